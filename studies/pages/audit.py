# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Stored scales of two real checkpoints: audited, compared with a run, and broken in every known way."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import pandas as pd

from nvfp4_utils.quantize import AMAX_PER_SCALE
from nvfp4_utils.sites import kind_of
from studies.checkpoints.against_run import LOSS_WARNING_DB, RANK_LIMIT, slack_table
from studies.checkpoints.audit import audit, stored_scales
from studies.checkpoints.breakages import BREAKAGES, convention_of, get, modules_of
from studies.checkpoints.files import open_checkpoint
from studies.checkpoints.findings import LARGEST_MEDIAN, SEVERITIES
from studies.checkpoints.large import mixture_skeleton
from studies.checkpoints.scales import quantized_modules
from studies.checkpoints.skeleton import Skeleton, build, load_skeleton
from studies.runs.store import RESULTS, Run

STORED = RESULTS / "checkpoints"
MAKERS = {"modelopt": "ModelOpt", "llmcompressor": "llm-compressor"}
MARKERS = {"ModelOpt": "o", "llm-compressor": "x"}
LARGE = {"layers": 30, "experts": 128, "width": 7936, "shards": 80}  # 412 GB
CONTROL_POLICIES = ("amax", "p99.99", "raised", "headroom", "raised-all")


def skeletons() -> dict[str, Skeleton]:
    """The stored skeleton of each tool's checkpoint."""
    return {name: load_skeleton(STORED / f"{maker}.json.gz") for maker, name in MAKERS.items()}


def proof() -> dict:
    """The stored outcome of ``studies.checkpoints.prove``; ``FileNotFoundError`` without one."""
    file = STORED / "proof.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; make it with `python -m studies.checkpoints.prove`.")
    return json.loads(file.read_text())


def in_folder(skeleton: Skeleton, look):
    """``look(folder)`` of a rebuilt checkpoint, which is deleted again."""
    with tempfile.TemporaryDirectory() as folder:
        return look(build(skeleton, Path(folder) / "checkpoint"))


def check(found: Mapping[str, Skeleton]) -> str:
    """Both real checkpoints must be clean, by themselves. Markdown; raises ``ValueError`` otherwise."""
    for name, skeleton in found.items():
        findings = in_folder(skeleton, audit)
        if findings:
            raise ValueError(f"{name}'s checkpoint has {findings[0]}; expected no finding.")
    counts = " and ".join(f"{len(modules_of(s))} scales of {n}" for n, s in found.items())
    return f"No finding at {counts}: neither tool's own export raises an alarm."


def slack(found: Mapping[str, Skeleton], run: Run, mix: str) -> pd.DataFrame:
    """``slack_table`` of both checkpoints with ``tool``, one row per tool and site."""

    def look(folder: Path) -> pd.DataFrame:
        checkpoint = open_checkpoint(folder)
        return slack_table(stored_scales(checkpoint, quantized_modules(checkpoint)), run, mix)

    parts = [in_folder(s, look).assign(tool=name) for name, s in found.items()]
    return pd.concat(parts, ignore_index=True).drop_duplicates(["tool", "site"])


def slack_summary(table: pd.DataFrame) -> pd.DataFrame:
    """By tool and kind of site: sites, clipped ones, least slack to both sides, largest loss."""
    kinds = table.site.map(kind_of)
    groups = table.groupby(["tool", kinds], sort=False)
    return pd.DataFrame(
        {
            "sites": groups.size(),
            "clip what the run saw": groups.saturation.apply(lambda s: int((s < 0).sum())),
            "least above the largest block (octaves)": groups.saturation.min(),
            "least below underflow (octaves)": groups.underflow.min(),
            "largest loss (dB)": groups.loss_db.max(),
            f"loss above {LOSS_WARNING_DB} dB": groups.loss_db.apply(
                lambda s: int((s > LOSS_WARNING_DB).sum())
            ),
        }
    ).rename_axis(["tool", "site"])


