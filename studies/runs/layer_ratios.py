# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Ratios of published per-layer amaxes of large models: how much calibration sets differ.

Reads the amaxes of Model-Optimizer pull request 1573 (Apache-2.0) from a CSV with the columns of
``COLUMNS`` and writes only ratios computed from them; no amax goes into the repository.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .store import RESULTS, provenance, sha256_of, write_json, write_table

COLUMNS = ("model", "site", "layer", "calibration", "g_amax")
REFERENCE_SET = "ref-max"  # amax over the published comparison's reference data
SITES = {"mlp_in": "mlp_input", "down_proj": "down_proj_input"}
SOURCE = (
    "NVIDIA Model-Optimizer pull request 1573 (Apache-2.0): calibrated amax by layer, site and "
    "calibration set; where a layer has experts, the mean over them"
)
TARGET = RESULTS / "published" / "layer_ratios.parquet"


def read_amaxes(path: Path) -> pd.DataFrame:
    """The published amaxes, one row per model, site, layer and calibration set.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it lacks a column, names an unknown site, has an amax that is not positive and finite, or a
        row twice.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; expected a CSV of published amaxes with the columns {', '.join(COLUMNS)}."
        )
    table = pd.read_csv(path)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(
            f"{path.name} has the columns {', '.join(table)}; expected also {', '.join(missing)}."
        )
    unknown = sorted(set(table.site) - set(SITES))
    if unknown:
        raise ValueError(
            f"{path.name} names the site {', '.join(unknown)}; expected {', '.join(SITES)}."
        )
    bad = ~(np.isfinite(table.g_amax) & (table.g_amax > 0))
    if bad.any():
        raise ValueError(
            f"{path.name} has {bad.sum()} values of g_amax that are not positive; remove them."
        )
    twice = table.duplicated(list(COLUMNS[:-1]))
    if twice.any():
        raise ValueError(f"{path.name} repeats {twice.sum()} rows; expected one per layer and set.")
    return table


def layer_ratios(amaxes: pd.DataFrame, reference: str = REFERENCE_SET) -> pd.DataFrame:
    """model, site, layer, set, ratio: each set's amax over the reference set's of the same layer.

    Raises
    ------
    ValueError
        If a layer has no amax of the reference set.
    """
    keys = ["model", "site", "layer"]
    own = amaxes[amaxes.calibration == reference].set_index(keys).g_amax
    table = amaxes[amaxes.calibration != reference]
    at = pd.MultiIndex.from_frame(table[keys])
    if not at.isin(own.index).all():
        raise ValueError(
            f"{(~at.isin(own.index)).sum()} rows have no amax of the set {reference!r}; expected one "
            "for every layer."
        )
    table = table.assign(
        model=[re.sub(r"\s*\(.*\)$", "", name) for name in table.model],
        site=table.site.map(SITES),
        ratio=table.g_amax / own.reindex(at).to_numpy(),
    )
    table = table.rename(columns={"calibration": "set"})
    return table[[*keys, "set", "ratio"]].reset_index(drop=True)


def write(source: Path, target: Path) -> pd.DataFrame:
    """Write the ratios and, beside them, a JSON of where they come from and what was left out."""
    amaxes = read_amaxes(source)
    ratios = layer_ratios(amaxes)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_table(ratios, target)
    compared = sorted(set(amaxes.calibration) - {REFERENCE_SET})
    models = [
        {"as published": str(name), "layers": int(rows.layer.nunique())}
        for name, rows in amaxes.groupby("model", sort=False)
    ]
    info = provenance(reference_set=REFERENCE_SET, compared_sets=compared)
    info |= {
        "source": SOURCE,
        "citation": "modelopt1573",
        "csv_sha256": sha256_of(source),
        "models": models,
    }
    info["note"] = "Ratios only: amax of a set over that of the reference set, same layer and site."
    write_json(info, target.with_suffix(".json"))
    return ratios


def main(arguments: list[str] | None = None) -> int:
    """Command line: one CSV, and where the ratios go."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, help=f"columns: {', '.join(COLUMNS)}")
    parser.add_argument("--target", type=Path, default=TARGET, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        ratios = write(options.csv, options.target)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(ratios)} ratios of {ratios.model.nunique()} models in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
