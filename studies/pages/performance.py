# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The performance page: what ``studies.bench`` stored, beside targets, ceilings and predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from studies.runs.store import ROOT

from . import plots

FOLDER = ROOT / "results" / "performance"
GIB = 2**30
LARGE = "1024 MiB"  # the size of the headline numbers
WIDE = 0.1  # of the median: a target whose timing spreads more is marked
KINDS = {"gaussian": "Gaussian", "swiglu": "SwiGLU-like", "lognormal": "log-normal",
         "equal": "all equal"}  # fmt: skip
MLP, FOUR = "mlp_input of all layers", "four sites of all layers"
SMALL_GROUPS = "four sites, small groups"
KEPT = {True: "#0072B2", False: "#999999"}  # colour of a version kept, and of one dropped
KERNEL_STYLE = {"fake_quantize": ("#0072B2", "o"), "block_codes": ("#009E73", "s"),
                "sort_blocks": ("#E69F00", "D"), "count_pairs": ("#D55E00", "^")}  # fmt: skip
SIZE_STYLE = {
    "copy": ("copy", "#000000", "o", ""),
    "fake_quantize_kernel": ("fake quantizer, kernel", "#0072B2", "s", ""),
    "fake_quantize": ("fake quantizer, call", "#56B4E9", "v", (1, 1)),
    "modelopt": ("ModelOpt", "#D55E00", "^", (4, 2)),
    "update": ("histogram, call", "#009E73", "D", (4, 1, 1, 1)),
}
KIND_COLUMNS = {"block_codes": "amax codes", "count_pairs": "sort, count", "update": "call",
                "update_existing": "into a statistic", "global_atomics": "global atomics"}  # fmt: skip


@dataclass(frozen=True)
class Timings:
    """The stored tables: rows have name, case, bytes, ms, ms_p20, ms_p80 and what the row is about.

    ``model_fla`` and ``model``: capture in a model, with and without ``flash-linear-attention``.
    ``counters``: a row per kernel. ``info``: provenance by part; ``log``: versions and controls.
    """

    kernels: pd.DataFrame
    model_fla: pd.DataFrame
    model: pd.DataFrame
    cpu: pd.DataFrame
    counters: pd.DataFrame
    info: dict
    log: dict

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Timings:
        """What ``python -m studies.bench`` and ``studies.bench.hardware_counters`` wrote."""
        parts = ("kernels", "model_fla", "model", "cpu")
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in parts}
        info = {n: json.loads((folder / f"{n}.json").read_text()) for n in (*parts, "counters", "log")}
        counters = pd.read_csv(folder / "counters.csv")
        counters = counters.pivot(index="kernel", columns="counter", values="value")
        return cls(**tables, counters=counters, log=info.pop("log"), info=info)

    @property
    def device(self) -> str:
        """The card the kernels ran on."""
        return self.info["kernels"]["device"]

    @property
    def all_rows(self) -> pd.DataFrame:
        """Every timing, of all parts."""
        return pd.concat([self.kernels, self.model_fla, self.model, self.cpu], ignore_index=True)


def timing(table: pd.DataFrame, name: str, case: str, size: int | None = None) -> pd.Series:
    """The row of one timing; ``size`` in bytes, where a case was timed at several.

    Raises ValueError if it was not timed.
    """
    rows = table[(table.name == name) & (table.case == case)]
    rows = rows if size is None else rows[rows.bytes == size]
    if rows.empty:
        at = "" if size is None else f" at {size} bytes"
        raise ValueError(f"no timing of {name}, {case}{at}; expected one. Run python -m studies.bench.")
    return rows.iloc[0]


def ms(table: pd.DataFrame, name: str, case: str, size: int | None = None) -> float:
    """Median milliseconds of one timing."""
    return float(timing(table, name, case, size).ms)


def histograms(t: Timings, name: str = "update") -> pd.Series:
    """Milliseconds of the histogram of 1 GiB by kind of data."""
    return pd.Series({kind: ms(t.kernels, name, kind, GIB) for kind in KINDS})


def spread(rows: pd.DataFrame) -> pd.Series:
    """How far the 20th or 80th percentile lies from the median, as a share; NaN if timed once."""
    far = np.maximum(rows.ms_p80 - rows.ms, rows.ms - rows.ms_p20) / rows.ms
    return far.where(rows.ms_p20 < rows.ms_p80)


