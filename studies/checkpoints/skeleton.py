# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A checkpoint without its weights: headers, configuration and small scales, to audit it anywhere.

Rebuilt, the folder has the files' names, headers and lengths; scales have their bytes, all other bytes
are zeros that take no room on disk (sparse files).
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from .files import INDEX, open_checkpoint
from .scales import split_name

CONFIGURATION = ("config.json", "hf_quant_config.json")
SMALL = 64  # bytes: scales of one or a few elements
# A header, file name -> tensor name -> entry, as safetensors spells it.
Skeleton = dict


def save_skeleton(folder: Path, file: Path) -> None:
    """Store a checkpoint's skeleton as compressed JSON: the same bytes for the same checkpoint."""
    file.write_bytes(gzip.compress(json.dumps(take_skeleton(folder), sort_keys=True).encode(), mtime=0))


def load_skeleton(file: Path) -> Skeleton:
    """A stored skeleton. Raises ``FileNotFoundError`` naming what makes it."""
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file}; make it from a checkpoint with `python -m studies.checkpoints.prove collect`."
        )
    return json.loads(gzip.decompress(file.read_bytes()))


def take_skeleton(folder: Path) -> Skeleton:
    """``json``: configuration and index files; ``headers``: file -> header; ``scales``: tensor ->
    base64."""
    checkpoint = open_checkpoint(folder)
    headers, scales = {}, {}
    for file in checkpoint.files:
        with file.open("rb") as stream:
            headers[file.name] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for tensor in checkpoint.tensors.values():
        if split_name(tensor.name)[1] and tensor.end - tensor.begin <= SMALL:
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.begin)
                raw = stream.read(tensor.end - tensor.begin)
            scales[tensor.name] = base64.b64encode(raw).decode()
    kept = [p for p in (*(folder / n for n in CONFIGURATION), *folder.glob(INDEX)) if p.is_file()]
    return {"json": {p.name: json.loads(p.read_text()) for p in kept}, "headers": headers,
            "scales": scales}  # fmt: skip


def build(skeleton: Skeleton, folder: Path) -> Path:
    """Write a sparse checkpoint folder from a skeleton; returns the new folder."""
    folder.mkdir(parents=True)
    for name, content in skeleton["json"].items():
        (folder / name).write_text(json.dumps(content, indent=1))
    for name, header in skeleton["headers"].items():
        write_sparse(folder / name, header, skeleton["scales"])
    return folder


def write_sparse(file: Path, header: dict, scales: dict[str, str]) -> None:
    """A safetensors file of a header and the scales' bytes; the rest is a hole."""
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns data by spaces
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        entries = {n: e for n, e in header.items() if n != "__metadata__"}
        for name in entries.keys() & scales.keys():
            stream.seek(8 + len(raw) + entries[name]["data_offsets"][0])
            stream.write(base64.b64decode(scales[name]))
        stream.truncate(8 + len(raw) + max((e["data_offsets"][1] for e in entries.values()), default=0))


def entries_of(skeleton: Skeleton) -> Iterator[tuple[str, str]]:
    """(file, tensor) of every tensor."""
    for file, header in skeleton["headers"].items():
        yield from ((file, name) for name in header if name != "__metadata__")


def without(skeleton: Skeleton, drop: Callable[[str], bool]) -> Skeleton:
    """A skeleton without some tensors; their bytes stay as a hole."""
    headers = {
        file: {n: e for n, e in header.items() if n == "__metadata__" or not drop(n)}
        for file, header in skeleton["headers"].items()
    }
    return skeleton | {"headers": headers}


def renamed(skeleton: Skeleton, name: Callable[[str], str]) -> Skeleton:
    """A skeleton whose tensors have other names."""
    headers = {
        file: {n if n == "__metadata__" else name(n): e for n, e in header.items()}
        for file, header in skeleton["headers"].items()
    }
    return skeleton | {"headers": headers, "scales": {name(n): b for n, b in skeleton["scales"].items()}}
