# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Write a policy's activation scales for engines: as files of their own, or into a copy of a checkpoint.

    python -m studies.checkpoints.export --run NAME --policy POLICY --out FOLDER [--mix MIX]
        [--checkpoint FOLDER]

Without a checkpoint, ``FOLDER`` holds ``input_scale.safetensors`` (ModelOpt's convention),
``input_global_scale.safetensors`` (compressed-tensors') and ``scales.json`` with both by module name.
With one, it is a copy of it with other activation scales, and ``FOLDER.json`` beside it says which.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nvfp4_utils.policies import POLICIES
from studies.runs.store import RUNS, Run, check_run_name, provenance, write_json

from .audit import chosen_mix
from .files import open_checkpoint
from .golden import check_golden, golden_block
from .patch import patch_checkpoint, print_changes
from .scales import CONVENTIONS, fill_experts, quantized_modules, site_readers, unify

SCALES = "scales.json"
RECOMMENDED = "recommended"  # policy of a report: what it says to set


@dataclass(frozen=True)
class ModuleScales:
    """Calibrated amax by module: one per fused group, every expert with one.

    ``sites``: module -> site it reads; ``moved``: members of fused groups that got another's larger
    amax; ``filled``: experts that got the largest of their layer's others; ``origin``: run, mix, policy.
    """

    amaxes: Mapping[str, float]
    sites: Mapping[str, str]
    moved: list[dict] = field(default_factory=list)
    filled: list[dict] = field(default_factory=list)
    origin: Mapping = field(default_factory=dict)

    def entries(self) -> dict[str, dict]:
        """Module -> site, amax and the scale in both conventions."""
        return {
            module: {"site": self.sites.get(module, ""), "amax": amax}
            | {c.leaf: c.stored(amax) for c in CONVENTIONS}
            for module, amax in sorted(self.amaxes.items())
        }

    def record(self) -> dict:
        """What ``scales.json`` holds; the golden block first."""
        return {"golden": golden_block(), "origin": dict(self.origin), "moved": self.moved,
                "filled": self.filled, "modules": self.entries()}  # fmt: skip


def policy_amaxes(run: Run, policy: str, mix: str) -> dict[str, float]:
    """Site -> calibrated amax. Raises ``ValueError`` for a policy the run lacks or that is not
    one scale."""
    table = run.policies(mix)
    known = [p for p in table.policy.unique() if p in POLICIES and POLICIES[p].one_scale]
    if policy not in known:
        raise ValueError(
            f"policy is {policy!r}; expected one of {', '.join(known)}, whose scale run {run.name!r} "
            "holds and a plain kernel takes."
        )
    rows = table[table.policy == policy]
    return dict(zip(rows.site.astype(str), rows.calibrated_amax.tolist(), strict=True))


@dataclass(frozen=True)
class Calibration:
    """One amax per site: ``amaxes``, site -> calibrated amax; ``readers``, site -> linears that read it;
    ``origin``: run, model, mix and policy."""

    amaxes: Mapping[str, float]
    readers: Mapping[str, list[str]]
    origin: Mapping[str, str]


def of_run(run: Run, policy: str, mix: str) -> Calibration:
    """A policy of a captured run. Raises ``ValueError`` as ``policy_amaxes``."""
    origin = {"run": run.name, "model": run.model_name, "mix": mix, "policy": policy}
    return Calibration(policy_amaxes(run, policy, mix), run.readers, origin)


def of_report(file: Path, policy: str) -> Calibration:
    """A policy of ``report.json``: ``recommended``, which has a scale for every site, or a plain one.

    Raises ``ValueError`` for another policy, and for one that has no value at a site.
    """
    report = json.loads(file.read_text())
    sites: dict[str, dict] = report["sites"]
    names = list(next(iter(sites.values()))["calibrated_amax"])
    if policy not in (RECOMMENDED, *names):
        raise ValueError(
            f"policy is {policy!r}; expected {RECOMMENDED} or one of {', '.join(names)}, as {file} has."
        )
    amaxes = {
        label: site["recommended_amax"] if policy == RECOMMENDED else site["calibrated_amax"][policy]
        for label, site in sites.items()
    }
    without = [label for label, amax in amaxes.items() if amax is None]
    if without:
        raise ValueError(
            f"{policy} has no value at {', '.join(without[:3])}; expected one at each of {len(sites)} "
            f"sites. Export {RECOMMENDED}."
        )
    origin = {"run": file.parent.name, "model": report["model"]["name"],
              "mix": report["text"]["calibration"], "policy": policy}  # fmt: skip
    return Calibration(amaxes, {label: site["linears"] for label, site in sites.items()}, origin)


def module_scales(calibration: Calibration, modules: Iterable[str] = ()) -> ModuleScales:
    """An amax for every module, by default of the calibrated model's own.

    Raises ``ValueError`` for modules that read no site of the calibration.
    """
    by_site, origin = calibration.amaxes, calibration.origin
    readers = {site: names for site, names in calibration.readers.items() if site in by_site}
    modules = list(modules) or [name for names in readers.values() for name in names]
    sites = site_readers(readers, modules)
    amaxes, filled = fill_experts({m: by_site[site] for m, site in sites.items()}, modules)
    amaxes, moved = unify(amaxes)
    lost = [m for m in modules if m not in amaxes]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(modules)} modules read no site of run {origin['run']!r}, as {lost[0]};"
            f" expected readers of its {len(readers)} sites, such as {next(iter(sites), 'none here')}. "
            "Capture a run of the same model."
        )
    return ModuleScales(amaxes, sites, moved, filled, origin)


