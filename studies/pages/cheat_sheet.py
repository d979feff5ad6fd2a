# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""One page to carry off: what to set, the numbers behind it, and what happens to a block at a scale."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nvfp4_utils.quantize import E4M3_NORMAL_RANGE
from studies.runs.scoring import UNDERFLOW_START
from studies.runs.store import Run

from . import loss_tables, q1_more_calibration, q2_which_policy, what_to_set


def numbers(runs: Sequence[Run]) -> pd.DataFrame:
    """What was measured: a row per number worth remembering, smallest to largest over models."""
    runs = tuple(runs)
    policy, floors = what_to_set.chosen(runs), what_to_set.noise_floor(runs)
    margins = what_to_set.margin_table(runs).groupby("model").first()
    clip = [c["p99.99"][0] for c in q2_which_policy.answer(runs).change.values()]
    enough = q1_more_calibration.answer(runs).enough.values()
    rows = {
        "Sequences after which the amax gains nothing": loss_tables.span(enough, "d"),
        "One octave too low costs as much as so many too high":
            loss_tables.span(margins["as bad as 1 octave too low"]),
        "KL with p99.99 in place of the amax (%)": loss_tables.span(clip, "+.0f"),
        "KL with the amax of other text, at worst (%)":
            f"{what_to_set.worst(runs, 'amax', (what_to_set.OTHER,)).percent:+.1f}",
        f"KL with {policy}, any text, at worst (%)": f"{what_to_set.worst(runs, policy).percent:+.1f}",
        "KL between calibrations of equal merit (±%)": f"{max(floors.values()):.1f}",
    }  # fmt: skip
    return pd.Series(rows, name="measured").rename_axis("number").to_frame()


def ranges() -> pd.DataFrame:
    """What becomes of a block of amax b at a calibrated amax A."""
    rows = {
        "below 1": ("saturated", "its largest values are clipped: the dear side"),
        f"1 to {E4M3_NORMAL_RANGE:,.0f}": ("normal", "error independent of A, but for a ripple"),
        f"{E4M3_NORMAL_RANGE:,.0f} to {UNDERFLOW_START:,.0f}": ("subnormal", "error grows"),
        f"from {UNDERFLOW_START:,.0f} on": ("underflow", "zero in kernels (flush) or too large (floor)"),
    }  # fmt: skip
    frame = pd.DataFrame(rows, index=["block scale", "effect"]).T
    return frame.rename_axis("A / b")
