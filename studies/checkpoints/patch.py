# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Copy a checkpoint and overwrite the bytes of its activation scales; every other byte stays."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from .files import DTYPES, Checkpoint, StoredTensor, UnreadableError, read_values
from .scales import Convention, QuantizedModule

PRINTED = 8  # changes shown


def patch_checkpoint(
    source: Checkpoint,
    modules: Mapping[str, QuantizedModule],
    amaxes: Mapping[str, float],
    target: Path,
) -> list[dict]:
    """Copy ``source`` into the empty folder ``target`` with the activation scales of ``amaxes``.

    Symbolic links become files. Returns the changes by tensor: file, amax before and after, and the
    stored values ``old`` and ``new``. The copy's scales are read back before it returns.

    Raises
    ------
    UnreadableError
        If the checkpoint is cut short, a module's activation scale is missing, or a scale is not one
        element of a float dtype.
    OSError
        If there is not enough room.
    """
    _refuse_broken(source, modules)
    tensors = {m.name: m.scales[m.convention.leaf] for m in modules.values()}
    old = read_values(tensors.values())
    raw = {
        m.name: to_bytes(m.convention, amaxes[m.name], tensors[m.name].dtype) for m in modules.values()
    }
    _copy(source.folder, target)
    _overwrite(source, target, {tensors[name]: data for name, data in raw.items()})
    changes = []
    new = read_values(_moved(t, source, target) for t in tensors.values())
    for name, module in modules.items():
        tensor = tensors[name]
        before, after = old[tensor.name], new[tensor.name]
        if decode(raw[name], tensor.dtype) != after.item():
            raise OSError(
                f"{tensor.name} reads {after.item()} from the copy, not what was written; the disk "
                "failed."
            )
        changes.append({"tensor": tensor.name, "file": tensor.file.name,
                        "old": before.item(), "new": after.item(),
                        "old_amax": module.convention.amax(before).item(),
                        "new_amax": module.convention.amax(after).item()})  # fmt: skip
    return changes


def _refuse_broken(source: Checkpoint, modules: Mapping[str, QuantizedModule]) -> None:
    if source.cut or source.absent:
        problem = next(iter(source.cut.items() or source.absent.items()))
        raise UnreadableError(
            f"{source.folder} is not whole: {problem[0]} {problem[1]}. Expected every byte that headers "
            "and index promise; download it again."
        )
    if not modules:
        raise UnreadableError(
            f"{source.folder} has no NVFP4 module; expected ModelOpt's weight_scale_2 or "
            "compressed-tensors' "
            "weight_packed. Audit it: make audit CHECKPOINT=folder."
        )
    for module in modules.values():
        leaf = module.convention.leaf
        if set(module.scales) != {leaf}:
            raise UnreadableError(
                f"{module.name} stores "
                f"{' and '.join(sorted(module.scales)) or 'no activation scale'}; expected "
                f"{leaf} alone, whose bytes can be replaced. Export the checkpoint again."
            )
        tensor = module.scales[leaf]
        if tensor.count != 1 or tensor.dtype not in DTYPES:
            raise UnreadableError(
                f"{tensor.name} is {tensor.dtype} of shape {list(tensor.shape)}; expected one "
                "element of "
                f"{', '.join(DTYPES)}. Fused experts must be exported one by one."
            )


def to_bytes(convention: Convention, amax: float, dtype: str) -> bytes:
    """The stored bytes of a scale. Coarser dtypes round towards the larger amax, so that none
    saturates."""
    exact = torch.tensor(convention.stored(amax), dtype=torch.float64)
    value = exact.to(DTYPES[dtype])
    short = value.double() > exact if convention.inverse else value.double() < exact
    if short and dtype in ("BF16", "F16"):
        bits = value.view(torch.int16) + (
            -1 if convention.inverse else 1
        )  # the neighbour: positive floats
        value = bits.view(DTYPES[dtype])
    return bytes(value.reshape(1).view(torch.uint8).tolist())


def decode(raw: bytes, dtype: str) -> float:
    """The number that stored bytes hold."""
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).double().item()


def _copy(source: Path, target: Path) -> None:
    """Copy contents, not links, with a progress bar by bytes."""
    sizes = {p: p.stat().st_size for p in source.rglob("*") if p.is_file()}
    free = shutil.disk_usage(target).free
    if sum(sizes.values()) > free:
        raise OSError(
            f"the copy of {source} takes {sum(sizes.values()):,} bytes, and {free:,} are free at "
            f"{target}; "
            "expected room for it. Free some, or give OUT= on another disk."
        )
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="copy") as bar:
        for file, size in sizes.items():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            bar.update(size)


def _overwrite(source: Checkpoint, target: Path, raw: Mapping[StoredTensor, bytes]) -> None:
    for tensor, data in raw.items():
        if len(data) != tensor.end - tensor.begin:
            raise UnreadableError(
                f"{tensor.name} takes {tensor.end - tensor.begin} bytes in {tensor.file}; expected "
                f"{len(data)}."
            )
        with _moved(tensor, source, target).file.open("r+b") as stream:
            stream.seek(tensor.begin)
            stream.write(data)


def _moved(tensor: StoredTensor, source: Checkpoint, target: Path) -> StoredTensor:
    file = target / tensor.file.relative_to(source.folder)
    return StoredTensor(tensor.name, tensor.dtype, tensor.shape, file, tensor.begin, tensor.end)


def print_changes(changes: list[dict]) -> None:
    """Print old and new amaxes, those that changed most first, and what all changes come to."""
    changes = sorted(changes, key=lambda c: -_factor(c))
    for c in changes[:PRINTED]:
        print(
            f"{c['tensor']}: {c['old']:.9g} -> {c['new']:.9g} (amax {c['old_amax']:.6g} -> "
            f"{c['new_amax']:.6g})"
        )
    if len(changes) > PRINTED:
        print(f"{len(changes) - PRINTED} more, all of them in the JSON beside the copy")
    same = sum(c["old"] == c["new"] for c in changes)
    print(
        f"{len(changes)} scales replaced, {same} of them by an equal value; largest factor "
        f"{_factor(changes[0]):.4g}"
    )


def _factor(change: dict) -> float:
    """How far the amax moved, as a factor of at least 1; infinite from or to what is no amax."""
    ratio = change["new_amax"] / change["old_amax"] if change["old_amax"] > 0 else float("inf")
    return max(ratio, 1 / ratio) if ratio > 0 else float("inf")
