# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the moving elements show equals what Python computes; keyboard, address, print, no script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

from nvfp4_utils import fake_quantize, input_scale_from_amax, policies
from nvfp4_utils.quantize import fake_quantize_reference
from studies.pages import format as format_page
from studies.pages import index, interactive, regimes, snr_tables
from studies.runs.store import Run

ROOT = Path(__file__).resolve().parents[2]
STATIC = '<figure><img alt="static" width="300" height="200"><figcaption>Found.</figcaption></figure>'
BLOCK = torch.tensor([0.02, -0.11, 0.35, -0.6, 0.9, 1.3, -1.7, 2.2, 0.05, -0.4, 0.7, -1.05, 0.22, 3.1,
                      -0.8, 0.5]).bfloat16()  # fmt: skip
PASTE = """text => {
  const clipboardData = new DataTransfer();
  clipboardData.setData("text", text);
  const event = new ClipboardEvent("paste", { clipboardData });
  document.querySelector("input[type=text]").dispatchEvent(event);
}"""
SHOWN = 0.0056  # dB: half of the last digit shown, and of the last one stored


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def case(run: Run) -> interactive.Case:
    return interactive.Case(run, "layers.6.o_proj_input", run.mixes[2], run.mixes[3])


@pytest.fixture(scope="module")
def cross(run: Run):
    return snr_tables.cross_matrix(run)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory, run: Run, case, cross) -> Path:
    """A page with each element, laid out and reached as in the built book: from a file."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book" / "_static", folder / "_static")
    interactive.write(folder / "_static" / "curves", [run])
    elements = {
        "scale": interactive.scale_settings([run], case),
        "calculator": index.block_numbers(case),
        "block": format_page.block_settings(BLOCK, 10.0),
        "sizes": interactive.sizes_settings(run, run.featured_mix, "flush", run.sites[0]),
        "cross": interactive.cross_settings(run, cross, "amax", "flush"),
    }
    links = "".join(
        f'<script src="../_static/{p.name}"></script>' for p in (folder / "_static").glob("*.js")
    )
    links += '<link rel="stylesheet" href="../_static/moving.css"><meta charset="utf-8">'
    (folder / "notebooks").mkdir()
    for name, settings in elements.items():
        html = interactive.element(name, settings, STATIC, keep=name == "sizes")
        head = f"<!doctype html><html lang='en'><head><title>{name}</title>{links}</head>"
        (folder / "notebooks" / f"{name}.html").write_text(f"{head}<body>{html}</body></html>")
    return folder


@pytest.fixture
def open_page(browser, book: Path):
    """Opens an element's page at a state; nothing may be logged, fail or come from elsewhere."""
    contexts, trouble = [], []

    def opened(name: str, *, width: int = 1280, script: bool = True, **state):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and trouble.append(m.text))
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("request", lambda r: r.url.startswith("file://") or trouble.append(r.url))
        query = f"#{name}?{urlencode(state)}" if state else ""
        page.goto(f"file://{book}/notebooks/{name}.html{query}")
        if script:
            page.wait_for_selector(".moving-on")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def shown(page, name: str) -> str:
    return page.locator(f'[data-name="{name}"] dd').inner_text()


def number(text: str) -> float:
    return float(text.split()[0])