def spread_text(t: Timings, share: float = 0.05) -> str:
    """How far percentiles lie from the medians, over every repeated timing."""
    rows = t.all_rows.assign(spread=spread(t.all_rows)).dropna(subset="spread")
    worst = rows.loc[rows.spread.idxmax()]
    return (
        f"Of {len(rows)} repeated timings the 20th and 80th percentile lie within {100 * share:g} % of "
        f"the median in {(rows.spread <= share).sum()}; the farthest is {100 * worst.spread:.0f} % "
        f"away (`{worst['name']}`, {worst.case})."
    )


def overheads(table: pd.DataFrame) -> pd.Series:
    """Overhead of capture over the plain forward (%), by case."""
    return 100 * table[table.name == "forward"].set_index("case").overhead


def targets(t: Timings, limits: dict[str, float]) -> pd.DataFrame:
    """Each target beside what was measured; ``limits`` by the names of the page's parameters.

    Columns: target, measured, sense (">=" or "<="), spread (the widest of its timings), met, off
    (factor by which a missed one is missed, else NaN).
    """
    k, fla, cpu = t.kernels, t.model_fla, t.cpu
    copy, fake, peer = (timing(k, n, LARGE) for n in ("copy", "fake_quantize_kernel", "modelopt"))
    update = {kind: timing(k, "update", kind, GIB) for kind in KINDS}
    gaussian, worst = update["gaussian"], max(update.values(), key=lambda row: row.ms)
    candidates = timing(k, "candidates", "modelopt")
    warm, cold = timing(k, "mse_again", "cuda"), timing(k, "mse", "cuda")
    plain, mlp, four = (timing(fla, "forward", case) for case in ("plain", MLP, FOUR))
    long = timing(fla, "long_capture", "all")
    slowest = cpu[cpu.name == "update"].sort_values("rate").iloc[0]
    on_cpu, oracle = timing(cpu, "mse", "cpu"), timing(cpu, "oracle", "cpu")
    layers = t.info["model_fla"]["parameters"]["layers"]
    cores = "two cores" if t.info["cpu"]["parameters"]["threads"] == 2 else "the CPU"
    rows = [
        ("fake quantizer, speed of a copy", "copy_share", copy.ms / fake.ms, ">=", copy, fake),
        ("fake quantizer, times ModelOpt's kernel", "peer_factor", peer.ms / fake.ms, ">=", peer, fake),
        ("histogram, Gaussian, copies", "update_copies", gaussian.ms / copy.ms, "<=", gaussian, copy),
        ("histogram, worst of four kinds, copies", "worst_copies", worst.ms / copy.ms, "<=",
         worst, copy),
        (f"histogram, times faster than {candidates.candidates:.0f} candidates", "oracle_factor",
         candidates.ms / gaussian.ms, ">=", candidates, gaussian),
        ("MSE at 1,000 scales, device, ms, asked before", "mse_gpu_ms", warm.ms, "<=", warm),
        ("MSE at 1,000 scales, device, ms, first time", "mse_gpu_ms", cold.ms, "<=", cold),
        (f"MSE at 1,000 scales, {cores}, ms", "mse_cpu_ms", on_cpu.ms, "<=", on_cpu),
        (f"oracle, {cores}, ms", "oracle_cpu_ms", oracle.ms, "<=", oracle),
        (f"capture of {layers} MLP inputs, % of the forward", "mlp_percent",
         100 * mlp.overhead, "<=", mlp, plain),
        (f"capture of {4 * layers} sites, % of the forward", "all_percent",
         100 * four.overhead, "<=", four, plain),
        (f"capture of {long.sequences:,.0f} sequences, s", "capture_s", long.ms / 1e3, "<=", long),
        ("the same, MB written", "written_mb", long.written / 1e6, "<=", long),
        (f"histogram on {cores}, worst of four, million elements/s", "cpu_rate",
         slowest.rate / 1e6, ">=", slowest),
    ]  # fmt: skip
    table = pd.DataFrame({
        "target": [limits[limit] for _, limit, *_ in rows],
        "measured": [measured for _, _, measured, *_ in rows],
        "sense": [sense for _, _, _, sense, *_ in rows],
        "spread": [spread(pd.DataFrame(timings)).max() for _, _, _, _, *timings in rows],
    }, index=[what for what, *_ in rows])  # fmt: skip
    factor = table.target / table.measured
    missed_by = factor.where(table.sense == ">=", 1 / factor)
    return table.assign(met=missed_by <= 1, off=missed_by.where(missed_by > 1))


