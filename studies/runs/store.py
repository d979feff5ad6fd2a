# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Stored runs: where the pages read captured statistics from, and what each number came from."""

from __future__ import annotations

import datetime
import hashlib
import html
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch

from nvfp4_utils.histogram import Marginals
from nvfp4_utils.sites import kind_of
from nvfp4_utils.statistics import ActivationStatistics
from studies import ROOT

RESULTS = ROOT / "results"
REFERENCE = RESULTS / "reference"
RUNS = ROOT / "runs"
# Columns stored as codes: few different texts.
LABELS = ("site", "pool", "source", "calibration", "policy", "underflow", "token", "test", "weights",
          "only", "layout")  # fmt: skip
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` to write into, which takes its place once it is whole.

    Raises ``OSError`` that says what to do if the disk is full or the folder cannot be written.
    """
    part = path.with_suffix(".partial")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"could not write {path}: {error}. Make room, or make its folder writable, and repeat the "
            "command: what is stored stays, and it goes on from there."
        ) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_table(table: pd.DataFrame, path: Path, level: int = 15) -> None:
    """Write a table as Parquet; an interrupted write leaves the old file, or none."""
    labels = [name for name in LABELS if name in table]
    table = table.astype(dict.fromkeys(labels, "category"))
    with replacing(path) as part:
        table.to_parquet(part, compression="zstd", compression_level=level, index=False,
                         write_page_checksum=True)  # fmt: skip


def read_table(path: Path, **options) -> pd.DataFrame:
    """Read what ``write_table`` wrote; ``options`` are those of ``pandas.read_parquet``.

    Raises ``FileNotFoundError``, and ``ValueError`` naming the file if it is truncated or damaged.
    """
    try:
        return pd.read_parquet(path, page_checksum_verification=True, **options)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not readable as Parquet ({error}); expected a whole table. It was truncated or "
            "damaged: delete it, and repeat the command that made it."
        ) from error


def write_json(info: dict | list, path: Path) -> None:
    """Write JSON; an interrupted write leaves the old file, or none."""
    with replacing(path) as part:
        part.write_text(json.dumps(info, indent=1) + "\n")


def check_run_name(name: str) -> None:
    """Refuse a run's name that is a path, or that a shell or a page would take for something else."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"the run's name is {name!r}; expected letters, digits, '.', '_' and '-', not a dot first: "
            "a name, not a path."
        )


def as_page_text(text: str) -> str:
    """Text as HTML and Markdown show it, nothing of it taken for markup."""
    escaped = html.escape(text)
    return re.sub(r"[`|*$\\\[\]]", lambda match: f"&#{ord(match[0])};", escaped)


def _read_info(file: Path) -> dict:
    """What ``run.json`` says. Its names become keys, paths and parts of pages."""
    try:
        info = json.loads(file.read_text())
        names = [name for key in ("mixes", "sites", "featured", "detailed_mixes", "window_mixes")
                 for name in info[key]]  # fmt: skip
        lengths = [text["length"] for text in info["texts"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); expected what a capture wrote. "
            f"Restore it, or delete {file.parent} and capture the run again."
        ) from error
    strange = [n for n in names if not re.fullmatch(r"\w[\w .,+:-]*", str(n))]
    strange += [n for n in lengths if not isinstance(n, int)]
    if strange:
        raise ValueError(
            f"{file} names {strange[0]!r}; expected mixes and sites of letters, digits and ' ._,+:-', "
            "and lengths in tokens. Such a run is not shown."
        )
    return info


