# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture a run: every site of a model over calibration mixes, and what the pages need of it.

    python -m studies.runs.capture_run --model models/reference --dataset python-library --run try

First every mix's calibration pool, then every mix's test pool, on which all calibrations are
scored; with ``--end-to-end`` also the model itself, with every scale. A stage that is done is skipped
when the command is repeated; with more mixes, every test pool is scored again, by the new
calibrations too.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from nvfp4_utils import policies
from nvfp4_utils.hooks import capture, hooked
from nvfp4_utils.quantize import UNDERFLOWS
from nvfp4_utils.sites import SITES
from studies import ROOT
from studies.data import corpora, models
from studies.data.mixes import EMBEDDED_MIX

from . import scoring, tables
from .model_loss import clean_up, layout_stage, model_stage
from .store import REFERENCE, RUNS, Run, provenance, sha256_of, write_json, write_table
from .subsets import SubsetMarginals
from .token_amaxes import TokenAmaxes

BEGUN = "begun.json"  # what an unfinished run was begun with
CALIBRATION_TABLES = ("pools", "blocks", "sequences", "subsets", "tokens")  # of the calibration stage


@dataclass(frozen=True)
class CaptureSettings:
    """What a run holds.

    ``calibration``, ``test``: sequences per mix, of ``length`` tokens; ``test_group``: test sequences
    per group, the unit of intervals; ``batch``: sequences per forward; ``draws``: nested families of
    subsets. Of the first ``detailed`` mixes, subsets, largest tokens, exact block marginals, metrics of
    every scale and joint histograms of ``featured`` sites are kept; of the first ``windows`` mixes,
    errors by 256 tokens. ``end_to_end``: also evaluate the model; ``layouts``: other lengths to
    calibrate and test with, in tokens.
    """

    mixes: tuple[str, ...]
    calibration: int = 256
    test: int = 64
    length: int = 512
    test_group: int = 8
    batch: int = 32
    draws: int = 5
    detailed: int = 1
    windows: int = 0
    featured: tuple[str, ...] = ()
    end_to_end: bool = False
    layouts: tuple[int, ...] = ()
    allow_shortfall: bool = False

    def parameters(self) -> dict:
        """What must stay the same when a run is continued, mixes and what follows from them apart."""
        own = dataclasses.asdict(self)
        return {k: v for k, v in own.items() if k not in ("mixes", "featured", "allow_shortfall")}


def _each(function: Callable, sites: list[str], what: str) -> list:
    """``function`` of every site, several at once: its operations are small and release the lock."""
    workers = 8 if torch.cuda.is_available() else torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(function, sites), total=len(sites), desc=what))


def _capture(model, tokens: torch.Tensor, settings: CaptureSettings, group: int, callbacks=()):
    """Statistics of every site, with other callbacks fed by the same forward passes."""
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(hooked(model, tuple(SITES), callback))
        return capture(model, tokens.long().split(settings.batch), tuple(SITES), group_size=group)


def _calibration_stage(
    model, tokenizer, texts, path: Path, settings: CaptureSettings, detailed: bool
) -> None:
    """Everything that a mix's calibration pool decides; nothing of the test pool is seen."""
    tokens = texts.calibration
    subsets = SubsetMarginals(len(tokens), settings.draws, next(model.parameters()).device)
    largest = TokenAmaxes()
    callbacks = [subsets.count, largest.count] if detailed else []
    sites = _capture(model, tokens, settings, len(tokens), callbacks)
    found = tables.pool_tables("calibration", sites, texts.calibration_source, detailed)
    if detailed:
        found |= {"subsets": subsets.table(), "tokens": largest.table(tokens, tokenizer)}
    for name, table in found.items():
        write_table(table, path / f"calibration_{name}.parquet")
    calibrated = _each(lambda site: policies.calibrate(sites[site].total), list(sites), "calibrate")
    write_table(
        tables.policy_table(dict(zip(sites, calibrated, strict=True))), path / "policies.parquet"
    )


