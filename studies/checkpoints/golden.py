# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A golden block: 16 values, their NVFP4 bytes and what those decode to, stored beside scales.

A loader that takes g for 1/g, packs the nibbles the other way round or rounds ties otherwise gets
other bytes from the 16 values. When a file is loaded, its own numbers are compared with what
the reference gives, so that a file written under another convention is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nvfp4_utils.quantize import (
    E2M1_VALUES,
    block_scale_e4m3,
    fake_quantize,
    round_e2m1,
)

from .scales import CONVENTIONS, MODELOPT

# Exact in bfloat16. At amax 96, g is 1/28 and the largest magnitude, 5.25, gives s = 24.5, which E4M3
# rounds to 24: block scale, elements and both conventions of g are all visible in the result.
GOLDEN_AMAX = 96.0
GOLDEN_VALUES = (0.0, 0.375, -0.625, 1.0, -1.5, 2.0, -3.0, 5.25,
                 -0.0625, 0.75, -1.25, 1.75, -2.5, 3.5, -4.5, 0.1875)  # fmt: skip
SIGN_BIT = 8  # of a nibble; the other three are the index of E2M1_VALUES


def golden_block() -> dict:
    """The golden block as JSON: values, scales of both conventions, bytes and decoded values.

    ``packed``: 8 bytes, the even element in the low nibble, as ModelOpt and compressed-tensors pack;
    ``block_scale_byte``: E4M3; ``decoded``: float32, ``±E2M1_VALUES[k] * block_scale * input_scale``.
    """
    x = torch.tensor(GOLDEN_VALUES, dtype=torch.float32)
    g = torch.tensor(MODELOPT.stored(GOLDEN_AMAX))
    block_scale = block_scale_e4m3(x.abs().amax(), g, "flush")
    codes = _codes(x, block_scale * g)
    return {
        "values": list(GOLDEN_VALUES),
        **{c.leaf: c.stored(GOLDEN_AMAX) for c in CONVENTIONS},
        "block_scale": block_scale.item(),
        "block_scale_byte": int(block_scale.to(torch.float8_e4m3fn).view(torch.uint8)),
        "packed": (codes[0::2] + 16 * codes[1::2]).tolist(),
        "decoded": fake_quantize(x[None], g, underflow="flush")[0].tolist(),
    }


def _codes(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    magnitudes = round_e2m1(x.abs() / step)
    index = torch.searchsorted(torch.tensor(E2M1_VALUES), magnitudes)
    return index + SIGN_BIT * torch.signbit(x).long()


def check_golden(stored: Mapping, source: str) -> None:
    """Raise ``ValueError`` if a file's golden block is not the one that this convention gives."""
    for name, expected in golden_block().items():
        if stored.get(name) != expected:
            raise ValueError(
                f"{source}: the golden block's {name} is {stored.get(name)}; expected {expected}. "
                "The file "
                "is of another convention or was edited: export it again."
            )
