# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The two stages of a mix: its calibration pool, and its test pool scored with every calibration.

A stage is done if every file that it writes is there and whole: here are the lists.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from nvfp4_utils.policies import calibrate
from nvfp4_utils.sites import find_sites

from . import captured, run_folder, scoring, tables, unfinished
from .capture_settings import CaptureSettings
from .no_value import oracles, say_missing
from .store import replacing, write_table
from .subsets import SubsetMarginals
from .token_amaxes import TokenAmaxes

# Of a mix's folder: what its calibration pool gives, and what is added when its test pool is scored.
CALIBRATION_TABLES = ("pools", "blocks", "sequences")
DETAILED_CALIBRATION_TABLES = ("subsets", "tokens")
TEST_TABLES = ("groups", "curves", "errors")
DETAILED_TEST_TABLES = ("metrics",)
WINDOW_TABLES = ("windows",)


def _batches(tokens: torch.Tensor, settings: CaptureSettings) -> tuple[torch.Tensor, ...]:
    return tokens.long().split(settings.batch)


def calibration_names(detailed: bool) -> tuple[str, ...]:
    """The tables of a mix's calibration pool, policies apart."""
    return CALIBRATION_TABLES + (DETAILED_CALIBRATION_TABLES if detailed else ())


def _counted(path: Path, detailed: bool) -> bool:
    """Whether a mix's calibration pool has been counted."""
    return run_folder.whole(tables.calibration_file(path, name) for name in calibration_names(detailed))


def calibrated(path: Path, detailed: bool) -> bool:
    """Whether everything that a mix's calibration pool gives is there and whole."""
    return run_folder.whole([path / "policies.parquet"]) and _counted(path, detailed)


def calibration_stage(
    model, tokenizer, texts, path: Path, settings: CaptureSettings, detailed: bool
) -> None:
    """Everything that a mix's calibration pool decides; nothing of the test pool is seen."""
    side = path / unfinished.FOLDER / "calibration"
    found_sites, device = find_sites(model), next(model.parameters()).device
    sites = list(found_sites)
    if not (unfinished.kept(side, sites) and _counted(path, detailed)):
        tokens = texts.calibration
        subsets, largest = SubsetMarginals(len(tokens), settings.draws, device), TokenAmaxes()
        callbacks = [subsets.count, largest.count] if detailed else []
        counted = captured.count(model, found_sites, _batches(tokens, settings), len(tokens), callbacks)
        found = tables.pool_tables("calibration", counted, texts.calibration_source, detailed)
        if detailed:
            found |= {"subsets": subsets.table(), "tokens": largest.table(tokens, tokenizer)}
        for name, table in found.items():
            write_table(table, path / f"calibration_{name}.parquet")
        unfinished.keep(side, counted)
        del counted  # from here on site by site, read from the side files: memory for one at a time

    def policies_of(site: str) -> unfinished.Tables:
        total = unfinished.statistics(side, site, device).total
        return {"policies": tables.policy_table({site: calibrate(total)})}

    found = unfinished.each_site(side / "done", sites, policies_of, "calibrate")
    say_missing(found["policies"])
    write_table(found["policies"], path / "policies.parquet")
    unfinished.forget(side)


def _test_files(path: Path, mix: str, settings: CaptureSettings) -> list[Path]:
    """Every file that ``test_stage`` writes."""
    names: tuple[str, ...] = CALIBRATION_TABLES + TEST_TABLES
    names += WINDOW_TABLES if settings.is_windowed(mix) else ()
    if settings.is_detailed(mix):
        names += DETAILED_CALIBRATION_TABLES + DETAILED_TEST_TABLES
        names += tuple(f"joint.{site}" for site in settings.featured)
    return [path / f"{name}.parquet" for name in names]


def scored(path: Path, mix: str, settings: CaptureSettings) -> bool:
    """Whether a mix's test pool is scored with the calibrations of all mixes, all files whole."""
    if not run_folder.whole(_test_files(path, mix, settings)):
        return False
    calibrations = tables.read_table(path / "errors.parquet", columns=["calibration"]).calibration
    return set(settings.mixes) <= set(calibrations)