def _test_stage(
    model, texts, path: Path, calibrations: tables.Calibrations, mix: str, settings: CaptureSettings
) -> None:
    """Score every calibration on one mix's test pool. ``errors.parquet`` is written last."""
    number = settings.mixes.index(mix)
    detailed, windowed = number < settings.detailed, number < settings.windows
    sites = _capture(model, texts.test, settings, settings.test_group)
    for name, table in tables.pool_tables("test", sites, texts.test_source, detailed).items():
        before = tables.calibration_table(path, name)
        write_table(pd.concat([before, table]), path / f"{name}.parquet")
    sequences = tables.calibration_table(path, "sequences")
    halves = tables.halves_of(sequences)

    def score(site: str):
        total = sites[site].total
        own = {m: {p: a[site] for p, a in by.items()} for m, by in calibrations.items()}
        oracle = {u: policies.oracle(total, u) for u in UNDERFLOWS}
        exact = [a for by in own.values() for a in by.values()] + list(oracle.values())
        if detailed:  # so that every subset of the sequences can be read off the curve
            exact += sequences[sequences.site == site].amax.unique().tolist()
        found = {
            "errors": scoring.group_errors(site, sites[site], total, own, oracle),
            "groups": scoring.group_table(site, sites[site]),
            "curves": scoring.curve_table(site, total, exact, windowed),
            "oracle": oracle,
        }
        if detailed:
            subsets = tables.calibration_table(path, "subsets")
            found["subsets"] = scoring.score_subsets(subsets[subsets.site == site], total)
            menu = scoring.site_menu(site, mix, calibrations, oracle, halves)
            found["metrics"] = scoring.metric_table(site, total, menu)
        return found

    scored = _each(score, list(sites), "score")
    oracles = {site: found.pop("oracle") for site, found in zip(sites, scored, strict=True)}
    joined = {name: pd.concat([found[name] for found in scored]) for name in scored[0]}
    menu = {
        site: scoring.window_menu(site, mix, calibrations, oracles[site], settings) for site in sites
    }
    direct = scoring.WindowErrors(menu, scoring.window_length(texts.test.shape[1]))
    device = next(model.parameters()).device
    with torch.inference_mode(), hooked(model, tuple(SITES), direct.count):
        for part in tqdm(texts.test.long().split(settings.batch), desc="windows", unit="batch"):
            getattr(model, "model", model)(input_ids=part.to(device))
    windows = direct.table()
    if windowed:
        write_table(scoring.as_float32(windows), path / "windows.parquet")
    if detailed:
        write_table(tables.calibration_table(path, "tokens"), path / "tokens.parquet")
        for site in settings.featured:
            sites[site].total.save(path / f"joint.{site}.parquet")
    per_group = settings.test_group * texts.test.shape[1] // direct.window
    by_window = scoring.window_group_errors(windows, calibrations, mix, per_group)
    errors = pd.concat([joined.pop("errors"), by_window])
    for name, table in joined.items():
        write_table(table, path / f"{name}.parquet")
    write_table(tables.without_equal_floor(errors), path / "errors.parquet")


def _scored(path: Path, mixes: tuple[str, ...]) -> bool:
    """Whether a test pool has been scored with the calibrations of all mixes."""
    file = path / "errors.parquet"
    return file.exists() and set(mixes) <= set(
        pd.read_parquet(file, columns=["calibration"]).calibration
    )


def _settings_of(info: dict) -> dict[str, str]:
    """What must not change while a run is made, or when mixes are added to it."""
    made = info["provenance"]
    hashes = {"model": info["model_sha256"], "code": made["source_sha256"]}
    for mix, text in info["texts"].items():
        hashes[f"texts of {mix}"] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
    versions = {f"version of {name}": version for name, version in made["versions"].items()}
    return hashes | made["parameters"] | versions | {"device": made["device"]}


def _begin(path: Path, info: dict) -> None:
    """Refuse to go on with a run that was made with other settings, or note those of a new one."""
    new = _settings_of(json.loads(json.dumps(info)))
    for file in (path / "run.json", path / BEGUN):
        if file.exists():
            old = _settings_of(json.loads(file.read_text()))
            changed = [f"{k} was {old[k]}, is {new[k]}" for k in old if k in new and old[k] != new[k]]
            if changed:
                raise ValueError(
                    f"{path} was captured with other settings: {'; '.join(changed)}. Expected the same: "
                    "its files would not fit together. Take another name, or delete the folder to "
                    "capture it again."
                )
    path.mkdir(parents=True, exist_ok=True)
    write_json(info, path / BEGUN)


