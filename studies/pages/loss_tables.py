# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What activation scales do to the output of one model or several: KL by policy, and its noise.

KL is the mean over tokens of ``sum p log(p / q)`` in nats, ``p`` the unquantized model's distribution
of the next token and ``q`` the quantized one's. A change is in percent of the KL of calibrations of
equal merit on the test mix's own text: the mean over the amax of its pool and of the pool's random
halves. Only activations are quantized, with the flush convention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from studies.runs.scoring import resamples
from studies.runs.store import Run

from .plots import model_label

EQUAL_MERIT = r"amax$|amax of half \d+$"
HARM_PERCENT = 5.0  # the rise of KL from which on the pages speak of a loss
MODEL_MARKS = (
    ("o", "-", "#000000"),
    ("s", "--", "#606060"),
    ("^", ":", "#202020"),
    ("D", "-.", "#808080"),
)
Measured = tuple[float, float, float]  # value, and the ends of its 95 % interval


def models(run: str, runs: Sequence[str]) -> list[Run]:
    """The runs that a page speaks of: ``run`` alone where it is named, else all of ``runs``."""
    return [Run(run)] if run else [Run(name) for name in runs]


def short(run: Run) -> str:
    """A model's name for panels, tables and sentences."""
    name = model_label(run.model_name)
    return name if name[:1].isupper() else f"the {name}"


def scope(runs: Sequence[Run]) -> str:
    """What a page over several models is measured on."""
    about = [f"{short(run)} ({len(run.sites)} sites)" for run in runs]
    mixes = {mix: None for run in runs for mix in run.mixes}
    lengths = {run.info["texts"][run.featured_mix]["length"] for run in runs}
    return (
        f"{listed(about)}; {len(mixes)} {'mix' if len(mixes) == 1 else 'mixes'} of text, sequences of "
        f"{span(lengths, 'd')} tokens; all but the sites' activations in bfloat16; flush"
    )


def site_of(site: str, run: Run) -> str:
    """A site and its model, for a sentence."""
    return f"`{site}` of {short(run)}"


def mark(number: int) -> dict:
    """Marker, dash and grey of the n-th model of a figure: colours mean policies."""
    marker, dash, color = MODEL_MARKS[number % len(MODEL_MARKS)]
    return {"marker": marker, "linestyle": dash, "color": color}


def has_loss(run: Run) -> bool:
    """Whether a run holds the model's own loss, not the tensors' errors alone."""
    try:
        return len(run.end_to_end()) > 0 and len(run.end_to_end_sequences()) > 0
    except FileNotFoundError:
        return False


def of_test(run: Run, test: str, *, weights: str = "bf16", only: str = "") -> pd.DataFrame:
    """Rows of ``end_to_end`` of one test; calibration and policy as text."""
    table = run.end_to_end()
    table = table[(table.test == test) & (table.weights == weights) & (table.only == only)]
    return table.astype({"calibration": str, "policy": str, "underflow": str})


def sweep(run: Run, underflow: str = "flush") -> pd.DataFrame:
    """Measures by octaves from the amax, all sites' scales together, on the featured mix."""
    mix = run.featured_mix
    table = of_test(run, mix)
    table = table[(table.calibration == mix) & (table.underflow == underflow)]
    table = table[table.policy.str.startswith("x2^")]
    octaves = table.policy.str.removeprefix("x2^").astype(float)
    columns = ["nll", "kl", "kl_p999", "top1", "low", "high"]
    return table.assign(octaves=octaves).set_index("octaves")[columns].sort_index()


def value(run: Run, policy: str, column: str = "kl", **kwargs) -> float:
    """One measure of a policy calibrated on the featured mix, or of one without calibration; flush."""
    table = of_test(run, run.featured_mix, **kwargs)
    own = table.calibration.isin((run.featured_mix, "test", ""))
    rows = table[own & (table.policy == policy) & (table.underflow == "flush")]
    return float(rows[column].iloc[0]) if len(rows) else float("nan")


def sequence_kl(run: Run, test: str) -> pd.DataFrame:
    """KL of each sequence (rows) under each flush setting of a test: (calibration, policy)."""
    table = run.end_to_end_sequences()
    table = table[(table.test == test) & (table.underflow == "flush")]
    table = table[(table.weights == "bf16") & (table.only == "")]
    table = table.astype({"calibration": str, "policy": str})
    table = table[~table.policy.str.startswith("x2^-")]
    return table.pivot(index="sequence", columns=["calibration", "policy"], values="kl").astype(float)