@pytest.mark.parametrize("underflow", ["flush", "floor"])
@pytest.mark.parametrize(
    "site", ["layers.0.mlp_input", "layers.6.o_proj_input", "layers.7.down_proj_input"]
)
def test_the_curve_is_what_python_reads(open_page, run, site, underflow) -> None:
    mix = run.mixes[1]
    test = run.marginals(mix, site, "test")
    state = {"site": site, "calibration": mix, "test": mix, "underflow": underflow}
    page = open_page("scale", **state)
    best = regimes.policies_at(run, mix, site, underflow).set_index("policy").snr_db["oracle"]
    for octaves in (-6, -1.5, -0.125, 0, 0.5, 3, 12, 15.625, 19):
        page.evaluate("hash => location.hash = hash", f"scale?{urlencode(state | {'at': octaves})}")
        amax = test.amax * 2.0**octaves
        page.wait_for_function(
            "text => document.querySelector('[data-name=\"input_scale\"] dd').innerText === text",
            arg=page.evaluate("v => moving.short(v, 4)", input_scale_from_amax(amax)),
        )
        snr = float(snr_tables.curve_snr(run, mix, site, underflow, [amax])[0])
        assert number(shown(page, "SNR")) == pytest.approx(snr, abs=SHOWN)
        assert number(shown(page, "loss from the best")) == pytest.approx(best - snr, abs=SHOWN + 0.0005)
        shares = regimes.block_regimes(test, amax)
        last = "flushed" if underflow == "flush" else "floored"
        for label, regime in (
            ("saturated", "saturated"),
            ("subnormal", "subnormal"),
            (last, "underflow"),
        ):
            assert number(shown(page, label)) == pytest.approx(100 * shares[regime], rel=6e-3, abs=1e-9)


@pytest.mark.parametrize("underflow", ["flush", "floor"])
def test_every_policy_lands_where_python_has_it(open_page, run, case, underflow) -> None:
    table = snr_tables.policy_snr(run, case.test, underflow, case.calibration)
    table = table[(table.site == case.site) & ~table.policy.isin(snr_tables.NOT_ONE_SCALE)]
    page = open_page("scale", underflow=underflow)
    assert page.locator("button[data-policy]").count() == len(table)
    for row in table.itertuples():
        page.locator(f'button[data-policy="{row.policy}"]').click()
        assert number(shown(page, "SNR")) == pytest.approx(row.snr_db, abs=SHOWN)
        assert number(shown(page, "loss from the best")) == pytest.approx(row.gap_db, abs=SHOWN + 0.0005)
        scale = input_scale_from_amax(row.calibrated_amax)
        assert float(shown(page, "input_scale")) == pytest.approx(scale, rel=6e-4)
        assert f"at={row.policy}" in page.url


def test_policies_have_the_colours_and_markers_of_the_figures(open_page) -> None:
    from studies.pages import plots

    page = open_page("scale")
    for name, style in plots.POLICY_STYLE.items():
        mark = page.locator(f'button[data-policy="{name}"] path')
        if mark.count():
            assert mark.get_attribute("fill") == style.color
    paths = interactive.policy_marks()
    assert paths["headroom"]["path"] == "M-1.000,1.000L1.000,1.000L1.000,-1.000L-1.000,-1.000Z"
    assert paths["p99"]["path"].startswith(
        "M-0.000,1.000L1.000,-1.000L"
    )  # points down, as y grows downwards


def test_the_yardstick_is_shown_where_it_is_stored_and_nowhere_made_up(open_page, run, case) -> None:
    mix, site = run.featured_mix, run.featured[0]
    metrics = run.metrics(mix).astype({"site": str, "policy": str, "calibration": str, "underflow": str})
    metrics = metrics[metrics.site == site]
    row = metrics[(metrics.policy == "p99.99") & (metrics.calibration == mix)].iloc[0]
    loss = max(metrics.snr_db.max() - row.snr_db, metrics.block_snr_db.max() - row.block_snr_db)
    page = open_page("scale", site=site, test=mix, calibration=mix, at="p99.99")
    assert number(shown(page, "yardstick")) == pytest.approx(loss, abs=SHOWN)
    page = open_page("scale", site=site, test=mix, calibration=mix, at="3.125")
    assert shown(page, "yardstick").count(" dB at ") == 2
    assert shown(open_page("scale"), "yardstick") == "not stored for this text"


def test_arrow_keys_home_and_end_move_the_scale_and_the_address_keeps_it(open_page, run) -> None:
    page = open_page("scale", at="0", site="layers.3.mlp_input")
    slider = page.locator("input[type=range]")
    slider.focus()
    steps = {"ArrowRight": "0.125", "ArrowLeft": "0", "ArrowDown": "-0.125", "Home": "-6", "End": "19"}
    for key, octaves in steps.items():
        page.keyboard.press(key)
        assert page.url.endswith(f"at={octaves}")
    assert slider.get_attribute("aria-valuetext").startswith("input_scale ")
    page.wait_for_function("document.querySelector('[aria-live]').textContent.includes('0.00 dB, ')")
    page.reload()
    page.wait_for_selector(".moving-on")
    assert page.locator("select").nth(1).input_value() == "layers.3.mlp_input"
    assert page.locator("input[type=range]").input_value() == "152"


