# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Exports and audits of activation scales: on skeletons of two real checkpoints, and on broken ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nvfp4_utils.quantize import fake_quantize
from studies.checkpoints import audit, export, golden, patch, scales
from studies.checkpoints.breakages import (
    BREAKAGES,
    DOWN,
    convention_of,
    get,
    mixture,
    modules_of,
    put,
    stored,
)
from studies.checkpoints.files import UnreadableError, open_checkpoint, read_values
from studies.checkpoints.findings import EXPERT_SPREAD, KINDS, LARGEST_MEDIAN
from studies.checkpoints.large import mixture_skeleton
from studies.checkpoints.skeleton import build, load_skeleton, take_skeleton
from studies.runs.store import RESULTS, Run

ROOT = Path(__file__).resolve().parents[1]
MAKERS = ("modelopt", "llmcompressor")
LINEARS = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
NO_ACTIVATIONS = {
    "quant_method": "compressed-tensors",
    "config_groups": {"a": {"input_activations": None}},
}


@pytest.fixture(scope="module", params=MAKERS)
def skeleton(request):
    return load_skeleton(RESULTS / "checkpoints" / f"{request.param}.json.gz")


@pytest.fixture(scope="module")
def run():
    return Run("smollm2")


def kinds(folder, *arguments):
    return {(f.kind, f.severity) for f in audit.audit(folder, *arguments)}


