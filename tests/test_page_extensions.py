# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the book's own Sphinx extensions do to a page, and what tables and figures are made of."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pandas as pd
import pytest

from studies.pages import plots

sys.path.append(str(Path(__file__).resolve().parents[1] / "book/_extensions"))
TERMS = {"amax": ("term-amax", "The largest magnitude."), "block": ("term-block", "16 elements."),
         "calibrated amax": ("term-calibrated", "What a policy decides on.")}  # fmt: skip


def test_the_first_occurrence_of_a_term_leads_to_its_definition() -> None:
    terms = pytest.importorskip("terms")
    page = "<h1>Amax</h1><p>A <code>block</code> of blocks; its calibrated amax, an amax, blocks.</p>"
    found = terms.linked(page, TERMS, "cheat.html")
    links = re.findall(r'href="cheat.html#term-(\w+)"[^>]*>([^<]+)</a>', found)
    assert links == [("block", "blocks"), ("calibrated", "calibrated amax"), ("amax", "amax")]
    assert 'title="16 elements."' in found
    assert re.sub(r"</?a[^>]*>", "", found) == page


def test_the_answer_moves_under_the_title_and_describes_the_page() -> None:
    light = pytest.importorskip("light_pages")
    title = '<p class="admonition-title">Answer</p>'
    answer = f'<div class="admonition tip">{title}<p><strong>No.</strong> 1 dB.</p></div>'
    context = {"body": f"<h1>Why?</h1><details>code</details><div>{answer}</div>", "title": "Why?"}
    context["pathto"] = lambda path, _: f"../{path}"
    light.answer_first(None, "", "", context, None)
    assert context["body"] == f"<h1>Why?</h1>{answer}<details>code</details><div></div>"
    config = SimpleNamespace(html_title="Book", html_baseurl="https://x.org/")
    light.described(SimpleNamespace(config=config), "", "", context, None)
    assert '<meta name="description" content="No. 1 dB."/>' in context["metatags"]
    assert '<meta property="og:image" content="https://x.org/_static/card.png"/>' in context["metatags"]


def test_a_formula_stands_on_the_line_and_names_its_source() -> None:
    light = pytest.importorskip("light_pages")
    plain, deep = (light.formula(latex, inline=True) for latex in ("x", r"x_\mathrm{max}"))
    drop = [float(re.search(r"vertical-align:-([\d.]+)em", svg)[1]) for svg in (plain, deep)]  # type: ignore[index]
    assert drop[0] < 0.1 < drop[1] < 0.5
    assert 'aria-label="x"' in plain and "currentColor" in plain


def test_scripts_are_kept_once_and_icons_need_none() -> None:
    light = pytest.importorskip("light_pages")
    page = '<script>a</script>\n<script>a</script>\n<script src="b.js"></script>'
    assert light.without_repeats(page).count("<script>a") == 1
    assert light.ICON_SCRIPT.sub("", '<script defer src="../fontawesome.js?x=1"></script>') == ""


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is displayed."""
    displayed: list[str] = []
    monkeypatch.setattr(plots, "_display", lambda kind, text: displayed.append(text))
    return displayed


def test_a_table_has_one_header_row_and_rows_below_their_group(shown: list[str]) -> None:
    index = pd.MultiIndex.from_tuples([("m", "x"), ("m", "y"), ("n", "x")], names=["model", "site"])
    plots.table(pd.DataFrame({"loss_db": [1.5, -0.001, None]}, index=index), caption="c <b>d</b>")
    (html,) = shown
    assert re.findall(r"<th[^>]*>(.*?)</th>", html) == ["site", "loss (dB)", "m", "x", "y", "n", "x"]
    assert re.findall(r"<td>(.*?)</td>", html) == ["1.50", "0.00", "–"]
    assert '<div class="scrolls" tabindex="0" role="region" aria-label="Table: c d">' in html
    assert index.names == ["model", "site"]  # the page's own frame is left alone


def test_a_figure_is_text_within_a_region_and_never_shrinks_below_eight_pixels(shown: list[str]) -> None:
    matplotlib.use("Agg")
    plots.use_style()
    fig, ax = plots.plt.subplots(figsize=(7.2, 3))
    ax.text(0.5, 0.5, "pale", color="#E69F00", fontsize=8)
    ax.plot(range(1000), range(1000), "o")
    plots.show(fig, caption="c", alt='a "b"')
    (html,) = shown
    assert ">pale</text>" in html and "#e69f00; text" not in html.lower()
    assert 'aria-label="a &quot;b&quot;"' in html
    assert "min-width:518px" in html  # 691 px wide, of which 8 points are 10.67 px
    assert html.count("<use") < 100 and "data:image/png" in html  # a thousand markers are pixels
    assert not re.search(r'<g id="|<style|<metadata|font-family', html)


@pytest.mark.parametrize("color", ["#E69F00", "#56B4E9", "#999999", "yellow"])
def test_coloured_text_is_dark_enough_on_paper(color: str) -> None:
    def linear(v: float) -> float:
        return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, matplotlib.colors.to_rgb(plots.readable(color)))
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.5


def test_white_text_stays_white() -> None:
    assert plots.readable("white") == "#ffffff"