def write_scales(scales: ModuleScales, out: Path) -> None:
    """Write both safetensors files and ``scales.json`` into a new folder, which appears whole or not."""
    partial = start_folder(out)
    try:
        golden = json.dumps(golden_block())
        entries = scales.entries()
        for c in CONVENTIONS:
            tensors = {f"{m}.{c.leaf}": torch.full(c.shape, e[c.leaf]) for m, e in entries.items()}
            definition = "2688 / amax" if c.inverse else "amax / 2688"
            save_file(tensors, partial / f"{c.leaf}.safetensors",
                      {"convention": f"{c.leaf} = {definition}", "golden": golden})  # fmt: skip
        record = scales.record()
        write_json(record | {"provenance": provenance(**scales.origin)}, partial / SCALES)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def start_folder(out: Path) -> Path:
    """An empty folder beside ``out`` to be renamed to it. Raises ``FileExistsError`` if ``out``
    exists."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(
            f"{out} exists; expected a new folder. Delete it or name another with OUT=."
        )
    partial = out.with_name(out.name + ".partial")  # one that a killed export left is of no use
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def load_scales(folder: Path) -> dict[str, dict]:
    """The entries of an exported folder by module, after checking that its three files agree.

    Raises
    ------
    ValueError
        If a golden block is of another convention, or a tensor differs from ``scales.json``.
    FileNotFoundError
        If one of the files is missing.
    """
    record = json.loads((folder / SCALES).read_text())
    check_golden(record["golden"], str(folder / SCALES))
    modules: dict[str, dict] = record["modules"]
    for c in CONVENTIONS:
        file = folder / f"{c.leaf}.safetensors"
        with safe_open(file, "pt") as stored:
            check_golden(json.loads(stored.metadata()["golden"]), str(file))
            wrong = {f"{m}.{c.leaf}" for m in modules} ^ set(stored.keys())
            for name in set(stored.keys()) - wrong:
                if stored.get_tensor(name).item() != modules[name.rpartition(".")[0]][c.leaf]:
                    wrong.add(name)
        if wrong:
            raise ValueError(
                f"{file}: {len(wrong)} tensors differ from {SCALES}, as {min(wrong)}; expected equal "
                "values of the same modules. Export the folder again."
            )
    return modules


def export(calibration: Calibration, out: Path, checkpoint: Path | None = None) -> ModuleScales:
    """Write scales to ``out``: files of their own, or a patched copy of ``checkpoint``.

    Raises ``ValueError`` or ``OSError`` saying what is wrong; then nothing is left at ``out``.
    """
    if checkpoint is None:
        scales = module_scales(calibration)
        write_scales(scales, out)
        return scales
    source = open_checkpoint(checkpoint)
    modules = quantized_modules(source)
    scales = module_scales(calibration, modules)
    partial = start_folder(out)
    try:
        changes = patch_checkpoint(source, modules, scales.amaxes, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print_changes(changes)
    record = {"checkpoint": str(checkpoint), "changes": changes, **scales.record()}
    write_json(record | {"provenance": provenance(**scales.origin)}, out.with_name(out.name + ".json"))
    return scales


def calibration_of(name: str, policy: str, mix: str = "") -> Calibration:
    """Of the run of that name: what ``make capture`` made, or else what ``make recommend`` did."""
    check_run_name(name)
    report = RUNS / name / "report.json"
    if report.is_file() and not report.with_name("run.json").is_file():
        return of_report(report, policy)
    run = Run(name)
    return of_run(run, policy, chosen_mix(run, mix))


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)  # so that `finally` removes what is half written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--policy", required=True, help="of a report also: recommended")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mix", default="", help="of the run; default: its first")
    parser.add_argument("--checkpoint", type=Path, default=None, help="copy it with these scales")
    a = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        scales = export(calibration_of(a.run, a.policy, a.mix), a.out, a.checkpoint)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, members in (("fused members moved to their group's largest amax", scales.moved),
                          ("experts given the largest amax of the others", scales.filled)):  # fmt: skip
        print(
            f"{len(members)} {what}"
            + "".join(f"\n  {m['module']}: amax {m['given']:.6g}" for m in members)
        )
    print(f"{len(scales.amaxes)} modules, {a.policy} of {a.run} on {scales.origin['mix']}: {a.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