def test_a_picked_site_is_in_the_address_and_keeps_the_focus(open_page) -> None:
    page = open_page("scale")
    page.locator("select").nth(1).focus()
    page.locator("select").nth(1).select_option("layers.2.mlp_input")
    page.wait_for_function("location.hash.includes('site=layers.2.mlp_input')")
    assert page.evaluate("document.activeElement.value") == "layers.2.mlp_input"


def test_dragging_the_plot_moves_the_scale(open_page) -> None:
    page = open_page("scale", width=390)
    box = page.locator(".moving-plot").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 378, box["y"] + 100)
    page.mouse.up()
    assert page.url.endswith("at=19")


def test_a_state_that_does_not_exist_is_mended(open_page, run) -> None:
    page = open_page(
        "scale", model="none", site="layers.99.x", test="no-mix", at="nowhere", underflow="drop"
    )
    assert page.locator("select").nth(0).input_value() == run.name
    assert number(shown(page, "SNR")) > 0


@pytest.mark.parametrize("name", ["scale", "calculator", "block", "sizes", "cross"])
def test_print_and_no_script_have_the_static_figure(open_page, name) -> None:
    page = open_page(name, script=False)
    assert page.locator("img").is_visible() and page.locator("figcaption").is_visible()
    assert page.locator(".moving-live").count() == 0
    page = open_page(name)
    assert page.locator(".moving-live").is_visible() and page.locator("figcaption").is_visible()
    assert page.locator("img").is_visible() == (name == "sizes")
    page.emulate_media(media="print")
    assert page.locator("img").is_visible() and not page.locator(".moving-live").is_visible()


@pytest.mark.parametrize("name", ["scale", "calculator", "block", "sizes", "cross"])
def test_no_element_is_wider_than_a_phone(open_page, name) -> None:
    page = open_page(name, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_its_numbers_an_element_stays_static(browser, book: Path, tmp_path: Path) -> None:
    shutil.copytree(book, tmp_path / "book")
    shutil.rmtree(tmp_path / "book" / "_static" / "curves")
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda m: said.append(m.text))
    page.goto(f"file://{tmp_path}/book/notebooks/scale.html")
    page.wait_for_timeout(500)
    assert page.locator("img").is_visible() and page.locator(".moving-live").count() == 0
    assert any("scale: the figure stays static. cannot load" in text for text in said)
    page.close()


def blocks() -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of every kind and a scale for each, some on E4M3 and E2M1 ties: [n, 16], [n, 1]."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 16, generator=made) * 2.0 ** torch.randint(-20, 20, (6000, 1), generator=made)
    x[::3] = x[::3].bfloat16().float()
    x[1::3] *= torch.rand(2000, 16, generator=made) < 0.4
    x[:40] = 0.0
    x[20:40] = -0.0
    x[40:1040] = torch.randint(-28, 29, (1000, 16), generator=made) / 4.0  # many on E2M1's midpoints
    amax = x.abs().amax(1, keepdim=True).clamp(min=1e-3)
    octaves = torch.rand(6000, 1, generator=made) * 30 - 5
    g = amax * 2.0**octaves / 2688
    s = (
        torch.randint(1, 512, (2000, 1), generator=made)
        / 2.0
        * 2.0 ** -torch.randint(1, 12, (2000, 1), generator=made)
    )
    g[4000:] = amax[4000:] / (6 * s)
    g[40:1040] = 2.0 ** torch.randint(-12, -2, (1000, 1), generator=made)
    return x, g


