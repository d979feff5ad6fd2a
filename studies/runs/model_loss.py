# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The stages of a run that evaluate the model itself: every scale of the plan, and other lengths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import torch

from nvfp4_utils.policies import calibrate
from nvfp4_utils.quantize import UNDERFLOWS
from nvfp4_utils.sites import find_sites
from studies.data import corpora

from . import captured, plan, tables, unfinished
from .end_to_end import evaluate_to
from .run_folder import whole
from .settings import policy_settings, uncalibrated_settings
from .store import read_table, write_table

BATCH_TOKENS = 2**14  # of a forward pass
SINGLE_SEQUENCES = 32  # for one site at a time
SINGLE_FOLDER = "single_sites"
LAYOUTS = "layouts.parquet"
RECORDS = "one record per sequence"
PARTS = ("end_to_end", "end_to_end_sequences", "end_to_end_snr")


def _evaluate(path: Path, model, tokens: torch.Tensor, settings, **options) -> None:
    batch = max(1, BATCH_TOKENS // tokens.shape[1]) if torch.cuda.is_available() else 8
    settings = plan.with_values(settings, f"the model in {path.name}")
    evaluate_to(path, model, tokens, settings, batch=batch, **options)


def model_stage(model, tests: dict[str, torch.Tensor], path: Path, calibrations) -> None:
    """Evaluate every setting of the plan on each mix's test sequences, int64 [sequences, tokens].

    The first mix also sees the sweep of scales, one kind of site and one site at a time.
    """
    for number, (mix, tokens) in enumerate(tests.items()):
        print(f"the model on {mix}", flush=True)
        errors = read_table(path / mix / "errors.parquet")
        oracle = errors[(errors.policy == "oracle") & (errors.group == 0)]
        found = {u: oracle[oracle.underflow == u].set_index("site").calibrated_amax for u in UNDERFLOWS}
        # A floor oracle whose errors equal the flush oracle's is not stored.
        amaxes: dict[str, dict[str, float]] = {
            u: found["flush"].to_dict() | found[u].to_dict() for u in UNDERFLOWS
        }
        halves = tables.halves_of(tables.calibration_table(path / mix, "sequences"))
        first = number == 0
        settings = plan.settings_for(mix, calibrations, amaxes, halves, sweep=first)
        _evaluate(path / mix, model, tokens, settings, token_snr=first)
        if first:
            single = plan.single_site_settings(mix, calibrations[mix]["amax"])
            some = tokens[:SINGLE_SEQUENCES]
            _evaluate(path / SINGLE_FOLDER, model, some, single, group=96)
    _join(path, [path / mix for mix in tests])


def layout_stage(model, tokenizer, path: Path, calibrations, settings, *, begin, folder) -> None:
    """Calibrate on other layouts of the first mix's text, as many tokens, and test on long sequences.

    ``layouts.parquet``: mix, layout, sequences, site, policy, calibrated_amax. The tests of long
    sequences join ``end_to_end``, named after mix and length.
    """
    mix = settings.mixes[0]
    own = f"packed, {settings.length} tokens"
    rows = [_layout_table(own, mix, settings.calibration, calibrations[mix])]
    folders = [path / m for m in settings.mixes]
    for length in (settings.length, *settings.layouts):
        packed = length != settings.length
        share = settings.length / length
        texts = corpora.sequences(
            mix, tokenizer, calibration=round(settings.calibration * share),
            test=round(settings.test * share) if packed else 0, length=length, begin=begin,
            packed=packed, folder=folder, allow_shortfall=True,
        )  # fmt: skip
        name = f"packed, {length} tokens" if packed else RECORDS
        print(f"calibration: {name}", flush=True)
        found = _calibrate(model, texts, length)
        by_policy = {p: {site: a[p] for site, a in found.items()} for p in calibrations[mix]}
        rows.append(_layout_table(name, mix, len(texts.calibration), by_policy))
        if packed:
            test = f"{mix}, {length} tokens"
            long = {test: plan.with_margins(by_policy), mix: plan.with_margins(calibrations[mix])}
            menu = uncalibrated_settings(test) + policy_settings(test, long, underflows=("flush",))
            _evaluate(path / f"long-{length}", model, texts.test.long(), menu)
            folders.append(path / f"long-{length}")
    _join(path, folders)
    write_table(pd.concat(rows, ignore_index=True), path / LAYOUTS)


def _layout_table(layout: str, mix: str, sequences: int, by_policy) -> pd.DataFrame:
    rows = [(mix, layout, sequences, site, policy, amax)
            for policy, amaxes in by_policy.items() for site, amax in amaxes.items()]  # fmt: skip
    return pd.DataFrame(
        rows, columns=["mix", "layout", "sequences", "site", "policy", "calibrated_amax"]
    )


def _calibrate(model, texts, length: int) -> dict[str, dict[str, float]]:
    """site -> policy -> amax, of sequences that may be filled up with padding."""
    tokens = texts.calibration.long()
    mask = (torch.arange(length) < texts.calibration_lengths[:, None]).long()
    batch = max(1, BATCH_TOKENS // length)
    batches = [{"input_ids": t, "attention_mask": m}
               for t, m in zip(tokens.split(batch), mask.split(batch), strict=True)]  # fmt: skip
    parts = batches if mask.min() == 0 else tokens.split(batch)
    sites = captured.count(model, find_sites(model), parts, len(tokens))
    return {site: calibrate(statistics.total) for site, statistics in sites.items()}


def _join(path: Path, folders: list[Path]) -> None:
    """One table per run of what was evaluated folder by folder."""
    for name in PARTS:
        files = [f / f"{name}.parquet" for f in folders if (f / f"{name}.parquet").exists()]
        if files:
            table = pd.concat([read_table(f) for f in files], ignore_index=True)
            write_table(table, path / f"{name}.parquet")
    single = path / SINGLE_FOLDER / "end_to_end.parquet"
    if single.exists():
        write_table(read_table(single), path / f"{SINGLE_FOLDER}.parquet")


def evaluated(path: Path, settings) -> bool:
    """Whether the tables of both stages are whole, and hold every mix and length of the run."""
    files = [f"{name}.parquet" for name in (*PARTS, SINGLE_FOLDER)] if settings.end_to_end else []
    files += [LAYOUTS, f"{PARTS[0]}.parquet"] if settings.layouts else []
    if not whole(path / name for name in files):
        return False
    tests = [*settings.mixes] if settings.end_to_end else []
    tests += [f"{settings.mixes[0]}, {length} tokens" for length in settings.layouts]
    if not tests:
        return True
    table = read_table(path / f"{PARTS[0]}.parquet")
    return set(tests) <= set(table.test) and (
        not settings.end_to_end or set(settings.mixes) <= set(table.calibration)
    )


def clean_up(path: Path) -> None:
    """Delete what only an unfinished run needs."""
    for folder in [path, *(p for p in path.iterdir() if p.is_dir())]:
        shutil.rmtree(folder / "end_to_end", ignore_errors=True)
        unfinished.forget(folder / unfinished.FOLDER)
        if folder != path:
            for name in PARTS:
                (folder / f"{name}.parquet").unlink(missing_ok=True)
    for folder in (path / SINGLE_FOLDER, *path.glob("long-*")):
        shutil.rmtree(folder, ignore_errors=True)
