# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The report's text: a named mix or a folder, cut into a calibration and a held-out pool."""

from __future__ import annotations

from pathlib import Path

from studies.data import corpora
from studies.data.mixes import MIXES
from studies.data.text_folder import members_of


def read_text(
    name: str, tokenizer, *, calibration: int, held_out: int, length: int, begin: list[int]
) -> corpora.Sequences:
    """Sequences of a mix, or of a folder of one's own text. No record is in both pools.

    Raises
    ------
    ValueError
        If there is neither mix nor folder of that name, or too little text.
    """
    members = None
    if name not in MIXES:
        if not Path(name).is_dir():
            raise ValueError(
                f"DATASET is {name!r}; expected a folder of text or one of: {', '.join(MIXES)}."
            )
        # Reserves count sequences of 512 tokens; those of the folder hold just what is asked for.
        reserves = [-(-n * length // corpora.RESERVE_LENGTH) + 1 for n in (calibration, held_out)]
        members = members_of(Path(name), *reserves)
    return corpora.sequences(
        name,
        tokenizer,
        calibration=calibration,
        test=held_out,
        length=length,
        begin=begin,
        members=members,
    )
