# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Every built page in a real browser: light and dark, wide and narrow, over http and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from built import HTML, built_pages

PAGES = built_pages() if HTML.is_dir() else ["(no page is built)"]
THEMES, WIDTHS = ("light", "dark"), {1280: 800, 390: 844}
PROBES = (Path(__file__).parent / "probes.js").read_text(encoding="utf-8").strip().rstrip(";")
PAGE_BYTES = 1.5e6  # everything a page fetches until it has loaded, unpacked
LOAD_SECONDS, BITS_PER_SECOND, ROUND_TRIP_MS = 5.0, 1.6e6, 150  # a slow 4G connection
BIBLIOGRAPHY = ("aria-deprecated-role", "aria-required-children")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]

every_page = pytest.mark.parametrize("name", PAGES)


class Visit:
    """A page in a context of its own, and all that went wrong while it was drawn."""

    def __init__(
        self, browser: Any, origin: str, name: str, theme: str = "light", width: int = 1280
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": WIDTHS[width]}, color_scheme=theme
        )
        self.origin, self.faults, self.responses = origin, list[str](), list[Any]()
        self.page = self.context.new_page()
        self.context.route("**/*", self._own_host_only)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"script error: {error}"))
        self.page.on("requestfailed", lambda r: self.faults.append(f"failed: {r.url} {r.failure}"))
        self.page.on("response", self._answered)
        self.address = origin + name

    def _own_host_only(self, route: Any) -> None:
        if route.request.url.startswith((self.origin, "data:", "blob:")):
            route.continue_()
        else:
            self.faults.append(f"asks another host: {route.request.url}")
            route.abort()

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console {message.type}: {message.text}")

    def _answered(self, response: Any) -> None:
        self.responses.append(response)
        if response.status >= 400:
            self.faults.append(f"{response.status}: {response.url}")

    def __enter__(self) -> Visit:
        self.page.goto(self.address, wait_until="load")
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def accessibility(page: Any) -> list[str]:
    """What axe finds against WCAG 2.1 AA; drawings have probes of their own."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # The roles of the bibliography's list are Sphinx's: one deprecated since, one around plain anchors.
    options = {"runOnly": {"type": "tag", "values": WCAG}, "resultTypes": ["violations"],
               "rules": {name: {"enabled": False} for name in BIBLIOGRAPHY},
               "preload": False}  # fmt: skip
    found = axe.run(page, context={"exclude": [["svg"]]}, options=options).response["violations"]
    nodes = [(rule["id"], node) for rule in found for node in rule["nodes"]]
    return [f"{rule}: {node['html'][:120]} {node['failureSummary'][:160]}" for rule, node in nodes]


def probed(page: Any) -> dict[str, list[str]]:
    """The probes that found something, and what."""
    return {kind: found for kind, found in page.evaluate(f"({PROBES})()").items() if found}


@every_page
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_a_page_can_be_read(browser: Any, origin: str, name: str, theme: str, width: int) -> None:
    with Visit(browser, origin, name, theme, width) as visit:
        assert visit.page.evaluate("document.documentElement.dataset.theme") == theme
        assert probed(visit.page) == {}
        assert visit.faults == []
        if (theme, width) == ("light", 1280):
            assert accessibility(visit.page) == []


@every_page
def test_a_page_opens_from_a_file(browser: Any, html: Path, name: str) -> None:
    with Visit(browser, html.as_uri() + "/", name) as visit:
        assert visit.page.title()
        assert visit.faults == []


@every_page
def test_a_page_is_light_and_says_what_it_is(browser: Any, origin: str, name: str) -> None:
    visit = Visit(browser, origin, name)
    link = visit.context.new_cdp_session(visit.page)
    link.send("Network.enable")
    link.send("Network.emulateNetworkConditions", {
        "offline": False, "latency": ROUND_TRIP_MS, "downloadThroughput": BITS_PER_SECOND / 8,
        "uploadThroughput": BITS_PER_SECOND / 8})  # fmt: skip
    with visit:
        fetched = {response.url: len(response.body()) for response in visit.responses}
        page = visit.page
        seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventStart / 1000")
        said = page.evaluate("""() => Object.fromEntries([...document.querySelectorAll("meta[content]")]
            .map(tag => [tag.getAttribute("property") || tag.name, tag.content]))""")
        icon = page.evaluate("document.querySelector('link[rel~=icon]').href")
        card = page.evaluate("address => new URL(address, location).href", said["og:image"])
        found = [page.request.get(address).status for address in (icon, card)]
    assert sum(fetched.values()) <= PAGE_BYTES, sorted(fetched.items(), key=lambda item: -item[1])[:8]
    assert seconds <= LOAD_SECONDS
    assert said["og:title"] and said["og:description"] == said["description"]
    assert 0 < len(said["description"]) <= 300
    assert found == [200, 200]


def test_arrow_keys_move_what_is_wider_than_a_phone(browser: Any, origin: str) -> None:
    with Visit(browser, origin, "notebooks/what_to_set.html", width=390) as visit:
        wide = "e => e.scrollWidth > e.clientWidth + 60"
        areas = [area for area in visit.page.locator(".scrolls").all() if area.evaluate(wide)]
        assert areas
        for area in areas:
            area.focus()
            visit.page.keyboard.press("ArrowRight")
            visit.page.wait_for_function(
                "e => e.scrollLeft > 0", arg=area.element_handle(), timeout=2000
            )


def test_the_search_finds_a_page(browser: Any, origin: str) -> None:
    with Visit(browser, origin, "search.html?q=headroom") as visit:
        visit.page.wait_for_selector("#search-results li a")
        assert visit.faults == []


WIDE = "<p style='width:2000px'>a</p>"
FAULTS = {
    "numbers out of sight": f"<article><table><tr><th>{WIDE}<td>1.00</table></article>",
    "figure text under 8 px": """<figure><svg viewBox="0 0 700 99" width="350">
        <text y="50" font-size="10">a</text></svg></figure>""",
    "pale text": "<p style='color:#222;background:#222'>unseen</p>",
    "pale figure text": "<figure><svg><text y='50' fill='#E69F00'>p99.9</text></svg></figure>",
    "scroll area that no key reaches": f"<article><div style='overflow-x:auto'>{WIDE}</div></article>",
    "output that is not shown": "<article><p class='cell_output' style='display:none'>a</p></article>",
    "wider than the window": WIDE,
    "icon without a drawing": "<i class='fa-solid fa-bars'>a</i>",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found(browser: Any, kind: str) -> None:
    """Each probe on a page that has its fault alone."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_content(
        f"<!doctype html><html lang='en'><body style='margin:0'>{FAULTS[kind]}</body></html>"
    )
    found = probed(page)
    page.close()
    assert kind in found
