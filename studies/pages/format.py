# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What ``input_scale`` does: the SNR of one tensor over all scales, and where it does not move."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from nvfp4_utils import ActivationStatistics, input_scale_from_amax
from nvfp4_utils.quantize import E4M3_NORMAL_RANGE, UNDERFLOWS

from . import plots, regimes

WITHIN = np.linspace(0, 1, 257)  # places in an octave, as exponents of 2


@dataclass(frozen=True)
class Sweep:
    """The SNR (dB) of one tensor at calibrated amaxes from far below its safe window to far above.

    ``low``, ``high``: the safe window; ``curve``: calibrated_amax, flush, floor; ``half``, ``right``:
    SNR at half of the tensor's amax and at it, flush; ``ripple``: how far SNR moves within the octave
    from the amax on; ``wrong``: SNR at ``overshoot``, by convention.
    """

    elements: int
    low: float
    high: float
    curve: pd.DataFrame
    half: float
    right: float
    ripple: float
    overshoot: float
    wrong: dict[str, float]

    @property
    def plateau(self) -> pd.DataFrame:
        """The curve inside the safe window."""
        return self.curve[self.curve.calibrated_amax.between(self.low, self.high)]

    @property
    def octaves(self) -> float:
        """How wide the safe window is."""
        return float(np.log2(self.high / self.low))


def sweep(statistics: ActivationStatistics, overshoot: float) -> Sweep:
    """Every 32nd of an octave from 4 octaves below the amax to 25 above it."""
    low, high = regimes.safe_window(statistics.marginals)
    amaxes = low * 2.0 ** np.arange(-4, 25, 1 / 32)
    half, right = statistics.snr_db(input_scale_from_amax(np.array([low / 2, low])))
    scale = input_scale_from_amax(overshoot)
    wrong = {str(u): statistics.snr_db(scale, u) for u in UNDERFLOWS}
    curve = regimes.snr_curve(statistics, amaxes)
    octave = statistics.snr_db(input_scale_from_amax(low * 2**WITHIN))
    ripple = float(octave.max() - octave.min())
    return Sweep(statistics.count, low, high, curve, float(half), float(right), ripple, overshoot, wrong)


def answer(s: Sweep) -> str:
    """The page's answer, simple HTML."""
    snr = s.plateau.flush
    if snr.empty:
        places = (
            "It places the block scales inside the range of an 8-bit float, which these blocks "
            f"span.</strong> Their amaxes span more than a factor of {E4M3_NORMAL_RANGE:,.0f}: no scale "
            "suits them all."
        )
    else:
        places = (
            "It places the block scales inside the range of an 8-bit float, and does nothing "
            f"else.</strong> Over a factor of {s.high / s.low:,.0f} of calibrated amaxes, the SNR of a "
            f"Gaussian moves by {s.ripple:.3f} dB."
        )
    return (
        f"<strong>{places} Half of the amax already costs {s.right - s.half:.1f} dB; one far too high "
        f"{s.right - s.wrong['flush']:.1f} dB under flush, as kernels do."
    )


def plateau_prose(s: Sweep) -> str:
    """The numbers behind the answer, Markdown."""
    snr = s.plateau.flush
    inside = "No calibrated amax keeps every block normal"
    if not snr.empty:
        inside = (
            f"Every calibrated amax from {s.low:.3g} to {s.high:,.0f} gives an SNR between "
            f"{snr.min():.2f} and {snr.max():.2f} dB"
        )
    return (
        f"{inside}, on {s.elements:,} draws of N(0,1). *Floor* keeps blocks that are too small for "
        "their scale; *flush* zeroes them. What would change this: a tensor whose block amaxes span "
        f"more than a factor of {E4M3_NORMAL_RANGE:,.0f} has no safe amax at all."
    )


def worked_prose(numbers: dict[str, float], calibrated_amax: float) -> str:
    """``regimes.worked_block``'s numbers in words, Markdown."""
    return (
        f"A calibrated amax of {calibrated_amax:g} stores an `input_scale` of "
        f"{numbers['input_scale']:.7f}. The block's own amax is {numbers['block_amax']:g}, so its scale "
        f"is {numbers['s']:.3f}, which E4M3 rounds to {numbers['s8']:g}. One unit of E2M1 is then worth "
        f"{numbers['step']:.5f}, and the largest value of the block can be {6 * numbers['step']:.4f}. "
        "`fake_quantize` gives the same bits."
    )


