# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The published study's synthetic experiment: SNR against calibration size, seven distributions.

    python -m studies.runs.synthetic                                  # the table, two CPU cores
    python -m studies.runs.synthetic --replicates 12 --device cuda --out results/synthetic/cuda

write to ``results/synthetic``: the table, and on a GPU also its spread over other seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nvfp4_utils import policies
from nvfp4_utils.histogram import CODE_BITS, Marginals
from nvfp4_utils.quantize import UNDERFLOWS, Underflow, input_scale_from_amax
from nvfp4_utils.statistics import ActivationStatistics
from studies import ROOT
from studies.data import distributions
from studies.data.distributions import ROW

from .store import provenance, write_json, write_table

TEST_SEED, TEST_ELEMENTS = 12345, 2**20
CALIBRATION_SEED = 100
PERCENTILES = (99.0, 99.9, 99.99)
PUBLISHED = ROOT / "results" / "published" / "published_results.json"
STORED = ROOT / "results" / "synthetic"


def sizes(max_calibration: int = 2**25) -> list[int]:
    """The study's calibration sizes, ``4**k * 1024`` and 2**25, up to ``max_calibration``."""
    return [n for n in [1024 * 4**k for k in range(8)] + [2**25] if n <= max_calibration]


def published() -> dict:
    """The study's numbers, as cited data."""
    return json.loads(PUBLISHED.read_text())


def calibration_amaxes(name: str, n: int, seed: int, device: str = "cpu") -> dict[str, float]:
    """The calibrated amax of every policy of the study from one calibration sample of n elements."""
    sample = distributions.sample(name, n, seed, device=device)
    counts = torch.bincount(sample.view(torch.int16).bitwise_and_(0x7FFF), minlength=2**CODE_BITS)
    codes = counts.nonzero().view(-1)
    parts = codes.cpu(), counts[codes].cpu()
    marginals = Marginals(torch.bfloat16, *parts, *parts)  # one block level, never read
    return {"amax": marginals.amax} | {f"p{p:g}": marginals.percentile(p) for p in PERCENTILES}


def test_statistics(name: str, device: str = "cpu", seed: int = TEST_SEED) -> ActivationStatistics:
    """The study's test tensor of a distribution: 2**20 elements as rows of 1024.

    The study does not say which ten channels ``per_channel_outlier`` scales: another seed than its
    own also places them at random.
    """
    sample = distributions.sample(name, TEST_ELEMENTS, seed, "test", device).view(-1, ROW)
    if name == "per_channel_outlier" and seed != TEST_SEED:
        order = torch.randperm(ROW, generator=torch.Generator().manual_seed(seed))
        sample = sample[:, order.to(sample.device)]
    return ActivationStatistics.from_tensor(sample)


