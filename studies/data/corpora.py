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

import gzip
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .mixes import EMBEDDED_MIX, FOLDER_STREAMS, MIXES, STAND_INS, Member, Stream, quotas

FOLDER_VARIABLE = "NVFP4_CORPORA"
RESERVE_LENGTH = 512  # reserves count sequences of this many tokens, whatever length is asked for
RECORDS_A_BATCH = 32
EMBEDDED_SOURCE_BYTES = 4_000_000
EMBEDDED_PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json",
                     "logging", "multiprocessing", "unittest", "urllib", "xml")  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """Token sequences of a mix, int32 [n, length], and where each row comes from.

    Rows interleave the members round-robin, and a member's streams round-robin within it, so every
    prefix holds a balanced mix (up to one row a member) until the smallest quota is used up.
    `shortfall` maps "calibration:member/stream" to (got, wanted).
    """

    calibration: torch.Tensor
    test: torch.Tensor
    calibration_source: list[str]
    test_source: list[str]
    shortfall: dict[str, tuple[int, int]] = dataclass_field(default_factory=dict)
    provenance: dict[str, Any] = dataclass_field(default_factory=dict)


# ------------------------------------------------------------------------------ reading records


def corpora_folder(folder: str | Path | None = None) -> Path | None:
    """The folder of text: the argument, else ``$NVFP4_CORPORA``, else None."""
    found = folder or os.environ.get(FOLDER_VARIABLE)
    return Path(found) if found else None


def _folder_path(stream: Stream, folder: Path | None) -> Path:
    if folder is None or not folder.is_dir():
        got = "no corpora folder is set" if folder is None else f"corpora folder {folder} does not exist"
        raise FileNotFoundError(
            f"{got}; stream {stream.name!r} is {stream.source}.jsonl.gz in it, one record of text per "
            f"line. Set {FOLDER_VARIABLE} or pass folder=, or use the embedded mix {EMBEDDED_MIX!r}, "
            "which needs no files."
        )
    path = folder / f"{stream.source}.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"corpora folder {folder} has no {path.name}. Add the file, or use the embedded mix "
            f"{EMBEDDED_MIX!r}, which needs no files."
        )
    return path


def _folder_records(stream: Stream, folder: Path | None) -> Iterator[dict]:
    """Yield the records in the order of their ids: content hashes, hence a fixed shuffle.

    Several answers to one prompt follow one another, at the smallest of their ids.
    """
    path = _folder_path(stream, folder)
    records: dict[str, dict] = {}  # equal ids are equal contents: a repeated record counts once
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                    raise ValueError('expected an object with a string "id"')
                _content(stream, record)
                records.setdefault(record["id"], record)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}, after line {number}: damaged or truncated gzip ({error}). Fetch it again."
        ) from error
    except ValueError as error:  # includes bad JSON and bad UTF-8
        raise ValueError(f"{path}, line {number}: {error}") from error
    groups: dict[str, list[str]] = {}
    for key in sorted(records):
        groups.setdefault(_opening(_content(stream, records[key])) or key, []).append(key)
    for group in groups.values():
        for key in group:
            yield records[key]


def _hub_error(stream: Stream, error: Exception) -> OSError:
    instead = sorted({STAND_INS[mix] for mix in STAND_INS for member in MIXES[mix]
                      if stream in member.streams})  # fmt: skip
    return OSError(
        f"could not read {stream.source} ({stream.split or stream.data_files}) from the Hugging "
        f"Face hub: {type(error).__name__}: {error}. It may be gated (accept its terms and log in) "
        f"and it needs a network; the open stand-in mix is {' or '.join(instead) or EMBEDDED_MIX}."
    )


def _hub_revision(stream: Stream) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(stream.source).sha)
    except Exception as error:
        raise _hub_error(stream, error) from error


