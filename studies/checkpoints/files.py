# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What a checkpoint folder of safetensors holds, read from its headers alone.

A safetensors file is eight bytes of length, a JSON header with dtype, shape and byte range of every
tensor, then the bytes. The library reads tensors but does not tell where they lie, and it refuses a file
that is cut short; an audit must say which tensors are lost, and a patch must know which bytes are whose.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

HEADER_LIMIT = 100_000_000  # bytes: the library's own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
INDEX = "*.safetensors.index.json"


class UnreadableError(ValueError):
    """A folder that cannot be read as a checkpoint at all."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes ``[begin, end)`` of ``file``. ``dtype`` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. ``tensors``: name -> where it lies; ``config``: ``config.json``, with
    ``hf_quant_config.json`` as ``hf_quant``. ``cut``: file -> how it falls short of its header or of
    the index; ``absent``: tensors that the index promises and no file holds."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping = field(default_factory=dict)
    cut: Mapping[Path, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The safetensors files that hold the tensors, in order of name."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_json(path: Path) -> dict:
    """A JSON object. Raises ``UnreadableError`` naming the file where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path} is no readable JSON ({error}); copy it again.") from error
    if not isinstance(found, dict):
        raise UnreadableError(f"{path} holds a {type(found).__name__}; expected a JSON object.")
    return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header of a folder: one ``*.safetensors`` file or several, with an index or without.

    Symbolic links, as in a hub's snapshot, are followed. Files that are cut short are no error here:
    ``cut`` says how.

    Raises
    ------
    UnreadableError
        If there is no such folder, no safetensors file in it, or a header or JSON is not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UnreadableError(f"no folder {folder}; expected a checkpoint with *.safetensors files.")
    promised = _promised(folder)
    names = sorted(set(promised.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        raise UnreadableError(
            f"{folder} holds no *.safetensors file; expected a checkpoint in that format. Weights in "
            "*.bin files must be converted first."
        )
    tensors: dict[str, StoredTensor] = {}
    cut: dict[Path, str] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            cut[file] = "the index names it and it is not there"
            continue
        found, problem = read_header(file)
        if problem:
            cut[file] = problem
        for tensor in found:
            if tensor.name in tensors and not promised:
                raise UnreadableError(
                    f"{tensor.name} is in {tensors[tensor.name].file.name} and in {name}; expected it "
                    "once. Leave only the files of one checkpoint, or add its index."
                )
            if promised.get(tensor.name, name) == name:
                tensors[tensor.name] = tensor
    absent = {t: f for t, f in promised.items() if t not in tensors and folder / f not in cut}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / "hf_quant_config.json").is_file():
        config = {**config, "hf_quant": read_json(folder / "hf_quant_config.json")}
    return Checkpoint(folder, tensors, config, cut, absent)


def _promised(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, by the index; empty without one."""
    promised: dict[str, str] = {}
    for index in sorted(folder.glob(INDEX)):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        ):
            raise UnreadableError(
                f"{index} has no weight_map of file names; expected one. Copy it again."
            )
        promised |= weight_map
    return promised


def read_header(file: Path) -> tuple[list[StoredTensor], str]:
    """The tensors of one file, and how it is cut short; the text is empty for a whole file.

    Raises ``UnreadableError`` if the header is not what the format says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            return [], f"has {size} bytes, fewer than the 8 of its header's length"
        if length > HEADER_LIMIT:
            raise UnreadableError(
                f"{file} begins with a header length of {length} bytes, over {HEADER_LIMIT}; it is no "
                "safetensors file. A Git LFS pointer must be replaced by the file (git lfs pull)."
            )
        if size < 8 + length:
            return [], f"has {size} bytes; its header alone takes {8 + length}"
        raw = stream.read(length)
    base = 8 + length
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = [
            StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file,
                         base + entry["data_offsets"][0], base + entry["data_offsets"][1])
            for name, entry in header.items()
        ]  # fmt: skip
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnreadableError(
            f"{file} has a header that is no safetensors header ({error!r}); copy the file again."
        ) from error
    end = max((tensor.end for tensor in tensors), default=base)
    return tensors, f"has {size} bytes; its header promises {end}" if size < end else ""


def read_values(tensors: Iterable[StoredTensor]) -> dict[str, torch.Tensor]:
    """Name -> values, float64 [count], of small floating-point tensors that lie within their files.

    Only their bytes are read, file by file in the order they lie.

    Raises
    ------
    UnreadableError
        If a dtype is none of ``DTYPES`` or the byte range is not that of the shape.
    """
    values = {}
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, group in by_file.items():
        with file.open("rb", buffering=0) as stream:
            for tensor in sorted(group, key=lambda t: t.begin):
                if tensor.end - tensor.begin != tensor.count * ITEM_BYTES.get(tensor.dtype, 0):
                    raise UnreadableError(
                        f"{tensor.name} in {file} is {tensor.dtype} of shape {list(tensor.shape)} in "
                        f"{tensor.end - tensor.begin} bytes; expected a scale of "
                        f"{', '.join(DTYPES)} that fills its bytes."
                    )
                stream.seek(tensor.begin)
                raw = bytearray(stream.read(tensor.end - tensor.begin))
                if raw:
                    values[tensor.name] = torch.frombuffer(raw, dtype=DTYPES[tensor.dtype]).double()
    return values
