# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The built pages, where `make book` has built them: links arrive, nothing comes from another host."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build/book/.built"
HTML = ROOT / "build/book/_build/html"
# What a browser fetches while it draws a page; of <link>, not canonical or the next page.
LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "object": "data",
    "link": "href",
}
FETCHED_LINKS = {"stylesheet", "preload", "icon", "modulepreload", "preconnect", "dns-prefetch"}
NEVER_CLOSED = {"br", "hr", "img", "input", "link", "meta", "wbr"}
UNREAD = {"script", "style", "pre", "code"}


class Page(HTMLParser):
    """Links, fetched addresses, ids and readable text (without code and formulas) of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self._unread: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        fetched = tag != "link" or not FETCHED_LINKS.isdisjoint(values.get("rel", "").split())
        if fetched and LOADED.get(tag) in values:
            self.fetched.append(values[LOADED[tag]])
        unread = self._unread or tag in UNREAD or "math" in values.get("class", "").split()
        if unread and tag not in NEVER_CLOSED:
            self._unread.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._unread and self._unread[-1] == tag:
            self._unread.pop()

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self.text.append(data)


@cache
def page(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module")
def pages() -> list[Path]:
    if not BUILT.exists():
        pytest.skip("the pages are not built: run `make book`")
    sources = [ROOT / "_config.yml", ROOT / "_toc.yml"]
    sources += [path for name in ("notebooks", "book") for path in (ROOT / name).rglob("*.*")]
    newer = [path.name for path in sources if path.stat().st_mtime > BUILT.stat().st_mtime]
    if newer:
        pytest.skip(f"the pages are older than {', '.join(newer)}: run `make book`")
    found = [path for path in HTML.rglob("*.html") if "_static" not in path.parts]
    assert len(found) > len(list((ROOT / "notebooks").glob("*.ipynb")))
    return found


def broken(path: Path, address: str) -> bool:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return True
    named = parts.fragment and target.suffix == ".html"
    return bool(named) and unquote(parts.fragment) not in page(target).ids


def test_every_link_between_pages_arrives(pages: list[Path]) -> None:
    found = {(p.name, link) for p in pages for link in page(p).links if broken(p, link)}
    assert sorted(found) == []


def test_every_file_a_page_fetches_is_there(pages: list[Path]) -> None:
    found = {(p.name, address) for p in pages for address in page(p).fetched if broken(p, address)}
    assert sorted(found) == []


def test_no_page_fetches_from_another_host(pages: list[Path]) -> None:
    found = {(p.name, a) for p in pages for a in page(p).fetched if re.match(r"(https?:)?//", a)}
    assert sorted(found) == []


def test_no_formula_is_shown_as_source(pages: list[Path]) -> None:
    found = [
        (p.name, m[0]) for p in pages for m in re.finditer(r"\$[^$\n]{1,80}\$", "".join(page(p).text))
    ]
    assert found == []


def test_a_broken_page_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text(
        '<p id="here">costs $B_{min}$ <code>$no$</code></p>', encoding="utf-8"
    )
    path = tmp_path / "a.html"
    path.write_text(
        '<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.ipynb">3</a><a href="https://x.org">4</a>'
        '<link rel="canonical" href="https://x.org"><script src="https://x.org/a.js"></script>',
        encoding="utf-8",
    )
    assert [link for link in page(path).links if broken(path, link)] == ["b.html#gone", "c.ipynb"]
    assert page(path).fetched == ["https://x.org/a.js"]
    assert re.findall(r"\$[^$]+\$", "".join(page(tmp_path / "b.html").text)) == ["$B_{min}$"]
