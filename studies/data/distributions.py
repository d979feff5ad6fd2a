# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The study's seven synthetic distributions, in bf16.

The study's test tensor has seed 12345 and 2^20 elements; its calibration seeds are 100, 101, 102.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

ROW = 1024  # elements a row: channels of the per-channel case, one token of the per-token case
CHUNK_ROWS = 4096  # 2^22 elements at a time keep the FP32 temporaries under 100 MB
SPLITS = ("calibration", "test")

# Drawn once at random. Their placement matters: 683 and 684 share a block of 16 (26.6 dB at best,
# as published); ten channels in ten blocks give 27.2 dB, ten in one block 21.1 dB.
OUTLIER_CHANNELS = (11, 217, 227, 602, 657, 683, 684, 705, 933, 980)
SPIKE_MAGNITUDE = 1e6
SPIKE_PROBABILITY = 1e-7

# (rows, generator, split) -> one FP32 chunk [rows, 1024]
_Draw = Callable[[int, torch.Generator, str], torch.Tensor]
# n, generator -> values for each row: what a whole tensor decides before its chunks are drawn
_RowScale = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Distribution:
    """A named distribution with its formula; `sample` draws it in bf16."""

    name: str
    formula: str
    draw: _Draw
    row_scale: _RowScale | None = None

    def sample(self, n: int, generator: torch.Generator, split: str = "calibration") -> torch.Tensor:
        """Return bf16 [n], drawn on the generator's device as rows of 1,024 elements.

        Longer tensors do not extend shorter ones of the same seed. Raises ValueError if `n` is not
        a positive multiple of 1,024 or `split` is unknown.
        """
        if n < ROW or n % ROW:
            raise ValueError(f"got n={n}, expected a positive multiple of {ROW}. Round it up.")
        if split not in SPLITS:
            raise ValueError(f"got split={split!r}, expected one of {SPLITS}.")
        rows = n // ROW
        out = torch.empty(rows, ROW, dtype=torch.bfloat16, device=generator.device)
        scale = self.row_scale(rows, generator) if self.row_scale else None
        for start, stop in _chunks(rows):
            values = self.draw(stop - start, generator, split)
            out[start:stop] = values if scale is None else values * scale[start:stop, None]
        return out.flatten()


def _chunks(rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, CHUNK_ROWS):
        yield start, min(start + CHUNK_ROWS, rows)


def _normal(rows: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, ROW, generator=g, device=g.device)


def _uniform(rows: int, g: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(rows, ROW, generator=g, device=g.device, dtype=dtype)


def _sign(rows: int, g: torch.Generator) -> torch.Tensor:
    return torch.where(_uniform(rows, g) < 0.5, -1.0, 1.0)


def _post_layernorm_spikes(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    x = _normal(rows, g)
    return torch.where(_uniform(rows, g) < 1e-3, 10 * x, x)


def _per_channel_outlier(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    x = _normal(rows, g)
    x[:, list(OUTLIER_CHANNELS)] *= 100
    return x


def _per_token_outlier(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    return 0.5 * _normal(rows, g)


def _outlier_rows(rows: int, g: torch.Generator) -> torch.Tensor:
    scale = torch.ones(rows, device=g.device)
    scale[torch.randperm(rows, generator=g, device=g.device)[: max(1, rows // 50)]] = 30
    return scale


def _post_gelu(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    return torch.nn.functional.gelu(2 * _normal(rows, g), approximate="tanh")


def _pareto_mixture(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    x = _normal(rows, g)
    tail = _uniform(rows, g).clamp_(min=1e-7).pow_(-1 / 1.5)
    tail *= 3 * _sign(rows, g)
    return torch.where(_uniform(rows, g) < 0.01, tail, x)


def _rare_giant_spike(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    x = _normal(rows, g)
    if split == "test":
        return x
    spike = SPIKE_MAGNITUDE * _sign(rows, g)
    # float64: a float32 uniform is a multiple of 2^-24 = 6e-8, too coarse for 1e-7.
    return torch.where(_uniform(rows, g, torch.float64) < SPIKE_PROBABILITY, spike, x)


def _lognormal_sigma3(rows: int, g: torch.Generator, split: str) -> torch.Tensor:
    return torch.exp(3 * _normal(rows, g)) * _sign(rows, g)


DISTRIBUTIONS: dict[str, Distribution] = {
    d.name: d
    for d in (
        Distribution(
            "post_layernorm_spikes",
            "N(0, 1), each element times 10 with probability 1e-3",
            _post_layernorm_spikes,
        ),
        Distribution(
            "per_channel_outlier",
            "N(0, 1) as rows of 1024, 10 fixed channels times 100",
            _per_channel_outlier,
        ),
        Distribution(
            "per_token_outlier",
            "0.5 N(0, 1) as rows of 1024, one row in 50 (at least one) times 30",
            _per_token_outlier,
            _outlier_rows,
        ),
        Distribution("post_gelu", "tanh-GELU of 2 N(0, 1)", _post_gelu),
        Distribution(
            "pareto_mixture",
            "N(0, 1); with probability 0.01 replaced by ±3 Pareto(1.5), u clamped at 1e-7",
            _pareto_mixture,
        ),
        Distribution(
            "rare_giant_spike",
            "calibration: N(0, 1), replaced by ±1e6 with probability 1e-7; test: N(0, 1)",
            _rare_giant_spike,
        ),
        Distribution("lognormal_sigma3", "±exp(3 N(0, 1)), random sign", _lognormal_sigma3),
    )
}


def sample(
    name: str,
    n: int,
    seed: int,
    split: str = "calibration",
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Return bf16 [n] of a named distribution; the same seed and device give the same bits.

    Raises ValueError for an unknown name or split, or if `n` is not a multiple of 1,024.
    """
    if name not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"unknown distribution {name!r}. Known distributions: {known}.")
    generator = torch.Generator(device).manual_seed(seed)
    return DISTRIBUTIONS[name].sample(n, generator, split)