def capture_run(
    model_name: str,
    path: Path,
    settings: CaptureSettings,
    *,
    folder: Path | None = None,
    commit: str | None = None,
) -> None:
    """Capture a model (a name of ``studies.data.models``, a folder or a hub id) into a folder.

    What ``path`` holds already is kept. Raises ``ValueError`` if it was captured with another model,
    other settings, texts, code, versions, or on another device.
    """
    source = Path(models.resolve(model_name))
    model, tokenizer = models.load(model_name)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    begin = models.begins_with(tokenizer)
    texts = {
        mix: corpora.sequences(mix, tokenizer, calibration=settings.calibration, test=settings.test,
                               length=settings.length, begin=begin, folder=folder,
                               allow_shortfall=settings.allow_shortfall)
        for mix in settings.mixes
    }  # fmt: skip
    known = models.MODELS.get(model_name)
    info = {
        "model": str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else model_name,
        "model_name": known.title if known else f"{source.name} model",
        "model_sha256": sha256_of(source) if source.exists() else "hub",
        "mixes": list(settings.mixes),
        "detailed_mixes": list(settings.mixes[: settings.detailed]),
        "window_mixes": list(settings.mixes[: settings.windows]),
        "texts": {m: t.provenance | {"shortfall": t.shortfall} for m, t in texts.items()},
        "provenance": provenance(commit, **settings.parameters()),
    }
    _begin(path, info)
    for number, mix in enumerate(settings.mixes):
        (path / mix).mkdir(parents=True, exist_ok=True)
        if not (path / mix / "policies.parquet").exists():
            print(f"calibration pool of {mix}", flush=True)
            detailed = number < settings.detailed
            _calibration_stage(model, tokenizer, texts[mix], path / mix, settings, detailed)
    calibrations = tables.read_calibrations(path, settings.mixes)
    sites = list(calibrations[settings.mixes[0]]["amax"])
    settings = dataclasses.replace(settings, featured=settings.featured or default_featured(sites))
    for mix in settings.mixes:
        if not _scored(path / mix, settings.mixes):
            print(f"test pool of {mix}", flush=True)
            _test_stage(model, texts[mix], path / mix, calibrations, mix, settings)
    if settings.end_to_end:
        model_stage(model, {mix: t.test.long() for mix, t in texts.items()}, path, calibrations)
    if settings.layouts:
        layout_stage(model, tokenizer, path, calibrations, settings, begin=begin, folder=folder)
    for mix in settings.mixes:
        for name in CALIBRATION_TABLES:
            (path / mix / f"calibration_{name}.parquet").unlink(missing_ok=True)
    clean_up(path)
    write_json(info | {"sites": sites, "featured": list(settings.featured)}, path / "run.json")
    (path / BEGUN).unlink()


def default_featured(sites: list[str]) -> tuple[str, ...]:
    """The first and the last layer's MLP and down-projection inputs."""
    layers = sorted({int(s.split(".")[1]) for s in sites})
    wanted = [f"layers.{i}.{s}" for i in (layers[0], layers[-1])
              for s in ("mlp_input", "down_proj_input")]  # fmt: skip
    return tuple(site for site in wanted if site in sites)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="models/reference", help="name, folder or hub id")
    parser.add_argument("--dataset", default=EMBEDDED_MIX, help="mixes, comma-separated")
    parser.add_argument("--run", default="", help="name under runs/; empty: results/reference")
    parser.add_argument("--out", type=Path, default=None, help="another output folder")
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    for name, value in (("calibration", 256), ("test", 64), ("length", 512), ("batch", 32),
                        ("detailed", 1), ("windows", 0), ("draws", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--featured", default="", help="sites whose joint histogram is kept")
    parser.add_argument("--layouts", default="", help="other lengths in tokens, comma-separated")
    parser.add_argument("--end-to-end", action="store_true", help="evaluate the model too")
    parser.add_argument("--allow-shortfall", action="store_true")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args()
    path = a.out or (RUNS / a.run if a.run else REFERENCE)
    settings = CaptureSettings(
        mixes=tuple(a.dataset.split(",")), calibration=a.calibration, test=a.test, length=a.length,
        batch=a.batch, draws=a.draws, detailed=a.detailed, windows=a.windows, end_to_end=a.end_to_end,
        featured=tuple(filter(None, a.featured.split(","))),
        layouts=tuple(int(n) for n in a.layouts.split(",") if n), allow_shortfall=a.allow_shortfall,
    )  # fmt: skip
    capture_run(a.model, path, settings, folder=a.corpora, commit=a.commit)
    print(f"run stored in {path}")
    Run(a.run) if a.out is None else None


if __name__ == "__main__":
    main()