def draw_scales(table: pd.DataFrame) -> plt.Figure:
    """Stored amax by layer between the run's cliffs, a panel per kind of site."""
    kinds = list(dict.fromkeys(table.site.map(kind_of)))
    fig, axes = plt.subplots(
        2, math.ceil(len(kinds) / 2), figsize=(8.4, 5.6), sharex=True, squeeze=False
    )
    for ax, kind in zip(axes.flat, kinds, strict=False):
        rows = table[table.site.map(kind_of) == kind]
        rows = rows.assign(layer=rows.site.str.extract(r"\.(\d+)\.")[0].astype(int)).sort_values("layer")
        one = rows.drop_duplicates("layer")
        low, high = one.amax / 2.0**one.saturation, one.amax * 2.0**one.underflow
        ax.fill_between(one.layer, low, high, color="#dddddd", lw=0, label="between the cliffs")
        for tool, own in rows.groupby("tool", sort=False):
            ax.plot(own.layer, own.amax, MARKERS[tool], ms=4, color="k", mfc="none", label=tool)
        ax.set_yscale("log", base=2)
        ax.set_title(kind, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    for ax in axes[:, 0]:
        ax.set_ylabel("amax (log2 axis)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncol=len(labels))
    return fig


def precision(found: Mapping[str, Skeleton]) -> pd.DataFrame:
    """By tool: distinct values, how many are exact in bfloat16, extreme ratios to the first's amax."""
    amaxes, rows = {}, {}
    for name, s in found.items():
        stored = pd.Series({m: get(s, m) for m in modules_of(s)})
        amaxes[name] = AMAX_PER_SCALE / stored if convention_of(s).inverse else stored * AMAX_PER_SCALE
        bits = stored.to_numpy("float32").view("uint32")
        rows[name] = {"scales": len(stored), "distinct": stored.nunique(),
                      "exact in bfloat16": int((bits % 2**16 == 0).sum())}  # fmt: skip
    first = amaxes[next(iter(found))]
    for name in found:
        ratio = amaxes[name] / first
        rows[name] |= {"lowest amax ratio": ratio.min(), "highest amax ratio": ratio.max()}
    return pd.DataFrame.from_dict(rows, orient="index")


def breakage_table(found: Mapping[str, Skeleton]) -> pd.DataFrame:
    """By breakage: the kind it must raise, and findings of it and of others in each checkpoint."""
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, skeleton in found.items():
            for i, breakage in enumerate(BREAKAGES):
                findings = audit(breakage.build(skeleton, Path(folder) / f"{name}{i}"))
                hits = [
                    f for f in findings if (f.kind, f.severity) == (breakage.kind, breakage.severity)
                ]
                row = rows.setdefault(
                    breakage.label, {"kind": breakage.kind, "severity": breakage.severity}
                )
                row |= {
                    f"{name}: found": len(hits),
                    f"{name}: other findings": len(findings) - len(hits),
                }
                row["message"] = hits[0].message if hits else "not found"
    return pd.DataFrame.from_dict(rows, orient="index")


def missed(table: pd.DataFrame) -> int:
    """Breakages that an audit of either checkpoint did not name."""
    columns = [c for c in table if c.endswith(": found")]
    return int((table[columns] == 0).any(axis=1).sum())


def exchange_table(runs: list[Run]) -> pd.DataFrame:
    """By model and policy: median amax, read rightly and as its reciprocal; what the rules say.

    ``seen``: by the median alone; ``seen with RUN=``: by either rule; ``false alarm``: of either, on the
    right reading. Rank correlation: with the run's amax, over sites.
    """
    rows = {}
    for run in runs:
        wide = run.policies(run.mixes[0]).pivot_table(
            index="site", columns="policy", values="calibrated_amax", observed=True
        )
        for policy in CONTROL_POLICIES:
            amaxes = wide[policy]
            right = median(amaxes)
            wrong, rank = AMAX_PER_SCALE**2 / right, amaxes.corr(wide.amax, method="spearman")
            rows[run.name, policy] = {
                "median amax": right, "as reciprocal": wrong, "rank correlation": rank,
                "false alarm": right > LARGEST_MEDIAN or rank < RANK_LIMIT,
                "seen": wrong > LARGEST_MEDIAN,
                "seen with RUN=": wrong > LARGEST_MEDIAN or -rank < RANK_LIMIT,
            }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["run", "policy"])


def time_large() -> dict[str, float]:
    """Build and audit a sparse sharded checkpoint: its size, and seconds of the audit."""
    skeleton = mixture_skeleton(**LARGE)

    def look(folder: Path) -> dict[str, float]:
        size = sum(p.stat().st_size for p in folder.iterdir())
        began, cpu = time.perf_counter(), time.process_time()
        findings = audit(folder)
        return {"gigabytes": size / 1e9, "files": LARGE["shards"],
                "tensors": sum(map(len, skeleton["headers"].values())),
                "scales": len(modules_of(skeleton)), "findings": len(findings),
                "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}  # fmt: skip

    return in_folder(skeleton, look)


def proof_table(outcome: dict) -> pd.DataFrame:
    """Every comparison with a real tool: elements, how many differ in a bit, and by how much."""
    rows = {}
    for stage, comparisons in outcome.items():
        nested = comparisons if stage == "vllm" else {"": comparisons}
        for part, found in nested.items():
            if not isinstance(found, dict):
                continue
            for name, c in found.items():
                if isinstance(c, dict) and "differ" in c:
                    label = f"{stage} {MAKERS.get(part, part)}".strip()
                    rows[label, name] = {"tensors": int(c["tensors"]), "elements": int(c["elements"]),
                                         "differ": int(c["differ"]),
                                         "differ (%)": 100 * c["differ"] / c["elements"],
                                         "largest / amax": c["largest"]}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["tool", "compared"])


def differences(outcome: dict) -> str:
    """Why tools differ from this book's quantizer where they do; Markdown."""
    table = proof_table({k: outcome[k] for k in ("modelopt", "compressed-tensors", "vllm")})
    share, differ = table["differ (%)"], table["differ"]
    ct = "compressed-tensors"
    engines = [f"vllm {name}" for name in MAKERS.values()]
    plain, odd = (
        " and ".join(f"{share[e, part]:.2g} %" for e in engines)
        for part in ("activations, flush", "flush, 12-bit scales")
    )
    read = differ["modelopt", "scale read back"]
    return (
        f"- **ModelOpt**: {_equal(differ['modelopt', 'activations, floor'])} in its activations, "
        "under floor, and "
        f"{_equal(differ['modelopt', 'weights'])} in its weights. {read} scales come back from its "
        "quantizer "
        f"an ulp off, since it keeps the amax and divides anew.\n"
        "- **compressed-tensors** computes in the activation's dtype: "
        f"{share[ct, 'activations']:.2g} % of the "
        "elements differ. The same call in float32 leaves "
        f"{share[ct, 'activations in float32']:.2g} %; with its "
        f"order of operations, {_equal(differ[ct, 'float32, its order of operations'])}.\n"
        f"- **vLLM**: {plain} of the elements differ, for the two checkpoints; it multiplies by "
        "reciprocals, and an "
        "amax that was calibrated often lies on an E4M3 tie. At scales with 12-bit odd mantissas, "
        "where "
        f"no tie can occur, {odd}. Its CPU build has no NVFP4 kernel and refuses "
        f"(`{outcome['vllm']['refusal'].splitlines()[0]}`); its own emulation was registered for "
        "the CPU to run this."
    )


def _equal(differ: int) -> str:
    return f"{differ:,} differing elements" if differ else "no differing element"


def worst(table: pd.DataFrame) -> pd.Series:
    """The site of the largest expected loss."""
    return table.loc[table.loss_db.idxmax()]


def answer(found: Mapping[str, Skeleton], table: pd.DataFrame, broken: pd.DataFrame, run: Run) -> str:
    """The page's answer, simple HTML."""
    top, gone = worst(table), missed(broken)
    sites = table.groupby("tool").site.nunique().iloc[0]
    clipping = table[table.saturation < 0].groupby("tool").size().max()
    verdict = "Each is found by reading the scales alone" if not gone else f"All but {gone} are found"
    return (
        f"<strong>{verdict}: {len(broken)} ways to break a checkpoint, made from sound ones "
        "that raise no alarm.</strong> Whether a sound scale fits the model only a captured run "
        "tells: of "
        f"{sites} sites, up to {clipping} clip what {run.name} saw, and {top.site} would lose "
        f"{top.loss_db:.1f} dB. `make audit CHECKPOINT=folder RUN=name` prints both."
    )


def severity_counts(found: Mapping[str, Skeleton], run: Run, mix: str) -> pd.DataFrame:
    """By tool: findings of an audit against the run, by severity."""
    rows = {}
    for name, skeleton in found.items():
        findings = in_folder(skeleton, lambda folder: audit(folder, run, mix))
        rows[name] = {s: sum(f.severity == s for f in findings) for s in SEVERITIES}
    return pd.DataFrame.from_dict(rows, orient="index")


def reconciliation(table: pd.DataFrame, control: pd.DataFrame, bits: pd.DataFrame) -> str:
    """The prediction beside what was found; Markdown."""
    false, seen = int(control["false alarm"].sum()), int(control["seen"].sum())
    blind = control.index[~control["seen with RUN="]]
    coarse = [
        f"{name} ({row['exact in bfloat16']:.0f} of {row['scales']:.0f})"
        for name, row in bits.iterrows()
        if row["exact in bfloat16"] > row["scales"] / 2
    ]
    clipped = (table.saturation < 0).mean()
    harmed = (table.loss_db > LOSS_WARNING_DB).mean()
    verdict = ": clipping is the rule, harm the exception" if harmed < 0.1 < 0.5 < clipped else ""
    return (
        f"- {clipped:.0%} of the stored scales clip something that the run saw and {harmed:.1%} "
        "lose more than "
        f"{LOSS_WARNING_DB} dB{verdict}.\n"
        f"- Exchanged value and reciprocal are seen in {seen} of {len(control)} settings by the "
        "median, in "
        f"{len(control) - len(blind)} with a run, with {false} false alarms. Not seen: "
        f"{', '.join(' '.join(i) for i in blind) or 'none'}. Scales aimed far above the amax read "
        "as plausible "
        "either way.\n"
        f"- Not predicted: values that are rounded to bfloat16, by {' and '.join(coarse) or 'no tool'}. "
        f"Amaxes of the two tools differ by factors of {bits['lowest amax ratio'].min():.3f} to "
        f"{bits['highest amax ratio'].max():.3f}."
    )