@pytest.mark.parametrize("underflow", ["flush", "floor"])
def test_the_quantizer_of_the_format_page_is_bit_equal(open_page, underflow) -> None:
    x, g = blocks()
    expected = fake_quantize_reference(x, g, underflow, torch.float32).numpy()
    one = fake_quantize(x[4321:4322], g[4321].item(), underflow=underflow)
    assert np.array_equal(one.numpy()[0].view(np.uint32), expected[4321].view(np.uint32))
    page = open_page("block")
    found = page.evaluate(
        "([x, g, underflow]) => x.map((block, i) => moving.quantizeBlock(block, g[i], underflow).y)",
        [x.tolist(), g[:, 0].tolist(), underflow],
    )
    found = np.array(found, dtype=np.float32)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert 0.05 < (expected == 0).mean() < 0.9 and len(np.unique(expected)) > 10_000


def test_codes_are_those_of_the_formats(open_page) -> None:
    page = open_page("block")
    e4m3 = torch.arange(0, 127, dtype=torch.uint8)
    values = e4m3.view(torch.float8_e4m3fn).float().tolist()
    found = page.evaluate("values => values.map(v => moving.e4m3Bits(v).join(''))", values)
    assert found == [f"{code:08b}" for code in e4m3.tolist()]
    found = page.evaluate(
        "moving.e2m1Bits && [0, 0.5, 1, 1.5, 2, 3, 4, 6].map(v => moving.e2m1Bits(v, true).join(''))"
    )
    assert found == [f"1{code:03b}" for code in range(8)]


def test_the_block_follows_its_slider(open_page) -> None:
    page = open_page("block")
    numbers, rows = regimes.worked_block(BLOCK, 10.0)
    cells = [float(t) for t in page.locator("tbody tr td:nth-child(5)").all_inner_texts()]
    assert cells == rows.q.tolist()
    assert f"{numbers['s8']:g}" in page.locator(".moving-caption").inner_text()
    page.locator("input[type=range]").focus()
    page.keyboard.press("End")
    assert "flushed to zero" in page.locator(".moving-caption").inner_text()
    page.locator("select").select_option("floor")
    assert "held at 2^-9" in page.locator(".moving-caption").inner_text()
    assert page.url.endswith("#block?octaves=20&underflow=floor")
    page.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert "saturated" in page.locator(".moving-caption").inner_text()


@pytest.mark.parametrize("site", ["layers.0.attention_input", "layers.6.o_proj_input"])
def test_a_subset_s_amax_has_the_exact_law(open_page, run, site) -> None:
    table = snr_tables.size_curve(run, run.featured_mix, site)
    page = open_page("sizes", site=site)
    for row in table.itertuples():
        page.evaluate("hash => location.hash = hash", f"sizes?{urlencode({'site': site, 'n': row.n})}")
        page.wait_for_function(
            "n => document.querySelector('[data-name=\"sequences\"] dd').innerText.startsWith(n + ' ')",
            arg=str(row.n),
        )
        assert float(shown(page, "amax, median")) == pytest.approx(row.amax, rel=6e-4)
        low, high = shown(page, "amax, 5 to 95 %").split(" to ")
        assert [float(low), float(high)] == pytest.approx([row.amax_low, row.amax_high], rel=6e-4)
        assert number(shown(page, "SNR, mean")) == pytest.approx(row.snr_db, abs=SHOWN)
        low, high = shown(page, "SNR, 5 to 95 %").removesuffix(" dB").split(" to ")
        assert [float(low), float(high)] == pytest.approx([row.snr_low, row.snr_high], abs=SHOWN)


def test_ties_share_the_weight_of_the_law(open_page) -> None:
    values = np.array([1.0, 1, 2, 3, 3, 3, 7])
    _, counts = np.unique(values, return_counts=True)
    page = open_page("sizes")
    for n in range(1, 8):
        _, weights = snr_tables.subset_maximum(values, n)
        expected = [weights[np.sort(values) == v].sum() for v in np.unique(values)]
        found = page.evaluate("([counts, n]) => moving.subsetMaximum(counts, n)", [counts.tolist(), n])
        assert found == pytest.approx(expected, abs=1e-12)


