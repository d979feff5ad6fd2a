# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A stored run: every number follows from the tensors, and a broken-off capture resumes."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

transformers = pytest.importorskip("transformers")

from nvfp4_utils import fake_quantize, input_scale_from_amax, policies  # noqa: E402
from nvfp4_utils.hooks import hooked  # noqa: E402
from nvfp4_utils.quantize import (  # noqa: E402
    UNDERFLOWS,
    fake_quantize_reference,
    four_over_six_reference,
)
from nvfp4_utils.sites import SITES  # noqa: E402
from studies.data import corpora, mixes  # noqa: E402
from studies.pages import snr_tables  # noqa: E402
from studies.runs import store  # noqa: E402
from studies.runs.capture_run import capture_run  # noqa: E402
from studies.runs.capture_settings import CaptureSettings  # noqa: E402

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "reference"
SECOND = "documentation-only"
MIXES = [mixes.EMBEDDED_MIX, SECOND]
SETTINGS = CaptureSettings(
    tuple(MIXES), calibration=8, test=4, length=32, test_group=2, batch=4, draws=2, windows=1
)
POLICIES = {name for name, p in policies.POLICIES.items() if p.calibrate and p.one_scale}
DETAILS = {"subsets.parquet", "tokens.parquet", "metrics.parquet", "windows.parquet"}


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a folder of runs with one tiny run in it; a second mix stands for other data."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny operations: threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runs")
        patch.setattr(store, "RUNS", folder)
        patch.setitem(mixes.MIXES, SECOND, mixes.MIXES[mixes.EMBEDDED_MIX][:1])
        patch.setenv("HF_HUB_OFFLINE", "1")
        torch.manual_seed(0)
        config = transformers.Qwen3_5TextConfig(
            vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            tie_word_embeddings=True, max_position_embeddings=128, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        transformers.Qwen3_5ForCausalLM(config).bfloat16().save_pretrained(folder / "model")
        transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "model")
        capture_run(str(folder / "model"), folder / "tiny", SETTINGS, commit="none")
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(runs):
    return store.Run("tiny")


