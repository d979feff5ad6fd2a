# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the stages measured, as the tables of ``results/engine``."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from nvfp4_utils.histogram import sum_by_key
from nvfp4_utils.quantize import input_scale_from_amax
from nvfp4_utils.statistics import ActivationStatistics
from studies.runs.store import RESULTS, provenance, read_table, write_json, write_table

from . import measure
from .measure import CHUNKED, DECODE, REAL, REREAD, SAMPLED, SINGLE, TRANSFORMERS, VLLM

TARGET = RESULTS / "engine"
PREFILL = (TRANSFORMERS, SINGLE, VLLM, CHUNKED)  # sources that read the calibration text


def moved(a: ActivationStatistics, b: ActivationStatistics) -> float:
    """Least share of elements that must change for one statistic to become the other; 0 if equal.

    Elements are told apart by their magnitude and their block's amax: if that moves, 16 elements do.
    Half the sum of the absolute differences of counts, over the number of elements. Raises
    ``ValueError`` if these numbers differ.
    """
    if a.count != b.count:
        raise ValueError(
            f"the statistics are of {a.count} and {b.count} elements; expected the same text."
        )
    _, rest = sum_by_key(torch.cat([a.keys, b.keys]), torch.cat([a.counts, -b.counts]))
    return int(rest.abs().sum()) / 2 / a.count


def source_row(statistic: ActivationStatistics, reference: ActivationStatistics) -> dict[str, float]:
    """Count and amax; SNR in dB, also with all blocks alike, at the own amax and at the reference's."""
    scales = input_scale_from_amax([statistic.amax, reference.amax])
    (own, calibrated), (block, block_calibrated) = (
        statistic.snr_db(scales),
        statistic.block_snr_db(scales),
    )
    return {"count": statistic.count, "amax": statistic.amax, "snr_db": own, "block_snr_db": block,
            "calibrated_snr_db": calibrated, "calibrated_block_snr_db": block_calibrated}  # fmt: skip


def site_table(work: Path, labels: list[str]) -> pd.DataFrame:
    """One row a source and site: see ``source_row``; ``moved`` from transformers, of the same text."""
    others = [REAL, REREAD, *(f"{DECODE} {name}" for name in SAMPLED)]
    rows = []
    for label in tqdm(labels, desc="compare", unit="site"):
        reference = measure.kept_statistics(work, TRANSFORMERS, [label])[label]
        for source in (*PREFILL, *others):
            statistic = measure.kept_statistics(work, source, [label])[label]
            row = {"site": label, "source": source} | source_row(statistic, reference)
            rows.append(row | ({"moved": moved(statistic, reference)} if source in PREFILL else {}))
    return pd.DataFrame(rows)


def policy_table(work: Path) -> pd.DataFrame:
    """One row a source of the calibration text, policy and site: calibrated_amax."""
    rows = [(source, policy, site, amax)
            for source in (TRANSFORMERS, VLLM, CHUNKED)
            for policy, amaxes in json.loads((work / f"policies {source}.json").read_text()).items()
            for site, amax in amaxes.items()]  # fmt: skip
    return pd.DataFrame(rows, columns=["source", "policy", "site", "calibrated_amax"])


def agreement(work: Path) -> dict:
    """Where greedy text of the two engines parts, and how often they predict the same token."""
    ours, theirs = (
        load_file(work / f"generated {engine}.safetensors")["greedy"] for engine in (TRANSFORMERS, VLLM)
    )
    differs = (ours != theirs).int()
    first = [int(row.argmax()) if row.any() else len(row) for row in differs]
    top = {engine: load_file(work / f"top {engine}.safetensors")["top"]
           for engine in (TRANSFORMERS, VLLM, CHUNKED)}  # fmt: skip
    return {
        "tokens_before_difference": first,
        "generated": ours.shape[1],
        "same_prediction": {e: (t == top[TRANSFORMERS]).double().mean().item() for e, t in top.items()},
        "same_prediction_chunked": (top[CHUNKED] == top[VLLM]).double().mean().item(),
    }


def collect(work: Path) -> None:
    """Write ``sites``, ``policies`` and ``losses`` (Parquet) and ``outcome.json``."""
    TARGET.mkdir(parents=True, exist_ok=True)
    policies = policy_table(work)
    write_table(site_table(work, list(dict.fromkeys(policies.site))), TARGET / "sites.parquet")
    write_table(policies, TARGET / "policies.parquet")
    losses = [read_table(work / f"losses {engine}.parquet") for engine in (TRANSFORMERS, VLLM, CHUNKED)]
    write_table(pd.concat(losses, ignore_index=True), TARGET / "losses.parquet")
    stages = ("transformers", "vllm", "vllm-chunked", "losses")
    outcome = {
        "provenance": provenance(
            model=measure.MODEL, mix=measure.MIX, calibration=measure.CALIBRATION, test=measure.TEST,
            length=measure.LENGTH, prompt=measure.PROMPT, chunk=measure.CHUNK, sampled=SAMPLED,
        ),
        "versions": {s: json.loads((work / f"versions {s}.json").read_text()) for s in stages},
        "agreement": agreement(work),
    }  # fmt: skip
    write_json(outcome, TARGET / "outcome.json")
