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


def accessibility(page: Any, rules: dict[str, Any]) -> list[str]:
    """What axe finds against ``rules``; also text in the colour of its ground, where axe is unsure."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"runOnly": rules, "resultTypes": ["violations", "incomplete"], "preload": False}
    found = axe.run(page, context={"exclude": [["svg"]]}, options=options).response
    nodes = [(rule["id"], node) for rule in found["violations"] for node in rule["nodes"]]
    for rule in found["incomplete"]:
        for node in rule["nodes"]:
            data = [check["data"] for check in node["any"] if isinstance(check["data"], dict)]
            if any(d.get("messageKey") == "equalRatio" for d in data):
                nodes.append((rule["id"], node))
    return [f"{i}: {n['html'][:120]} {n.get('failureSummary', '')[:160]}" for i, n in nodes]


@every_page
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_a_page_can_be_read(browser: Any, origin: str, name: str, theme: str, width: int) -> None:
    with Visit(browser, origin, name, theme, width) as visit:
        assert visit.page.evaluate("document.documentElement.dataset.theme") == theme
        findings = {kind: found for kind, found in visit.page.evaluate(f"({PROBES})()").items() if found}
        rules = (
            {"type": "tag", "values": WCAG}
            if (theme, width) == ("light", 1280)
            else {"type": "rule", "values": ["color-contrast"]}
        )
        if axe := accessibility(visit.page, rules):
            findings["axe"] = axe
        if visit.faults:
            findings["while it was drawn"] = visit.faults
    assert findings == {}


@every_page
@pytest.mark.parametrize("theme", THEMES)
def test_a_page_opens_from_a_file(browser: Any, html: Path, name: str, theme: str) -> None:
    with Visit(browser, html.as_uri() + "/", name, theme) as visit:
        assert visit.page.title()
        assert visit.faults == []


@every_page
def test_a_page_is_light(browser: Any, origin: str, name: str) -> None:
    visit = Visit(browser, origin, name)
    link = visit.context.new_cdp_session(visit.page)
    link.send("Network.enable")
    link.send("Network.emulateNetworkConditions", {
        "offline": False, "latency": ROUND_TRIP_MS, "downloadThroughput": BITS_PER_SECOND / 8,
        "uploadThroughput": BITS_PER_SECOND / 8})  # fmt: skip
    with visit:
        fetched = {response.url: len(response.body()) for response in visit.responses}
        seconds = visit.page.evaluate(
            "performance.getEntriesByType('navigation')[0].loadEventStart / 1000"
        )
    assert sum(fetched.values()) <= PAGE_BYTES, sorted(fetched.items(), key=lambda item: -item[1])[:8]
    assert seconds <= LOAD_SECONDS


@every_page
def test_a_page_says_what_it_is(browser: Any, origin: str, name: str) -> None:
    with Visit(browser, origin, name) as visit:
        content = (
            "name => document.querySelector(`meta[name='${name}'], meta[property='${name}']`)?.content"
        )
        said = {
            tag: visit.page.evaluate(content, tag)
            for tag in ("description", "og:title", "og:description", "og:image")
        }
        assert all(said.values()), said
        assert len(said["description"]) <= 300
        icon = visit.page.evaluate("document.querySelector('link[rel~=icon]').href")
        card = visit.page.evaluate(
            "new URL(document.querySelector(`meta[property='og:image']`).content, location).href"
        )
        assert [visit.page.request.get(address).status for address in (icon, card)] == [200, 200]


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
    "numbers out of sight": "<article><table><tr><th width=1270>a<td>1.00</table></article>",
    "figure text under 8 px": """<figure><svg viewBox="0 0 700 99" width="350">
        <text y="50" font-size="10">a</text></svg></figure>""",
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
    found = page.evaluate(f"({PROBES})()")
    page.close()
    assert kind in [name for name, findings in found.items() if findings]


def test_text_in_the_colour_of_its_ground_is_found(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(
        "<p style='color:#222;background:#222'>unseen</p><p style='color:#999;background:#fff'>pale</p>"
    )
    found = accessibility(page, {"type": "rule", "values": ["color-contrast"]})
    page.close()
    assert len(found) == 2