class Run:
    """A captured run: ``Run()`` is the stored reference, ``Run("name")`` one in ``results`` or ``runs``.

    Tables (pandas) of a mix: ``sequences``, ``tokens``, ``subsets``, ``groups``, ``curves``, ``errors``,
    ``metrics``, ``windows``; of the run: ``end_to_end``, ``end_to_end_sequences``, ``end_to_end_snr``,
    ``single_sites``, ``layouts``. ``marginals(mix, site, pool)`` and ``joint(mix, site)``: statistics.

    ``model_name`` is escaped, as pages show it; the other names hold nothing to escape.

    Raises
    ------
    FileNotFoundError
        If there is no such run, or a table was never captured in it.
    ValueError
        If the name is a path, or a file of the run is damaged.
    """

    def __init__(self, name: str = ""):
        self.name = name or REFERENCE.name
        check_run_name(self.name)
        stored, own = RESULTS / self.name, RUNS / self.name
        self.path = own if (own / "run.json").is_file() else stored
        if not (self.path / "run.json").is_file():
            raise FileNotFoundError(
                f"no run at {own}; expected a folder with run.json. Make it with "
                f"`make capture MODEL=models/reference DATASET=python-library RUN={name or 'NAME'}`"
            )
        self.info = _read_info(self.path / "run.json")
        self.mixes: list[str] = self.info["mixes"]
        self.sites: list[str] = self.info["sites"]
        self.readers: dict[str, list[str]] = self.info["readers"]  # site -> linears that read it
        self.featured: list[str] = self.info["featured"]
        self.featured_mix: str = self.info["detailed_mixes"][0]
        self.window_mixes: list[str] = self.info["window_mixes"]
        self.model_name: str = as_page_text(self.info["model_name"])

    @property
    def kinds(self) -> list[str]:
        """The kinds of site of this run, in the order of the model."""
        return list(dict.fromkeys(kind_of(site) for site in self.sites))

    def test_sequences(self, mix: str) -> int:
        """Sequences in a mix's test pool."""
        table = self.sequences(mix)
        return int(table[table.pool == "test"].sequence.max()) + 1

    @lru_cache(maxsize=64)  # noqa: B019 - a run lives as long as its page
    def _table(self, name: str, mix: str = "") -> pd.DataFrame:
        path = self.path / mix / f"{name}.parquet"
        if not path.is_file():
            of = f" of mix {mix!r}" if mix else ""
            raise FileNotFoundError(
                f"no {name}{of} at {path}; this run holds {', '.join(self.mixes)}, and details of "
                f"{', '.join(self.info['detailed_mixes'])} only."
            )
        return read_table(path)

    def sequences(self, mix: str) -> pd.DataFrame:
        """site, pool, sequence, source, amax: each sequence's largest magnitude."""
        return self._table("sequences", mix)

    def tokens(self, mix: str) -> pd.DataFrame:
        """Each calibration sequence's largest token at each site, of detailed mixes: ``TokenAmaxes``."""
        return self._table("tokens", mix)

    def groups(self, mix: str) -> pd.DataFrame:
        """site, group, count, signal_power of each test group of sequences."""
        return self._table("groups", mix)

    def curves(self, mix: str) -> pd.DataFrame:
        """site, calibrated_amax, mse_flush, mse_floor over the whole test pool.

        Of ``window_mixes`` also mse_flush_bf16, for a bfloat16 output.
        """
        return self._table("curves", mix)

    def curve(self, mix: str, site: str) -> pd.DataFrame:
        """``curves(mix)`` of one site, by ascending calibrated amax."""
        curves = self.curves(mix)
        return curves[curves.site == site].sort_values("calibrated_amax")

    @lru_cache(maxsize=16)  # noqa: B019
    def errors(self, mix: str) -> pd.DataFrame:
        """site, calibration, policy, underflow, calibrated_amax, group, mse on ``mix``'s test pool.

        Rows under floor that equal those under flush are not stored; they are put back here.
        """
        stored = self._table("errors", mix)
        keys = ["site", "calibration", "policy"]
        flush, floor = (stored[stored.underflow == u] for u in ("flush", "floor"))
        known = pd.MultiIndex.from_frame(floor[keys].drop_duplicates())
        equal = flush[~pd.MultiIndex.from_frame(flush[keys]).isin(known)]
        return pd.concat([stored, equal.assign(underflow="floor")], ignore_index=True)

    def metrics(self, mix: str) -> pd.DataFrame:
        """What ``scoring.metric_table`` says of every scale of ``end_to_end``. Detailed mixes."""
        return self._table("metrics", mix)

    def subsets(self, mix: str) -> pd.DataFrame:
        """site, draw, n, policy, calibrated_amax, mse_flush, mse_floor: nested calibration subsets.

        Detailed mixes.
        """
        return self._table("subsets", mix)

    def windows(self, mix: str) -> pd.DataFrame:
        """site, window, signal_power, and the MSE of each ``"policy convention"`` on 256 tokens.

        Only of ``window_mixes``.
        """
        return self._table("windows", mix)

    def policies(self, mix: str) -> pd.DataFrame:
        """site, policy, calibrated_amax of the mix's calibration pool."""
        return self._table("policies", mix)

    def end_to_end(self) -> pd.DataFrame:
        """test, calibration, policy, underflow, weights, only, sequences, nll, kl, kl_p999, top1, low,
        high: the model with every setting; ``low`` and ``high`` bound its mean KL."""
        return self._table("end_to_end")

    def end_to_end_sequences(self) -> pd.DataFrame:
        """The labels of ``end_to_end``, sequence, kl, nll, top1: for paired differences."""
        return self._table("end_to_end_sequences")

    def end_to_end_snr(self) -> pd.DataFrame:
        """The labels of ``end_to_end``, site, token_snr_db: each site's SNR by token, of the first mix.

        Measured in the model whose other sites are quantized too.
        """
        return self._table("end_to_end_snr")

    def single_sites(self) -> pd.DataFrame:
        """``end_to_end`` of one quantized site at a time, named by ``only``."""
        return self._table("single_sites")

    def layouts(self) -> pd.DataFrame:
        """layout, site, policy, calibrated_amax: other lengths, and one record per sequence."""
        return self._table("layouts")

    def marginals(self, mix: str, site: str, pool: str = "calibration") -> Marginals:
        """The block-amax marginal of a pool at a site, with its amax and signal power; no elements.

        Of mixes that are not detailed, block amaxes have 4 significant bits.
        """
        grouped = self._blocks(mix)
        if (site, pool) not in grouped:
            raise KeyError(f"no marginal of {site} {pool} in {mix}; this run holds {self.sites}.")
        rows = grouped[site, pool]
        codes, counts = (torch.from_numpy(rows[c].to_numpy("int64").copy()) for c in ("code", "count"))
        scalars = self._table("pools", mix)
        of = scalars[(scalars.site == site) & (scalars.pool == pool)].iloc[0]
        return Marginals.of_blocks(torch.bfloat16, codes, counts, of.amax, of.signal_power)

    @lru_cache(maxsize=16)  # noqa: B019
    def _blocks(self, mix: str) -> dict:
        table = self._table("blocks", mix)
        return dict(list(table.groupby(["site", "pool"], sort=False, observed=True)))

    def joint(self, mix: str, site: str) -> ActivationStatistics:
        """The joint histogram of a featured site's test pool."""
        return ActivationStatistics.load(self.path / mix / f"joint.{site}.parquet")
