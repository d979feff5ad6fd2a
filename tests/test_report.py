# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A report says what plain counting says, fires its rules where it should, and resumes or refuses."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvfp4_reference import reference

from nvfp4_utils.quantize import input_scale_from_amax
from nvfp4_utils.statistics import ActivationStatistics, SiteStatistics
from studies.report import __main__ as report_command
from studies.report import evaluation, measure, rules, schema, verdict, words
from studies.report import html as report_html

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES, TOKENS, WIDTH = 8, 16, 64


def gaussian(seed: int = 0, sequences: int = SEQUENCES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, TOKENS, WIDTH, generator=generator)


def statistics_of(x: torch.Tensor) -> SiteStatistics:
    """A group per sequence, as held-out text is captured."""
    x = x.bfloat16()
    groups = [ActivationStatistics.from_tensor(sequence) for sequence in x]
    return SiteStatistics(1, groups, x.abs().flatten(1).amax(1).double())


def largest(x: torch.Tensor) -> np.ndarray:
    from studies.runs.token_amaxes import TokenAmaxes

    found = TokenAmaxes()
    found.count("site", x.bfloat16())
    return torch.cat(found.parts["site"], dim=1).numpy()


class Tokenizer:
    @staticmethod
    def convert_ids_to_tokens(ids):
        return [f"token {i}" for i in ids]


def entry(x, held_out=None, foreign=None, policy: str = "raised", experts=None) -> dict:
    """One site of a report from plain tensors [sequences, tokens, width]."""
    statistics = statistics_of(x)
    if experts is not None:
        statistics.expert_tokens = torch.tensor(experts)
        statistics.expert_amax = torch.ones(len(experts), dtype=torch.float64)
    calibrated = measure.describe_pool(statistics)
    if calibrated["amax"] > 0:
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        calibrated["massive"] = measure.massive(largest(x), ids, 1, Tokenizer)
    amaxes = calibrated["calibrated_amax"]
    pools = [
        measure.score_site(statistics_of(pool), amaxes) if pool is not None else None
        for pool in (x if held_out is None else held_out, foreign)
    ]
    scales = verdict.scales_of({"layers.0.mlp_input": calibrated}, policy, [])
    chosen = scales["layers.0.mlp_input"]
    return verdict.site_entry(
        "layers.0.mlp_input", calibrated, pools[0], pools[1], chosen, ["mlp.up_proj"]
    )


def fired(*args, **kwargs) -> set[str]:
    return {f["rule"] for f in entry(*args, **kwargs)["findings"]}


def spiked(factor: float) -> torch.Tensor:
    """The first token of every sequence holds one large value."""
    x = gaussian()
    x[:, 0, 3] = factor
    return x


def with_small_blocks(factor: float) -> torch.Tensor:
    """A quarter of the blocks is tiny."""
    x = gaussian()
    x[..., :16] *= factor
    return x


def growing(steps: float) -> torch.Tensor:
    """Each sequence but one is small."""
    x = gaussian()
    x[3] *= steps
    return x


