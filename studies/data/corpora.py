# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Calibration and test sequences from named mixes of hub, folder or embedded text.

Every stream is cut into three zones that never share a record, nor an opening prompt::

    records:  | calibration reserve | test reserve | training text ... |

The zones depend on the tokenizer and on the stream only, never on the mix or on the counts asked
for. So the calibration sequences of any mix are disjoint from the test sequences of every mix, and
both are disjoint from `training_text`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .mixes import FOLDER_STREAMS, MIXES, Member, Stream, quotas
from .records import content_of, corpora_folder, folder_records, open_stream, opening_of

RESERVE_LENGTH = 512  # reserves count sequences of this many tokens, whatever length is asked for
RECORDS_A_BATCH = 32
ZONES = ("calibration", "test")


@dataclass(frozen=True)
class Sequences:
    """Token sequences of a mix, int32 [n, length], and where each row comes from.

    Rows interleave the members round-robin, and a member's streams round-robin within it, so every
    prefix holds a balanced mix (up to one row a member) until the smallest quota is used up.
    `shortfall` maps "calibration:member/stream" to (got, wanted). `calibration_lengths` and
    `test_lengths`, int64 [n], say how many tokens of a row are text; the rest is padding, of which
    packed rows have none.
    """

    calibration: torch.Tensor
    test: torch.Tensor
    calibration_source: list[str]
    test_source: list[str]
    calibration_lengths: torch.Tensor
    test_lengths: torch.Tensor
    shortfall: dict[str, tuple[int, int]] = dataclass_field(default_factory=dict)
    provenance: dict[str, Any] = dataclass_field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a stream's tokens become rows of ``length`` tokens, each beginning with ``begin``.

    ``packed``: records are joined and cut, nothing is dropped. Else a row is one record, cut at the
    length or filled up with ``padding``, as the study had it.
    """

    length: int
    begin: tuple[int, ...] = ()
    packed: bool = True
    padding: int = 0

    @property
    def text(self) -> int:
        """Tokens of text that a row can hold."""
        return self.length - len(self.begin)

    def full(self, records: list[list[int]], rows: int) -> bool:
        """Whether the records make that many rows."""
        return (sum(map(len, records)) // self.text if self.packed else len(records)) >= rows

    def rows(self, records: list[list[int]], most: int) -> list[list[int]]:
        """Up to ``most`` rows, not yet filled up."""
        if self.packed:
            joined = [token for record in records for token in record]
            starts = range(0, len(joined) - self.text + 1, self.text)
            texts = [joined[i : i + self.text] for i in starts]
        else:
            texts = [record[: self.text] for record in records]
        return [[*self.begin, *text] for text in texts[:most]]

    def tensor(self, rows: list[list[int]]) -> torch.Tensor:
        """int32 [rows, length]."""
        filled = [row + [self.padding] * (self.length - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.int32).view(len(rows), self.length)


# ------------------------------------------------------------------------ rendering and zoning


def _texts(
    records: Iterable[dict], stream: Stream, tokenizer: Any
) -> Iterator[tuple[str | None, str, dict]]:
    """Yield each record's opening, its text with the end-of-sequence token, and the record."""
    for number, record in enumerate(records):
        content = content_of(stream, record)
        opening = opening_of(content)
        if not isinstance(content, str):
            # Chat templates may refuse a conversation without a user; the tool's output, which an
            # agent reads as its user's turn, then takes that role.
            if all(m["role"] != "user" for m in content):
                content = [{**m, "role": "user"} if m["role"] == "tool" else m for m in content]
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(
                    f"stream {stream.name!r} holds chat messages but the tokenizer has no chat "
                    f"template. Set tokenizer.chat_template or choose a mix of plain text."
                )
            try:
                content = str(tokenizer.apply_chat_template(content, tokenize=False))
            except Exception as error:
                raise ValueError(
                    f"stream {stream.name!r}, record {record.get('id', number)}: the chat template "
                    f"failed: {type(error).__name__}: {error}"
                ) from error
        yield opening, content + tokenizer.eos_token, record