def study_table(
    *, max_calibration: int = 2**25, seeds: int = 3, device: str = "cpu", progress: bool = True,
    replicate: int = 0, percentiles: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Every policy at every calibration size on every distribution.

    Columns: distribution, n, policy, amax (calibrated, mean over seeds), snr_db_flush, snr_db_floor
    (of the MSE averaged over seeds, as the study did), oracle_db (flush), published_db (NaN where
    none). ``replicate`` 0 has the study's seeds; any other repeats it with seeds of its own.
    """
    cited = published()["synthetic"]
    rows = []
    bar = tqdm(distributions.DISTRIBUTIONS, desc="synthetic", disable=not progress)
    for name in bar:
        test = test_statistics(name, device, TEST_SEED + replicate)
        oracle = test.snr_db(input_scale_from_amax(policies.oracle(test)))
        for n in sizes(max_calibration):
            first = CALIBRATION_SEED + 1000 * replicate
            samples = [calibration_amaxes(name, n, first + s, device) for s in range(seeds)]
            known = dict(zip(cited["n_calib"], cited["snr_db"][name], strict=True))
            for policy in samples[0] if percentiles else ("amax",):
                amaxes = torch.tensor([s[policy] for s in samples], dtype=torch.float64)
                scales = input_scale_from_amax(amaxes)
                snr = [10 * np.log10(test.signal_power / test.mse(scales, u).mean())
                       for u in UNDERFLOWS]  # fmt: skip
                shown = known.get(n, np.nan) if policy == "amax" else np.nan
                rows.append((name, n, policy, float(amaxes.mean()), *snr, oracle, shown))
    columns = ["distribution", "n", "policy", "amax", *(f"snr_db_{u}" for u in UNDERFLOWS), "oracle_db",
               "published_db"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def replicates(count: int, *, device: str = "cpu") -> pd.DataFrame:
    """The whole experiment ``count`` times with other seeds: what a difference by chance looks like.

    Columns: distribution, n, replicate, snr_db_flush, snr_db_floor, oracle_db; amax policy.
    """
    tables = [
        study_table(device=device, replicate=r, percentiles=False, progress=False).assign(replicate=r)
        for r in tqdm(range(1, count + 1), desc="replicates")
    ]
    columns = ["distribution", "n", "replicate", "snr_db_flush", "snr_db_floor", "oracle_db"]
    return pd.concat(tables, ignore_index=True)[columns]


def stored_table(policy: str | None = "amax") -> pd.DataFrame:
    """The full-size table of ``results/synthetic``, of one policy or (None) of all."""
    table = pd.read_parquet(STORED / "study.parquet")
    return table if policy is None else table[table.policy == policy].drop(columns="policy")


def spike_loss() -> dict[str, float]:
    """SNR (dB) that one freak value in the calibration costs, by underflow convention.

    Of the stored spike case: the best calibration size's SNR less the worst's, which is from the sizes
    whose samples hold a spike. The test tensor is N(0, 1) without one.
    """
    table = stored_table()
    spiked = table[table.distribution == "rare_giant_spike"]
    return {u: float(np.ptp(spiked[f"snr_db_{u}"])) for u in UNDERFLOWS}


def unseen_outliers(growth: float, underflow: Underflow = "flush") -> dict[str, float]:
    """MSE on N(0, 1) of which one row in five is ``growth`` times larger than calibration saw.

    Calibrated by amax ("bmax_anchor") and headroom ("bmin_anchor") on N(0, 1), and the oracle. The
    fifth is inferred: the published oracle errors are ``0.8 + 0.2 growth**2`` times the first.
    """
    # The spike case's test tensor is N(0, 1) without a spike.
    seen = distributions.sample("rare_giant_spike", TEST_ELEMENTS, CALIBRATION_SEED, "test")
    test = distributions.sample("rare_giant_spike", TEST_ELEMENTS, TEST_SEED, "test")
    test.view(-1, ROW)[::5] *= growth
    calibration, statistics = (ActivationStatistics.from_tensor(x.view(-1, ROW)) for x in (seen, test))
    amaxes = {
        "bmax_anchor": policies.amax(calibration),
        "bmin_anchor": policies.headroom(calibration),
        "oracle": policies.oracle(statistics, underflow),
    }
    return {k: statistics.mse(input_scale_from_amax(a), underflow) for k, a in amaxes.items()}


def stored_replicates() -> pd.DataFrame:
    """The repetitions with other seeds."""
    return pd.read_parquet(STORED / "cuda" / "replicates.parquet")


def stored_info(name: str = "study") -> dict:
    """Where ``stored_table`` (or "cuda/study", "cuda/replicates") came from."""
    return json.loads((STORED / f"{name}.json").read_text())


def _store(table: pd.DataFrame, a, name: str, seconds: float, **parameters) -> None:
    a.out.mkdir(parents=True, exist_ok=True)
    write_table(table, a.out / f"{name}.parquet")
    info = provenance(a.commit, test_seed=TEST_SEED, calibration_seed=CALIBRATION_SEED, **parameters)
    write_json(info | {"seconds": round(seconds, 1)}, a.out / f"{name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicates", type=int, default=0)
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    began = time.perf_counter()
    table = study_table(device=a.device)
    _store(table, a, "study", time.perf_counter() - began, seeds=3)
    if a.replicates:
        began = time.perf_counter()
        table = replicates(a.replicates, device=a.device)
        _store(table, a, "replicates", time.perf_counter() - began, seeds=3, count=a.replicates)


if __name__ == "__main__":
    main()