def test_cells_of_the_heat_map_open_into_their_sites(open_page, run, cross) -> None:
    calibration, test = run.mixes[2], run.mixes[3]
    rows = cross[(cross.calibration == calibration) & (cross.test == test)].sort_values("loss_db")
    page = open_page("cross", calibration=calibration, test=test)
    cell = page.locator("button[aria-pressed=true]")
    assert cell.inner_text() == f"{rows.loss_db.mean():.3f}\n({rows.loss_db.max():.2f})"
    links = page.locator(".moving-list tbody a")
    assert links.count() == len(run.sites) and links.first.inner_text() == rows.site.iloc[-1]
    top = page.locator(".moving-list tbody tr").first.locator("td").all_inner_texts()
    assert top == [
        f"{rows.loss_db.iloc[-1]:.3f}",
        f"{rows.low.iloc[-1]:.3f} to {rows.high.iloc[-1]:.3f}",
    ]
    assert links.first.get_attribute("href") == "explore.html#scale?" + urlencode({
        "model": run.name, "site": rows.site.iloc[-1], "calibration": calibration, "test": test,
        "underflow": "flush", "at": "amax"})  # fmt: skip
    cell.focus()
    page.keyboard.press("ArrowLeft")
    assert page.url.endswith(urlencode({"calibration": calibration, "test": run.mixes[2]}))
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    assert page.url.endswith(urlencode({"calibration": run.mixes[1], "test": run.mixes[3]}))


def test_the_calculator_agrees_with_python_and_with_headroom(open_page, run, case) -> None:
    page = open_page("calculator")
    for site in run.sites[:8]:
        of = interactive.Case(run, site, run.featured_mix, run.featured_mix)
        numbers, statistics = index.block_numbers(of), run.marginals(run.featured_mix, site)
        table = index.calculator(**numbers)
        found = page.evaluate("numbers => moving.calculate(numbers).rows", numbers)
        assert [r["name"] for r in found] == list(table.columns)
        for row in found:
            keys = ("calibrated", "scale", "reciprocal", "above", "below")
            assert [row[k] for k in keys] == pytest.approx(
                table[row["name"]].tolist(), rel=1e-12, abs=1e-12
            )
        assert found[2]["calibrated"] == policies.headroom(statistics)
        assert found[0]["scale"] == input_scale_from_amax(policies.amax(statistics))


def test_the_calculator_takes_pasted_numbers_reports_and_says_what_is_wrong(open_page, tmp_path) -> None:
    page = open_page("calculator")
    fields = page.locator("input[type=text]")
    page.evaluate(PASTE, "0.5\t2e1, 25.5")
    assert [fields.nth(i).input_value() for i in range(3)] == ["0.5", "2e1", "25.5"]
    assert page.url.endswith("#calculator?p1=0.5&p9999=2e1&amax=25.5")
    page.wait_for_function(
        "document.querySelector('[aria-live]').textContent.startsWith('Room of 9.1 octaves')"
    )
    fields.nth(2).fill("1")
    page.wait_for_function(
        "document.querySelector('[aria-live]').textContent.startsWith('Expected p1 ≤ p99.99')"
    )
    fields.nth(0).fill("none")
    page.wait_for_function(
        "document.querySelector('[aria-live]').textContent.startsWith('p1 has to be a positive')"
    )
    some = {"min": 0.1, "p1": 0.25, "p99.99": 3.0, "amax": 4000.0}
    sites = {
        "a": {"block_amax": None},
        "b": {"block_amax": some},
        "c": {"block_amax": some | {"amax": 9000}},
    }
    (tmp_path / "report.json").write_text(json.dumps({"sites": sites}))
    page.locator("input[type=file]").set_input_files(tmp_path / "report.json")
    page.wait_for_function("document.querySelector('input[type=text]').value === '0.25'")
    assert page.locator("select option").all_inner_texts() == ["b", "c"]
    page.locator("select").select_option("c")
    assert fields.nth(2).input_value() == "9000"
    page.wait_for_function(
        "document.querySelector('[aria-live]').textContent.includes('headroom would clip')"
    )
    (tmp_path / "other.json").write_text("[1]")
    page.locator("input[type=file]").set_input_files(tmp_path / "other.json")
    page.wait_for_function(
        "document.querySelector('[aria-live]').textContent.includes('expected a report.json')"
    )