# ---------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("rule", "case", "control"),
    [
        ("dead", {"x": torch.zeros(SEQUENCES, TOKENS, WIDTH)}, {"x": gaussian()}),
        ("constant", {"x": torch.full((SEQUENCES, TOKENS, WIDTH), 0.5)}, {"x": gaussian()}),
        ("experts", {"x": gaussian(), "experts": [5, 600]}, {"x": gaussian(), "experts": [512, 600]}),
        ("wide", {"x": with_small_blocks(2.0**-20)}, {"x": with_small_blocks(2.0**-8)}),
        ("flushes", {"x": with_small_blocks(2.0**-24)}, {"x": with_small_blocks(2.0**-12)}),
        ("massive", {"x": spiked(500.0)}, {"x": spiked(20.0)}),
        ("growing", {"x": growing(8.0)}, {"x": gaussian()}),
        ("saturates", {"x": gaussian(), "held_out": 4000 * gaussian(1)},
         {"x": gaussian(), "held_out": 4 * gaussian(1)}),
        ("lossy", {"x": gaussian(), "held_out": 4000 * gaussian(1)},
         {"x": gaussian(), "held_out": 4 * gaussian(1)}),
        ("above", {"x": gaussian(), "held_out": 4000 * gaussian(1)},
         {"x": gaussian(), "held_out": 4 * gaussian(1)}),
        ("narrow", {"x": with_small_blocks(2.0**-12)}, {"x": gaussian()}),
        ("foreign", {"x": gaussian(), "foreign": 4000 * gaussian(1)},
         {"x": gaussian(), "foreign": 4 * gaussian(1)}),
        ("convention", {"x": gaussian(), "held_out": gaussian(1) * 2.0**-6, "policy": "raised-all"},
         {"x": gaussian()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_rule_fires_where_it_should_and_nowhere_else(rule, case, control):
    assert rule in fired(**case)
    assert rule not in fired(**control)


def test_a_plain_tensor_has_no_finding_and_the_gravest_come_first():
    assert fired(gaussian(), held_out=gaussian(1)) == set()
    found = entry(gaussian(), held_out=4000 * gaussian(1))["findings"]
    assert [f["severity"] for f in found] == sorted(f["severity"] for f in found)
    for f in found:
        rule = rules.RULES[f["rule"]]
        assert (f["threshold"], f["severity"], f["advice"]) == (
            rule.threshold,
            rule.severity,
            rule.advice,
        )


def test_thresholds_are_those_of_the_pages_that_measured_them():
    from studies.pages import massive_activations, which_number

    assert rules.HARMLESS_DB == which_number.HARMLESS_DB
    assert rules.HARMLESS_SHARE == which_number.HARMLESS_SHARE
    assert rules.HARM == which_number.HARM
    assert rules.FACTOR == massive_activations.FACTOR
    for name, rule in rules.RULES.items():
        shown = re.sub(r"[^\d.]", " ", rule.text).split()
        percent = {str(100 * rule.threshold).rstrip("0").rstrip("."), f"{rule.threshold:g}"}
        assert rule.threshold == 0 or percent & {n.strip(".") for n in shown} or name == "weights", name


# ------------------------------------------------------------------------------------- measuring


def test_numbers_of_a_site_equal_plain_counting():
    x, held_out = gaussian(), 3 * gaussian(1)
    site = entry(x, held_out=held_out)
    y = held_out.bfloat16().double()
    blocks = y.abs().view(-1, 16).amax(1)
    for name, of in site["policies"].items():
        amax = site["calibrated_amax"][name]
        assert of["saturated"] == pytest.approx((blocks > amax).double().mean().item())
        assert of["subnormal"] + of["flushed"] == pytest.approx(
            (blocks < amax / 28672).double().mean().item()
        )
        assert of["slack_low_octaves"] == pytest.approx(np.log2(amax / y.abs().max().item()))
        for underflow in ("flush", "floor"):
            scale = input_scale_from_amax(amax)
            q = reference(held_out.bfloat16(), scale, underflow, torch.float32, np.float32).double()
            snr = 10 * torch.log10(y.square().sum() / (q - y).square().sum()).item()
            assert of[underflow]["snr_db"] == pytest.approx(snr, abs=1e-6)
    assert site["block_amax"]["amax"] == site["amax"] == x.bfloat16().abs().max().item()


def test_losses_by_sequence_add_up_and_resample():
    held_out = gaussian(1)
    held_out[2] = 0  # a sequence without signal
    site = entry(gaussian(), held_out=held_out)
    groups = measure.score_site(statistics_of(held_out), site["calibrated_amax"])["groups"]
    draws = verdict.losses(groups)
    for name in groups["policies"]:
        exact = site["policies"][name]["flush"]["loss_db"]
        assert draws[name][0] == pytest.approx(exact, abs=1e-6)
    assert site["loss_db"]["low"] <= site["loss_db"]["value"] <= site["loss_db"]["high"]
    # The second draw, by hand: sequences repeated as often as the draw has them.
    from studies.runs.scoring import resamples

    rows = torch.repeat_interleave(held_out, torch.from_numpy(resamples(SEQUENCES)[1]), dim=0)
    again = ActivationStatistics.from_tensor(rows.bfloat16())
    own = site["calibrated_amax"]["raised"]
    whole = statistics_of(held_out).total
    menu = [site["calibrated_amax"][n] for n in measure.COMPARED]
    menu += [site["oracle"]["flush"]["calibrated_amax"]]
    menu += [site["held_out_amax"] * 2.0**k for k in measure.CURVE_OCTAVES]
    scales = input_scale_from_amax(np.array(menu))
    best = [scales[int(getattr(whole, f)(scales).argmax())] for f in ("snr_db", "block_snr_db")]
    plain = again.snr_db(best[0]) - again.snr_db(input_scale_from_amax(own))
    unit = again.block_snr_db(best[1]) - again.block_snr_db(input_scale_from_amax(own))
    assert draws["raised"][2] == pytest.approx(max(float(plain), float(unit)), abs=1e-6)


def test_growth_is_the_mean_over_all_subsets():
    amaxes = np.array([1.0, 5.0, 2.0, 9.0, 3.0, 9.5])
    found = measure.growth(amaxes)
    for n, share in zip(found["sequences"], found["share"], strict=True):
        every = [max(c) for c in itertools.combinations(amaxes, n)]
        assert share == pytest.approx(np.mean(every) / 9.5)
    assert found["enough_at"] is None
    assert measure.growth(np.array([8.0, 9.0, 9.5, 9.0]))["enough_at"] == 1
    assert measure.growth(np.array([1.0, np.nan])) is None


def test_massive_tells_the_token_and_its_place():
    x = gaussian()
    x[5, 7, 11] = 300.0
    ids = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS)
    found = measure.massive(largest(x), ids, 1, Tokenizer)
    medians = x.bfloat16().float().abs().amax(-1).median(1).values
    assert found["token"] == f"token {5 * TOKENS + 7}" and found["channel"] == 11
    assert found["over_token"] == pytest.approx(300 / np.median(medians))


def test_a_percentile_that_is_zero_is_left_out():
    x = torch.zeros(SEQUENCES, TOKENS, WIDTH)
    x[:, 0, 0] = 1.0  # 1 element of 1024
    site = entry(x)
    assert site["calibrated_amax"]["p99"] is None and "p99" not in site["policies"]
    assert site["calibrated_amax"]["amax"] == 1.0


# --------------------------------------------------------------------------------------- verdict


def test_the_default_stands_until_another_is_better_by_half_a_decibel():
    same = dict.fromkeys(measure.CANDIDATES, 0.1)
    policy, why, exceptions = verdict.choose({"a": same, "b": same | {"raised": 0.55}})
    assert policy == "raised" and "default" in why and not exceptions
    policy, why, exceptions = verdict.choose({"a": same | {"raised": 2.0}, "b": same | {"raised": 0.3}})
    assert policy == "amax" and "1.15 dB" in why
    _, _, exceptions = verdict.choose({"a": same | {"raised": 0.7}, "b": same, "c": same})
    assert [(e["site"], e["policy"]) for e in exceptions] == [("a", "amax")]
    assert verdict.choose({})[0] == "raised"


def test_a_dead_site_takes_the_largest_scale_of_its_kind():
    calibrated = {
        f"layers.{i}.{kind}": {"calibrated_amax": dict.fromkeys(measure.COMPARED, amax)}
        for i, kind, amax in [(0, "mlp_input", None), (1, "mlp_input", 3.0), (2, "mlp_input", 5.0),
                              (0, "o_proj_input", None)]
    }  # fmt: skip
    found = verdict.scales_of(calibrated, "raised", [])
    assert found["layers.0.mlp_input"] == ("largest of its kind", 5.0)
    assert found["layers.0.o_proj_input"] == ("constant", 2688.0)
    assert found["layers.1.mlp_input"] == ("raised", 3.0)


def test_the_models_own_loss_overrules_only_when_every_sequence_agrees():
    def kl(chosen):
        return {"kl": {"A recommended": chosen, "A amax": [0.1, 0.1]}}

    assert "1.1 times" in verdict.by_kl(kl([0.12, 0.13]), "raised")
    assert not verdict.by_kl(kl([0.12, 0.105]), "raised")
    assert not verdict.by_kl(kl([0.12, 0.13]), "amax")
    assert not verdict.by_kl(None, "raised")


def test_evaluation_stays_in_its_budget(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def evaluate(model, tokens, settings, batch):
        asked.append((len(tokens), [s.policy for s in settings]))
        zeros = torch.zeros(len(settings), len(tokens))
        return SimpleNamespace(kl=zeros, nll=zeros, top1=zeros)

    linear = torch.nn.Linear(16, 16)
    monkeypatch.setattr(evaluation, "find_linears", lambda model: {"s": {"l": linear}})
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    amaxes = {"recommended": {"s": 1.0}, "amax": {"s": 1.0}}
    tokens = torch.zeros(8, 4, dtype=torch.int32)
    evaluation.evaluation_stage(linear, tokens, amaxes, 1.0, 32, False)
    assert asked == [(2, ["A recommended", "A amax", "W", "W and A recommended"])]  # 16 s / 6.2 s
    slow = evaluation.evaluation_stage(linear, tokens, amaxes, 20.0, 32, False)
    assert slow["kl"] == {} and "124 s, the budget is 60 s" in slow["skipped"][0]
    monkeypatch.setattr(evaluation, "free_bytes", lambda device: 16)
    tight = evaluation.evaluation_stage(linear, tokens, amaxes, 0.01, 32, True)
    assert asked[-1] == (8, ["A recommended", "A amax", "A per token"])
    assert "weights were not quantized" in tight["skipped"][0]


# ---------------------------------------------------------------------------------------- schema


def test_schema_names_what_is_wrong():
    site = entry(gaussian())
    report = {name: {} for name in schema.REPORT} | {"format": 1, "findings": [], "sites": {"a": site}}
    assert schema.check(report) is report
    bad = report | {
        "sites": {"a": {k: v for k, v in site.items() if k != "input_scale"} | {"amax": "1"}}
    }
    with pytest.raises(ValueError, match=r"sites\.a\.input_scale is missing; sites\.a\.amax is str"):
        schema.check(bad)
    with pytest.raises(ValueError, match="format is 2, expected 1"):
        schema.check(report | {"format": 2})
    with pytest.raises(ValueError, match="more is not described"):
        schema.check(report | {"more": 1})


def test_what_has_no_number_becomes_null():
    assert schema.plain({"a": (float("inf"), 1.5), 2: float("nan")}) == {"a": [None, 1.5], "2": None}


def test_the_description_names_every_key():
    for name in (*schema.SITE, *schema.REPORT):
        assert f"``{name}``" in schema.__doc__, name
    for name in (*entry(gaussian())["policies"]["amax"], *entry(gaussian())["massive"]):
        assert f"``{name}``" in schema.__doc__, name


# -------------------------------------------------------------------------------------- the page


def stored() -> dict:
    return words.load("results/report/reference.json")


def test_the_stored_report_is_whole_and_its_words_are_computed():
    report = stored()
    lines = words.summary_lines(report)
    assert len(lines) == 10 and not [line for line in lines if "nan" in line.lower()]
    assert report["recommendation"]["policy"] in lines[1]
    grave = [s for s, of in report["sites"].items()
             if any(f["severity"] == "attention" for f in of["findings"])]  # fmt: skip
    assert len(grave) == report["recommendation"]["attention"] == len(words.wanting_attention(report))
    worse = [verdict.urgency(item) for item in report["sites"].items()]
    assert worse == sorted(worse)
    fired = {f["rule"] for s in report["sites"].values() for f in s["findings"]}
    assert fired | {f["rule"] for f in report["findings"]} <= set(report["rules"]) == set(rules.RULES)


def test_tables_and_figures_of_a_report_hold_its_numbers():
    from studies.pages import plots
    from studies.report import page, tables

    plots.use_style()
    report = stored()
    table = tables.policy_table(report)
    for name, mean in verdict.policy_means(report["sites"]).items():
        assert table["mean loss (dB)"][name] == pytest.approx(mean)
    assert list(tables.site_table(report).index) == list(report["sites"])
    label, site = next((s, of) for s, of in report["sites"].items() if of["curve"])
    figure = page.site_figure(site)
    drawn = {line.get_label() for line in figure.axes[0].get_lines()}
    shown = f"raised amax {site['policies']['raised']['flush']['loss_db']:.2f}"
    assert shown in drawn, label
    assert len(page.overview_figure(report).axes) == len({s["kind"] for s in report["sites"].values()})
    plots.plt.close("all")


def test_a_page_fetches_nothing_and_shows_no_code():
    nbformat = pytest.importorskip("nbformat")
    from studies.report import html

    v4 = nbformat.v4
    output = v4.new_output("display_data", {"text/html": '<div class="admonition">seen</div>'})
    cells = [
        v4.new_markdown_cell("of the book", metadata={"tags": [html.BOOK_ONLY]}),
        v4.new_code_cell("hidden = 1", outputs=[output]),
        v4.new_markdown_cell("## Shown"),
    ]
    made = html.as_html(v4.new_notebook(cells=cells), "<model>")
    assert "seen" in made and "Shown" in made and "&lt;model&gt;" in made
    assert "hidden" not in made and "of the book" not in made
    assert not re.findall(r"<script|(?:src|href)\s*=\s*[\"'](?!data:)|url\(|@import", made)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random Llama whose first down_proj input is all zero, with the reference model's tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models/reference" / name, folder)
    return folder


def command(monkeypatch, runs: Path, *arguments: str) -> int:
    monkeypatch.setattr(report_command, "RUNS", runs)
    return report_command.main(list(arguments))


def test_a_model_from_text_to_a_report_and_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_html, "write_page", lambda folder: folder / "report.html")
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("\n\n".join(f"Paragraph {i} says {i * i}." for i in range(4000)))
    asked = ["--model", str(tiny), "--dataset", f"{text},python-library", "--run", "try",
             "--sequences", "8", "--length", "64"]  # fmt: skip
    assert command(monkeypatch, tmp_path / "runs", *asked) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 12 and str(tmp_path / "runs/try/report.html") in said
    report = json.loads((tmp_path / "runs/try/report.json").read_text())
    assert schema.check(report)["text"]["calibration_sequences"] == 6
    dead = report["sites"]["layers.0.down_proj_input"]
    assert [f["rule"] for f in dead["findings"]] == ["dead"] and dead["input_scale"] > 0
    assert dead["policy"] == "largest of its kind"
    assert dead["recommended_amax"] == report["sites"]["layers.1.down_proj_input"]["recommended_amax"]
    assert dead["linears"] == ["model.layers.0.mlp.down_proj"]
    assert report["sites"]["layers.1.mlp_input"]["foreign"]["policies"]
    # Weights of zeros have no scale: the model is not evaluated, and that is said.
    assert report["evaluation"]["kl"] == {} and "not evaluated" in said
    # What is done is not done again; other settings are refused and leave everything as it was.
    (tmp_path / "runs/try/report.json").unlink()
    monkeypatch.setattr(measure, "captured", None)
    monkeypatch.setattr(report_command, "evaluation_stage", None)
    assert command(monkeypatch, tmp_path / "runs", *asked) == 0
    again = json.loads((tmp_path / "runs/try/report.json").read_text())
    assert again["sites"] == report["sites"]
    capsys.readouterr()
    assert command(monkeypatch, tmp_path / "runs", *asked[:-1], "32") == 1
    assert "made with other settings: texts was" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/try/report.json").read_text()) == again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "no-such"], "DATASET is 'no-such'; expected a folder of text or one of"),
        (["--dataset", "a,b,c"], "expected one mix or folder, or two different ones"),
        (["--dataset", "a,a"], "expected one mix or folder, or two different ones"),
        (["--sequences", "4"], "got 4 sequences of 512 tokens; expected at least 8"),
        (["--sequences", "4000"], "too few sequences"),
        (["--model", "/no/such/folder"], "no folder /no/such/folder"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(arguments, message, tiny, tmp_path, monkeypatch, capsys):
    model = [] if "--model" in arguments else ["--model", str(tiny)]
    assert command(monkeypatch, tmp_path / "runs", *model, *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") or "\nerror: " in said
    assert message in said and not (tmp_path / "runs").exists()


def test_what_is_not_recognised_is_named():
    transformers = pytest.importorskip("transformers")
    from studies.report.coverage import coverage

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    layer = "model.layers.0.mlp."
    sites = coverage(model).sites
    assert list(sites["layers.0.mlp_input"].readers) == [layer + "gate_proj", layer + "up_proj"]
    assert coverage(model).uncovered == {}
    model.model.layers[0].mlp.side = torch.nn.Linear(64, 64)
    model.model.layers[0].mlp.experts = torch.nn.Module()
    model.model.layers[0].mlp.experts.fused = torch.nn.Parameter(torch.zeros(2, 64, 64))
    assert list(coverage(model).uncovered) == [layer + "side", layer + "experts.fused"]
    with pytest.raises(ValueError, match="has no site that can be counted"):
        coverage(transformers.BertModel(transformers.BertConfig(
            vocab_size=64, hidden_size=24, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=24)))  # fmt: skip
