"""Converts equations to MathML, and inlines SVG drawings, while mkdocs builds the site."""

import html
import pathlib
import posixpath
import re

from latex2mathml.converter import convert

_SPAN = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_DRAWING = re.compile(r'<img alt="([^"]*)" src="([^":]*\.svg)" />')


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
