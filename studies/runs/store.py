# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Stored runs: where the pages read captured statistics from, and what each number came from."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from functools import cached_property, lru_cache
from pathlib import Path

import pandas as pd
import torch

from nvfp4_utils.histogram import Marginals
from nvfp4_utils.statistics import ActivationStatistics
from studies import ROOT

REFERENCE = ROOT / "results" / "reference"
RUNS = ROOT / "runs"
LABELS = ("site", "pool", "level", "source", "calibration", "policy", "underflow")  # stored as codes
PACKAGES = ("torch", "triton", "transformers", "numpy", "pyarrow")


def result_code() -> list[Path]:
    """The files that make results: the package, text and models, runs. Pages and benchmarks do not."""
    folders = ("nvfp4_utils", "studies/data", "studies/runs")
    return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cu"))


def provenance(commit: str | None = None, **parameters) -> dict:
    """What a result came from: commit, hash of ``result_code``, parameters, versions, device, date."""
    if commit is None:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        commit = git.stdout.strip() or "unknown"
    source = hashlib.sha256()
    for path in result_code():
        source.update(path.read_bytes())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    gpu = torch.cuda.is_available()
    return {
        "commit": commit,
        "source_sha256": source.hexdigest(),
        "parameters": parameters,
        "versions": {"python": platform.python_version()} | versions,
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def sha256_of(path: Path) -> str:
    """Hash of a file, or of every regular file in a folder in name order."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet; an interrupted write leaves no file that looks whole."""
    labels = [name for name in LABELS if name in table]
    table = table.astype(dict.fromkeys(labels, "category"))
    part = path.with_suffix(".partial")
    table.to_parquet(part, compression="zstd", compression_level=15, index=False)
    part.replace(path)


def write_json(info: dict, path: Path) -> None:
    """Write JSON; an interrupted write leaves the old file, or none."""
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(info, indent=1) + "\n")
    part.replace(path)


class Run:
    """A captured run: ``Run()`` is the stored reference, ``Run("name")`` one in ``runs/``.

    Tables (pandas): ``sequences(mix)``, ``subsets(mix)``, ``groups(mix)``, ``curves(mix)``,
    ``errors(mix)``, ``windows(mix)``; ``marginals(mix, site, pool)`` and ``joint(mix, site)`` give
    statistics.

    Raises
    ------
    FileNotFoundError
        If there is no such run, or a mix was never captured in it.
    """

    def __init__(self, name: str = ""):
        self.path = RUNS / name if name else REFERENCE
        if not (self.path / "run.json").is_file():
            raise FileNotFoundError(
                f"no run at {self.path}; expected a folder with run.json. Make it with "
                f"`make capture MODEL=models/reference DATASET=python-library RUN={name or 'NAME'}`"
            )
        self.info = json.loads((self.path / "run.json").read_text())
        self.mixes: list[str] = self.info["mixes"]
        self.sites: list[str] = self.info["sites"]
        self.featured: list[str] = self.info["featured"]
        self.featured_mix: str = self.info["featured_mixes"][0]
        self.window_mixes: list[str] = self.info["window_mixes"]
        self.model_name: str = self.info["model_name"]

    def test_sequences(self, mix: str) -> int:
        """Sequences in a mix's test pool."""
        table = self.sequences(mix)
        return int(table[table.pool == "test"].sequence.max()) + 1

    @lru_cache(maxsize=64)  # noqa: B019 - a run lives as long as its page
    def _table(self, mix: str, name: str) -> pd.DataFrame:
        path = self.path / mix / f"{name}.parquet"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {name} of mix {mix!r} at {path}; this run holds {', '.join(self.mixes)}."
            )
        return pd.read_parquet(path)

    def sequences(self, mix: str) -> pd.DataFrame:
        """site, pool, sequence, source, amax: each sequence's largest magnitude."""
        return self._table(mix, "sequences")

    def groups(self, mix: str) -> pd.DataFrame:
        """site, group, count, signal_power of each test group of sequences."""
        return self._table(mix, "groups")

    def curves(self, mix: str) -> pd.DataFrame:
        """site, calibrated_amax, mse_flush, mse_floor over the whole test pool.

        Of ``window_mixes`` also mse_flush_bf16, for a bfloat16 output.
        """
        return self._table(mix, "curves")

    def curve(self, mix: str, site: str) -> pd.DataFrame:
        """``curves(mix)`` of one site, by ascending calibrated amax."""
        curves = self.curves(mix)
        return curves[curves.site == site].sort_values("calibrated_amax")

    def errors(self, mix: str) -> pd.DataFrame:
        """site, calibration, policy, underflow, calibrated_amax, group, mse on ``mix``'s test."""
        return self._table(mix, "errors")

    def subsets(self, mix: str) -> pd.DataFrame:
        """site, draw, n, policy, calibrated_amax, mse_flush, mse_floor: nested calibration subsets."""
        return self._table(mix, "subsets")

    def windows(self, mix: str) -> pd.DataFrame:
        """site, window, signal_power, and the MSE of each ``"policy convention"`` on 256 tokens.

        Only of ``window_mixes``.
        """
        return self._table(mix, "windows")

    def marginals(self, mix: str, site: str, pool: str = "calibration") -> Marginals:
        """Element and block-amax marginal of a pool at a site."""
        key = (site, pool)
        grouped = self._marginals(mix)
        if key not in grouped:
            raise KeyError(f"no marginal of {site} {pool} in {mix}; this run holds {self.sites}.")
        table = grouped[key]
        parts = []
        for level in ("element", "block"):
            rows = table[table.level == level]
            parts += [torch.from_numpy(rows[c].to_numpy("int64").copy()) for c in ("code", "count")]
        return Marginals(torch.bfloat16, *parts)

    def _marginals(self, mix: str) -> dict:
        if mix not in self._marginal_cache:
            table = self._table(mix, "marginals")
            self._marginal_cache[mix] = dict(
                list(table.groupby(["site", "pool"], sort=False, observed=True))
            )
        return self._marginal_cache[mix]

    @cached_property
    def _marginal_cache(self) -> dict:
        return {}

    def joint(self, mix: str, site: str) -> ActivationStatistics:
        """The joint histogram of a featured site's test pool."""
        return ActivationStatistics.load(self.path / mix / f"joint.{site}.parquet")
