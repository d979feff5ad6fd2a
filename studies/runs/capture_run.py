# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture a run: every site of a model over calibration mixes, and what the pages need of it.

    python -m studies.runs.capture_run --model models/reference --dataset python-library --run try

First every mix's calibration pool, then every mix's test pool, on which all calibrations are
scored. A mix that is done is skipped when the command is repeated; with more mixes, every test pool is
scored again, by the new calibrations too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nvfp4_utils import policies
from nvfp4_utils.histogram import Marginals
from nvfp4_utils.hooks import SITES, SiteStatistics, capture, hooked
from nvfp4_utils.quantize import UNDERFLOWS
from studies.data import corpora
from studies.data.mixes import EMBEDDED_MIX

from . import scoring
from .store import REFERENCE, RUNS, Run, provenance, sha256_of, write_json, write_table
from .subsets import SubsetMarginals

WINDOW = 256  # tokens of the study's test tensor
BEGUN = "begun.json"  # what an unfinished run was begun with


def _capture(model, tokens, group_size: int, batch: int) -> dict[str, SiteStatistics]:
    return capture(model, tokens.long().split(batch), tuple(SITES), group_size=group_size)


def _marginal_rows(site: str, pool: str, m: Marginals) -> pd.DataFrame:
    parts = {"element": (m.element_codes, m.element_counts), "block": (m.block_codes, m.block_counts)}
    return pd.concat(
        pd.DataFrame({"site": site, "pool": pool, "level": level,
                      "code": codes.numpy().astype(np.int16), "count": counts.numpy()})
        for level, (codes, counts) in parts.items()
    )  # fmt: skip


def pool_tables(pool: str, sites: dict[str, SiteStatistics], source: list[str]):
    """Marginals and per-sequence amax of one pool."""
    marginals = pd.concat(_marginal_rows(k, pool, s.total.marginals) for k, s in sites.items())
    sequences = pd.concat(
        pd.DataFrame({"site": k, "pool": pool, "sequence": np.arange(len(source)),
                      "source": source, "amax": s.sequence_amax.numpy()})
        for k, s in sites.items()
    )  # fmt: skip
    return marginals, sequences


def _calibration_table(folder: Path, name: str) -> pd.DataFrame:
    """The calibration pool's rows: a file of their own until a run is done, then part of both."""
    path = folder / f"calibration_{name}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    table = pd.read_parquet(folder / f"{name}.parquet")
    return table[table.pool == "calibration"] if "pool" in table else table


def _each(function: Callable, sites: list[str], what: str) -> list:
    """``function`` of every site, several at once: its operations are small and release the lock."""
    workers = 8 if torch.cuda.is_available() else torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(function, sites), total=len(sites), desc=what))


def _calibration_stage(model, texts, path: Path, *, group: int, batch: int, draws: int) -> None:
    """Everything that a mix's calibration pool decides; nothing of the test pool is seen."""
    tokens = texts.calibration
    device = next(model.parameters()).device
    subsets = SubsetMarginals(len(tokens), draws, device)
    with hooked(model, tuple(SITES), subsets.count):
        sites = _capture(model, tokens, group, batch)
    marginals, sequences = pool_tables("calibration", sites, texts.calibration_source)
    write_table(marginals, path / "calibration_marginals.parquet")
    write_table(sequences, path / "calibration_sequences.parquet")
    write_table(subsets.table(), path / "calibration_subsets.parquet")
    found = _each(lambda site: policies.calibrate(sites[site].total), list(sites), "calibrate")
    rows = [(k, p, a) for k, amaxes in zip(sites, found, strict=True) for p, a in amaxes.items()]
    columns = ["site", "policy", "calibrated_amax"]
    write_table(pd.DataFrame(rows, columns=columns), path / "policies.parquet")


