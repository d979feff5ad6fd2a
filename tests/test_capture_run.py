# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A capture that is refused, broken off, damaged or repeated; sites that are zero or sparse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

transformers = pytest.importorskip("transformers")

from nvfp4_utils.policies import CALIBRATED  # noqa: E402
from studies.data import mixes  # noqa: E402
from studies.runs import capture_run as module  # noqa: E402
from studies.runs import plan, run_folder, stages, store, unfinished  # noqa: E402
from studies.runs.capture_run import capture_run  # noqa: E402
from studies.runs.capture_settings import CaptureSettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "models" / "reference"
MIX = mixes.EMBEDDED_MIX
SETTINGS = CaptureSettings((MIX,), calibration=3, test=2, length=16, test_group=1, batch=2, draws=1)
ZERO, SPARSE = "layers.0.down_proj_input", "layers.1.down_proj_input"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[Path]:
    """A tiny model with ReLU squared: one site is all zero, another has under 1 % nonzeros; float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny operations: threads only wait for each other
    folder = tmp_path_factory.mktemp("models") / "<img src=x onerror=alert(1)>"
    torch.manual_seed(0)
    config = transformers.NemotronConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
        eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    network = transformers.NemotronForCausalLM(config)
    with torch.no_grad():
        first = network.model.layers[0]
        first.post_attention_layernorm.bias.fill_(20)  # so what it gives is positive everywhere
        first.mlp.up_proj.weight.copy_(-first.mlp.up_proj.weight.abs())  # and what this gives nowhere
        network.model.layers[1].mlp.up_proj.weight[1:].zero_()
    network.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    yield folder
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but ``run.json``, whose date may differ."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json"}  # fmt: skip


@pytest.fixture(scope="module")
def captured(model, tmp_path_factory) -> tuple[Path, str]:
    """A run, and what was printed while it was made."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        capture_run(str(model), path, SETTINGS, commit="none")
    return path, printed.getvalue()


@pytest.fixture(scope="module")
def whole(captured) -> Path:
    return captured[0]


def make_cheap(monkeypatch) -> list[str]:
    """Policies and oracle that cost nothing, text that is read once; the list fills with work done."""
    work: list[str] = []
    sequences, texts = module.corpora.sequences, TEXTS

    def calibrate(total):
        work.append("calibrate")
        found = {name: total.amax * (1 + i / 8) or np.nan for i, name in enumerate(CALIBRATED)}
        return found | {"constant": 2688.0}

    def oracles(total):
        work.append("score")
        return dict.fromkeys(("flush", "floor"), 1.5 * total.amax or np.nan)

    def read_once(mix, tokenizer, **options):
        key = repr((mix, sorted(options.items())))
        if key not in texts:
            texts[key] = sequences(mix, tokenizer, **options, progress=False)
        return texts[key]

    monkeypatch.setattr(stages, "calibrate", calibrate)
    monkeypatch.setattr(stages, "oracles", oracles)
    monkeypatch.setattr(module.corpora, "sequences", read_once)
    return work


TEXTS: dict = {}


@pytest.fixture
def cheap(monkeypatch) -> list[str]:
    return make_cheap(monkeypatch)


