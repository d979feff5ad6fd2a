# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What to set for a model: a page and ``report.json``.

    python -m studies.report --model smollm2 --dataset python-library

Finished parts are kept under ``runs/RUN/parts``; a repeated command goes on after them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nvfp4_utils.forward import entry_of
from studies import ROOT
from studies.data import models
from studies.data.mixes import EMBEDDED_MIX
from studies.runs.store import RUNS, provenance, sha256_of, write_json

from . import measure, schema, verdict, words
from .coverage import coverage
from .evaluation import evaluation_stage
from .rules import RULES, wide_octaves
from .texts import read_text

HELD_OUT = 4  # one sequence in so many is held out


@dataclass(frozen=True)
class ReportSettings:
    """What a report is made with. ``sequences`` of ``length`` tokens: calibration and held-out together.

    ``datasets``: a mix or folder, and optionally a second one that is scored as foreign text.
    """

    model: str
    datasets: tuple[str, ...]
    sequences: int = 32
    length: int = 512

    def __post_init__(self) -> None:
        if not 1 <= len(self.datasets) <= 2 or len(set(self.datasets)) < len(self.datasets):
            raise ValueError(
                f"DATASET names {list(self.datasets)}; expected one mix or folder, or two different ones"
                " separated by a comma: the first calibrates, the second is foreign text."
            )
        if self.sequences < 2 * HELD_OUT or self.length < 32:
            raise ValueError(
                f"got {self.sequences} sequences of {self.length} tokens; expected at least "
                f"{2 * HELD_OUT} of at least 32: a {HELD_OUT}th of them is held out."
            )

    @property
    def held_out(self) -> int:
        """Sequences that are scored and not calibrated on."""
        return self.sequences // HELD_OUT

    @property
    def run(self) -> str:
        """The name of a run that was given none."""
        parts = [
            re.sub(r"\W+", "-", Path(part).name).strip("-") for part in (self.model, *self.datasets)
        ]
        return "-".join(filter(None, parts)).lower()