def _test_stage(
    model, texts, path: Path, calibrations: dict, mix: str, *, test_group: int, batch: int,
    window_mixes: list[str], featured: list[str],
) -> None:  # fmt: skip
    """Score every calibration on one mix's test pool. ``errors.parquet`` is written last."""
    sites = _capture(model, texts.test, test_group, batch)
    marginals, sequences = pool_tables("test", sites, texts.test_source)
    for name, table in (("marginals", marginals), ("sequences", sequences)):
        before = _calibration_table(path, name)
        write_table(pd.concat([before, table]), path / f"{name}.parquet")
    subsets = _calibration_table(path, "subsets")

    def score(site: str):
        total = sites[site].total
        oracle = {u: policies.oracle(total, u) for u in UNDERFLOWS}
        own = subsets[subsets.site == site].drop(columns=["mse_flush", "mse_floor"], errors="ignore")
        return (
            oracle,
            scoring.group_errors(site, sites[site], total, calibrations[site], oracle),
            scoring.group_table(site, sites[site]),
            scoring.curve_table(site, total, mix in window_mixes),
            scoring.score_subsets(own, total),
        )

    scored = _each(score, list(sites), "score")
    oracles, errors, *tables = zip(*scored, strict=True)
    menu = {
        site: _window_menu(calibrations[site], oracle, mix, window_mixes)
        for site, oracle in zip(sites, oracles, strict=True)
    }
    direct = scoring.WindowErrors(menu, min(WINDOW, texts.test.shape[1]))
    device = next(model.parameters()).device
    with torch.inference_mode(), hooked(model, tuple(SITES), direct.count):
        for part in tqdm(texts.test.long().split(batch), desc="windows", unit="batch"):
            getattr(model, "model", model)(input_ids=part.to(device))
    windows = direct.table()
    if mix in window_mixes:
        # float32: a single window's error is wanted to 7 digits, and the files travel with the book
        floats = dict.fromkeys(windows.columns[2:], np.float32)
        write_table(windows.astype(floats), path / "windows.parquet")  # type: ignore[arg-type]
    for site in featured:
        sites[site].total.save(path / f"joint.{site}.parquet")
    for name, table in zip(("groups", "curves", "subsets"), tables, strict=True):
        write_table(pd.concat(table), path / f"{name}.parquet")
    per_group = test_group * texts.test.shape[1] // direct.window
    by_window = scoring.window_group_errors(windows, calibrations, mix, per_group)
    write_table(pd.concat([*errors, by_window]), path / "errors.parquet")


def _scored(path: Path, mixes: list[str]) -> bool:
    """Whether a test pool has been scored with the calibrations of all mixes."""
    file = path / "errors.parquet"
    return file.exists() and set(mixes) <= set(
        pd.read_parquet(file, columns=["calibration"]).calibration
    )


def _window_menu(calibrations: dict, oracle: dict, mix: str, window_mixes: list[str]) -> dict:
    """What is scored window by window: two policies always, all of them where windows are kept."""
    own = calibrations[mix]
    menu = {scoring.DYNAMIC: np.nan, scoring.FOUR_OVER_SIX: own[scoring.FOUR_OVER_SIX]}
    if mix in window_mixes:
        menu |= {p: own[p] for p in ("amax", "p99.99", "p99.999", "headroom", "mse", "aligned")}
        menu |= {f"amax of {m}": calibrations[m]["amax"] for m in window_mixes if m != mix}
    both = {(name, u): amax for name, amax in menu.items() for u in UNDERFLOWS}
    if mix in window_mixes:
        both |= {("oracle", u): oracle[u] for u in UNDERFLOWS}
    return both


