# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Stored scales beside a captured run of the same model: slack to both cliffs, and the expected loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from nvfp4_utils.quantize import AMAX_PER_SCALE, E4M3_MAX
from studies.runs.store import Run

from .findings import Finding, Scale, Severity
from .scales import site_readers

# Half a decibel is what the pages call harm; three are twice the noise power.
LOSS_WARNING_DB, LOSS_ERROR_DB = 0.5, 3.0
# Mistakes that multiply every amax by one factor: amax stored for the scale (2688, or 448 or 6 of it
# left out).
FACTORS = (AMAX_PER_SCALE, E4M3_MAX, 6.0)
FACTOR_TOLERANCE = 2.0**0.25  # text moves an amax by less than this at most sites
# Rank correlation of stored amaxes with the run's over sites. Read rightly, no policy on any text of
# the stored
# runs has less than -0.42; the reciprocal turns the sign.
RANK_LIMIT = -0.5
FACTOR_SHARE = 0.75  # of the sites: a policy that raises amaxes raises them unequally


def slack_table(scales: Iterable[Scale], run: Run, mix: str) -> pd.DataFrame:
    """A row per sound scale whose module reads a site of the run, on the mix's test pool.

    tensor, site, amax; ``of_amax``: over the run's calibrated amax; ``saturation``: octaves from the
    largest block seen in either pool up to the stored amax, negative if it clips; ``underflow``:
    octaves from the stored amax up to where blocks notice (policy ``raised-all``: amax raised by all
    its room), negative if they do; ``loss_db``: SNR below the best of the error curve, flush.

    The SNR weights blocks by their energy and hardly sees small ones; ``underflow``, which weights all
    blocks alike, does.
    """
    scales = [s for s in scales if s.sound]
    sites = site_readers(run.readers, {s.module.name for s in scales})
    policies = run.policies(mix).pivot_table(
        index="site", columns="policy", values="calibrated_amax", observed=True
    )
    curves = dict(list(run.curves(mix).sort_values("calibrated_amax").groupby("site", observed=True)))
    largest = {
        site: max(run.marginals(mix, site, pool).amax for pool in ("calibration", "test"))
        for site in set(sites.values())
    }
    rows = []
    for scale in scales:
        site = sites.get(scale.module.name)
        if site is None:
            continue
        curve = curves[site]
        mse = np.interp(np.log2(scale.amax), np.log2(curve.calibrated_amax), curve.mse_flush)
        top = policies["raised-all"].get(site, np.nan) if "raised-all" in policies else np.nan
        rows.append((scale.tensor, site, scale.amax, scale.amax / policies.amax[site],
                     np.log2(scale.amax / largest[site]), np.log2(top / scale.amax),
                     10 * np.log10(mse / curve.mse_flush.min())))  # fmt: skip
    columns = ["tensor", "site", "amax", "of_amax", "saturation", "underflow", "loss_db"]
    return pd.DataFrame(rows, columns=columns)


def slack_findings(scales: Iterable[Scale], run: Run, mix: str) -> Iterator[Finding]:
    """``slack`` of every site's reader, and ``magnitude`` where all are off by one known factor.

    Raises ``ValueError`` if no module of the checkpoint reads a site of the run.
    """
    scales = list(scales)
    table = slack_table(scales, run, mix)
    if scales and table.empty:
        raise ValueError(
            f"run {run.name!r} has sites such as {run.sites[0]}, and no scale of the checkpoint "
            "belongs to "
            f"one, not {scales[0].tensor}; expected the run of the same model. Name it with RUN=."
        )
    yield from _exchanged(table, run, mix)
    yield from _common_factor(table, run, mix)
    for row in table.to_dict("records"):
        yield _slack(row, run, mix)


def _slack(row: dict[str, Any], run: Run, mix: str) -> Finding:
    loss, low, high = row["loss_db"], row["saturation"], row["underflow"]
    severity: Severity = "info"
    if loss > LOSS_ERROR_DB:
        severity = "error"
    elif loss > LOSS_WARNING_DB or high < 0:
        severity = "warning"
    clipped = (
        f"{low:.2f} octaves above the largest block" if low >= 0 else f"clips by {-low:.2f} octaves"
    )
    noticed = (
        f"{high:.2f} octaves below underflow" if high >= 0 else f"{-high:.2f} octaves into underflow"
    )
    value = {k: round(row[k], 4) for k in ("saturation", "underflow", "loss_db", "of_amax")}
    return Finding(
        row["tensor"], "slack", severity,
        f"{row['site']}: {clipped}, {noticed if high == high else 'room unknown'}, expected loss "
        f"{loss:.2f} dB "
        f"({run.name}, {mix}). Rule: a warning above {LOSS_WARNING_DB} dB or in underflow, an "
        "error above "
        f"{LOSS_ERROR_DB} dB.",
        value | {"site": row["site"]},
    )  # fmt: skip


def rank_correlation(table: pd.DataFrame) -> float:
    """Spearman's correlation of the stored amaxes with the run's, over the sites of a
    ``slack_table``."""
    sites = table.drop_duplicates("site")
    return float(sites.amax.corr(sites.amax / sites.of_amax, method="spearman"))


def _exchanged(table: pd.DataFrame, run: Run, mix: str) -> Iterator[Finding]:
    correlation = rank_correlation(table)
    if correlation < RANK_LIMIT:
        yield Finding(
            "", "magnitude", "error",
            f"sites of large amax in {run.name}, {mix}, have small ones here: rank correlation "
            f"{correlation:.2f}. Value and reciprocal look exchanged in the whole checkpoint. "
            "Rule: below "
            f"{RANK_LIMIT}.",
            round(correlation, 4),
        )  # fmt: skip


def _common_factor(table: pd.DataFrame, run: Run, mix: str) -> Iterator[Finding]:
    for factor in (f for size in FACTORS for f in (size, 1 / size)):
        off = np.abs(np.log2(table.of_amax / factor))
        share = float((off <= np.log2(FACTOR_TOLERANCE)).mean())
        if share >= FACTOR_SHARE:
            yield Finding(
                "", "magnitude", "error",
                f"{share:.0%} of the amaxes are {factor:.4g} times those of {run.name}, {mix}: a "
                "factor of "
                f"the scale's definition, amax / (6 * 448), is left out or there twice. Rule: "
                f"{FACTOR_SHARE:.0%} of the sites within {FACTOR_TOLERANCE:.3g} times 2688, 448 or 6.",
                factor,
            )  # fmt: skip
