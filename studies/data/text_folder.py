# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A folder of one's own text as a mix: *.txt, *.md, and *.jsonl of "text" or "messages", also as .gz.

A text file is cut into records at paragraphs, a line of JSON is one record. Records of different files
take turns, so that the first ones are of every file; files come in the order of a hash of their names.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from .mixes import Member, Stream

SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")
RECORD_CHARACTERS = 8000  # a record of a text file ends with the paragraph that passes this many
FILES_AT_ONCE = 64  # that take turns: each is open
KIND = "text folder"


def members_of(folder: Path, calibration: int, test: int) -> tuple[Member, ...]:
    """The folder as a mix of one member; reserves, in sequences of 512 tokens, are what is asked for."""
    stream = Stream(folder.name, KIND, str(folder), field="any",
                    calibration_reserve=calibration, test_reserve=test)  # fmt: skip
    return (Member("text", (stream,)),)


def text_files(folder: Path) -> list[Path]:
    """The folder's files of text, also in folders within, in a fixed shuffled order.

    Raises ``FileNotFoundError`` if there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; expected a folder with {', '.join(SUFFIXES)} files."
        )
    found = [p for p in folder.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)]
    if not found:
        raise FileNotFoundError(
            f"folder {folder} holds no text; expected files named *{', *'.join(SUFFIXES)}."
        )

    def order(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    return sorted(found, key=order)


def origin_of(folder: Path) -> dict[str, str | int]:
    """How many files there are, and a hash of their names and sizes."""
    files = text_files(folder)
    listing = sorted(f"{p.relative_to(folder).as_posix()} {p.stat().st_size}" for p in files)
    return {
        "files": len(files),
        "listing_sha256": hashlib.sha256("\n".join(listing).encode()).hexdigest(),
    }


def text_records(folder: Path) -> Iterator[dict]:
    """Records ``{"id", "text"}`` or ``{"id", "messages"}``, read as they are asked for.

    Raises ``ValueError`` naming file and line of what is no text, or no record.
    """
    files = text_files(folder)
    for start in range(0, len(files), FILES_AT_ONCE):
        waiting = [_records_of(path, folder) for path in files[start : start + FILES_AT_ONCE]]
        while waiting:
            left = []
            for records in waiting:
                record = next(records, None)
                if record is not None:
                    yield record
                    left.append(records)
            waiting = left


def _records_of(path: Path, folder: Path) -> Iterator[dict]:
    name, number = path.relative_to(folder).as_posix(), 0
    is_json = path.name.endswith((".jsonl", ".jsonl.gz"))
    paragraphs: list[str] = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:  # type: ignore[operator]
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    if sum(map(len, paragraphs)) >= RECORD_CHARACTERS:
                        yield {"id": f"{name}:{number}", "text": "".join(paragraphs)}
                        paragraphs = []
                    elif paragraphs:
                        paragraphs.append(line)
                elif is_json:
                    yield {"id": f"{name}:{number}"} | _json_record(line)
                else:
                    paragraphs.append(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}, after line {number}: damaged or truncated gzip ({error}). Make the file again."
        ) from error
    except ValueError as error:  # includes bad JSON and bad UTF-8
        raise ValueError(f"{path}, line {number}: {error}") from error
    if "".join(paragraphs).strip():
        yield {"id": f"{name}:{number}", "text": "".join(paragraphs)}


def _json_record(line: str) -> dict:
    record = json.loads(line)
    if isinstance(record, dict):
        for key, kind in (("messages", list), ("text", str)):
            if isinstance(record.get(key), kind) and record[key]:
                return {key: record[key]}
    keys = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f'expected an object with "text" or "messages", got {keys}')
