# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The replication page's sentences add up, whatever the verdicts are."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from studies.pages import replication
from studies.runs.store import Run


def rows_of(*verdicts: str, part: str = "rare_giant_spike") -> pd.DataFrame:
    return pd.DataFrame({"part": part, "quantity": "amax, 4,194,304 elements", "difference": -2.5,
                         "verdict": verdicts, "reason": "other seeds 1 to 2"})  # fmt: skip


def test_answer_of_the_stored_run_adds_up() -> None:
    rows = replication.all_rows(Run(), 0.25)
    text = replication.answer(rows)
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    assert numbers == [47, 72, 1, 240]
    assert 47 + 22 + 2 + 1 == 72 and len(rows) == 72 + 240
    assert text.startswith("<strong>Where they can be checked, mostly: 47 of 72 numbers are reproduced.")
    counts = [int(n) for n in re.findall(r"\d+", replication.unchecked_prose(rows))]
    assert counts == [312, 240, 226, 10, 4] and sum(counts[2:]) == counts[1]


@pytest.mark.parametrize(
    ("verdicts", "word", "absent"),
    [([replication.REPRODUCED] * 2, "yes: 2 of 2", "differ"),
     ([replication.REPRODUCED, replication.DRAW, replication.DRAW], "seldom: 1 of 3", "no reason")],
)  # fmt: skip
def test_another_tables_answer_has_its_own_words(verdicts, word, absent) -> None:
    text = replication.answer(rows_of(*verdicts, replication.NOT_COMPARABLE))
    assert word in text and absent not in text and "The other 1 published" in text


def test_a_spike_is_spoken_of_only_where_it_is_unexplained() -> None:
    chance = replication.spike_probability(2**22, 3)
    assert chance == pytest.approx((1 - (1 - 1e-7) ** 2**22) ** 3)
    text = replication.unexplained_prose(rows_of(replication.UNEXPLAINED), 3)
    assert "Unexplained: 1, by up to 2.50 dB" in text
    assert "as bad at 4,194,304 elements as at the end" in text and f"probability {chance:.0%}" in text
    other = replication.unexplained_prose(rows_of(replication.UNEXPLAINED, part="post_gelu"), 3)
    assert "Unexplained: 1" in other and "spike" not in other
    none = replication.unexplained_prose(rows_of(replication.REPRODUCED), 3)
    assert none == "No checkable synthetic value stays unexplained."
