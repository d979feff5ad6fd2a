# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The published study's synthetic experiment: SNR against calibration size, seven distributions.

    python -m nvfp4_utils.synthetic

writes the table at full size to ``results/synthetic``: about two minutes on two CPU cores.
"""

from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import distributions, policies
from .quantize import UNDERFLOWS, input_scale_from_amax
from .results import ROOT, provenance
from .statistics import ActivationStatistics

TEST_SEED, TEST_ELEMENTS = 12345, 2**20
CALIBRATION_SEED = 100
PUBLISHED = ROOT / "results" / "published" / "published_results.json"
STORED = ROOT / "results" / "synthetic"


def sizes(max_calibration: int = 2**25) -> list[int]:
    """The study's calibration sizes, ``4**k * 1024`` and 2**25, up to ``max_calibration``."""
    return [n for n in [1024 * 4**k for k in range(8)] + [2**25] if n <= max_calibration]


def published() -> dict:
    """The study's numbers, as cited data."""
    return json.loads(PUBLISHED.read_text())


def amax_of(name: str, n: int, seed: int, device: str = "cpu") -> float:
    """Amax of one calibration sample."""
    sample = distributions.sample(name, n, seed, device=device)
    return float(sample.view(torch.int16).bitwise_and_(0x7FFF).max().view(torch.bfloat16))


def test_statistics(name: str, device: str = "cpu") -> ActivationStatistics:
    """The study's test tensor of a distribution: 2**20 elements as rows of 1024."""
    sample = distributions.sample(name, TEST_ELEMENTS, TEST_SEED, "test", device)
    return ActivationStatistics.from_tensor(sample.view(-1, 1024))


def study_table(
    *, max_calibration: int = 2**25, seeds: int = 3, device: str = "cpu", progress: bool = True
) -> pd.DataFrame:
    """Amax calibration at every size on every distribution.

    Columns: distribution, n, amax (mean over seeds), snr_db_flush, snr_db_floor (of the MSE
    averaged over seeds, as the study did), oracle_db (flush), published_db (NaN where none).
    """
    reference = published()["synthetic"]
    rows = []
    for name in tqdm(distributions.DISTRIBUTIONS, desc="synthetic", disable=not progress):
        test = test_statistics(name, device)
        oracle = test.snr_db(input_scale_from_amax(policies.oracle(test)))
        for n in sizes(max_calibration):
            amaxes = [amax_of(name, n, CALIBRATION_SEED + s, device) for s in range(seeds)]
            scales = input_scale_from_amax(torch.tensor(amaxes, dtype=torch.float64))
            snr = [10 * np.log10(test.signal_power / test.mse(scales, u).mean()) for u in UNDERFLOWS]
            known = dict(zip(reference["n_calib"], reference["snr_db"][name], strict=True))
            rows.append((name, n, np.mean(amaxes), *snr, oracle, known.get(n, np.nan)))
    columns = ["distribution", "n", "amax", *(f"snr_db_{u}" for u in UNDERFLOWS), "oracle_db",
               "published_db"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def stored_table() -> pd.DataFrame:
    """The full-size table of ``results/synthetic``."""
    return pd.read_parquet(STORED / "study.parquet")


def stored_info() -> dict:
    """Where ``stored_table`` came from."""
    return json.loads((STORED / "study.json").read_text())


def main() -> None:
    STORED.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    table = study_table()
    info = provenance(test_seed=TEST_SEED, calibration_seed=CALIBRATION_SEED, seeds=3)
    info["seconds"] = round(time.perf_counter() - began, 1)
    table.to_parquet(STORED / "study.parquet", index=False)
    (STORED / "study.json").write_text(json.dumps(info, indent=1))


if __name__ == "__main__":
    main()