def _zoned(
    records: Iterable[dict], stream: Stream, tokenizer: Any
) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (zone, text, token ids) a record of the stream's language; no ids in the training zone.

    A zone is full once its records hold its reserve of tokens; the next record that does not repeat
    the opening of the one before it opens the next zone.
    """
    if not tokenizer.eos_token:
        raise ValueError("the tokenizer has no eos_token, which ends every record. Set it.")
    reserve = {
        "calibration": stream.calibration_reserve * RESERVE_LENGTH,
        "test": stream.test_reserve * RESERVE_LENGTH,
    }
    left = ["calibration", "test"]
    filled = 0
    previous: str | None = None
    texts = _texts(records, stream, tokenizer)
    while batch := list(islice(texts, RECORDS_A_BATCH)):
        ids: list[list[int]] = [[]] * len(batch)
        if left:
            rendered = [text for _, text, _ in batch]
            ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        for (opening, text, record), tokens in zip(batch, ids, strict=True):
            if opening is None or opening != previous:
                while left and filled >= reserve[left[0]]:
                    left.pop(0)
                    filled = 0
            previous = opening
            filled += len(tokens)
            if stream.language in (None, record.get("language")):
                yield (left[0], text, tokens) if left else ("training", text, [])


def _cut(
    records: Iterable[dict], stream: Stream, tokenizer: Any, wanted: dict[str, int], layout: Layout
) -> dict[str, list[list[int]]]:
    """Return up to `wanted` rows of each zone."""
    found: dict[str, list[list[int]]] = {zone: [] for zone in ZONES}
    last = "test" if wanted["test"] else "calibration"
    if any(wanted.values()):
        for zone, _, ids in _zoned(records, stream, tokenizer):
            if zone == "training":
                break
            found[zone].append(ids)
            if zone == last and layout.full(found[last], wanted[last]):
                break
    return {zone: layout.rows(found[zone], n) for zone, n in wanted.items()}


# ------------------------------------------------------------------------------------ the API


def _round_robin(parts: Sequence[Sequence[Any]]) -> list[Any]:
    longest = max((len(p) for p in parts), default=0)
    return [p[i] for i in range(longest) for p in parts if i < len(p)]


def _check_request(mix: str, known: bool, calibration: int, test: int, layout: Layout) -> None:
    if not known:
        raise ValueError(f"unknown mix {mix!r}. Known mixes: {', '.join(MIXES)}.")
    if calibration < 0 or test < 0 or calibration + test < 1 or layout.text < 1:
        raise ValueError(
            f"got calibration={calibration}, test={test}, length={layout.length}; expected counts of at "
            f"least 0, not both 0, and a length of at least {1 + len(layout.begin)}."
        )


def _check_shortfall(mix: str, length: int, shortfall: dict[str, tuple[int, int]]) -> None:
    if shortfall:
        detail = "; ".join(f"{k} got {got}, wanted {want}" for k, (got, want) in shortfall.items())
        raise ValueError(
            f"mix {mix!r} has too few sequences of {length} tokens: {detail}. Ask for fewer "
            f"calibration or test sequences, or pass allow_shortfall=True to record the shortfall."
        )


def _missing(member: Member, stream: Stream, wanted: dict, got: dict) -> dict[str, tuple[int, int]]:
    return {f"{zone}:{member.name}/{stream.name}": (got[zone], n)
            for zone, n in wanted.items() if got[zone] < n}  # fmt: skip


def sequences(
    mix: str,
    tokenizer: Any,
    *,
    calibration: int = 1024,
    test: int = 256,
    length: int = 512,
    begin: Sequence[int] = (),
    packed: bool = True,
    folder: str | Path | None = None,
    members: Sequence[Member] | None = None,
    allow_shortfall: bool = False,
    progress: bool = True,
) -> Sequences:
    """Return calibration and test sequences of `length` tokens from a named mix, as ``Layout`` says.

    `begin`: what every sequence begins with, `<bos>` where the model has one
    (``studies.data.models.begins_with``). `members`: of a mix without an entry in `MIXES`, such as
    ``studies.data.text_folder.members_of``; `mix` is then just its name.

    Raises ValueError for an unknown mix, for bad counts and, unless `allow_shortfall`, for a stream
    with fewer sequences than its quota; FileNotFoundError for a missing folder or file; OSError for
    a hub data set that cannot be read.
    """
    layout = Layout(length, tuple(begin), packed, getattr(tokenizer, "eos_token_id", 0) or 0)
    _check_request(mix, mix in MIXES or members is not None, calibration, test, layout)
    root = corpora_folder(folder)
    members = MIXES[mix] if members is None else members
    plan = [
        (member, stream, {"calibration": n_calibration, "test": n_test})
        for member, row_c, row_t in zip(
            members, quotas(calibration, members), quotas(test, members), strict=True
        )
        for stream, n_calibration, n_test in zip(member.streams, row_c, row_t, strict=True)
    ]

    def capped(stream: Stream, wanted: dict[str, int]) -> dict[str, int]:
        reserves = {"calibration": stream.calibration_reserve, "test": stream.test_reserve}
        return {z: min(n, reserves[z] * RESERVE_LENGTH // length) for z, n in wanted.items()}

    if not allow_shortfall:  # reserves are known before anything is read: fail early
        too_much: dict[str, tuple[int, int]] = {}
        for member, stream, wanted in plan:
            too_much |= _missing(member, stream, wanted, capped(stream, wanted))
        _check_shortfall(mix, length, too_much)

    shortfall: dict[str, tuple[int, int]] = {}
    origins: dict[str, dict] = {}
    rows: dict[str, dict[str, list]] = {zone: {} for zone in ZONES}
    with tqdm(total=calibration + test, desc=mix, unit="seq", disable=not progress) as bar:
        for member, stream, wanted in plan:
            key = f"{member.name}/{stream.name}"
            origin, records = open_stream(stream, root)
            zones = _cut(records, stream, tokenizer, capped(stream, wanted), layout)
            got = {zone: len(found) for zone, found in zones.items()}
            shortfall |= _missing(member, stream, wanted, got)
            for zone, found in zones.items():
                digest = hashlib.sha256(layout.tensor(found).numpy().tobytes()).hexdigest()
                origin[zone] = {"sequences": len(found), "sha256": digest}
                rows[zone].setdefault(member.name, []).append([(key, row) for row in found])
            origins[key] = origin
            bar.update(sum(got.values()))
    if not allow_shortfall:
        _check_shortfall(mix, length, shortfall)

    mixed = {zone: _round_robin([_round_robin(s) for s in by.values()]) for zone, by in rows.items()}
    tokens = {zone: layout.tensor([row for _, row in mixed[zone]]) for zone in ZONES}
    sources = {zone: [key for key, _ in mixed[zone]] for zone in ZONES}
    lengths = {zone: torch.tensor([len(r) for _, r in mixed[zone]], dtype=torch.int64) for zone in ZONES}
    provenance = {"mix": mix, "calibration": calibration, "test": test, "length": length,
                  "begin": list(begin), "packed": packed, "streams": origins}  # fmt: skip
    return Sequences(
        tokens["calibration"], tokens["test"], sources["calibration"], sources["test"],
        lengths["calibration"], lengths["test"], shortfall, provenance,
    )  # fmt: skip


def training_text(tokenizer: Any, *, folder: str | Path | None = None) -> Iterator[str]:
    """Yield every record past the reserves of every folder stream, rendered, in a fixed order.

    Ends each with the end-of-sequence token. Raises FileNotFoundError for a missing folder or file.
    """
    root = corpora_folder(folder)
    for stream in FOLDER_STREAMS.values():
        for zone, text, _ in _zoned(folder_records(stream, root), stream, tokenizer):
            if zone == "training":
                yield text
