"""Converts docstrings from reStructuredText with Google sections to Markdown."""

import re
import textwrap
import types

import griffe

import jaxprune


def _reference(name, owner):
    """Links a name to its entry in the API: a public function, or a member of its owner."""
    name = name.removeprefix("jaxprune.")
    if isinstance(getattr(jaxprune, name, None), types.ModuleType):  # the head of a page
        return f"`jaxprune.{name}`"
    if name.split(".")[0] in jaxprune.__all__:
        return f"[`{name}`][jaxprune.{name}]"
    while owner is not None:
        if name in owner.members:
            return f"[`{name}`][{owner.path}.{name}]"
        owner = owner.parent
    return f"`{name}`"


def _markdown(text, owner):
    def equation(match):
        body, indent = match["body"] or match["line"], match["indent"]
        body = " ".join(textwrap.dedent(body).split())
        return f"{indent}$$\n{indent}{body}\n{indent}$$\n"

    text = re.sub(
        r"(?m)^(?P<indent> *)\.\. math::[ ]*"
        r"(?:(?P<line>\S.*(?:\n\1 +\S.*)*)\n?|\n\n?(?P<body>(?:\1 +.*\n?)+))",
        equation,
        text,
    )
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    roles = r":(?:func|class|mod|meth|data):`([^`]*)`"
    text = re.sub(roles, lambda m: _reference(m[1], owner), text)
    text = re.sub(r"`([^`<]+?)\s+<(https?://[^>]+)>`_", lambda m: f"[{m[1]}]({m[2]})", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"(?m)(?<=[^:]):: *$", ":", text)
    # griffe takes words before a colon for a type.
    text = re.sub(r"(Returns:\n +[^\n:`]+ [^\n:`]+):", r"\1&#58;", text)
    text = re.sub(r"(?m)^>>> .*\n?(?:.+\n?)*", lambda m: f"```pycon\n{m[0].strip()}\n```\n", text)
    text, heading, works = text.partition("References:\n")
    works = ["- " + " ".join(work.split()) for work in works.split("\n\n")]
    return text + ("**References:**\n\n" + "\n".join(works) if heading else "")


class Docstrings(griffe.Extension):
    """Rewrites docstrings before mkdocstrings parses them."""

    def on_package(self, *, pkg, **_):
        """Rewrites the docstrings of all objects of a package."""
        objects = [pkg]
        while objects:
            obj = objects.pop()
            if obj.docstring:
                obj.docstring.value = _markdown(obj.docstring.value, obj)
            objects += [member for member in obj.members.values() if not member.is_alias]