def draw_levels() -> plt.Figure:
    """A tensor cut into blocks, a block into elements, an element into bits; each with its scale."""
    fig, ax = plt.subplots(figsize=(5.2, 4.4))
    ax.set(xlim=(0, 16), ylim=(0, 16.6))
    ax.set_axis_off()
    grey, picked = "0.93", "0.72"

    def box(x, y, width, height, text="", color="w"):
        ax.add_patch(plt.Rectangle((x, y), width, height, fc=color, ec="k", lw=0.8))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def zoom(left, right, top, bottom):
        for x, below in ((left, 0), (right, 16)):
            ax.plot([x, below], [top, bottom], color="0.5", lw=0.8, ls=":")

    def title(y, name, scale):
        ax.text(0, y, name, weight="bold", va="bottom", fontsize=10)
        ax.text(16, y, scale, ha="right", va="bottom", fontsize=9)

    title(16, "tensor", "input_scale, FP32: fixed by calibration")
    for row, column in np.ndindex(3, 4):
        box(4 * column, 14.8 - row, 4, 1, "block" if (row, column) == (2, 1) else "",
            picked if (row, column) == (2, 1) else grey)  # fmt: skip
    zoom(4, 8, 12.8, 9.6)
    title(9.7, "block of 16 elements", "block scale, E4M3: 8 bits, set at inference")
    for i in range(16):
        box(i, 8.4, 1, 1.2, "x" if i == 5 else "", picked if i == 5 else grey)
    zoom(5, 6, 8.4, 4.6)
    title(4.7, "element", "E2M1: 4 bits, set at inference")
    for i, text in enumerate(("sign", "exponent", "exponent", "mantissa")):
        box(4 * i, 3.2, 4, 1.4, text, grey)
    ax.text(8, 1.2, "value ≈ element × block scale × input_scale", ha="center", fontsize=10)
    return fig


def block_settings(block: torch.Tensor, calibrated_amax: float) -> dict:
    """What the element ``block`` of ``interactive`` needs: where it begins, its ends in octaves."""
    values = block.to(torch.float32).tolist()
    return {"block": values, "amax": calibrated_amax, "underflow": "flush", "range": [-4, 20]}


def draw_range(s: Sweep, statistics: ActivationStatistics) -> plt.Figure:
    """SNR against calibrated amax under both conventions, over the regimes of the block scales."""
    fig, ax = plt.subplots(figsize=(7.2, 4.4))
    x = s.curve.calibrated_amax
    for convention, style in plots.UNDERFLOW_STYLE.items():
        ax.plot(x, s.curve[convention], color=style.color, linestyle=style.linestyle)
        at = (s.curve[convention] - 10).abs()[x > s.high].idxmin()
        side, shift = ("right", -8) if convention == "flush" else ("left", 8)
        ax.annotate(style.label, (x[at], 10), color=style.color, ha=side, xytext=(shift, 0),
                    textcoords="offset points")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xlim(x.iloc[0], x.iloc[-1])
    ax.set_ylim(-0.5, 26)
    regimes.shade_scale_axis(ax, statistics.marginals)
    ax.set_xlabel("calibrated amax (log2 axis)")
    ax.set_ylabel("SNR (dB)")
    return fig


def draw_ripple(statistics: ActivationStatistics, low: float) -> plt.Figure:
    """SNR over the first octave of the plateau, with two higher ones on it."""
    fig, ax = plt.subplots(figsize=(7.2, 3.4))
    for octave, color, marker, every in (
        (0, "0.5", "", 1),
        (6, "k", "o", 16),
        (10, "k", "x", 16),
    ):
        snr = statistics.snr_db(input_scale_from_amax(low * 2 ** (WITHIN + octave)))
        ax.plot(2 ** WITHIN[::every], snr[::every], color=color, marker=marker, ls="" if marker else "-",
                ms=7 - octave / 4, mfc="none", label=f"octave {octave}")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 1.25, 1.5, 1.75, 2], ["1", "1.25", "1.5", "1.75", "2"])
    ax.set_xlabel("calibrated amax / start of the octave (log2 axis)")
    ax.set_ylabel("SNR (dB)")
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return fig


def cliff_prose(s: Sweep) -> str:
    """Where harm begins beyond the window, Markdown."""
    last = s.curve.calibrated_amax[s.curve.flush > s.right - 1].max()
    return (
        f"The first block leaves the normal range at {s.high:,.0f}, yet the SNR is within 1 dB of the "
        f"plateau up to {last:,.0f}: the smallest blocks leave first, and they carry the least energy. "
        "So the window is a guarantee, not the point of harm. The dip and rebound further right come "
        "from the last two subnormals: a scale between them is rounded by up to a third, one close to "
        "either is not."
    )


def reconciliation(s: Sweep) -> str:
    """The prediction beside what was found, Markdown."""
    return (
        f"The prediction held. The plateau is {s.octaves:.1f} octaves wide here because the block "
        f"amaxes of a Gaussian span only a factor of {s.low / s.high * E4M3_NORMAL_RANGE:.1f}, which "
        f"leaves almost all of E4M3's normal range, a factor of {E4M3_NORMAL_RANGE:,.0f}, as room for a "
        "wrong guess. What it did not foresee is how different the two conventions are past the right "
        f"cliff: {s.wrong['floor'] - s.wrong['flush']:.1f} dB at an amax of {s.overshoot:,.0f}."
    )
