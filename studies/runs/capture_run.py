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
import sys
from pathlib import Path

import torch

from nvfp4_utils.sites import find_coverage, kind_of, layer_of
from studies import ROOT
from studies.data import corpora, models
from studies.data.mixes import EMBEDDED_MIX

from . import run_folder, tables
from .capture_settings import CaptureSettings
from .model_loss import clean_up, evaluated, layout_stage, model_stage
from .stages import calibrated, calibration_names, calibration_stage, scored, test_stage
from .store import REFERENCE, RESULTS, RUNS, Run, check_run_name, provenance, sha256_of


def _check_texts(texts: dict, checkpoint: models.Checkpoint, tokenizer) -> None:
    """Refuse a pool without a sequence, and tokens that the model has no embedding of."""
    for mix, text in texts.items():
        for pool, tokens in (("calibration", text.calibration), ("test", text.test)):
            if not len(tokens):
                raise ValueError(
                    f"the {pool} pool of {mix} holds no sequence; expected at least one. Ask for more "
                    "sequences, or for shorter ones."
                )
            if (largest := int(tokens.max())) >= checkpoint.vocabulary:
                raise ValueError(
                    f"the tokenizer of {checkpoint.source}, of {len(tokenizer)} tokens, made the token "
                    f"{largest} of {mix}; expected ids below {checkpoint.vocabulary}, the vocabulary of "
                    "the model. Put the model's own tokenizer beside it."
                )


def capture_run(
    model_name: str,
    path: Path,
    settings: CaptureSettings,
    *,
    folder: Path | None = None,
    commit: str | None = None,
) -> None:
    """Capture a model (a name of ``studies.data.models``, a folder or a hub id) into a folder.

    What ``path`` holds already is kept, if it is whole; what is missing is made again.

    Raises
    ------
    ValueError
        For settings that no run can be made with, and if ``path`` was captured with another model, other
        settings, texts, code, versions, or on another device.
    OSError
        If another process writes the run, the disk is full, or model or text cannot be read.
    """
    settings.check()
    with run_folder.locked(path):
        _capture_run(model_name, path, settings, folder, commit)


def _capture_run(
    model_name: str, path: Path, settings: CaptureSettings, folder: Path | None, commit: str | None
) -> None:
    checkpoint = models.describe(model_name)
    tokenizer = models.load_tokenizer(model_name)
    begin = models.begins_with(tokenizer)
    texts = {
        mix: corpora.sequences(mix, tokenizer, calibration=settings.calibration, test=settings.test,
                               length=settings.length, begin=begin, folder=folder,
                               allow_shortfall=settings.allow_shortfall)
        for mix in settings.mixes
    }  # fmt: skip
    _check_texts(texts, checkpoint, tokenizer)
    info = _info(model_name, checkpoint, settings, texts, commit)
    run_folder.check_same(path, info)
    same = checkpoint.dtype == info["dtype"]
    print(f"{info['model']}: a {checkpoint.dtype} checkpoint" + ("" if same else ", cast to bfloat16"))
    model = models.load_network(model_name).to("cuda" if torch.cuda.is_available() else "cpu")
    coverage = find_coverage(model)
    if coverage.uncovered:
        print(f"not captured: {coverage.described()}")
    sites = list(coverage.sites)
    settings = dataclasses.replace(settings, featured=settings.featured or default_featured(sites))
    if unknown := set(settings.featured) - set(sites):
        raise ValueError(f"featured has {sorted(unknown)[0]}; expected sites of {', '.join(sites)}.")
    run_folder.begin(path, info)
    made = False
    for mix in settings.mixes:
        (path / mix).mkdir(parents=True, exist_ok=True)
        detailed = settings.is_detailed(mix)
        if not calibrated(path / mix, detailed):
            print(f"calibration pool of {mix}", flush=True)
            calibration_stage(model, tokenizer, texts[mix], path / mix, settings, detailed)
            made = True
    calibrations = tables.read_calibrations(path, settings.mixes)
    for mix in settings.mixes:
        if not scored(path / mix, mix, settings):
            print(f"test pool of {mix}", flush=True)
            test_stage(model, texts[mix], path / mix, calibrations, mix, settings)
            made = True
    if not evaluated(path, settings):
        made = True
        if settings.end_to_end:
            model_stage(model, {mix: t.test.long() for mix, t in texts.items()}, path, calibrations)
        if settings.layouts:
            layout_stage(model, tokenizer, path, calibrations, settings, begin=begin, folder=folder)
    for mix in settings.mixes:
        for name in calibration_names(detailed=True):
            (path / mix / f"calibration_{name}.parquet").unlink(missing_ok=True)
    clean_up(path)
    readers = {label: list(site.readers) for label, site in coverage.sites.items()}
    found = {"sites": sites, "readers": readers, "featured": list(settings.featured)}
    run_folder.finish(path, info | found, made)


