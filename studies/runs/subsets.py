# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Marginals of nested random subsets of the calibration sequences, counted while the model runs.

Each draw is one permutation of the sequences; its subset of size n is the first n of them, as in the
published study. Only how many elements of each code a step from one size to the next adds is kept,
so memory does not grow with the number of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from nvfp4_utils.histogram import CODE_BITS, Marginals
from nvfp4_utils.policies import FROM_MARGINALS, calibrate
from nvfp4_utils.quantize import BLOCK_SIZE, check_tensor

CODES = 2**CODE_BITS
NEAR = 0.9  # of the pool's amax: a sequence this close has shown calibration what it needs
STUDY_SEED = 1000  # the study's subset of seed s is randperm(total, manual_seed(1000 + s))[:n]


def subset_sizes(sequences: int) -> list[int]:
    """1, 4, 16, ... sequences, then a half and the whole pool."""
    sizes = {4**k for k in range(6) if 4**k < sequences}
    return sorted(sizes | {max(1, sequences // 2), sequences})


class SubsetMarginals:
    """Marginals of ``draws`` nested families of subsets; ``count`` is a hook's callback.

    Sequences must arrive in order: the i-th row that ``count`` sees at a site is sequence i.
    """

    def __init__(self, sequences: int, draws: int, device) -> None:
        self.sizes = subset_sizes(sequences)
        self.draws, self.sequences, self.device = draws, sequences, device
        steps = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(STUDY_SEED + draw)
            order = torch.randperm(sequences, generator=generator)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(sequences)
            steps.append(torch.bucketize(rank, torch.tensor(self.sizes), right=True))
        # which step of which draw a sequence belongs to, as a row of the tables [draws, sequences]
        self.rows = torch.stack(steps) + len(self.sizes) * torch.arange(draws)[:, None]
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.seen: dict[str, int] = {}

    def count(self, site: str, x: torch.Tensor) -> None:
        """Count a batch [sequences, tokens, 16 k] in."""
        check_tensor(x, (torch.bfloat16,))
        first = self.seen.get(site, 0)
        if first + len(x) > self.sequences:
            raise ValueError(
                f"{site} has seen {first + len(x)} sequences; expected {self.sequences}, as announced."
            )
        if site not in self.tables:
            shape = (self.draws * len(self.sizes), CODES)
            self.tables[site] = tuple(
                torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2)
            )  # type: ignore[assignment]
        codes = x.detach().contiguous().view(torch.int16).bitwise_and(0x7FFF).flatten(1)
        blocks = codes.view(len(x), -1, BLOCK_SIZE).amax(-1)
        rows = self.rows[:, first : first + len(x)].to(self.device)
        for table, values in zip(self.tables[site], (codes, blocks), strict=True):
            offset = CODES * torch.arange(len(x), device=self.device)[:, None]
            counts = torch.bincount((values + offset).flatten(), minlength=CODES * len(x))
            counts = counts.view(len(x), CODES)
            for draw in rows:
                table.index_add_(0, draw, counts)
        self.seen[site] = first + len(x)

    def subsets(self, site: str) -> Iterator[tuple[int, int, Marginals]]:
        """Yield (draw, size, marginals) of every subset at a site."""
        if self.seen.get(site) != self.sequences:
            raise ValueError(
                f"{site} has seen {self.seen.get(site, 0)} of {self.sequences} sequences; expected "
                "all. The run ended early: capture it again."
            )
        shape = (self.draws, len(self.sizes), CODES)
        elements, blocks = (t.view(shape).cumsum(1).cpu() for t in self.tables[site])
        for draw in range(self.draws):
            for i, size in enumerate(self.sizes):
                parts: list[torch.Tensor] = []
                for table in (elements[draw, i], blocks[draw, i]):
                    codes = table.nonzero().view(-1)
                    parts += [codes, table[codes]]
                yield draw, size, Marginals(torch.bfloat16, *parts)

    def table(self) -> pd.DataFrame:
        """Every subset's calibrated amax by policy: columns site, draw, n, policy, calibrated_amax."""
        rows = [
            (site, draw, n, policy, amax)
            for site in self.tables
            for draw, n, marginals in self.subsets(site)
            for policy, amax in calibrate(marginals, FROM_MARGINALS).items()
        ]
        return pd.DataFrame(rows, columns=["site", "draw", "n", "policy", "calibrated_amax"])


def seen_law(amaxes: np.ndarray, sizes, near: float = NEAR) -> pd.DataFrame:
    """What ``n`` random sequences of a pool show of its amax, exactly: columns n, share, probability.

    Without replacement, the largest of n is at most the i-th smallest with probability C(i, n) /
    C(N, n). share: its mean over the pool's amax; probability: that one of the n comes within ``near``.
    """
    ordered = np.sort(np.asarray(amaxes, dtype=float))
    total, below = len(ordered), int((ordered < near * ordered[-1]).sum())
    rows = []
    for n in sizes:
        ways = math.comb(total, n)
        at_most = np.array([math.comb(i, n) / ways for i in range(total + 1)])
        share = float((np.diff(at_most) * ordered).sum() / ordered[-1])
        rows.append((n, share, 1 - math.comb(below, n) / ways))
    return pd.DataFrame(rows, columns=["n", "share", "probability"])


def doublings(total: int) -> list[int]:
    """1, 2, 4 ... up to the total, which is the last."""
    return sorted({2**k for k in range(total.bit_length()) if 2**k <= total} | {total})
