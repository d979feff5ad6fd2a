# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Audit the activation scales of an NVFP4 checkpoint: headers and scale tensors alone are read.

    python -m studies.checkpoints.audit CHECKPOINT [--run NAME] [--mix MIX] [--out audit.json]

Prints findings, worst first. Exit status: 0 clean, 1 with findings of severity error, 2 unreadable.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from studies.runs.store import Run, write_json

from .against_run import slack_findings
from .files import Checkpoint, UnreadableError, open_checkpoint, read_values
from .findings import (
    SEVERITIES,
    Finding,
    Scale,
    format_findings,
    presence_findings,
    relation_findings,
    scales_of,
    value_findings,
)
from .scales import CONVENTIONS, MODELOPT, QuantizedModule, quantized_modules, split_name

SHOWN = 5  # findings of one kind and severity that are printed in full


def stored_scales(checkpoint: Checkpoint, modules: dict[str, QuantizedModule]) -> list[Scale]:
    """Every activation scale of the checkpoint whose bytes are there."""
    tensors = [t for m in modules.values() for t in m.scales.values()]
    return list(scales_of(modules, read_values(tensors)))


def audit(folder: Path, run: Run | None = None, mix: str = "") -> list[Finding]:
    """Findings about a checkpoint folder, worst first; against ``mix`` of a run of the same model too.

    Raises
    ------
    UnreadableError
        If the folder cannot be read as a checkpoint.
    ValueError
        If the run has no such mix, or is of another model.
    """
    checkpoint = open_checkpoint(folder)
    modules = quantized_modules(checkpoint)
    named = {split_name(t)[0] for t in checkpoint.tensors if split_name(t)[1] == MODELOPT.leaf}
    found = list(format_findings(checkpoint, modules, len(named - set(modules))))
    found += presence_findings(checkpoint, modules)
    scales = stored_scales(checkpoint, modules)
    found += value_findings(scales)
    found += relation_findings(scales)
    if run is not None:
        found += slack_findings(scales, run, chosen_mix(run, mix))
    return sorted(found, key=Finding.order)


def chosen_mix(run: Run, mix: str) -> str:
    """The mix, by default the run's first. Raises ``ValueError`` naming those that the run holds."""
    if mix and mix not in run.mixes:
        raise ValueError(f"run {run.name!r} has no mix {mix!r}; expected one of {', '.join(run.mixes)}.")
    return mix or run.mixes[0]


def report(findings: Iterable[Finding], shown: int = SHOWN) -> str:
    """Lines to print: of each kind and severity the first few, and how many more there are."""
    findings = list(findings)
    lines, seen = [], Counter[tuple[str, str]]()
    totals = Counter((f.severity, f.kind) for f in findings)
    for finding in findings:
        key = (finding.severity, finding.kind)
        seen[key] += 1
        if seen[key] <= shown:
            lines.append(
                f"{finding.severity:8s}{finding.kind:15s}{finding.tensor or '(checkpoint)'}: "
                f"{finding.message}"
            )
        elif seen[key] == shown + 1:
            lines.append(
                f"{finding.severity:8s}{finding.kind:15s}{totals[key] - shown} more; "
                "OUT=audit.json lists all"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--run", default="", help="captured run of the same model, to compare with")
    parser.add_argument("--mix", default="", help="of the run; default: its first")
    parser.add_argument("--out", type=Path, default=None, help="JSON list of all findings")
    a = parser.parse_args(arguments)
    try:
        checkpoint = open_checkpoint(a.checkpoint)
        modules = quantized_modules(checkpoint)
        findings = audit(a.checkpoint, Run(a.run) if a.run else None, a.mix)
        if a.out is not None:
            write_json([dataclasses.asdict(f) for f in findings], a.out)
    except (UnreadableError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if findings:
        print(report(findings))
    count = Counter(f.severity for f in findings)
    kinds = ", ".join(f"{n} {c.name}" for c in CONVENTIONS
                      if (n := sum(m.convention is c for m in modules.values())))  # fmt: skip
    print(f"{len(modules)} NVFP4 modules ({kinds or 'none'}) in {len(checkpoint.files)} files: "
          + ", ".join(f"{count[s]} {s}" for s in SEVERITIES))  # fmt: skip
    return 1 if count["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