def tiny(folder: Path, convention=scales.MODELOPT, shards: int = 1, dtype=torch.float32) -> Path:
    """A whole checkpoint of three layers with random weights, written by the safetensors library."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    weight_map = {}
    for shard in range(shards):
        tensors = {}
        for layer in range(shard, 3, shards):
            for linear in LINEARS:
                name = f"model.layers.{layer}.{linear}"
                weight = torch.randint(0, 256, (4, 8), dtype=torch.uint8, generator=generator)
                scale = torch.full(convention.shape, convention.stored(4.0 + layer), dtype=dtype)
                names = {"weight_scale_2": torch.tensor(1.0), "weight": weight}
                if convention is scales.COMPRESSED_TENSORS:
                    names = {"weight_packed": weight, "weight_global_scale": torch.ones(1)}
                tensors |= {f"{name}.{k}": v for k, v in names.items()} | {
                    f"{name}.{convention.leaf}": scale
                }
        file = "model.safetensors" if shards == 1 else f"model-{shard}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b c")
    return folder


# Reading


def test_header_agrees_with_the_library(tmp_path):
    folder = tiny(tmp_path / "c")
    ours = open_checkpoint(folder).tensors
    raw = (folder / "model.safetensors").read_bytes()
    with safe_open(folder / "model.safetensors", "pt") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, tensor in ours.items():
            value = theirs.get_tensor(name)
            assert list(tensor.shape) == list(value.shape)
            assert raw[tensor.begin : tensor.end] == bytes(value.reshape(-1).view(torch.uint8).tolist())


def test_an_unreadable_folder_says_what_was_expected(tmp_path):
    with pytest.raises(UnreadableError, match="no folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(UnreadableError, match=r"holds no \*\.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UnreadableError, match="Git LFS pointer"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(UnreadableError, match="no safetensors header"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnreadableError, match="no readable JSON"):
        open_checkpoint(tmp_path)


def test_an_index_that_leaves_the_folder_is_refused(tmp_path):
    folder = tiny(tmp_path / "c", shards=2)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
    )
    with pytest.raises(UnreadableError, match="weight_map"):
        open_checkpoint(folder)


# Audit


def test_what_the_tools_export_raises_nothing(skeleton, tmp_path):
    assert audit.audit(build(skeleton, tmp_path / "c")) == []


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda b: b.label)
def test_each_breakage_is_named(skeleton, breakage, tmp_path):
    folder = breakage.build(skeleton, tmp_path / "c")
    found = [f for f in audit.audit(folder) if f.kind == breakage.kind]
    assert found and found[0].severity == breakage.severity
    assert all("Rule: " in f.message for f in found)
    json.dumps([f.value for f in found], allow_nan=False)


def test_every_kind_has_a_breakage():
    assert {b.kind for b in BREAKAGES} == set(KINDS) - {"slack"}


def test_mixtures_sharded_or_made_of_a_dense_model_stay_clean(skeleton, tmp_path):
    assert audit.audit(build(mixture(skeleton), tmp_path / "dense")) == []
    assert audit.audit(build(mixture_skeleton(3, 4, 64, shards=4), tmp_path / "sharded")) == []


@pytest.mark.parametrize("convention", scales.CONVENTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("shards", [1, 3])
def test_small_whole_checkpoints_stay_clean(convention, shards, tmp_path):
    assert audit.audit(tiny(tmp_path / "c", convention, shards)) == []


def test_fp8_modules_beside_nvfp4_ones_are_left_out(tmp_path):
    folder = tiny(tmp_path / "c")
    save_file({"model.layers.9.mlp.up_proj.input_scale": torch.tensor(0.0),
               "model.layers.9.mlp.up_proj.weight_scale": torch.tensor(1.0)},
              folder / "other.safetensors")  # fmt: skip
    (finding,) = audit.audit(folder)
    assert (finding.kind, finding.severity, finding.value) == ("unknown_format", "info", 1)


@pytest.mark.parametrize(
    ("config", "severity"),
    [({"quantization_config": {"quant_algo": "W4A16_NVFP4"}}, {("missing", "info")}),
     ({"quantization_config": {"quant_algo": "NVFP4"}}, {("convention", "error")}),
     ({"quantization_config": NO_ACTIVATIONS}, {("missing", "info")})],
)  # fmt: skip
def test_weights_only_is_no_error_where_the_config_says_so(skeleton, tmp_path, config, severity):
    broken = next(b for b in BREAKAGES if b.label == "no scale at all").change(skeleton)
    folder = build(broken, tmp_path / "c")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    assert kinds(folder) == severity


def test_a_missing_shard_and_a_tensor_that_no_shard_has_are_truncated(tmp_path):
    folder = tiny(tmp_path / "c", shards=3)
    (folder / "model-1.safetensors").unlink()
    assert kinds(folder) == {("truncated", "error")}
    whole = tiny(tmp_path / "d", shards=3)
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-0.safetensors"
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    assert kinds(whole) == {("truncated", "error")}


def test_bfloat16_scales_are_read_and_named(tmp_path):
    assert kinds(tiny(tmp_path / "c", dtype=torch.bfloat16)) == {("unknown_format", "warning")}


def test_mismatch_says_which_member_saturates_in_which_engine(skeleton, tmp_path):
    broken = next(b for b in BREAKAGES if b.kind == "fused_mismatch")
    (finding,) = audit.audit(broken.build(skeleton, tmp_path / "c"))
    assert finding.value == pytest.approx(8, rel=1e-6)
    if convention_of(skeleton).inverse:
        assert "saturates from 0.125 of its amax" in finding.message
    else:
        assert "none saturates" in finding.message and "TensorRT-LLM refuses" in finding.message


def test_the_reciprocal_rule_raises_no_false_alarm_on_stored_runs():
    for name in ("smollm2", "gemma3", "reference"):
        table = Run(name).policies(Run(name).mixes[0])
        medians = table.groupby("policy", observed=True).calibrated_amax.median()
        assert medians.max() < LARGEST_MEDIAN
        assert 2688**2 / medians["amax"] > LARGEST_MEDIAN


def test_expert_spread_threshold_is_half_the_median_room():
    rooms = []
    for name in ("smollm2", "gemma3", "reference"):
        table = Run(name).policies(Run(name).mixes[0])
        wide = table.pivot_table(index="site", columns="policy", values="calibrated_amax", observed=True)
        rooms += (wide["raised-all"] / wide.amax).tolist()
    median = torch.tensor(rooms).log2().median().item()
    assert abs(median / 2 - torch.tensor(EXPERT_SPREAD).log2().item()) < 0.6


def test_slack_against_a_run_of_the_policies_own_scales(skeleton, run, tmp_path):
    """Scales at the run's room end: no slack above; at the calibration pool's amax: what policies
    says."""
    from studies.checkpoints.against_run import slack_table

    tops = run.policies(run.mixes[0]).query("policy == 'raised-all'").set_index("site").calibrated_amax
    sites = scales.site_readers(run.readers, modules_of(skeleton))
    assert len(sites) == len(modules_of(skeleton)) == 210
    raised = put(skeleton, {m: stored(skeleton, tops[s]) for m, s in sites.items()})
    checkpoint = open_checkpoint(build(raised, tmp_path / "c"))
    table = slack_table(
        audit.stored_scales(checkpoint, scales.quantized_modules(checkpoint)), run, run.mixes[0]
    )
    assert table.underflow.abs().max() < 1e-4
    row = table.set_index("tensor").loc[f"{DOWN}.{convention_of(skeleton).leaf}"]
    pools = [run.marginals(run.mixes[0], row.site, pool).amax for pool in ("calibration", "test")]
    assert row.saturation == pytest.approx(
        torch.tensor(tops[row.site] / max(pools)).log2().item(), abs=1e-5
    )
    assert (table.loss_db >= 0).all()


def test_a_factor_left_out_everywhere_is_seen_with_a_run(skeleton, run, tmp_path):
    amaxes = run.policies(run.mixes[0]).query("policy == 'amax'").set_index("site").calibrated_amax
    sites = scales.site_readers(run.readers, modules_of(skeleton))
    off = put(skeleton, {m: stored(skeleton, 448 * amaxes[s]) for m, s in sites.items()})
    found = [f for f in audit.audit(build(off, tmp_path / "c"), run) if f.kind == "magnitude"]
    assert [f.value for f in found if f.severity == "error"] == [448.0]


@pytest.mark.parametrize("policy", ["amax", "raised"])
def test_an_exchange_in_the_whole_checkpoint_is_seen_with_a_run(skeleton, run, policy, tmp_path):
    sites = scales.site_readers(run.readers, modules_of(skeleton))
    amaxes = export.policy_amaxes(run, policy, run.mixes[0])
    right = put(skeleton, {m: stored(skeleton, amaxes[s]) for m, s in sites.items()})
    assert not [f for f in audit.audit(build(right, tmp_path / "a"), run) if f.kind == "magnitude"]
    wrong = put(skeleton, {m: stored(skeleton, 2688**2 / amaxes[s]) for m, s in sites.items()})
    found = [f for f in audit.audit(build(wrong, tmp_path / "b"), run) if f.kind == "magnitude"]
    assert found[0].severity == "error" and any("rank correlation" in f.message for f in found)


def test_a_run_of_another_model_is_refused(tmp_path):
    skeleton = mixture_skeleton(1, 2, 64, 1)
    folder = build({**skeleton, "headers": {f: {n.replace("layers", "blocks"): e for n, e in h.items()}
                                            for f, h in skeleton["headers"].items()},
                    "json": {}, "scales": {n.replace("layers", "blocks"): s
                                           for n, s in skeleton["scales"].items()}},
                   tmp_path / "c")  # fmt: skip
    with pytest.raises(ValueError, match="expected the run of the same model"):
        audit.audit(folder, Run("reference"))


def command(module, *arguments):
    return subprocess.run([sys.executable, "-m", f"studies.checkpoints.{module}", *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip


def test_exit_codes_and_json_of_the_command_line(tmp_path):
    clean = tiny(tmp_path / "c")
    done = command("audit", clean)
    assert (done.returncode, done.stdout) == (
        0, "21 NVFP4 modules (21 ModelOpt) in 1 files: 0 error, 0 warning, 0 info\n",
    )  # fmt: skip
    with (clean / "model.safetensors").open("r+b") as stream:
        tensor = open_checkpoint(clean).tensors["model.layers.1.mlp.up_proj.input_scale"]
        stream.seek(tensor.begin)
        stream.write(bytes(4))
    done = command("audit", clean, "--out", tmp_path / "audit.json")
    assert done.returncode == 1 and done.stdout.startswith("error   zero")
    (finding,) = json.loads((tmp_path / "audit.json").read_text())
    assert finding["tensor"] == tensor.name and set(finding) == {
        "tensor",
        "kind",
        "severity",
        "message",
        "value",
    }
    done = command("audit", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.startswith("error: no folder")


# Export


def test_golden_block_is_what_modelopt_packs():
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    block = golden.golden_block()
    g = torch.tensor(block["input_scale"])
    q, s, _ = module.NVFP4QTensor.quantize(
        torch.tensor([block["values"]]), 16, weights_scaling_factor_2=g
    )
    assert q._quantized_data.flatten().tolist() == block["packed"]
    assert s.view(torch.uint8).flatten().tolist() == [block["block_scale_byte"]]
    decoded = q.dequantize(dtype=torch.float32, scale=s, double_scale=g, block_sizes={-1: 16})
    assert decoded.flatten().tolist() == block["decoded"]


def test_golden_block_of_the_reciprocal_is_another():
    block = golden.golden_block()
    wrong = (
        fake_quantize(torch.tensor([block["values"]]), block["input_global_scale"]).flatten().tolist()
    )
    assert wrong != block["decoded"]
    assert block["input_scale"] * block["input_global_scale"] == pytest.approx(1, rel=1e-7)
    with pytest.raises(ValueError, match="another convention"):
        golden.check_golden(block | {"input_scale": block["input_global_scale"]}, "a file")


def test_exported_files_agree_and_a_changed_one_is_refused(run, tmp_path):
    out = tmp_path / "out"
    export.export(export.of_run(run, "amax", run.mixes[0]), out)
    modules = export.load_scales(out)
    amax = run.policies(run.mixes[0]).query("policy == 'amax'").set_index("site").calibrated_amax
    assert len(modules) == 210
    for entry in modules.values():
        assert entry["amax"] == amax[entry["site"]]
        assert entry["input_scale"] == torch.tensor(entry["amax"] / 2688, dtype=torch.float64).float()
        assert (
            entry["input_global_scale"]
            == torch.tensor(2688 / entry["amax"], dtype=torch.float64).float()
        )
    record = json.loads((out / "scales.json").read_text())
    record["modules"]["model.layers.0.mlp.up_proj"]["input_scale"] *= 2
    (out / "scales.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="1 tensors differ"):
        export.load_scales(out)


def test_members_that_move_are_named_and_experts_are_filled():
    amaxes = {"a.q_proj": 1.0, "a.k_proj": 4.0, "a.v_proj": 2.0, "a.o_proj": 9.0}
    amaxes |= {"m.experts.0.w1": 3.0, "m.experts.0.w3": 5.0, "m.experts.0.w2": 7.0}
    unified, moved = scales.unify(amaxes)
    assert {k: unified[k] for k in ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj")} == {
        "a.q_proj": 4.0, "a.k_proj": 4.0, "a.v_proj": 4.0, "a.o_proj": 9.0,
    }  # fmt: skip
    assert unified["m.experts.0.w1"] == unified["m.experts.0.w3"] == 5.0
    assert [m["module"] for m in moved] == ["a.q_proj", "a.v_proj", "m.experts.0.w1"]
    filled, given = scales.fill_experts(unified, [*amaxes, "m.experts.1.w2", "b.o_proj"])
    assert filled["m.experts.1.w2"] == 7.0 and "b.o_proj" not in filled
    assert given == [{"module": "m.experts.1.w2", "given": 7.0}]


@pytest.mark.parametrize("policy", ["four-over-six", "nonsense"])
def test_a_policy_that_is_no_one_scale_is_refused(run, policy):
    with pytest.raises(ValueError, match=f"policy is '{policy}'; expected one of amax, "):
        export.policy_amaxes(run, policy, run.mixes[0])


def test_modules_that_read_no_site_are_refused_and_nothing_is_left(run, tmp_path):
    folder = build(mixture_skeleton(1, 2, 64, 1), tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"6 of 10 modules read no site .* as model.layers.0.mlp.experts.0.down_proj"
    ):
        export.export(export.of_run(run, "amax", run.mixes[0]), tmp_path / "out", folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("convention", scales.CONVENTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_patched_copy_differs_in_the_bytes_of_the_scales_alone(run, convention, shards, tmp_path):
    source, out = tiny(tmp_path / "c", convention, shards), tmp_path / "out"
    before = {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    export.export(export.of_run(run, "amax", run.mixes[0]), out, source)
    assert before == {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    checkpoint = open_checkpoint(source)
    modules = scales.quantized_modules(checkpoint)
    allowed = {
        (tensor.file.name, position)
        for m in modules.values()
        for tensor in m.scales.values()
        for position in range(tensor.begin, tensor.end)
    }
    after = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert set(after) == set(before)
    changed = {(name.name, i) for name, old in before.items() for i, (a, b) in
               enumerate(zip(old, after[name], strict=True)) if a != b}  # fmt: skip
    assert changed and changed <= allowed
    amax = run.policies(run.mixes[0]).query("policy == 'amax'").set_index("site").calibrated_amax
    new = read_values(
        t for m in scales.quantized_modules(open_checkpoint(out)).values() for t in m.scales.values()
    )
    for name, value in new.items():
        site = scales.site_readers(run.readers, [name.rpartition(".")[0]])[name.rpartition(".")[0]]
        assert value.item() == convention.stored(amax[site])


def test_links_of_a_hub_snapshot_become_files(run, tmp_path):
    blobs = tiny(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(blobs / name)
    original = (blobs / "model.safetensors").read_bytes()
    export.export(export.of_run(run, "amax", run.mixes[0]), tmp_path / "out", snapshot)
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (
        (blobs / "model.safetensors").read_bytes()
        == original
        != (tmp_path / "out" / "model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("convention", scales.CONVENTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_coarse_scales_round_towards_the_larger_amax(convention, dtype):
    for amax in torch.logspace(-1, 4, 97, dtype=torch.float64).tolist():
        value = patch.decode(patch.to_bytes(convention, amax, dtype), dtype)
        back = convention.amax(torch.tensor(value, dtype=torch.float64)).item()
        tolerance = 1e-6 if dtype == "F32" else 0
        assert amax * (1 - 1e-7 - tolerance) <= back <= amax * (1.01 if dtype != "F32" else 1 + 1e-6)


def test_an_existing_target_is_kept_and_a_broken_source_refused(run, tmp_path):
    source, out = tiny(tmp_path / "c"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        export.export(export.of_run(run, "amax", run.mixes[0]), out, source)
    out.rmdir()
    with (source / "model.safetensors").open("r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(UnreadableError, match="is not whole"):
        export.export(export.of_run(run, "amax", run.mixes[0]), out, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_nothing_half_written_carries_the_name(tmp_path, with_signal):
    """The copy waits in the middle; a kill leaves no folder at OUT, and the next export succeeds."""
    source, out = tiny(tmp_path / "c", shards=3), tmp_path / "out"
    script = (
        "import sys, time, shutil; from studies.checkpoints import export, patch\n"
        "plain = shutil.copyfile\n"
        "def slow(a, b):\n    plain(a, b); print('copying', flush=True); time.sleep(60)\n"
        "patch.shutil.copyfile = slow\n"
        f"sys.exit(export.main(['--run', 'smollm2', '--policy', 'amax', '--out', {str(out)!r},"
        f" '--checkpoint', {str(source)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    os.kill(process.pid, with_signal)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert (with_signal == signal.SIGKILL) == (tmp_path / "out.partial").exists()
    export.export(export.calibration_of("smollm2", "amax"), out, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out", "out.json"]


def test_the_export_says_what_is_wrong_and_exits_with_two(tmp_path):
    done = command("export", "--run", "nowhere", "--policy", "amax", "--out", tmp_path / "o")
    assert done.returncode == 2 and "no run at" in done.stderr
    done = command(
        "export", "--run", "smollm2", "--policy", "amax", "--mix", "poems", "--out", tmp_path / "o"
    )
    assert done.returncode == 2 and "has no mix 'poems'; expected one of open-sft-seven" in done.stderr
    assert not (tmp_path / "o").exists()


# Size


def test_four_hundred_gigabytes_are_read_in_seconds(tmp_path):
    folder = build(mixture_skeleton(30, 128, 7936, 80), tmp_path / "c")
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if sum(p.stat().st_blocks for p in folder.glob("*")) * 512 > size / 100:
        pytest.skip("this file system has no sparse files")
    began = time.process_time()
    assert audit.audit(folder) == []
    assert size > 400e9 and time.process_time() - began < 10


def test_a_skeleton_of_a_rebuilt_checkpoint_is_the_same(skeleton, tmp_path):
    again = take_skeleton(build(skeleton, tmp_path / "c"))
    assert again["scales"] == skeleton["scales"]
    assert again["headers"] == skeleton["headers"]
    assert get(again, DOWN) == get(skeleton, DOWN)


def test_a_report_is_exported_as_it_recommends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = json.loads((RESULTS / "report" / "reference.json").read_text())
    label, site = next(iter(stored["sites"].items()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text(json.dumps(stored))
    monkeypatch.setattr(export, "RUNS", tmp_path)
    command = ["--run", "mine", "--out", str(tmp_path / "out"), "--policy"]
    assert export.main([*command, "recommended"]) == 0
    modules = export.load_scales(tmp_path / "out")
    assert set(modules) == {name for s in stored["sites"].values() for name in s["linears"]}
    for name in site["linears"]:
        assert modules[name]["site"] == label and modules[name]["input_scale"] == site["input_scale"]
    shutil.rmtree(tmp_path / "out")
    assert export.main([*command, "least"]) == 2 and not (tmp_path / "out").exists()
    stored["sites"][label]["calibrated_amax"]["p99"] = None
    (tmp_path / "mine" / "report.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"^p99 has no value at {label}; "):
        export.calibration_of("mine", "p99")