def target_rows(table: pd.DataFrame) -> pd.DataFrame:
    """``targets`` as shown: targets with their sense, a star where a timing spreads by over ``WIDE``."""
    names = [f"{what} *" if wide else what for what, wide in (table.spread > WIDE).items()]
    shown = pd.DataFrame({
        "target": table.sense + " " + table.target.map("{:g}".format),
        "measured": table.measured,
        "met": table.met.map({True: "yes", False: "no"}),
        "off by": ["" if met else f"{off:.2f}x" for met, off in zip(table.met, table.off, strict=True)],
    }).set_axis(names)  # fmt: skip
    return shown.drop(columns="off by") if table.met.all() else shown


def answer(t: Timings, table: pd.DataFrame) -> str:
    """The answer box: quantizer, histogram and capture, and whether the targets of ``table`` are met."""
    copy, fake = (ms(t.kernels, name, LARGE) for name in ("copy", "fake_quantize_kernel"))
    met, total = int(table.met.sum()), len(table)
    return (
        f"<strong>The fake quantizer runs at {100 * copy / fake:.0f} % of a copy's speed, and capture "
        f"of every MLP input adds {overheads(t.model_fla)[MLP]:.1f} % to a forward pass.</strong> On "
        f"one {t.device}, the joint histogram of a tensor, which answers every later question about a "
        f"scale, takes {histograms(t).gaussian / copy:.1f} copies of it; "
        f"{'all' if met == total else f'{met} of'} {total} targets are met. What would change this: a "
        "device whose memory is faster relative to its random accesses."
    )


def details(t: Timings, table: pd.DataFrame) -> str:
    """What the answer box has no room for, and every missed target."""
    copy, fake = (ms(t.kernels, name, LARGE) for name in ("copy", "fake_quantize_kernel"))
    update, overhead, layers = (
        histograms(t),
        overheads(t.model_fla),
        t.info["model_fla"]["parameters"]["layers"],
    )
    missed = [f"{what} ({row.measured:.3g}, target {row.target:g})"
              for what, row in table[~table.met].iterrows()]  # fmt: skip
    text = (
        f"Quantizing 1 GiB takes {fake:.3f} ms where copying it takes {copy:.3f} ms; its joint "
        f"histogram takes {update.gaussian:.2f} ms for Gaussian data, and {update.max() / copy:.1f} "
        f"copies on the worst of {len(update)} kinds of data. On a model of Qwen3.5-9B's shape with "
        f"random weights, capture of all {layers} MLP inputs costs {overhead[MLP]:.1f} % of the plain "
        f"forward, of four sites in every layer {overhead[FOUR]:.1f} %."
    )
    return text + (f" Missed: {'; '.join(missed)}." if missed else "")


def roofline(t: Timings) -> tuple[pd.DataFrame, float, float]:
    """Where each kernel lies, and two ceilings: bytes and warp instructions per second.

    Columns: intensity (warp instructions per byte of DRAM traffic), rate (of them per second),
    bandwidth (bytes per second), share (of the copy's bandwidth, the first ceiling).
    """
    c, bandwidth = t.counters, 2 * GIB / ms(t.kernels, "copy", LARGE) * 1e3
    moved = c["DRAM bytes read"] + c["DRAM bytes written"]
    points = pd.DataFrame({"intensity": c["warp instructions"] / moved,
                           "rate": c["warp instructions"] / c.duration,
                           "bandwidth": moved / c.duration})  # fmt: skip
    points["share"] = points.bandwidth / bandwidth
    return points, bandwidth, 4 * t.log["multiprocessors"] * t.log["clock_hz"]


def draw_roofline(points: pd.DataFrame, bandwidth: float, issue: float) -> plt.Figure:
    """The kernels of ``roofline`` under its two ceilings."""
    fig, ax = plt.subplots(figsize=(7.2, 4.4))
    x = np.geomspace(2.0**-6, 2, 200)
    ax.plot(x, np.minimum(x * bandwidth, issue) / 1e9, color="#000000")
    small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    ax.annotate(f"copy's bandwidth, {bandwidth / 1e12:.2f} TB/s", (0.06, 0.06 * bandwidth / 1e9),
                xytext=(-8, 4), ha="right", **small)  # fmt: skip
    ax.annotate("issue rate", (1, issue / 1e9), xytext=(0, 5), **small)
    for name, (color, marker) in KERNEL_STYLE.items():
        place = points.loc[name, "intensity"], points.loc[name, "rate"] / 1e9
        ax.plot(*place, marker, color=color, markersize=8)
        ax.annotate(
            name, place, xytext=(4, -16) if name == "block_codes" else (9, -3), color=color, **small
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xlabel="warp instructions per byte of DRAM traffic (log2 axis)",
           ylabel="billion warp instructions per second (log2 axis)")  # fmt: skip
    return fig