@pytest.fixture(scope="module")
def cheap_run(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cheap") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_cheap(patch)
        capture_run(str(model), path, SETTINGS, commit="none")
    return path


# ------------------------------------------------------------------------ refused before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": 0}, "calibration is 0; expected at least 1."),
        ({"test": 0}, "test is 0; expected at least 1."),
        ({"batch": 0}, "batch is 0; expected at least 1."),
        ({"length": 1}, "length is 1; expected at least 2."),
        ({"mixes": ()}, "the mixes are none; expected one or several of "),
        ({"mixes": (MIX, "nosuch")}, f"the mixes are {MIX},nosuch; expected one or several of "),
        ({"mixes": (MIX, MIX)}, f"mixes has {MIX} twice; expected each once."),
        ({"windows": 1, "length": 384}, "length is 384; expected a multiple of 256 tokens where errors"),
        ({"layouts": (16,)}, "layouts has 16; expected lengths of at least 2 tokens other than 16"),
        ({"layouts": (4096,)}, "layouts has 4096; expected lengths of at least 2 tokens other than 16"),
        ({"featured": ("a", "a")}, "featured has a twice; expected each once."),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        capture_run("no/such/model", tmp_path / "run", replace(SETTINGS, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_no_window_divides_is_captured_where_windows_are_not_kept(
    model, tmp_path, cheap
) -> None:
    assert stages.scoring.window_length(384) == 384 and stages.scoring.window_length(512) == 256
    settings = replace(SETTINGS, test=1, calibration=1, length=300, detailed=1)
    capture_run(str(model), tmp_path / "run", settings)
    errors = pd.read_parquet(tmp_path / "run" / MIX / "errors.parquet")
    assert set(errors.policy) >= {"dynamic", "four-over-six"}


@pytest.fixture
def no_network(monkeypatch) -> None:
    def load(name):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(module.models, "load_network", load)


def test_a_folder_without_a_tokenizer_says_so(model, tmp_path, no_network) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"^{re.escape(str(tmp_path))} holds no tokenizer that works; "
    ):
        capture_run(str(tmp_path), tmp_path / "run", SETTINGS)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_by_name(
    model, tmp_path, cheap, no_network
) -> None:
    shutil.copytree(model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    message = (
        rf"^the tokenizer of {re.escape(str(tmp_path / 'm'))}, of \d+ tokens, made the token \d+ of"
    )
    with pytest.raises(ValueError, match=message):
        capture_run(str(tmp_path / "m"), tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()


def test_an_unknown_featured_site_is_named(model, tmp_path, cheap) -> None:
    settings = replace(SETTINGS, featured=("layers.9.mlp_input",))
    message = "^featured has layers.9.mlp_input; expected sites of layers.0.attention_input, "
    with pytest.raises(ValueError, match=message):
        capture_run(str(model), tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a/../b", "/tmp/x", "a b", ".x", "..", "a`b", "$(x)", "a\n"])
def test_a_run_is_a_name_not_a_path(name, capsys) -> None:
    message = f"the run's name is {name!r}; expected letters, digits, '.', '_' and '-', not a dot first"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        store.Run(name)
    assert module.main(["--run", name]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_name_of_a_stored_run_is_not_taken(capsys) -> None:
    assert module.main(["--run", "smollm2"]) == 1
    assert "smollm2 is a run that the book stores; expected another name" in capsys.readouterr().err


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "RUN", "TEST")}
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.book", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)


@pytest.mark.parametrize("name", ["a b", "../x", ".x", "a`touch x`", "$(shell touch EVIL)", "a'b"])
def test_make_refuses_a_run_that_is_no_name(name) -> None:
    done = make("book", f"RUN={name}")
    assert done.returncode == 2 and not (ROOT / "EVIL").exists()
    assert f"RUN is '{name}'; expected a name of letters, digits" in done.stderr


def test_make_passes_every_option_of_a_capture_on() -> None:
    command = ["capture", "RUN=a-1.b_c", "MODEL=m", "DATASET=d"]
    assert make(*command).stdout.split("--run")[1].split() == ['"a-1.b_c"', "\\"]
    done = make(*command, "LENGTH=256", "END_TO_END=1", "ALLOW_SHORTFALL=0", "TEST_GROUP=2", "TEST=9")
    options = done.stdout.split("--run")[1].split()[2:]
    expected = ["--test", '"9"', "--test-group", '"2"', "--length", '"256"', "--end-to-end"]
    assert sorted(options) == sorted(expected)
    known = {f"--{name.replace('_', '-')}" for name in CaptureSettings.__dataclass_fields__}
    text = (ROOT / "Makefile").read_text()
    passed = re.findall(r"(?m)^(?:COUNTS|SWITCHES) := (.*)$", text)
    assert {f"--{o}" for o in " ".join(passed).split()} == known - {"--mixes"} | {"--corpora"}


# ------------------------------------------------------------------------------- zero and sparse sites


def test_zero_and_sparse_sites_leave_nan_and_a_line(captured) -> None:
    path, printed = captured
    assert f"{ZERO} has too few nonzero activations for amax, p99, " in printed
    assert f"{SPARSE} has too few nonzero activations for p99: no value there" in printed
    assert printed.count("no value there") == 2
    policies = pd.read_parquet(path / MIX / "policies.parquet")
    missing = policies[policies.calibrated_amax.isna()]
    assert set(missing[missing.site == SPARSE].policy) == {"p99"}
    assert set(policies[policies.site == ZERO].policy) - set(missing[missing.site == ZERO].policy) == {
        "constant"
    }
    assert set(missing.site) == {ZERO, SPARSE}
    errors = pd.read_parquet(path / MIX / "errors.parquet")
    unknown = errors[errors.mse.isna()]
    assert set(zip(unknown.site, unknown.policy, strict=True)) == (
        set(zip(missing.site, missing.policy, strict=True)) | {(ZERO, "oracle")}
    )
    zero = errors[(errors.site == ZERO) & errors.policy.isin(["constant", "dynamic"])]
    assert len(zero) and (zero.mse == 0).all()
    metrics = pd.read_parquet(path / MIX / "metrics.parquet")
    assert metrics[metrics.site == ZERO].snr_db.isna().all()
    sparse = metrics[metrics.site == SPARSE]
    assert set(sparse[sparse.snr_db.isna()].policy) == {"p99"}
    for name in ("subsets", "curves", "sequences"):
        assert ZERO in set(pd.read_parquet(path / MIX / f"{name}.parquet").site)


def test_the_model_is_evaluated_without_the_policies_that_have_no_value(
    model, tmp_path, cheap, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(plan, "SWEEP", (0, 1))
    monkeypatch.setattr(plan, "SINGLE", (0,))
    settings = replace(SETTINGS, end_to_end=True, layouts=(8,))
    path = tmp_path / "run"
    capture_run(str(model), path, settings, commit="none")
    printed = capsys.readouterr().out
    named = re.findall(rf"is not evaluated with (.*): no value at {re.escape(ZERO)}", printed)
    assert named and named[0].split(", ")[:2] == ["amax", "p99"]
    table = pd.read_parquet(path / "end_to_end.parquet")
    everywhere = table[table.only == ""]
    assert set(everywhere.policy) == {
        "none", "constant", "dynamic per sequence", "dynamic per token"
    }  # fmt: skip
    assert set(table[table.only == "mlp_input"].policy) >= {"amax", "headroom"}
    assert np.isfinite(table.kl).all()
    single = pd.read_parquet(path / "single_sites.parquet")
    assert ZERO not in set(single.only) and single.only.nunique() == 7
    before = contents(path)
    (path / "single_sites.parquet").unlink()
    capture_run(str(model), path, settings, commit="none")
    assert contents(path) == before


# ---------------------------------------------------------------------------------- what run.json says


@pytest.fixture
def finished(model, cheap_run, tmp_path, cheap) -> tuple[Path, Callable[..., None]]:
    """A finished run, and the command that made it."""
    path = tmp_path / "runs" / "run"
    shutil.copytree(cheap_run, path)

    def repeat(**changes) -> None:
        name = changes.pop("model", model)
        capture_run(str(name), path, replace(SETTINGS, **changes), commit="none")

    return path, repeat


def test_a_repeated_command_makes_nothing_and_leaves_run_json(finished, cheap) -> None:
    path, repeat = finished
    before, done = (path / "run.json").read_bytes(), len(cheap)
    stamp = (path / "run.json").stat().st_mtime_ns
    repeat()
    assert len(cheap) == done
    assert (path / "run.json").read_bytes() == before
    assert (path / "run.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 1}, "windows was 0, is 1"),
        ({"featured": ("layers.0.mlp_input",)}, "featured was [], is ['layers.0.mlp_input']"),
        ({"detailed": 2}, "detailed was 1, is 2"),
        ({"end_to_end": True}, "end_to_end was False, is True"),
        ({"mixes": ("second", MIX)}, f"mixes was {MIX}, is second,{MIX} (more may follow"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(
    finished, changes, message, no_network, monkeypatch
) -> None:
    monkeypatch.setitem(mixes.MIXES, "second", mixes.MIXES[MIX][:1])
    path, repeat = finished
    before = contents(path) | {"run.json": (path / "run.json").read_bytes()}
    with pytest.raises(ValueError, match=rf"was captured with other settings: .*{re.escape(message)}"):
        repeat(**changes)
    assert contents(path) | {"run.json": (path / "run.json").read_bytes()} == before


def test_a_copy_of_the_model_with_a_readme_is_the_same_model(finished, model, tmp_path) -> None:
    path, repeat = finished
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("about")
    before = contents(path)
    repeat(model=copy)
    assert contents(path) == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(ValueError, match=r"config\.json of the model was [0-9a-f]{64}, is"):
        repeat(model=copy)


def test_dtypes_are_recorded_and_the_cast_is_said(finished, model, capsys) -> None:
    path, repeat = finished
    repeat()
    assert "a float32 checkpoint, cast to bfloat16" in capsys.readouterr().out
    info = json.loads((path / "run.json").read_text())
    assert (info["checkpoint_dtype"], info["dtype"]) == ("float32", "bfloat16")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(info["model_files"])


def test_the_revision_of_a_hub_model_is_known_and_checked(finished, monkeypatch) -> None:
    path, _ = finished
    config = transformers.AutoConfig.from_pretrained(TOKENIZER)
    config._commit_hash = "abc"
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda source: config)
    checkpoint = module.models.describe("org/model")
    assert (checkpoint.revision, checkpoint.dtype, checkpoint.files) == ("abc", "bfloat16", {})
    info = json.loads((path / "run.json").read_text()) | {"model_revision": "abc"}
    store.write_json(info, path / "run.json")
    with pytest.raises(ValueError, match="revision of the model was abc, is def"):
        run_folder.check_same(path, info | {"model_revision": "def"})
    run_folder.check_same(path, info)


def test_every_file_that_is_deleted_or_truncated_is_made_again(finished, capsys) -> None:
    path, repeat = finished
    before = contents(path)
    for number, name in enumerate(before):
        file = path / name
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-20])
            if "joint" not in name:
                with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is not readable as"):
                    store.read_table(file)
    repeat()
    assert contents(path) == before
    for name in (f"{MIX}/curves.parquet", f"{MIX}/policies.parquet"):
        (path / name).unlink()
        repeat()
        assert contents(path) == before
    assert "made again: " in capsys.readouterr().out


def test_a_flipped_byte_of_a_table_is_found(tmp_path) -> None:
    file = tmp_path / "t.parquet"
    store.write_table(pd.DataFrame({"a": np.random.default_rng(0).random(1000)}), file)
    data = bytearray(file.read_bytes())
    data[3000] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is not readable as Parquet"):
        store.read_table(file)


def test_an_unreadable_note_blocks_nothing_where_nothing_is_lost(model, tmp_path, cheap) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "begun.json").touch()
    capture_run(str(model), path, SETTINGS, commit="none")
    (path / "run.json").write_text("{")
    message = rf"^{re.escape(str(path / 'run.json'))} cannot be read; expected what the other files"
    with pytest.raises(ValueError, match=message):
        capture_run(str(model), path, SETTINGS, commit="none")


# -------------------------------------------------------------------------- broken off, killed, locked


def test_a_run_that_crashes_at_many_writes_ends_the_same_and_redoes_no_site(
    model, cheap_run, tmp_path, cheap, monkeypatch
) -> None:
    path = tmp_path / "crashed"
    replace_file, rename, left = Path.replace, Path.rename, [0]

    def crashing(operation):
        def crash(self, target):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return operation(self, target)

        return crash

    monkeypatch.setattr(Path, "replace", crashing(replace_file))
    monkeypatch.setattr(Path, "rename", crashing(rename))
    crashes, step = 0, 9
    while not (path / "run.json").exists():
        left[0], step = step, step + 2
        try:
            capture_run(str(model), path, SETTINGS, commit="none")
        except KeyboardInterrupt:
            crashes += 1
    assert crashes >= 5
    assert contents(path) == contents(cheap_run)
    info = [json.loads((p / "run.json").read_text()) for p in (path, cheap_run)]
    assert info[0] == info[1]
    # A crash may cost the site in flight, no other.
    assert cheap.count("calibrate") + cheap.count("score") <= 16 + crashes


def test_a_killed_capture_goes_on_with_the_sites_that_are_left(
    model, whole, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "run"
    command = [sys.executable, "-m", "studies.runs.capture_run", "--model", str(model), "--out",
               str(path), "--calibration", "3", "--test", "2", "--length", "16", "--test-group", "1",
               "--batch", "2", "--draws", "1", "--commit", "none"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    side = path / MIX / unfinished.FOLDER
    while len(list(side.glob("test/done-*/layers.*.*_input"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p.name for p in side.glob("test/done-*/layers.*.*_input")}
    scored, oracles = [], stages.oracles

    def count(total):
        scored.append(total)
        return oracles(total)

    monkeypatch.setattr(stages, "oracles", count)
    capture_run(str(model), path, SETTINGS, commit="none")
    assert len(scored) == 8 - len(done)
    assert contents(path) == contents(whole)


def test_side_files_give_the_statistics_back(tmp_path) -> None:
    from nvfp4_utils.statistics import ActivationStatistics, SiteStatistics

    x = torch.randn(5, 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = [ActivationStatistics.from_tensor(part) for part in x.split(2)]
    amax = x.abs().flatten(1).amax(1).double()
    unfinished.keep(tmp_path, {"a": SiteStatistics(2, groups, amax)})
    back = unfinished.statistics(tmp_path, "a", "cpu")
    assert back.group_size == 2 and torch.equal(back.sequence_amax, amax)
    assert len(back.groups) == 3
    for one, two in zip(groups, back.groups, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.counts, two.counts)
        assert one.dtype == two.dtype and two.counts.dtype == torch.int64
    assert unfinished.kept(tmp_path, ["a"]) and not unfinished.kept(tmp_path, ["a", "b"])
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert not unfinished.kept(tmp_path, ["a"])


def test_an_error_names_its_site(tmp_path) -> None:
    def fail(site):
        raise ValueError("x holds NaN")

    with pytest.raises(ValueError, match=r"^layers\.3\.mlp_input: x holds NaN$"):
        unfinished.each_site(tmp_path, ["layers.3.mlp_input"], fail, "score")


def test_one_writer_a_run_and_a_dead_one_does_not_count(tmp_path) -> None:
    holder = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+');"
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "run"
    with run_folder.locked(path):
        pass
    lock = tmp_path / ".run.lock"
    lock.write_text("process 7 on host, since noon")
    process = subprocess.Popen([sys.executable, "-c", holder, lock], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    message = f"the run {path} is being written by process 7 on host, since noon; expected one writer."
    with pytest.raises(OSError, match=f"^{re.escape(message)}"):
        capture_run("no/such/model", path, SETTINGS)
    process.kill()
    process.wait()
    with run_folder.locked(path):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said_and_damages_nothing(tmp_path) -> None:
    table, info = pd.DataFrame({"a": np.random.default_rng(0).random(9999)}), {"a": "b" * 99999}
    for name, write, content in (("t.parquet", store.write_table, table),
                                 ("run.json", store.write_json, info)):  # fmt: skip
        file = tmp_path / name
        write(content, file)
        before = file.read_bytes()
        file.with_suffix(".partial").symlink_to("/dev/full")
        with pytest.raises(OSError, match=rf"^could not write {re.escape(str(file))}: .*No space left"):
            write(content, file)
        assert file.read_bytes() == before and not file.with_suffix(".partial").is_symlink()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert module.main(["--out", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# ------------------------------------------------------------------------------------------------ pages


def test_a_name_from_a_run_is_text_on_a_page(whole, monkeypatch) -> None:
    from studies.pages import plots

    monkeypatch.setattr(store, "RUNS", whole.parent)
    shown: list[str] = []
    monkeypatch.setattr(plots, "_display", lambda kind, text: shown.append(text))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run = store.Run(whole.name)
    assert run.info["model_name"] == "<img src=x onerror=alert(1)> model"
    plots.answer(f"Of the {run.model_name}.")
    plots.prose(f"Of the {run.model_name}.")
    names = {"run": whole.name}
    cells = json.loads((ROOT / "notebooks" / "explore.ipynb").read_text())["cells"]
    for cell in cells:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "skip-execution" not in tags:
            exec("".join(cell["source"]), names)
            names["run"] = whole.name  # as papermill does, after the cell of parameters
    text = "".join(shown)
    assert text.count("&lt;img src=x") >= 3
    assert "<img src=x" not in text


def test_page_text_is_no_markup_of_markdown() -> None:
    text = store.as_page_text("`a`|b*c*[d](e)$f$<g>&\\h my_model-1.0 (8 layers), x")
    assert not set("`|*[]$<>\\") & set(text) and "my_model-1.0 (8 layers), x" in text
    markdown = pytest.importorskip("markdown_it").MarkdownIt()
    html = markdown.render(f"x {text} y")
    assert html.startswith("<p>x `a`|b*c*[d](e)$f$&lt;g&gt;&amp;\\h my_model")


@pytest.mark.parametrize("key", ["mixes", "sites", "featured", "detailed_mixes", "window_mixes"])
def test_a_run_with_markup_for_a_mix_or_site_is_not_shown(key, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "RUNS", tmp_path)
    info = json.loads((store.REFERENCE / "run.json").read_text())
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(json.dumps(info | {key: ["<b>"]}))
    with pytest.raises(ValueError, match=r"run\.json names '<b>'; expected mixes and sites of letters"):
        store.Run("r")
    (tmp_path / "r" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged \(JSONDecodeError: "):
        store.Run("r")


@pytest.mark.parametrize("name", ["reference", "smollm2", "gemma3"])
def test_stored_runs_load_as_they_are(name) -> None:
    run = store.Run(name)
    assert run.model_name == run.info["model_name"]