@pytest.fixture(scope="module")
def test_activations(runs):
    """Run the first mix's test sequences once more, keeping the activations of every site."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / "model", dtype=torch.bfloat16)
    texts = corpora.sequences(MIXES[0], tokenizer, calibration=8, test=4, length=32, progress=False)
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(label, x):
        kept.setdefault(label, []).append(x.clone())

    with torch.no_grad(), hooked(model, tuple(SITES), keep):
        model(texts.test.long())
    return {label: torch.cat(parts) for label, parts in kept.items()}


def test_a_run_holds_every_site_policy_and_group(run):
    assert run.mixes == MIXES and len(run.sites) == 8
    for mix in MIXES:
        errors = run.errors(mix)
        calibrated = errors[(errors.calibration != "test") & (errors.policy != "four-over-six")]
        assert set(calibrated.policy) == POLICIES and set(calibrated.calibration) == set(MIXES)
        assert set(errors[errors.calibration == "test"].policy) == {"oracle", "dynamic"}
        assert set(errors[errors.policy == "four-over-six"].calibration) == {mix}
        assert len(errors) == 8 * len(UNDERFLOWS) * (2 * len(POLICIES) + 3) * 2
        assert np.isfinite(errors.mse).all() and (errors.mse > 0).all()
        groups = run.groups(mix)
        assert set(groups["group"]) == {0, 1} and len(groups) == 16
        sequences = run.sequences(mix)
        assert len(sequences) == 8 * (8 + 4)
        for site in run.sites:
            m = run.marginals(mix, site, "calibration")
            mine = sequences[(sequences.site == site) & (sequences.pool == "calibration")]
            assert m.amax == mine.amax.max()
            width = 128 if "down" in site else 64
            if "o_proj" in site and not site.startswith("layers.1."):
                width = 32  # linear attention: two heads of 16
            assert m.count == 8 * 32 * width
    everywhere = {"policies.parquet", "errors.parquet", "groups.parquet", "curves.parquet",
                  "blocks.parquet", "pools.parquet", "sequences.parquet"}  # fmt: skip
    joints = {f"joint.{s}.parquet" for s in run.featured}
    assert {p.name for p in (run.path / MIXES[0]).iterdir()} == everywhere | DETAILS | joints
    assert {p.name for p in (run.path / SECOND).iterdir()} == everywhere


def direct_error(x: torch.Tensor, row) -> float:
    """Mean squared error of one table row, from the activations [sequences, tokens, width]."""
    if row.policy == "dynamic":
        amaxes = [sequence.abs().max().item() for sequence in x]
    else:
        amaxes = [row.calibrated_amax] * len(x)
    parts = []
    for sequence, amax in zip(x, amaxes, strict=True):
        scale = torch.tensor(input_scale_from_amax(amax))
        quantize = four_over_six_reference if row.policy == "four-over-six" else fake_quantize_reference
        y = quantize(sequence, scale, row.underflow, torch.float32)
        parts.append((y.double() - sequence.double()).square().mean().item())
    return float(np.mean(parts))


def test_three_random_cells_of_each_kind_equal_direct_evaluation(run, test_activations):
    errors = run.errors(MIXES[0])
    alone = errors.policy.isin(["dynamic", "four-over-six"])
    for table in (errors[~alone], errors[alone]):
        for i in random.Random(0).sample(range(len(table)), 3):
            row = table.iloc[i]
            x = test_activations[row.site][2 * row.group : 2 * row.group + 2]
            assert row.mse == pytest.approx(direct_error(x, row), rel=1e-6)  # stored as float32
    subsets = run.subsets(MIXES[0])
    for i in random.Random(1).sample(range(len(subsets)), 3):
        row = subsets.iloc[i]
        x = test_activations[row.site]
        y = fake_quantize(x, input_scale_from_amax(row.calibrated_amax), out_dtype=torch.float32)
        assert row.mse_flush == pytest.approx(
            (y.double() - x.double()).square().mean().item(), rel=1e-12
        )
    windows = run.windows(MIXES[0])
    own = errors[(errors.policy == "headroom") & (errors.calibration == MIXES[0])]
    own = own[own.underflow == "flush"].groupby("site", observed=True).mse.mean()
    by_window = windows.groupby("site", observed=True)["headroom flush"].mean()
    np.testing.assert_allclose(by_window[own.index].astype(float), own, rtol=1e-6)  # stored as float32
    groups = run.groups(MIXES[0])
    row = groups.iloc[5]
    x = test_activations[row.site][2 * row.group : 2 * row.group + 2].double()
    assert row["count"] == x.numel()
    assert row.signal_power == pytest.approx(x.square().mean().item(), rel=1e-12)


def test_the_oracle_is_the_lowest_on_the_whole_pool(run):
    for underflow in UNDERFLOWS:
        table = snr_tables.policy_snr(run, MIXES[0], underflow)
        assert set(table.policy) == POLICIES | {"oracle", "dynamic", "four-over-six"}
        assert len(table) == 8 * (len(POLICIES) + 3)
        one_scale = table[~table.policy.isin(["dynamic", "four-over-six"])]
        assert (one_scale.gap_db > -1e-3).all()
        assert (table.low <= table.snr_db).all() and (table.snr_db <= table.high).all()


def test_curve_on_its_grid_equals_the_joint_histogram(run):
    site = run.featured[0]
    joint = run.joint(MIXES[0], site)
    curve = run.curves(MIXES[0])
    grid = curve[curve.site == site].calibrated_amax.to_numpy()
    sequences = run.sequences(MIXES[0])
    own = sequences[(sequences.site == site) & (sequences.pool == "calibration")].amax
    policy = run.policies(SECOND)
    # Exact where a subset's amax and any mix's calibration land.
    amaxes = np.concatenate([grid[::97], own, policy[policy.site == site].calibrated_amax])
    for underflow in UNDERFLOWS:
        expected = joint.snr_db(input_scale_from_amax(amaxes), underflow)
        found = snr_tables.curve_snr(run, MIXES[0], site, underflow, amaxes)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # stored as float32


def test_tables_of_the_question_pages(run):
    sizes = snr_tables.size_curve(run, MIXES[0], run.featured[0])
    assert sizes.n.tolist() == [1, 2, 4, 8]
    assert (sizes.amax.diff().dropna() >= 0).all()
    full = run.marginals(MIXES[0], run.featured[0]).amax
    assert sizes.amax.iloc[-1] == sizes.amax_low.iloc[-1] == full
    matrix = snr_tables.cross_matrix(run)
    own = matrix[matrix.calibration == matrix.test]
    assert len(matrix) == 8 * 4 and (own.loss_db == 0).all()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json"}  # fmt: skip


def test_an_incomplete_run_resumes_to_the_same_bytes(runs):
    again = runs / "again"
    shutil.copytree(runs / "tiny", again)
    (again / "run.json").unlink()
    (again / SECOND / "errors.parquet").unlink()
    capture_run(str(runs / "model"), again, SETTINGS, commit="none")
    assert contents(again) == contents(runs / "tiny")
    first, second = (json.loads((runs / n / "run.json").read_text()) for n in ("tiny", "again"))
    for info in (first, second):
        info["provenance"].pop("date")
    assert first == second


def test_a_mix_that_is_added_later_is_scored_on_the_old_test_pools(runs):
    grown = runs / "grown"
    capture_run(str(runs / "model"), grown, replace(SETTINGS, mixes=tuple(MIXES[:1])), commit="none")
    capture_run(str(runs / "model"), grown, SETTINGS, commit="none")
    assert contents(grown) == contents(runs / "tiny")


def test_a_run_is_not_continued_with_other_settings(runs):
    before, other = contents(runs / "tiny"), replace(SETTINGS, calibration=9)
    message = (
        rf"^{re.escape(str(runs / 'tiny'))} was captured with other settings: .*calibration was 8, is 9"
    )
    with pytest.raises(ValueError, match=message):
        capture_run(str(runs / "model"), runs / "tiny", other, commit="none")
    assert contents(runs / "tiny") == before


def test_an_interrupted_run_remembers_its_settings(runs, monkeypatch):
    broken = runs / "broken"

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("studies.runs.capture_run.calibration_stage", fail)
        capture_run(str(runs / "model"), broken, SETTINGS, commit="none")
    message = rf"^{re.escape(str(broken))} was captured with other settings: batch was"
    with pytest.raises(ValueError, match=message):
        capture_run(str(runs / "model"), broken, replace(SETTINGS, batch=3), commit="none")


def test_provenance_names_what_a_result_came_from(run):
    info = run.info["provenance"]
    assert info["commit"] == "none"
    assert info["parameters"] == json.loads(json.dumps(SETTINGS.parameters()))
    assert info["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert re.fullmatch("[0-9a-f]{64}", info["source_sha256"])
    assert run.info["model_sha256"] == store.sha256_of(run.path.parent / "model")


def test_missing_run(runs):
    message = (
        f"no run at {runs / 'none'}; expected a folder with run.json. Make it with `make capture "
        "MODEL=models/reference DATASET=python-library RUN=none`"
    )
    with raises(FileNotFoundError, message):
        store.Run("none")


def test_unknown_mix_site_and_pool(run):
    for name in ("errors", "groups", "curves", "sequences"):
        message = (
            f"no {name} of mix 'chat-only' at {run.path / 'chat-only' / name}.parquet; this run "
            f"holds {', '.join(MIXES)}, and details of {MIXES[0]} only."
        )
        with raises(FileNotFoundError, message):
            getattr(run, name)("chat-only")
    site = "layers.9.mlp_input"
    message = f"no marginal of {site} test in {SECOND}; this run holds {run.sites}."
    with pytest.raises(KeyError) as caught:
        run.marginals(SECOND, site, "test")
    assert caught.value.args == (message,)
    with pytest.raises(FileNotFoundError, match=r"^no statistic at .*joint\.layers\.9\."):
        run.joint(SECOND, site)


def test_marginals_equal_those_of_the_joint_histogram(run):
    site = run.featured[-1]
    joint, stored = run.joint(MIXES[0], site).marginals, run.marginals(MIXES[0], site, "test")
    for name in ("block_codes", "block_counts"):
        assert torch.equal(getattr(joint, name), getattr(stored, name))
    for name in ("amax", "signal_power", "count"):
        assert getattr(joint, name) == getattr(stored, name)
    coarse = run.marginals(SECOND, site, "test")
    assert (coarse.block_codes % 8 == 0).all() and coarse.count == 4 * 32 * 128


def test_floor_rows_that_equal_flush_are_put_back(run):
    stored = pd.read_parquet(run.path / MIXES[0] / "errors.parquet")
    keys = ["site", "calibration", "policy", "group"]
    wide = stored.pivot_table(index=keys, columns="underflow", values="mse", observed=True)
    assert (stored.underflow == "flush").sum() > (stored.underflow == "floor").sum()
    errors = run.errors(MIXES[0])
    both = errors.pivot_table(index=keys, columns="underflow", values="mse", observed=True)
    assert both.notna().all(axis=None)
    absent = wide[wide.floor.isna()].index
    assert (both.loc[absent].flush == both.loc[absent].floor).all()


def test_the_largest_token_of_each_sequence(run, runs):
    from studies.data import models

    model, tokenizer = models.load(runs / "model")
    texts = corpora.sequences(MIXES[0], tokenizer, calibration=8, test=4, length=32, progress=False)
    kept = {}
    with torch.no_grad(), hooked(model, tuple(SITES), lambda site, x: kept.update({site: x.clone()})):
        model(texts.calibration.long())
    table = run.tokens(MIXES[0])
    for row in table.sample(6, random_state=0).itertuples():
        amax = kept[row.site][row.sequence].abs().float().amax(-1)
        assert row.amax == pytest.approx(amax.max().item(), rel=0.05)  # another batch rounds otherwise
        assert row.next_amax <= row.amax and row.median_amax <= row.amax
        token = tokenizer.convert_ids_to_tokens(int(texts.calibration[row.sequence, row.position]))
        assert row.token == token


def test_metrics_are_those_of_the_joint_histogram(run):
    site = run.featured[0]
    joint, table = run.joint(MIXES[0], site), run.metrics(MIXES[0])
    table = table[table.site == site]
    assert {"amax", "x2^-4", "x2^18", "amax of half 3", "raised", "oracle"} <= set(table.policy)
    for row in table.sample(8, random_state=1).itertuples():
        g = input_scale_from_amax(row.calibrated_amax)
        assert row.snr_db == pytest.approx(joint.snr_db(g, row.underflow), abs=1e-4)
        assert row.block_snr_db == pytest.approx(joint.block_snr_db(g, row.underflow), abs=1e-4)
        b = joint.marginals.block_codes.to(torch.int16).view(torch.bfloat16).double()
        n = joint.marginals.block_counts[b > 0].double()
        rho = row.calibrated_amax / b[b > 0]
        for share, where in (
            (row.saturated, rho < 1), (row.underflowed, rho >= 458752),
            (row.subnormal, (rho > 28672) & (rho < 458752)),
        ):  # fmt: skip
            assert share == pytest.approx((n[where].sum() / n.sum()).item(), abs=1e-6)