def _settings(info: dict) -> dict[str, str]:
    """What must not change while a run is made, or when mixes are added to it."""
    made = info["provenance"]
    hashes = {"model": info["model_sha256"], "code": made["source_sha256"]}
    for mix, text in info["texts"].items():
        hashes[f"texts of {mix}"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    versions = {f"version of {name}": version for name, version in made["versions"].items()}
    return hashes | made["parameters"] | versions | {"device": made["device"]}


def _begin(path: Path, info: dict) -> None:
    """Refuse to go on with a run that was made with other settings, or note those of a new one."""
    new = _settings(info)
    for file in (path / "run.json", path / BEGUN):
        if file.exists():
            old = _settings(json.loads(file.read_text()))
            changed = [f"{k} was {old[k]}, is {new[k]}" for k in old if k in new and old[k] != new[k]]
            if changed:
                raise ValueError(
                    f"{path} was captured with other settings: {'; '.join(changed)}. Expected the same: "
                    "its files would not fit together. Take another name, or delete the folder to "
                    "capture it again."
                )
    path.mkdir(parents=True, exist_ok=True)
    write_json(info, path / BEGUN)


def capture_run(
    model_name: str,
    mixes: list[str],
    path: Path,
    *,
    calibration: int,
    test: int,
    length: int = 512,
    group: int = 32,
    test_group: int = 8,
    batch: int = 32,
    draws: int = 5,
    featured: list[str] | None = None,
    featured_mixes: int = 1,
    window_mixes: int = 0,
    folder: Path | None = None,
    allow_shortfall: bool = False,
    commit: str | None = None,
) -> None:
    """Capture ``mixes`` through ``model_name`` (a folder or a hub id) into the folder ``path``.

    Joint histograms are kept of the ``featured`` sites of the first ``featured_mixes``; errors by
    window of 256 tokens, and curves for a bfloat16 output, of the first ``window_mixes``.

    What ``path`` holds already is kept. Raises ``ValueError`` if it was captured with another model,
    other parameters, texts, code, versions, or on another device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path = Path(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    model = model.to(device)  # type: ignore[arg-type]
    texts = {
        mix: corpora.sequences(mix, tokenizer, calibration=calibration, test=test, length=length,
                               folder=folder, allow_shortfall=allow_shortfall)
        for mix in mixes
    }  # fmt: skip
    info = {
        "model": model_name,
        "model_name": f"{model_path.name} model",
        "model_sha256": sha256_of(model_path) if model_path.exists() else "hub",
        "mixes": mixes,
        "featured_mixes": mixes[:featured_mixes],
        "window_mixes": mixes[:window_mixes],
        "texts": {m: t.provenance | {"shortfall": t.shortfall} for m, t in texts.items()},
        "provenance": provenance(commit, calibration=calibration, test=test, length=length, group=group,
                                 test_group=test_group, batch=batch, draws=draws),
    }  # fmt: skip
    _begin(path, info)
    for mix in mixes:
        (path / mix).mkdir(parents=True, exist_ok=True)
        if not (path / mix / "policies.parquet").exists():
            print(f"calibration pool of {mix}", flush=True)
            _calibration_stage(model, texts[mix], path / mix, group=group, batch=batch, draws=draws)
    calibrations: dict[str, dict[str, dict[str, float]]] = {}
    for mix in mixes:
        table = pd.read_parquet(path / mix / "policies.parquet")
        for site, rows in table.groupby("site", observed=True, sort=False):
            values = dict(zip(rows.policy, rows.calibrated_amax, strict=True))
            calibrations.setdefault(str(site), {})[mix] = values
    chosen = featured if featured is not None else default_featured(list(calibrations))
    for number, mix in enumerate(mixes):
        if not _scored(path / mix, mixes):
            print(f"test pool of {mix}", flush=True)
            _test_stage(
                model, texts[mix], path / mix, calibrations, mix, test_group=test_group, batch=batch,
                window_mixes=mixes[:window_mixes], featured=chosen if number < featured_mixes else [],
            )  # fmt: skip
    for mix in mixes:
        for name in ("marginals", "sequences", "subsets"):
            (path / mix / f"calibration_{name}.parquet").unlink(missing_ok=True)
    info |= {"sites": list(calibrations), "featured": chosen}
    write_json(info, path / "run.json")
    (path / BEGUN).unlink()


def default_featured(sites: list[str]) -> list[str]:
    """The first and the last layer's MLP and down-projection inputs."""
    layers = sorted({int(s.split(".")[1]) for s in sites})
    wanted = [f"layers.{i}.{s}" for i in (layers[0], layers[-1])
              for s in ("mlp_input", "down_proj_input")]  # fmt: skip
    return [site for site in wanted if site in sites]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="models/reference", help="folder or hub id")
    parser.add_argument("--dataset", default=EMBEDDED_MIX, help="mixes, comma-separated")
    parser.add_argument("--run", default="", help="name under runs/; empty: results/reference")
    parser.add_argument("--out", type=Path, default=None, help="another output folder")
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    for name, value in (("calibration", 1024), ("test", 256), ("length", 512), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--windows", type=int, default=0, help="mixes with errors by 256 tokens")
    parser.add_argument("--allow-shortfall", action="store_true")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    path = a.out or (RUNS / a.run if a.run else REFERENCE)
    capture_run(
        a.model, a.dataset.split(","), path, calibration=a.calibration, test=a.test,
        length=a.length, batch=a.batch, window_mixes=a.windows, folder=a.corpora,
        allow_shortfall=a.allow_shortfall, commit=a.commit,
    )  # fmt: skip
    print(f"run stored in {path}")
    Run(a.run) if a.out is None else None


if __name__ == "__main__":
    main()