def _hub_records(stream: Stream, revision: str) -> Iterator[dict]:
    import datasets

    try:
        if stream.data_files:
            # As lines of text: the rows do not fit the declared schema, nor one another's.
            url = f"hf://datasets/{stream.source}@{revision}/{stream.data_files}"
            rows = datasets.load_dataset("text", data_files=url, split="train", streaming=True)
            for row in rows:
                if row["text"].strip():
                    yield json.loads(row["text"])
        else:
            yield from datasets.load_dataset(
                stream.source, stream.config, split=stream.split, streaming=True, revision=revision
            )
    except Exception as error:
        raise _hub_error(stream, error) from error


def _embedded_records(stream: Stream) -> Iterator[dict]:
    if stream.name == "documentation":
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield {"id": topic, "text": topics[topic]}
        return
    library = Path(os.__file__).parent
    paths = [
        p
        for p in library.glob("*.py")
        if not p.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
    ]
    paths += [p for package in EMBEDDED_PACKAGES for p in (library / package).rglob("*.py")
              if not {"test", "tests"} & set(p.relative_to(library).parts)]  # fmt: skip
    size = 0
    for path in sorted(paths, key=lambda p: p.relative_to(library).as_posix()):
        text = path.read_text(encoding="utf-8")
        size += len(text)
        if size > EMBEDDED_SOURCE_BYTES:
            return
        yield {"id": path.relative_to(library).as_posix(), "text": text}


# ------------------------------------------------------------------------ rendering and zoning


def _content(stream: Stream, record: dict) -> str | list[dict]:
    """Return the record's text or its messages; ValueError if it has none."""
    key = stream.field
    if key == "any":
        key = "messages" if record.get("messages") else "text"
    content = record.get(key)
    if key == "messages" and isinstance(content, list) and content:
        return content
    if key != "messages" and isinstance(content, str):
        return content
    kind = "a non-empty list" if key == "messages" else "a string"
    raise ValueError(f"expected {kind} under {key!r}, got keys {sorted(record)}")


def _opening(content: str | list[dict]) -> str | None:
    """Return the first user message of a conversation; None for plain text or without one."""
    if isinstance(content, str):
        return None
    return next((str(m["content"]) for m in content if m["role"] == "user"), None)