def test_stage(
    model, texts, path: Path, calibrations: tables.Calibrations, mix: str, settings: CaptureSettings
) -> None:
    """Score every calibration on one mix's test pool."""
    detailed, windowed = settings.is_detailed(mix), settings.is_windowed(mix)
    side = path / unfinished.FOLDER / "test"
    found_sites, device = find_sites(model), next(model.parameters()).device
    sites = list(found_sites)
    before = {name: tables.calibration_table(path, name) for name in calibration_names(detailed)}
    if not (unfinished.kept(side, sites) and run_folder.whole([side / "counted.parquet"])):
        counted = captured.count(model, found_sites, _batches(texts.test, settings), settings.test_group)
        unfinished.keep(side, counted)
        for name, table in tables.pool_tables("test", counted, texts.test_source, detailed).items():
            write_table(pd.concat([before[name], table]), side / f"with_test_{name}.parquet")
        write_table(pd.DataFrame({"site": sites}), side / "counted.parquet")
        del counted
    halves = tables.halves_of(before["sequences"])

    def score(site: str) -> unfinished.Tables:
        test = unfinished.statistics(side, site, device)
        total = test.total
        own = {m: {p: a[site] for p, a in by.items()} for m, by in calibrations.items()}
        oracle = oracles(total)
        exact = [a for by in own.values() for a in by.values()] + list(oracle.values())
        if detailed:  # so that every subset of the sequences can be read off the curve
            sequences = before["sequences"]
            exact += sequences[sequences.site == site].amax.unique().tolist()
        found = {
            "errors": scoring.group_errors(site, test, total, own, oracle),
            "groups": scoring.group_table(site, test),
            "curves": scoring.curve_table(site, total, exact, windowed),
        }
        if detailed:
            subsets = before["subsets"]
            found["subsets"] = scoring.score_subsets(subsets[subsets.site == site], total)
            menu = scoring.site_menu(site, mix, calibrations, oracle, halves)
            found["metrics"] = scoring.metric_table(site, total, menu)
        return found

    # Sites that were scored before a mix was added lack its calibrations.
    made_with = json.dumps([settings.mixes, calibrations]).encode()
    done = side / f"done-{hashlib.sha256(made_with).hexdigest()[:16]}"
    joined = unfinished.each_site(done, sites, score, "score")
    by_oracle = joined["errors"][(joined["errors"].policy == "oracle") & (joined["errors"].group == 0)]
    amaxes = by_oracle.set_index(["site", "underflow"]).calibrated_amax.to_dict()
    menu = {
        site: scoring.window_menu(
            site, mix, calibrations, {u: amaxes[site, u] for u in scoring.UNDERFLOWS}, settings
        )
        for site in sites
    }
    direct = scoring.WindowErrors(menu, scoring.window_length(texts.test.shape[1]))
    parts = tqdm(_batches(texts.test, settings), desc="windows", unit="batch")
    captured.follow(model, found_sites, parts, direct.count)
    windows = direct.table()
    if windowed:
        write_table(scoring.as_float32(windows), path / "windows.parquet")
    for name in CALIBRATION_TABLES:
        write_table(tables.read_table(side / f"with_test_{name}.parquet"), path / f"{name}.parquet")
    if detailed:
        write_table(before["tokens"], path / "tokens.parquet")
        for site in settings.featured:
            with replacing(path / f"joint.{site}.parquet") as part:
                unfinished.statistics(side, site, "cpu").total.save(part)
    per_group = settings.test_group * texts.test.shape[1] // direct.window
    by_window = scoring.window_group_errors(windows, calibrations, mix, per_group)
    errors = pd.concat([joined.pop("errors"), by_window])
    for name, table in joined.items():
        write_table(table, path / f"{name}.parquet")
    write_table(tables.without_equal_floor(errors), path / "errors.parquet")
    unfinished.forget(path / unfinished.FOLDER)
