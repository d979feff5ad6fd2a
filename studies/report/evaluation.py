# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Whether the loss comes from the activations at all: the model itself on a few held-out sequences."""

from __future__ import annotations

import psutil
import torch

from studies.runs.end_to_end import evaluate
from studies.runs.quantized import find_linears
from studies.runs.settings import NONE, PER_TOKEN, Amaxes, Setting

BUDGET_S = (10.0, 60.0)  # at least and at most; between them half of the plain forward's time
COST = 1.3  # of a forward with quantized activations, over the plain one
MOST_SEQUENCES = 8


def evaluation_stage(
    model, tokens: torch.Tensor, amaxes: dict[str, Amaxes], forward_s: float, sequences: int, wide: bool
) -> dict:
    """KL divergence and NLL per sequence of A only, W only and both, with ``amaxes`` of two policies.

    ``amaxes``: recommended and amax, site -> calibrated amax; ``forward_s``: seconds of a plain forward
    per sequence; ``sequences``: of the whole report, whose forward gives the budget; ``wide``: also a
    scale per token. What cannot be done is said under ``skipped``.
    """
    skipped = []
    try:
        sites = find_linears(model)
    except ValueError as error:
        return {"skipped": [f"the model was not evaluated: {error}"], "kl": {}}
    settings = [
        Setting("", "", "A recommended", amaxes=amaxes["recommended"]),
        Setting("", "", "A amax", amaxes=amaxes["amax"]),
    ]
    linears = [linear for readers in sites.values() for linear in readers.values()]
    weights = sum(linear.get_parameter("weight").nbytes for linear in linears)
    if weights < free_bytes(next(model.parameters()).device) / 2:
        settings += [
            Setting("", "", "W", weights="nvfp4", rule=NONE),
            Setting("", "", "W and A recommended", weights="nvfp4", amaxes=amaxes["recommended"]),
        ]
    else:
        skipped.append(
            f"weights were not quantized: a copy takes {weights / 2**30:.1f} GiB, over half of what is"
            " free"
        )
    if wide:
        settings.append(Setting("", "", "A per token", rule=PER_TOKEN))
    low, high = BUDGET_S
    budget = min(max(forward_s * sequences / 2, low), high)
    each = forward_s * (1 + COST * len(settings))
    count = min(int(budget / each), len(tokens), MOST_SEQUENCES)
    if count < 1:
        return {
            "skipped": [
                f"the model was not evaluated: a sequence under {len(settings)} settings takes "
                f"about {each:.0f} s, the budget is {budget:.0f} s"
            ],
            "kl": {},
        }
    try:
        found = evaluate(model, tokens[:count].long(), settings, batch=4)
    except ValueError as error:  # a model whose logits or weights are not understood
        return {"skipped": [*skipped, f"the model was not evaluated: {error}"], "kl": {}}
    names = [s.policy for s in settings]
    return {
        "sequences": count,
        "tokens": count * (tokens.shape[1] - 1),
        "budget_s": budget,
        "kl": dict(zip(names, found.kl.tolist(), strict=True)),
        "nll": dict(zip(names, found.nll.tolist(), strict=True)),
        "top1": dict(zip(names, found.top1.tolist(), strict=True)),
        "skipped": skipped,
    }


def free_bytes(device: torch.device) -> int:
    """Memory that is free where the model is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