def _texts(
    records: Iterable[dict], stream: Stream, tokenizer: Any
) -> Iterator[tuple[str | None, str, dict]]:
    """Yield each record's opening, its text with the end-of-sequence token, and the record."""
    for number, record in enumerate(records):
        content = _content(stream, record)
        opening = _opening(content)
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
    records: Iterable[dict], stream: Stream, tokenizer: Any, wanted: dict[str, int], length: int
) -> dict[str, torch.Tensor]:
    """Return up to `wanted` sequences of each zone, int32 [n, length]."""
    tokens: dict[str, list[int]] = {"calibration": [], "test": []}
    last = "test" if wanted["test"] else "calibration"
    if any(wanted.values()):
        for zone, _, ids in _zoned(records, stream, tokenizer):
            if zone == "training":
                break
            tokens[zone] += ids
            if zone == last and len(tokens[last]) >= wanted[last] * length:
                break
    result = {}
    for zone, n in wanted.items():
        rows = min(n, len(tokens[zone]) // length)
        flat = torch.tensor(tokens[zone][: rows * length], dtype=torch.int32)
        result[zone] = flat.view(rows, length)
    return result


# ------------------------------------------------------------------------------------ the API


def _round_robin(parts: Sequence[Sequence[Any]]) -> list[Any]:
    longest = max((len(p) for p in parts), default=0)
    return [p[i] for i in range(longest) for p in parts if i < len(p)]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_shortfall(mix: str, length: int, shortfall: dict[str, tuple[int, int]]) -> None:
    if shortfall:
        detail = "; ".join(f"{k} got {got}, wanted {want}" for k, (got, want) in shortfall.items())
        raise ValueError(
            f"mix {mix!r} has too few sequences of {length} tokens: {detail}. Ask for fewer "
            f"calibration or test sequences, or pass allow_shortfall=True to record the shortfall."
        )


def sequences(
    mix: str,
    tokenizer: Any,
    *,
    calibration: int = 1024,
    test: int = 256,
    length: int = 512,
    folder: str | Path | None = None,
    allow_shortfall: bool = False,
    progress: bool = True,
) -> Sequences:
    """Return calibration and test sequences of exactly `length` tokens from a named mix.

    The records of a stream are tokenized in order, joined and cut: no padding, nothing dropped.
    Raises ValueError for an unknown mix, for bad counts and, unless `allow_shortfall`, for a stream
    with fewer sequences than its quota; FileNotFoundError for a missing folder or file; OSError for
    a hub data set that cannot be read.
    """
    if mix not in MIXES:
        raise ValueError(f"unknown mix {mix!r}. Known mixes: {', '.join(MIXES)}.")
    if calibration < 0 or test < 0 or calibration + test < 1 or length < 1:
        raise ValueError(
            f"got calibration={calibration}, test={test}, length={length}; expected counts of at "
            f"least 0, not both 0, and a length of at least 1."
        )
    root = corpora_folder(folder)
    members = MIXES[mix]
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

    def short(member: Member, stream: Stream, wanted: dict, got: dict) -> dict:
        return {f"{z}:{member.name}/{stream.name}": (got[z], n)
                for z, n in wanted.items() if got[z] < n}  # fmt: skip

    if not allow_shortfall:  # reserves are known before anything is read: fail early
        too_much: dict[str, tuple[int, int]] = {}
        for member, stream, wanted in plan:
            too_much |= short(member, stream, wanted, capped(stream, wanted))
        _check_shortfall(mix, length, too_much)

    shortfall: dict[str, tuple[int, int]] = {}
    origins: dict[str, dict] = {}
    rows: dict[str, dict[str, list]] = {"calibration": {}, "test": {}}
    with tqdm(total=calibration + test, desc=mix, unit="seq", disable=not progress) as bar:
        for member, stream, wanted in plan:
            key = f"{member.name}/{stream.name}"
            origin: dict[str, Any] = {"kind": stream.kind, "source": stream.source}
            records: Iterable[dict]
            if stream.kind == "hub":
                origin |= {"split": stream.split or stream.data_files, "config": stream.config,
                           "revision": _hub_revision(stream)}  # fmt: skip
                records = _hub_records(stream, origin["revision"])
            elif stream.kind == "folder":
                origin["file_sha256"] = _sha256(_folder_path(stream, root).read_bytes())
                records = _folder_records(stream, root)
            else:
                origin["python"] = platform.python_version()
                records = _embedded_records(stream)
            zones = _cut(records, stream, tokenizer, capped(stream, wanted), length)
            got = {z: len(t) for z, t in zones.items()}
            shortfall |= short(member, stream, wanted, got)
            for zone, ids in zones.items():
                origin[zone] = {"sequences": len(ids), "sha256": _sha256(ids.numpy().tobytes())}
                rows[zone].setdefault(member.name, []).append([(key, row) for row in ids])
            origins[key] = origin
            bar.update(sum(got.values()))
    if not allow_shortfall:
        _check_shortfall(mix, length, shortfall)

    tensors, sources = {}, {}
    for zone, by_member in rows.items():
        mixed = _round_robin([_round_robin(streams) for streams in by_member.values()])
        empty = torch.empty((0, length), dtype=torch.int32)
        tensors[zone] = torch.stack([row for _, row in mixed]) if mixed else empty
        sources[zone] = [key for key, _ in mixed]
    provenance = {
        "mix": mix,
        "calibration": calibration,
        "test": test,
        "length": length,
        "tokenizer": str(getattr(tokenizer, "name_or_path", "")),
        "streams": origins,
    }
    return Sequences(
        tensors["calibration"], tensors["test"], sources["calibration"], sources["test"],
        shortfall, provenance,
    )  # fmt: skip


def training_text(tokenizer: Any, *, folder: str | Path | None = None) -> Iterator[str]:
    """Yield every record past the reserves of every folder stream, rendered, in a fixed order.

    Ends each with the end-of-sequence token. Raises FileNotFoundError for a missing folder or file.
    """
    root = corpora_folder(folder)
    for stream in FOLDER_STREAMS.values():
        for zone, text, _ in _zoned(_folder_records(stream, root), stream, tokenizer):
            if zone == "training":
                yield text
