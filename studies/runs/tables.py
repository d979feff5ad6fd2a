# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The tables of a run that come from statistics as they are: pools, blocks, sequences, policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from nvfp4_utils.histogram import Marginals
from nvfp4_utils.statistics import SiteStatistics

from .plan import half_amaxes
from .store import read_table

Calibrations = dict[str, dict[str, dict[str, float]]]  # mix -> policy -> site -> calibrated amax
COARSE_BITS = 3  # of a bfloat16 code that blocks of mixes without details lose: 16 values per octave


def block_table(site: str, pool: str, m: Marginals, exact: bool) -> pd.DataFrame:
    """site, pool, code, count: how many blocks have each amax code; codes rounded down if not exact."""
    codes, counts = m.block_codes.numpy(), m.block_counts.numpy()
    if not exact:
        codes, at = np.unique(codes >> COARSE_BITS << COARSE_BITS, return_inverse=True)
        counts = np.bincount(at, weights=counts).astype(np.int64)
    return pd.DataFrame({"site": site, "pool": pool, "code": codes.astype(np.int16), "count": counts})


def pool_tables(
    pool: str, sites: dict[str, SiteStatistics], source: list[str], exact: bool
) -> dict[str, pd.DataFrame]:
    """Scalars, block marginals and per-sequence amax of one pool: pools, blocks, sequences."""
    totals = {site: statistics.total for site, statistics in sites.items()}
    pools = pd.DataFrame([
        {"site": k, "pool": pool, "count": t.count, "amax": t.amax, "signal_power": t.signal_power}
        for k, t in totals.items()
    ])  # fmt: skip
    blocks = pd.concat(block_table(k, pool, t.marginals, exact) for k, t in totals.items())
    sequences = pd.concat(
        pd.DataFrame({"site": k, "pool": pool, "sequence": np.arange(len(source), dtype=np.int32),
                      "source": source, "amax": s.sequence_amax.numpy()})
        for k, s in sites.items()
    )  # fmt: skip
    return {"pools": pools, "blocks": blocks, "sequences": sequences}


def policy_table(calibrated: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """site, policy, calibrated_amax."""
    rows = [(site, p, amax) for site, amaxes in calibrated.items() for p, amax in amaxes.items()]
    return pd.DataFrame(rows, columns=["site", "policy", "calibrated_amax"])


def read_calibrations(path: Path, mixes) -> Calibrations:
    """Every mix's policies as ``policies.parquet`` holds them."""
    found: Calibrations = {}
    for mix in mixes:
        table = read_table(path / mix / "policies.parquet")
        for policy, rows in table.groupby("policy", observed=True, sort=False):
            amaxes = dict(zip(rows.site, rows.calibrated_amax, strict=True))
            found.setdefault(mix, {})[str(policy)] = amaxes
    return found


def calibration_file(folder: Path, name: str) -> Path:
    """Where the calibration pool's rows are: in a file of their own until a run is done."""
    path = folder / f"calibration_{name}.parquet"
    return path if path.exists() else folder / f"{name}.parquet"


def calibration_table(folder: Path, name: str) -> pd.DataFrame:
    """The calibration pool's rows, without what scoring has added."""
    table = read_table(calibration_file(folder, name))
    table = table.drop(columns=["mse_flush", "mse_floor"], errors="ignore")
    return table[table.pool == "calibration"] if "pool" in table else table


def halves_of(sequences: pd.DataFrame):
    """``plan.half_amaxes`` of the table of calibration sequences."""
    by_site = sequences.groupby("site", observed=True, sort=False)
    return half_amaxes({str(site): rows.amax.to_numpy() for site, rows in by_site})


def without_equal_floor(errors: pd.DataFrame) -> pd.DataFrame:
    """Without the rows under floor whose calibration has the errors that it has under flush.

    ``Run.errors`` puts them back. Errors are kept in float32.
    """
    keys = ["site", "calibration", "policy"]
    wide = errors.pivot_table(index=[*keys, "group"], columns="underflow", values="mse", observed=True)
    differ = (wide.flush != wide.floor).groupby(keys, observed=True).any()
    # A policy without a value has no errors to compare.
    kept = differ.reindex(pd.MultiIndex.from_frame(errors[keys]), fill_value=False).to_numpy(dtype=bool)
    errors = errors[(errors.underflow == "flush").to_numpy() | kept]
    return errors.astype({"mse": np.float32, "group": np.int16})
