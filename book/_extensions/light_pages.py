# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Sphinx extension: pages that travel light.

Formulas are drawn at build time, and scripts that no page needs are left out.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ziamath
from docutils import nodes
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.application import Sphinx

SIZE = 20  # of the drawn formula; its height and place are given to the page in em
# The theme's icons come from its style sheet and web font; its script (1.5 MB) would draw them again.
ICON_SCRIPT = re.compile(r'\s*<script defer src="[^"]*fontawesome\.js[^"]*"></script>')
INLINE_SCRIPT = re.compile(r"\s*<script>[^<]+</script>")
SEARCH_SCRIPT = re.compile(
    r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>'
)

ANSWER = re.compile(
    r'<div class="admonition tip">\s*<p class="admonition-title">[^<]*</p>(.*?)</div>', re.DOTALL
)
TITLE_TWICE = re.compile(r"<title>(.+?) &#8212; \1</title>")  # the first page's is the book's
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
CARD = "_static/card.png"  # written by python -m studies.pages.index
DESCRIPTION = 250  # characters


def formula(latex: str, *, inline: bool) -> str:
    """A formula as inline SVG in the text's colour, on its baseline; the source is its label."""
    drawn = ziamath.Latex(latex.strip(), size=SIZE, inline=inline, color="currentColor").svgxml()
    _, top, width, height = (float(v) / SIZE for v in drawn.get("viewBox").split())
    drawn.attrib.pop("width"), drawn.attrib.pop("height")
    drawn.set(
        "style", f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-(top + height):.3f}em"
    )
    drawn.set("role", "img")
    drawn.set("aria-label", latex.strip())
    return ElementTree.tostring(drawn, encoding="unicode")


def draw_inline(translator: Any, node: Any) -> None:
    translator.body.append(f'<span class="math">{formula(node.astext(), inline=True)}</span>')
    raise nodes.SkipNode


def draw_block(translator: Any, node: Any) -> None:
    label = html.escape(node.astext().strip(), quote=True)
    drawn = formula(node.astext(), inline=False)
    translator.body.append(
        f'<div class="math" tabindex="0" role="region" aria-label="Formula {label}">{drawn}</div>'
    )
    raise nodes.SkipNode


def without_repeats(text: str) -> str:
    """Drop inline scripts that a page holds already: some extensions add theirs twice."""
    seen: set[str] = set()

    def keep(match: re.Match[str]) -> str:
        script = match[0].strip()
        if script in seen:
            return ""
        seen.add(script)
        return match[0]

    return INLINE_SCRIPT.sub(keep, text)


def answer_first(app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Put the answer box under the title, before the folded code that computes it."""
    body = context.get("body", "")
    if (box := ANSWER.search(body)) and "</h1>" in body:
        title, rest = body.replace(box[0], "", 1).split("</h1>", 1)
        context["body"] = f"{title}</h1>{box[0]}{rest}"


def described(app: Sphinx, _page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Tell readers who have only a link what the page says: its answer, else its first paragraph."""
    said = ANSWER.search(context.get("body", "")) or PARAGRAPH.search(context.get("body", ""))
    text = plain(said[1]) if said else app.config.html_title
    text = text if len(text) <= DESCRIPTION else text[:DESCRIPTION].rsplit(" ", 1)[0] + " …"
    base = app.config.html_baseurl
    card = base + CARD if base else context["pathto"](CARD, 1)
    tags = {"property": {"og:type": "article", "og:site_name": app.config.html_title,
                         "og:title": plain(context.get("title", "")) or app.config.html_title,
                         "og:description": text, "og:image": card,
                         "og:image:alt": "KL divergence against the scale, three models"},
            "name": {"description": text, "twitter:card": "summary_large_image"}}  # fmt: skip
    context["metatags"] = context.get("metatags", "") + "".join(
        f'<meta {kind}="{name}" content="{html.escape(value, quote=True)}"/>\n'
        for kind, named in tags.items() for name, value in named.items()
    )  # fmt: skip


def plain(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


def few_icons(static: Path, pages: list[str]) -> None:
    """Cut the theme's icon font (156 kB) down to the icons that the pages and admonitions show."""
    sheet = static / "styles/pydata-sphinx-theme.css"
    css = sheet.read_text(encoding="utf-8")
    names = {name for page in pages for name in re.findall(r"\bfa-([a-z-]+)", page)}
    shown = {ord(icon) for icon in re.findall(r'--pst-icon-[\w-]+:"(.)"', css)}
    for name in names:
        codes = re.findall(rf'\.fa-{name}:before[^{{}}]*\{{content:"\\([0-9a-f]+)"', css)
        shown |= {int(code, 16) for code in codes}
    fonts = static / "vendor/fontawesome/webfonts"
    font = TTFont(fonts / "fa-solid-900.ttf")
    cut = subset.Subsetter()
    cut.populate(unicodes=shown)
    cut.subset(font)
    font.flavor = "woff"
    font.save(fonts / "icons.woff")
    whole = 'fa-solid-900.woff2) format("woff2")'
    sheet.write_text(css.replace(whole, 'icons.woff) format("woff")'), encoding="utf-8")


def lighten(app: Sphinx, error: Exception | None) -> None:
    """Rewrite every page that was built."""
    if error or app.builder.format != "html":
        return
    written = []
    for path in Path(app.outdir).rglob("*.html"):
        text = TITLE_TWICE.sub(r"<title>\1</title>", path.read_text(encoding="utf-8"))
        text = without_repeats(ICON_SCRIPT.sub("", text))
        if path.name != "search.html":
            text = SEARCH_SCRIPT.sub("", text)
        path.write_text(text, encoding="utf-8")
        written.append(text)
    few_icons(Path(app.outdir) / "_static", written)


def setup(app: Sphinx) -> dict[str, bool]:
    ziamath.config.svg2 = False  # glyphs as paths in place: no ids to collide on a page
    ziamath.config.precision = 1
    app.add_html_math_renderer("drawn", (draw_inline, None), (draw_block, None))
    app.connect("html-page-context", answer_first)
    app.connect("html-page-context", described)
    app.connect("build-finished", lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
