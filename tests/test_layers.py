"""The rooms of the package: who imports whom, how long a file is, what an import costs."""

import ast
import pathlib
import re
import statistics

from helpers import python

import jaxprune

ROOT = pathlib.Path(jaxprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
GROUND = set("_tree _mesh _sums _table _progress _atomic _fingerprint".split())
# File or room, and what it may import besides the ground floor and itself. An import inside a
# function counts: it only hides a cycle. One under TYPE_CHECKING does not: it never runs.
RULES = {
    "_threshold": "",
    "_partition": "_threshold",
    "_ranks": "",
    "patterns": "_threshold",
    "masks": "_files",
    "_select": "_partition _program _threshold _ranks patterns masks",
    "schedules": "_select",
    "_loss": "_program",
    "scores": "_loss _program masks",
    "_program": "",
    "_calibrate": "_program",
    "layerwise": "_calibrate _select patterns",
    "_resume": "",
    "_reconstruct": "_calibrate layerwise _program _resume _select patterns",
    "units": "_program _ranks _loss",
    "_grouping": "_program",
    "groups": "_grouping _program _select _ranks units",
    "search": "_program _select _ranks _loss masks groups units",
    "_plan": "_program",
    "_shrink": "_program _plan _ranks masks groups",
    "optimizer": "_select masks scores groups",
    "regularizers": "_select masks scores groups optimizer",
    "movement": "_select masks scores groups",
    "gates": "_select masks scores groups",
    "_dead": "_program _select masks",
    "recipes": "_select masks scores groups _dead",
    "_files": "_select _threshold",
    "_files.command_line": "_select metrics",
    "__main__": "_files.command_line",
    "metrics": "_program groups",
    "nnx": "_shrink",
    "curves": "_loss _select masks scores groups metrics optimizer recipes _shrink",
    "plot": "curves groups metrics",
    "_report": "curves groups metrics plot _plan",
}


def spell(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {spell(path) for path in FILES}


def imported(path):
    """Lists the modules of the package that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    blocks = [n for n in blocks if ast.unparse(n.test) == "TYPE_CHECKING"]
    typing = {node for block in blocks for node in ast.walk(block)}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in typing:
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node not in typing:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    names = [n.removeprefix("jaxprune.") for n in names if n.startswith("jaxprune.")]
    return [n if n in MODULES else n.rpartition(".")[0] for n in names]


def broken(path):
    """Lists the imports of a file that break a rule, each with the rule."""
    module = spell(path)
    room = module.split(".")[0]
    rule = module if module in RULES else room
    if room not in GROUND and rule not in RULES:
        yield f"{path}: has no rule; say in RULES of {__file__} what {module} may import."
        return
    allowed = GROUND | {room} | set(RULES.get(rule, "").split())
    for name in imported(path):
        if name not in allowed and name.split(".")[0] not in allowed:
            yield f"{path}: imports {name}, but {rule} may import only {sorted(allowed)}."
        elif name.startswith(("_program.", "_files.")) and room != name.split(".")[0]:
            if name not in allowed:
                yield f"{path}: imports {name}; outside of a private room, import only its door."


def test_rooms_import_only_what_they_may():
    assert set(RULES) <= MODULES, set(RULES) - MODULES
    problems = [p for path in FILES if path != ROOT / "__init__.py" for p in broken(path)]
    assert not problems, "\n".join(problems)


def test_one_file_touches_the_internals_of_jax():
    # The modules of JAX for extensions, how equations are run, and what they are made of.
    internals = (
        r"\bjax(\.| import )(_src|extend|interpreters|custom_derivatives)\b|get_bind_params|"
        r"\bmake_jaxpr\b"
    )
    modules = {spell(path) for path in FILES if re.search(internals, path.read_text())}
    assert modules == {"_program.jaxpr"}
    modules = {spell(path) for path in FILES if re.search(r"\.eqns?\b", path.read_text())}
    assert {module.split(".")[0] for module in modules} == {"_program"}


def test_files_are_short():
    lengths = {spell(path): len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 450, {m: n for m, n in lengths.items() if n > 450}
    assert statistics.median(lengths.values()) <= 160


def test_import_is_light():
    code = """
import sys, jaxprune
heavy = "matplotlib tqdm flax.nnx orbax.checkpoint jaxprune.curves jaxprune.groups jaxprune.plot"
print(set(heavy.split()) & sys.modules.keys())
assert set(jaxprune.__all__) <= set(dir(jaxprune))
"""
    assert python("-c", code).strip() == "set()"
