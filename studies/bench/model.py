# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Time capture on a model of Qwen3.5-9B's shape, with random weights: the third benchmark part.

The configuration is the default of transformers' ``Qwen3_5TextConfig``, which is Qwen/Qwen3.5-9B's;
its weights would have to come from a hub. What capture costs depends on the values only through
the number of distinct pairs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nvfp4_utils.hooks import capture
from nvfp4_utils.policies import FROM_MARGINALS, calibrate
from nvfp4_utils.sites import SITES
from studies import ROOT
from studies.data import corpora
from studies.runs.store import write_table
from studies.runs.tables import policy_table, pool_tables

from .timing import Table

BATCH, LENGTH, VOCABULARY = 16, 512, 248320
SEQUENCES = 2600
GROUP = 325  # sequences a group of the long capture: eight of them
STEPS = 20
CAPTURES: dict[str, tuple[tuple[str, ...], int]] = {  # sites, and sequences a group
    "mlp_input of all layers": (("mlp_input",), 10 * BATCH),
    "four sites of all layers": (tuple(SITES), 10 * BATCH),
    "four sites, small groups": (tuple(SITES), 2 * BATCH),
}


def random_model(layers: int):
    """The architecture in bfloat16 on the device, with random weights; 32 layers are all."""
    import transformers

    config = transformers.Qwen3_5TextConfig(num_hidden_layers=layers)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.Qwen3_5ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def real_tokens(folder: Path) -> torch.Tensor:
    """int64 [SEQUENCES, LENGTH] of open text, by the reference model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "reference")
    found: list[int] = []
    for text in corpora.training_text(tokenizer, folder=folder):
        found += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) >= SEQUENCES * LENGTH:
            return torch.tensor(found[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)
    raise ValueError(f"{folder} holds {len(found)} tokens; expected {SEQUENCES * LENGTH}.")


def wall(call) -> float:
    """Seconds until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def time_overhead(table: Table, model, repeats: int = 2) -> None:
    """The plain forward and capture, in turn, so that drifts of the clock hit both; ms a step."""
    batches = torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH)).split(BATCH)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(input_ids=batch.to("cuda", non_blocking=True))

    def captured(sites: tuple[str, ...], group: int) -> None:
        capture(model, batches, sites, group_size=group, progress=False)

    times: dict[str, list[float]] = {"plain": [], **{name: [] for name in CAPTURES}}
    for repeat, name in itertools.product(range(repeats + 1), times):
        seconds = wall(plain if name == "plain" else functools.partial(captured, *CAPTURES[name]))
        print(f"{name}: {seconds:.2f} s, {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB", flush=True)
        if repeat:  # the first compiles
            times[name].append(1e3 * seconds / STEPS)
    for name, values in times.items():
        quantiles = [float(np.quantile(values, q)) for q in (0.5, 0.2, 0.8)]
        more = np.median(np.array(values) / np.array(times["plain"])) - 1
        table.add("forward", name, 0, quantiles, overhead=float(more), steps=STEPS,
                  group=0 if name == "plain" else CAPTURES[name][1])  # fmt: skip


def time_capture(table: Table, model, folder: Path) -> None:
    """Tokens to files, as a capture run does it: statistics, policies, histograms of all layers."""
    before = time.perf_counter()
    tokens = real_tokens(folder)
    tokenized = time.perf_counter()
    one_of_each_size = {len(batch): batch for batch in tokens.split(BATCH)}
    for batch in one_of_each_size.values():  # kernels are compiled and tuned at first use
        capture(model, [batch], ("mlp_input",), progress=False)
    torch.cuda.synchronize()
    start = time.perf_counter()
    sites = capture(model, tokens.split(BATCH), ("mlp_input",), group_size=GROUP, progress=False)
    torch.cuda.synchronize()
    captured = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        found = pool_tables("calibration", sites, ["open text"] * SEQUENCES, exact=True)
        totals = {label: site.total for label, site in sites.items()}
        amaxes = {label: calibrate(t.marginals, FROM_MARGINALS) for label, t in totals.items()}
        for name, part in (found | {"policies": policy_table(amaxes)}).items():
            write_table(part, path / f"{name}.parquet")
        for label, total in totals.items():
            total.save(path / f"joint.{label}.parquet")
        written = sum(file.stat().st_size for file in path.iterdir())
    end = time.perf_counter()
    count = sum(total.count for total in totals.values())
    expected = SEQUENCES * LENGTH * model.config.hidden_size * len(sites)
    pairs = [len(total.keys) for total in totals.values()]
    for part, seconds in (("tokenize", tokenized - before), ("all", end - start),
                          ("capture", captured - start), ("write", end - captured)):  # fmt: skip
        table.add("long_capture", part, 0, [1e3 * seconds] * 3, written=written, sites=len(sites),
                  sequences=SEQUENCES, pairs=max(pairs), ok=count == expected)  # fmt: skip


def run_model(commit: str | None, folder: Path | None, layers: int = 32) -> None:
    """Both timings, with the linear attention that is installed."""
    try:
        attention = "flash-linear-attention " + importlib.metadata.version("flash-linear-attention")
    except importlib.metadata.PackageNotFoundError:
        attention = "the reference PyTorch path"
    table = Table()
    model = random_model(layers)
    parameters = sum(p.numel() for p in model.parameters())
    part = "model_fla" if attention.startswith("flash") else "model"
    info = {"linear_attention": attention, "parameters": parameters, "batch": BATCH, "length": LENGTH,
            "layers": model.config.num_hidden_layers, "group": GROUP}  # fmt: skip
    if folder is not None:
        time_capture(table, model, folder)
        table.write(part, commit, **info)
    time_overhead(table, model)
    table.write(part, commit, **info)