class Parts:
    """Finished parts of a report: JSON files that are made once."""

    def __init__(self, folder: Path, made_with: dict) -> None:
        self.folder = folder
        file = folder / "settings.json"
        if file.is_file():
            old = json.loads(file.read_text())
            changed = [k for k in old | made_with if old.get(k) != made_with.get(k)]
            if changed:
                told = "; ".join(f"{k} was {old.get(k)}, is {made_with.get(k)}" for k in changed[:3])
                raise ValueError(
                    f"{folder} was made with other settings: {told}. Expected the same. Take another"
                    " RUN, or delete the folder to measure again."
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(made_with, file)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made unless it is there; ``seconds`` says what making it took."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            began = time.perf_counter()
            value = schema.plain(make())
            write_json({"seconds": time.perf_counter() - began, "value": value}, file)
        return json.loads(file.read_text())["value"]

    def seconds(self) -> dict[str, float]:
        """What each part took."""
        files = sorted(self.folder.glob("*.json"))
        read = {f.stem: json.loads(f.read_text()) for f in files if f.stem != "settings"}
        return {name: part["seconds"] for name, part in read.items()}


def forward_seconds(model, tokens: torch.Tensor) -> float:
    """Seconds per sequence of a plain forward, of the second of two batches."""
    batch = measure.batches(model, tokens)[0].to(next(model.parameters()).device)
    with torch.inference_mode():
        for _ in range(2):
            began = time.perf_counter()
            entry_of(model)(input_ids=batch, use_cache=False)
            if batch.is_cuda:
                torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(batch)


def make_report(settings: ReportSettings, folder: Path) -> dict:
    """Measure, judge and write ``folder/report.json``; returns it.

    Raises ``ValueError`` if the folder was made with other settings, texts, code, versions or device.
    """
    source = Path(models.resolve(settings.model))
    known = models.MODELS.get(settings.model)
    model, tokenizer = models.load(settings.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    covered = coverage(model)
    wanted = covered.sites
    begin = models.begins_with(tokenizer)
    own, *other = (
        read_text(
            name,
            tokenizer,
            calibration=settings.sequences - settings.held_out,
            held_out=settings.held_out,
            length=settings.length,
            begin=begin,
        )
        for name in settings.datasets
    )
    made = provenance(**asdict(settings))
    parts = Parts(
        folder / "parts",
        {
            "model": sha256_of(source) if source.exists() else settings.model,
            "code": made["source_sha256"],
            "report code": code_sha256(),
            "texts": (
                hashlib.sha256(
                    json.dumps([t.provenance for t in (own, *other)], sort_keys=True).encode()
                ).hexdigest()
            ),
            "settings": json.loads(json.dumps(asdict(settings))),
            "versions": made["versions"],
            "device": made["device"],
        },
    )
    forward_s = parts.get("forward", lambda: forward_seconds(model, own.calibration))
    calibrated = parts.get(
        "calibration", lambda: measure.calibration_stage(model, tokenizer, own.calibration, wanted)
    )
    amaxes = {site: of["calibrated_amax"] for site, of in calibrated.items()}
    pools = []
    for name, text in zip(("held out", "foreign"), (own, *other), strict=False):
        score = partial(measure.scoring_stage, model, text.test, wanted, amaxes, name)
        pools.append(parts.get(name, score))
    policy, why, exceptions = verdict.choose(verdict.worst_losses(calibrated, pools))
    scales = verdict.scales_of(calibrated, policy, exceptions)
    chosen = {site: amax for site, (_, amax) in scales.items()}
    plain = {site: amaxes[site]["amax"] or chosen[site] for site in chosen}
    wide = any(of["block_amax"] and wide_octaves(of) < 0 for of in calibrated.values())
    evaluation = parts.get(
        "evaluation",
        lambda: evaluation_stage(
            model, own.test, {"recommended": chosen, "amax": plain}, forward_s, settings.sequences, wide
        ),
    )
    overruled = verdict.by_kl(evaluation, policy)
    if overruled:
        policy, why, exceptions = "amax", overruled, []
        scales = verdict.scales_of(calibrated, policy, exceptions)
    held_out, foreign = pools[0], pools[1] if other else {}
    sites = {
        site: verdict.site_entry(
            site,
            calibrated[site],
            held_out[site],
            foreign.get(site),
            scales[site],
            list(wanted[site].readers),
        )
        for site in calibrated
    }
    report: dict[str, Any] = {
        "format": schema.FORMAT,
        "model": {
            "name": known.title if known else source.name if source.exists() else settings.model,
            "source": str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source),
            "parameters": sum(p.numel() for p in model.parameters()),
            "kinds": list(dict.fromkeys(site["kind"] for site in sites.values())),
            "uncovered": covered.uncovered,
        },
        "text": {
            "calibration": settings.datasets[0],
            "default": settings.datasets[0] == EMBEDDED_MIX,
            "calibration_sequences": len(own.calibration),
            "held_out_sequences": len(own.test),
            "length": settings.length,
            "foreign": settings.datasets[1] if other else None,
            "foreign_sequences": len(other[0].test) if other else 0,
        },
        "recommendation": {
            "policy": policy,
            "formula": verdict.FORMULAS[policy],
            "why": why,
            "exceptions": exceptions,
            "loss_db": verdict.mean_loss(held_out, {s: name for s, (name, _) in scales.items()}),
            "loss_db_amax": verdict.mean_loss(held_out, dict.fromkeys(scales, "amax")),
            "attention": sum(
                any(f["severity"] == "attention" for f in s["findings"]) for s in sites.values()
            ),
        },
        "evaluation": evaluation,
        "rules": {name: asdict(rule) for name, rule in RULES.items()},
        "sites": dict(sorted(sites.items(), key=verdict.urgency)),
        "seconds": parts.seconds() | {"forward": forward_s * settings.sequences},
        "provenance": made | {"texts": [t.provenance for t in (own, *other)]},
    }
    report["findings"] = verdict.model_findings(report)
    report["recommendation"]["doubts"] = verdict.doubts(report)
    report = schema.check(schema.plain(report))
    write_json(report, folder / "report.json")
    return report


def code_sha256() -> str:
    """Hash of what measures; rules and pages may change and the parts stay good."""
    folder = Path(__file__).parent
    names = ("measure.py", "coverage.py", "evaluation.py", "texts.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="smollm2", help="name, folder or hub id")
    parser.add_argument("--dataset", default=EMBEDDED_MIX, help="mix or folder of text[,second one]")
    parser.add_argument("--run", default="", help="name under runs/")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    a = parser.parse_args(arguments)
    from . import html  # here: where a model is measured by other means, there need be no notebook

    try:
        settings = ReportSettings(a.model, tuple(a.dataset.split(",")), a.sequences, a.length)
        folder = RUNS / (a.run or settings.run)
        report = make_report(settings, folder)
        page = html.write_page(folder)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(words.summary_lines(report)))
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
