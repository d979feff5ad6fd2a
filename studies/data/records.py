# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Records of text from the hub, from folders and from Python itself, each stream in a fixed order."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import text_folder
from .mixes import EMBEDDED_MIX, MIXES, STAND_INS, Stream

FOLDER_VARIABLE = "NVFP4_CORPORA"
EMBEDDED_SOURCE_BYTES = 4_000_000
EMBEDDED_PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json",
                     "logging", "multiprocessing", "unittest", "urllib", "xml")  # fmt: skip


def open_stream(stream: Stream, folder: Path | None) -> tuple[dict[str, Any], Iterator[dict]]:
    """Where a stream's records come from, for provenance, and the records.

    Raises FileNotFoundError for a missing folder or file, OSError for a hub data set that cannot be
    read, ValueError for a damaged file.
    """
    origin: dict[str, Any] = {"kind": stream.kind, "source": stream.source}
    if stream.kind == "hub":
        origin |= {"split": stream.split or stream.data_files, "config": stream.config,
                   "revision": _hub_revision(stream)}  # fmt: skip
        return origin, _hub_records(stream, origin["revision"])
    if stream.kind == "folder":
        data = _folder_path(stream, folder).read_bytes()
        return origin | {"file_sha256": hashlib.sha256(data).hexdigest()}, folder_records(stream, folder)
    if stream.kind == text_folder.KIND:
        source = Path(stream.source)
        return origin | text_folder.origin_of(source), text_folder.text_records(source)
    return origin | {"python": platform.python_version()}, _embedded_records(stream)


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


def folder_records(stream: Stream, folder: Path | None) -> Iterator[dict]:
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
                content_of(stream, record)
                records.setdefault(record["id"], record)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}, after line {number}: damaged or truncated gzip ({error}). Fetch it again."
        ) from error
    except ValueError as error:  # includes bad JSON and bad UTF-8
        raise ValueError(f"{path}, line {number}: {error}") from error
    groups: dict[str, list[str]] = {}
    for key in sorted(records):
        groups.setdefault(opening_of(content_of(stream, records[key])) or key, []).append(key)
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


def content_of(stream: Stream, record: dict) -> str | list[dict]:
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


def opening_of(content: str | list[dict]) -> str | None:
    """Return the first user message of a conversation; None for plain text or without one."""
    if isinstance(content, str):
        return None
    return next((str(m["content"]) for m in content if m["role"] == "user"), None)
