# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Sphinx extension: on every page the first occurrence of a glossary term leads to its definition.

Also in what cells display, which Sphinx does not read.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx

GLOSSARY = "notebooks/cheat_sheet"
TAG = re.compile(r"(<[^>]+>)")
# Where a link would disturb: other links, names and formulas, headings, numbers.
CLOSED = {
    "a",
    "code",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "script",
    "style",
    "svg",
    "summary",
    "table",
    "button",
}


@cache
def definitions(app: Sphinx) -> dict[str, tuple[str, str]]:
    """Term in lower case: where its definition stands, and the definition."""
    if GLOSSARY not in app.env.found_docs:
        return {}
    found = {}
    for glossary in app.env.get_doctree(GLOSSARY).findall(addnodes.glossary):
        for item in glossary.children[0].children:
            *terms, meaning = item.children
            for term in terms:
                found[term.astext().lower()] = (term["ids"][0], " ".join(meaning.astext().split()))
    return found


def linked(body: str, terms: dict[str, tuple[str, str]], address: str) -> str:
    """The page's HTML with a link at the first occurrence of each term, also in the plural."""
    if not terms:
        return body
    names = "|".join(re.escape(t) for t in sorted(terms, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w/.-])({names})(s?)(?![\w/-])", re.IGNORECASE)
    left, closed, parts = set(terms), list[str](), []

    def link(match: re.Match[str]) -> str:
        term = match[1].lower()
        if term not in left:
            return match[0]
        place, meaning = terms[term]
        left.difference_update(t for t in terms if terms[t][0] == place or t == term)
        title = html.escape(meaning, quote=True)
        return f'<a class="term" href="{address}#{place}" title="{title}">{match[0]}</a>'

    for part in TAG.split(body):
        if part.startswith("<"):
            name = re.sub(r"\W.*", "", part.strip("</> "), flags=re.DOTALL).lower()
            if name in CLOSED and not part.endswith("/>"):
                closed = closed[:-1] if part.startswith("</") else [*closed, name]
            parts.append(part)
        else:
            parts.append(part if closed else pattern.sub(link, part))
    return "".join(parts)


def link_terms(app: Sphinx, page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    if "body" in context and page != GLOSSARY and page.startswith("notebooks/"):
        address = app.builder.get_relative_uri(page, GLOSSARY)
        context["body"] = linked(context["body"], definitions(app), address)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