def draw_sizes(kernels: pd.DataFrame) -> plt.Figure:
    """Throughput against tensor size: copy, quantizer, peer and histogram."""
    square = kernels.case.str.endswith("MiB") | (
        (kernels.name == "update") & (kernels.case == "gaussian")
    )
    rows = kernels[square & kernels.name.isin(list(SIZE_STYLE))]
    rows = rows.assign(mib=rows.bytes / 2**20, rate=rows.bytes / rows.ms / 1e6)
    labels, colors, markers, dashes = (dict(zip(SIZE_STYLE, values, strict=True))
                                       for values in zip(*SIZE_STYLE.values(), strict=True))  # fmt: skip
    fig, ax = plt.subplots(figsize=(7.2, 4.2))
    sns.lineplot(rows, x="mib", y="rate", hue="name", hue_order=labels, style="name", palette=colors,
                 markers=markers, dashes=dashes, legend=False, markeredgewidth=0, ax=ax)  # fmt: skip
    for line, label in zip(ax.get_lines(), labels.values(), strict=True):
        line.set_label(label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xlabel="tensor size (MiB, log2 axis)", ylabel="GB of input per second (log2 axis)")
    plots.label_lines(ax, pad=8)
    return fig


def kinds_table(t: Timings) -> pd.DataFrame:
    """Milliseconds for 1 GiB of each kind of data, the calls also in copies, with the distinct pairs."""
    k = t.kernels
    at = k[(k.bytes == GIB) & k.name.isin(list(KIND_COLUMNS)) & k.case.isin(list(KINDS))]
    table = at.pivot(index="case", columns="name", values="ms")[list(KIND_COLUMNS)]
    table = table.rename(columns=KIND_COLUMNS)
    table.insert(3, "call, copies", table["call"] / ms(k, "copy", LARGE))
    table["distinct pairs"] = at[at.name == "update"].set_index("case").pairs.astype(int)
    return table.rename(index=KINDS).sort_values("call")


def versions(log: dict) -> pd.DataFrame:
    """Every version that was run: times in ms as copies of the same tensor on the same card."""
    table = pd.DataFrame(log["versions"])
    in_ms = table.unit == "ms"
    scale = table.copy_ms.where(in_ms, 1.0)
    return table.assign(predicted=table.predicted.astype(float) / scale, measured=table.measured / scale,
                        unit=table.unit.where(~in_ms, "copies"))  # fmt: skip


def draw_ladder(table: pd.DataFrame) -> plt.Figure:
    """Measured and predicted time of each version, a panel per ladder; histograms on a log axis."""
    fig, axes = plt.subplots(1, table.ladder.nunique(), figsize=(8.2, 4.4), squeeze=False)
    for ax, (name, rows) in zip(axes[0], table.groupby("ladder", sort=False), strict=True):
        at = np.arange(len(rows))
        ax.vlines(at, rows.predicted, rows.measured, colors=rows.kept.map(KEPT), linewidth=1)
        sns.scatterplot(x=at, y=rows.measured, hue=rows.kept, style=rows.kept, s=50, legend=False, ax=ax,
                        palette=KEPT, markers={True: "o", False: "X"})  # fmt: skip
        ax.plot(at, rows.predicted, "D", color="#D55E00", markersize=6, markerfacecolor="none")
        ax.set(ylim=(0, 1.1 * rows.measured.max()), ylabel=rows.unit.iloc[0])
        ax.set_xticks(at, rows.version, rotation=60, ha="right", fontsize=8)
        ax.axvline((rows.device == "H100").sum() - 0.5, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_title(name.replace("_", " "), fontsize=10)
        if name == "histogram":
            ax.set(ylim=(1.5, 60), ylabel=f"{rows.unit.iloc[0]} (log2 axis)")
            ax.set_yscale("log", base=2)
    return fig


def forward_table(t: Timings) -> pd.DataFrame:
    """Milliseconds per step of the plain forward and with capture, and the overhead (%)."""
    rows = t.model_fla[t.model_fla.name == "forward"].set_index("case")
    group = [f"{group:.0f}" if group else "" for group in rows.group]
    table = rows[["ms", "ms_p20", "ms_p80"]].assign(group=group, overhead=overheads(t.model_fla))
    return table.rename(columns={"group": "sequences per group", "overhead": "overhead (%)"})
