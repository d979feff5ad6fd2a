# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture a run: every site of a model over calibration mixes, and what the pages need of it.

    python -m nvfp4_utils.capture_run --model models/reference --dataset python-library --run try

First every mix's calibration pool, then every mix's test pool, on which all calibrations are
scored. A mix that is done is skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import corpora, policies
from .capture import SITES, SiteStatistics, capture
from .quantize import UNDERFLOWS, input_scale_from_amax
from .results import REFERENCE, RUNS, Run, provenance, sha256_of
from .statistics import Marginals, codes_to_values

PERCENTILES = (99.0, 99.9, 99.99, 99.999)
CURVE_OCTAVES = 19  # above the largest block amax: past the last subnormal block scale


def policy_amaxes(statistics) -> dict[str, float]:
    """The calibrated amax of every policy that looks at calibration data only."""
    return {
        "amax": policies.amax(statistics),
        **{f"p{p:g}": policies.percentile(statistics, p) for p in PERCENTILES},
        "headroom": policies.headroom(statistics),
        "constant": policies.constant(statistics),
    }


def curve_amaxes(statistics) -> np.ndarray:
    """Where the stored curve is evaluated: every bfloat16 from p99 (or 1/64 of the amax) to twice
    the amax, so that amax and percentile calibrations lie on it exactly; then 16 an octave."""
    top = torch.tensor(2 * statistics.amax, dtype=torch.bfloat16).view(torch.int16)
    low = min(max(statistics.percentile(99), statistics.amax / 2**12), statistics.amax / 64)
    bottom = torch.tensor(low, dtype=torch.bfloat16).view(torch.int16)
    dense = codes_to_values(torch.arange(int(bottom), int(top) + 1), torch.bfloat16).numpy()
    steps = np.arange(16, 16 * CURVE_OCTAVES + 1) / 16
    return np.concatenate([dense, statistics.amax * 2 ** steps[1:]])


def _capture(model, tokens, group_size: int, batch: int) -> dict[str, SiteStatistics]:
    return capture(model, tokens.long().split(batch), tuple(SITES), group_size=group_size)


def _marginal_rows(site: str, pool: str, m: Marginals) -> pd.DataFrame:
    parts = {"element": (m.element_codes, m.element_counts), "block": (m.block_codes, m.block_counts)}
    return pd.concat(
        pd.DataFrame({"site": site, "pool": pool, "level": level,
                      "code": codes.numpy().astype(np.int16), "count": counts.numpy()})
        for level, (codes, counts) in parts.items()
    )  # fmt: skip


def _pool_tables(pool: str, sites: dict[str, SiteStatistics], source: list[str]):
    """Marginals and per-sequence amax of one pool."""
    marginals = pd.concat(_marginal_rows(k, pool, s.total.marginals) for k, s in sites.items())
    sequences = pd.concat(
        pd.DataFrame({"site": k, "pool": pool, "sequence": np.arange(len(source)),
                      "source": source, "amax": s.sequence_amax.numpy()})
        for k, s in sites.items()
    )  # fmt: skip
    return marginals, sequences


def _score(site: str, test: SiteStatistics, calibrations: dict[str, dict[str, float]]):
    """Errors of every calibration on every test group, group sizes, and the pool's curve."""
    total = test.total
    rows = []
    for underflow in UNDERFLOWS:
        menu = [(m, p, a) for m, amaxes in calibrations.items() for p, a in amaxes.items()]
        menu.append(("test", "oracle", policies.oracle(total, underflow)))
        menu.append(("test", "dynamic", total.amax))
        scales = input_scale_from_amax(torch.tensor([a for *_, a in menu], dtype=torch.float64))
        for group, statistics in enumerate(test.groups):
            mse = statistics.mse(scales, underflow)
            rows += [(site, m, p, underflow, a, group, e)
                     for (m, p, a), e in zip(menu, mse, strict=True)]  # fmt: skip
    errors = pd.DataFrame(rows, columns=["site", "calibration", "policy", "underflow",
                                         "calibrated_amax", "group", "mse"])  # fmt: skip
    groups = pd.DataFrame({
        "site": site, "group": np.arange(len(test.groups)),
        "count": [g.count for g in test.groups],
        "signal_power": [g.signal_power for g in test.groups],
    })  # fmt: skip
    amaxes = curve_amaxes(total)
    scales = input_scale_from_amax(torch.from_numpy(amaxes))
    curve = pd.DataFrame({"site": site, "calibrated_amax": amaxes}
                         | {f"mse_{u}": total.mse(scales, u) for u in UNDERFLOWS})  # fmt: skip
    return errors, groups, curve


def _write(table: pd.DataFrame, path: Path) -> None:
    for name in ("site", "pool", "level", "source", "calibration", "policy", "underflow"):
        if name in table:
            table[name] = table[name].astype("category")
    part = path.with_suffix(".partial")
    table.to_parquet(part, compression="zstd", compression_level=15, index=False)
    part.rename(path)  # an interrupted write leaves no file that looks whole


