# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What a run of ``capture_run`` holds, and what it cannot hold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from studies.data.mixes import MIXES

from .scoring import WINDOW


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
        """What must stay the same when a run is continued; of its mixes, more may follow."""
        own = dataclasses.asdict(self)
        return {k: v for k, v in own.items() if k not in ("mixes", "allow_shortfall")}

    def check(self) -> None:
        """Refuse, before anything is loaded, what no run can be made with; ValueError names it."""
        for name, lowest in (("calibration", 1), ("test", 1), ("test_group", 1), ("batch", 1),
                             ("draws", 1), ("detailed", 1), ("windows", 0), ("length", 2)):  # fmt: skip
            if (got := getattr(self, name)) < lowest:
                raise ValueError(f"{name} is {got}; expected at least {lowest}.")
        unknown = [mix for mix in self.mixes if mix not in MIXES]
        if unknown or not self.mixes:
            raise ValueError(
                f"the mixes are {','.join(self.mixes) or 'none'}; expected one or several of "
                f"{', '.join(MIXES)}, separated by commas"
                + (f", not {', '.join(map(repr, unknown))}." if unknown else ".")
            )
        for name in ("mixes", "featured", "layouts"):
            twice = [value for value, n in Counter(getattr(self, name)).items() if n > 1]
            if twice:
                raise ValueError(f"{name} has {twice[0]} twice; expected each once.")
        if self.windows and self.length > WINDOW and self.length % WINDOW:
            raise ValueError(
                f"length is {self.length}; expected a multiple of {WINDOW} tokens where errors "
                "are kept by window. Take such a length, or windows 0."
            )
        for length in self.layouts:
            counts = [round(n * self.length / length) if length > 0 else 0
                      for n in (self.calibration, self.test)]  # fmt: skip
            if length < 2 or length == self.length or min(counts) < 1:
                raise ValueError(
                    f"layouts has {length}; expected lengths of at least 2 tokens other than "
                    f"{self.length}, of which as many tokens as the run's make at least one calibration "
                    "and one test sequence. Take more sequences, or shorter ones."
                )

    def is_detailed(self, mix: str) -> bool:
        """Whether everything is kept of a mix."""
        return mix in self.mixes[: self.detailed]

    def is_windowed(self, mix: str) -> bool:
        """Whether errors by window are kept of a mix."""
        return mix in self.mixes[: self.windows]