@lru_cache(maxsize=32)
def _changes(run: Run, tests: tuple[str, ...]) -> pd.DataFrame:
    parts = []
    for seed, test in enumerate(tests):
        table = sequence_kl(run, test)
        weights = resamples(len(table), seed=seed)
        sums = np.vstack([np.ones(len(table)), weights]) @ table.to_numpy()
        policy = table.columns.get_level_values("policy")
        merit = (table.columns.get_level_values("calibration") == test) & policy.str.match(EQUAL_MERIT)
        parts.append(
            pd.DataFrame(100 * (sums / sums[:, merit].mean(1, keepdims=True) - 1).T, index=table.columns)
        )
    return pd.concat(parts, keys=tests, names=["test"])


def changes(run: Run, tests: Iterable[str] = ()) -> pd.DataFrame:
    """Change of KL against calibrations of equal merit on the test's own text, in percent.

    Rows (test, calibration, policy); column 0 is the measured change, the others bootstrap draws over
    sequences, the same sequences for both. ``tests``: the run's mixes unless given.
    """
    return _changes(run, tuple(tests) or tuple(run.mixes))


def measured(draws: pd.DataFrame | pd.Series) -> Measured:
    """Value and 95 % interval of a row of ``changes``, or of the mean over its rows."""
    row = draws.mean() if isinstance(draws, pd.DataFrame) else draws
    low, high = np.quantile(row.to_numpy()[1:], (0.025, 0.975))
    return float(row.to_numpy()[0]), float(low), float(high)


def own_change(run: Run, policy: str) -> Measured:
    """Change of KL of a policy, mean over the test mixes, each with its own calibration; NaN if absent.

    Policies without calibration count too.
    """
    table = changes(run)
    test, calibration = (table.index.get_level_values(n) for n in ("test", "calibration"))
    own = (calibration == test) | (calibration == "test")
    rows = table[own & (table.index.get_level_values("policy") == policy)]
    return measured(rows) if len(rows) else (np.nan,) * 3


def foreign_changes(run: Run, policy: str = "amax") -> pd.DataFrame:
    """The rows of ``changes`` of a policy calibrated on another mix than the test's."""
    table = changes(run)
    test, calibration = (table.index.get_level_values(n) for n in ("test", "calibration"))
    return table[(calibration != test) & calibration.isin(run.mixes)
                 & (table.index.get_level_values("policy") == policy)]  # fmt: skip


def own_kl(run: Run, policy: str = "amax") -> float:
    """KL of a policy with its own calibration, nats per token: mean over the test mixes."""
    return float(np.mean([sequence_kl(run, test)[test, policy].mean() for test in run.mixes]))


def noise_floor(table: pd.DataFrame) -> dict[str, float]:
    """Spread of calibrations of equal merit, the amax of a pool and of its halves, in percent of KL.

    ``pair``: largest distance from their mean at one test mix; ``mean``: largest of the means over
    tests; ``draws``: how many. ``table``: what ``changes`` gives.
    """
    test, calibration, policy = (table.index.get_level_values(i) for i in range(3))
    halves = table[(calibration == test) & policy.str.match(EQUAL_MERIT)][0]
    means = halves.groupby("policy").mean()
    return {"pair": float(halves.abs().max()), "mean": float(means.abs().max()), "draws": len(means)}


def beyond(change: Measured, floor: float) -> int:
    """-1 if a change is a gain beyond the noise, +1 if it is a loss, 0 if it is neither.

    Beyond: larger than the noise floor, and with an interval without zero.
    """
    middle, low, high = change
    return int(np.sign(middle)) if abs(middle) > floor and low * high > 0 else 0


def long_tests(run: Run) -> list[str]:
    """Tests of longer sequences, named after the featured mix and their length."""
    names = run.end_to_end().test.astype(str).unique()
    return [n for n in names if n.startswith(f"{run.featured_mix}, ")]


def cell(change: Measured) -> str:
    """A change with its interval, as a table's cell."""
    return "–" if np.isnan(change[0]) else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*change)


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def span(values: Iterable[float], style: str = ".1f") -> str:
    """The smallest and the largest of some numbers, or the one that they all are."""
    ordered = sorted(values)
    low, high = f"{ordered[0]:{style}}", f"{ordered[-1]:{style}}"
    return low if low == high else f"{low} to {high}"