def _calibration_table(folder: Path, name: str) -> pd.DataFrame:
    """The calibration pool's rows: a file of their own until a run is done, then part of both."""
    path = folder / f"calibration_{name}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    table = pd.read_parquet(folder / f"{name}.parquet")
    return table[table.pool == "calibration"]


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
    featured: list[str] | None = None,
    featured_mixes: int = 1,
    folder: Path | None = None,
    allow_shortfall: bool = False,
    commit: str | None = None,
) -> None:
    """Capture ``mixes`` through ``model_name`` (a folder or a hub id) into the folder ``path``."""
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
    for mix in mixes:
        (path / mix).mkdir(parents=True, exist_ok=True)
        if (path / mix / "policies.parquet").exists():
            continue
        print(f"calibration pool of {mix}", flush=True)
        sites = _capture(model, texts[mix].calibration, group, batch)
        marginals, sequences = _pool_tables("calibration", sites, texts[mix].calibration_source)
        _write(marginals, path / mix / "calibration_marginals.parquet")
        _write(sequences, path / mix / "calibration_sequences.parquet")
        rows = [(k, p, a) for k, s in sites.items() for p, a in policy_amaxes(s.total).items()]
        _write(pd.DataFrame(rows, columns=["site", "policy", "calibrated_amax"]),
               path / mix / "policies.parquet")  # fmt: skip
    calibrations: dict[str, dict[str, dict[str, float]]] = {}
    for mix in mixes:
        table = pd.read_parquet(path / mix / "policies.parquet")
        for site, rows in table.groupby("site", observed=True):
            values = dict(zip(rows.policy, rows.calibrated_amax, strict=True))
            calibrations.setdefault(str(site), {})[mix] = values
    for number, mix in enumerate(mixes):
        if (path / mix / "errors.parquet").exists():
            continue
        print(f"test pool of {mix}", flush=True)
        sites = _capture(model, texts[mix].test, test_group, batch)
        marginals, sequences = _pool_tables("test", sites, texts[mix].test_source)
        for name, table in (("marginals", marginals), ("sequences", sequences)):
            before = _calibration_table(path / mix, name)
            _write(pd.concat([before, table]), path / mix / f"{name}.parquet")
        scored = [_score(k, s, calibrations[k]) for k, s in tqdm(sites.items(), desc="score")]
        chosen = featured if featured is not None else default_featured(list(sites))
        for site in chosen if number < featured_mixes else []:
            sites[site].total.save(path / mix / f"joint.{site}.parquet")
        for name, tables in zip(("errors", "groups", "curves"), zip(*scored, strict=True), strict=True):
            if name != "errors":
                _write(pd.concat(tables), path / mix / f"{name}.parquet")
        _write(pd.concat([s[0] for s in scored]), path / mix / "errors.parquet")
    for mix in mixes:
        for name in ("marginals", "sequences"):
            (path / mix / f"calibration_{name}.parquet").unlink(missing_ok=True)
    info = {
        "model": model_name,
        "model_name": f"{model_path.name} model",
        "model_sha256": sha256_of(model_path) if model_path.exists() else "hub",
        "mixes": mixes,
        "sites": list(calibrations),
        "featured": featured if featured is not None else default_featured(list(calibrations)),
        "featured_mixes": mixes[:featured_mixes],
        "texts": {m: t.provenance | {"shortfall": t.shortfall} for m, t in texts.items()},
        "provenance": provenance(commit, calibration=calibration, test=test, length=length,
                                 group=group, test_group=test_group, batch=batch),
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(info, indent=1))


def default_featured(sites: list[str]) -> list[str]:
    """The first and the last layer's MLP and down-projection inputs."""
    layers = sorted({int(s.split(".")[1]) for s in sites})
    wanted = [f"layers.{i}.{s}" for i in (layers[0], layers[-1])
              for s in ("mlp_input", "down_proj_input")]  # fmt: skip
    return [site for site in wanted if site in sites]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="models/reference", help="folder or hub id")
    parser.add_argument("--dataset", default=corpora.EMBEDDED_MIX, help="mixes, comma-separated")
    parser.add_argument("--run", default="", help="name under runs/; empty: results/reference")
    parser.add_argument("--out", type=Path, default=None, help="another output folder")
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    for name, value in (("calibration", 1024), ("test", 256), ("length", 512), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--allow-shortfall", action="store_true")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    path = a.out or (RUNS / a.run if a.run else REFERENCE)
    capture_run(
        a.model, a.dataset.split(","), path, calibration=a.calibration, test=a.test,
        length=a.length, batch=a.batch, folder=a.corpora, allow_shortfall=a.allow_shortfall,
        commit=a.commit,
    )  # fmt: skip
    print(f"run stored in {path}")
    Run(a.run) if a.out is None else None


if __name__ == "__main__":
    main()
