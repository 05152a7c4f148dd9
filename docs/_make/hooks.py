"""Lists public names, converts equations to MathML, and inlines SVG drawings for mkdocs."""

import html
import pathlib
import posixpath
import re

from latex2mathml.converter import convert

_SPAN = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_NAME = re.compile(r"^::: jaxprune\.(?:([a-z]+)\.)?(\w+)\n(?! +options)", re.MULTILINE)
_DRAWING = re.compile(r'<img alt="([^"]*)" src="([^":]*\.svg)" />')


def _names(config):
    """Returns a table of the pages of the API and the names that they document."""
    (pages,) = (entry["API"] for entry in config.nav if "API" in entry)
    rows = ["| page | names |", "|---|---|"]
    for entry in pages:
        if isinstance(entry, str):  # this page
            continue
        ((title, path),) = entry.items()
        owners = {}
        for module, name in _NAME.findall((pathlib.Path(config.docs_dir) / path).read_text()):
            owners.setdefault(f"`jp.{module}`: " if module else "", []).append(name)
        names = [
            owner + ", ".join(f"`{name}`" if owner else f"`jp.{name}`" for name in members)
            for owner, members in owners.items()
        ]
        rows.append(f"| [{title}]({posixpath.basename(path)}) | {'; '.join(names)} |")
    return "\n".join(rows)


def on_page_markdown(markdown, config, **_):
    """Puts the table of public names in place of its mark."""
    mark = "<!-- public names -->"
    return markdown.replace(mark, _names(config)) if mark in markdown else markdown


def _inline(alt, path):
    """Returns a drawing as an SVG element, which follows the color scheme of the page."""
    text = path.read_text()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    return re.sub(r"<style>:?.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def on_page_content(content, page, config, **_):
    """Rewrites the HTML of a page."""
    for pattern, display in ((_SPAN, "inline"), (_BLOCK, "block")):
        content = pattern.sub(
            lambda m, d=display: convert(html.unescape(m[1]).strip(), display=d), content
        )
    folder = posixpath.dirname(page.file.dest_uri)
    docs = pathlib.Path(config.docs_dir)
    return _DRAWING.sub(
        lambda m: _inline(m[1], docs / posixpath.normpath(posixpath.join(folder, m[2]))), content
    )