def _info(
    model_name: str, checkpoint: models.Checkpoint, settings: CaptureSettings, texts: dict, commit
) -> dict:
    """What ``run.json`` says before anything is captured."""
    source, known = Path(checkpoint.source), models.MODELS.get(model_name)
    here = source.absolute().is_relative_to(ROOT)
    content = {"model_sha256": sha256_of(source)} if source.is_dir() else {}
    return {
        "model": str(source.absolute().relative_to(ROOT)) if here and content else model_name,
        "model_name": known.title if known else f"{source.name} model",
        **content,
        "model_files": checkpoint.files,
        "model_revision": checkpoint.revision,
        "checkpoint_dtype": checkpoint.dtype,
        "dtype": "bfloat16",
        "mixes": list(settings.mixes),
        "detailed_mixes": list(settings.mixes[: settings.detailed]),
        "window_mixes": list(settings.mixes[: settings.windows]),
        "texts": {m: t.provenance | {"shortfall": t.shortfall} for m, t in texts.items()},
        "provenance": provenance(commit, **settings.parameters()),
    }


def default_featured(sites: list[str]) -> tuple[str, ...]:
    """The first and the last layer's MLP and down-projection inputs."""
    wanted = [s for s in sites if kind_of(s) in ("mlp_input", "down_proj_input")]
    layers = sorted({n for n in map(layer_of, wanted) if n is not None})
    return tuple(s for s in wanted if layer_of(s) in (layers[0], layers[-1]))


def main(arguments: list[str] | None = None) -> int:
    """Command line; what is wrong with its arguments, files or room is one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="models/reference", help="name, folder or hub id")
    parser.add_argument("--dataset", default=EMBEDDED_MIX, help="mixes, comma-separated")
    parser.add_argument("--run", default="", help="name under runs/; empty: results/reference")
    parser.add_argument("--out", type=Path, default=None, help="another output folder")
    parser.add_argument("--corpora", type=Path, default=None, help="folder of *.jsonl.gz")
    for field in dataclasses.fields(CaptureSettings):
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=int, default=field.default, metavar="N"
            )
    parser.add_argument("--featured", default="", help="sites whose joint histogram is kept")
    parser.add_argument("--layouts", default="", help="other lengths in tokens, comma-separated")
    parser.add_argument("--end-to-end", action="store_true", help="evaluate the model too")
    parser.add_argument("--allow-shortfall", action="store_true")
    parser.add_argument("--commit", default=None)
    a = parser.parse_args(arguments)
    try:
        if a.run and a.out is None:
            check_run_name(a.run)
            if (RESULTS / a.run / "run.json").exists():
                raise ValueError(f"{a.run} is a run that the book stores; expected another name.")
        path = a.out or (RUNS / a.run if a.run else REFERENCE)
        own = {name: value for name, value in vars(a).items()
               if name in CaptureSettings.__dataclass_fields__}  # fmt: skip
        own |= {
            "mixes": tuple(filter(None, a.dataset.split(","))),
            "featured": tuple(filter(None, a.featured.split(","))),
            "layouts": tuple(int(n) for n in a.layouts.split(",") if n),
        }
        capture_run(a.model, path, CaptureSettings(**own), folder=a.corpora, commit=a.commit)
        if a.out is None:
            Run(a.run)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"run stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
