# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Ways in which checkpoints have been found broken, each made from a sound skeleton."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .scales import COMPRESSED_TENSORS, MODELOPT, Convention, split_name
from .skeleton import Skeleton, build, renamed, without

LAYER = "model.layers.3"
DOWN, QUERY, KEY = f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj"
EXPERTS = 4  # of the mixtures made from a dense skeleton


def convention_of(skeleton: Skeleton) -> Convention:
    """The convention of a skeleton's activation scales."""
    leaves = {split_name(name)[1] for name in skeleton["scales"]}
    return COMPRESSED_TENSORS if COMPRESSED_TENSORS.leaf in leaves else MODELOPT


def scale_name(skeleton: Skeleton, module: str) -> str:
    """The name of a module's activation scale."""
    return f"{module}.{convention_of(skeleton).leaf}"


def get(skeleton: Skeleton, module: str) -> float:
    """A module's stored value."""
    return struct.unpack("<f", base64.b64decode(skeleton["scales"][scale_name(skeleton, module)]))[0]


def put(skeleton: Skeleton, values: dict[str, float]) -> Skeleton:
    """A skeleton with other stored values, by module."""
    new = {scale_name(skeleton, m): base64.b64encode(struct.pack("<f", v)).decode()
           for m, v in values.items()}  # fmt: skip
    return skeleton | {"scales": skeleton["scales"] | new}


def modules_of(skeleton: Skeleton) -> list[str]:
    """The modules with an activation scale."""
    leaf = convention_of(skeleton).leaf
    return [split_name(n)[0] for n in skeleton["scales"] if split_name(n)[1] == leaf]


def stored(skeleton: Skeleton, amax: float) -> float:
    """The value of an amax in the skeleton's convention."""
    return convention_of(skeleton).stored(amax)


def mixture(skeleton: Skeleton) -> Skeleton:
    """Every dense MLP as a mixture of ``EXPERTS`` experts with the MLP's own scales."""
    headers: dict = {}
    scales = dict(skeleton["scales"])
    for file, header in skeleton["headers"].items():
        headers[file] = {}
        for name, entry in header.items():
            if ".mlp." not in name:
                headers[file][name] = entry
                continue
            for i in range(EXPERTS):
                expert = name.replace(".mlp.", f".mlp.experts.{i}.")
                headers[file][expert] = entry
                if name in scales:
                    scales[expert] = scales[name]
            scales.pop(name, None)
    return _spread_out(skeleton | {"headers": headers, "scales": scales})


def _spread_out(skeleton: Skeleton) -> Skeleton:
    """Give every tensor bytes of its own, in the order of the headers."""
    headers: dict[str, dict] = {}
    for file, header in skeleton["headers"].items():
        at, headers[file] = 0, {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            headers[file][name] = entry | {"data_offsets": [at, at + size]}
            at += size
    return skeleton | {"headers": headers}


def expert(i: int, linear: str) -> str:
    """A linear of an expert of ``mixture``, in the layer that is broken."""
    return f"{LAYER}.mlp.experts.{i}.{linear}"


def _experts_guessed(s: Skeleton) -> Skeleton:
    mixed = mixture(s)
    return put(mixed, {expert(i, "down_proj"): stored(mixed, 0.5) for i in range(EXPERTS)})


def _spiky_expert(s: Skeleton) -> Skeleton:
    mixed = mixture(s)
    amax = 100 * _amax(mixed, expert(1, "down_proj"))
    return put(mixed, {expert(1, "down_proj"): stored(mixed, amax)})


def _amax(s: Skeleton, module: str) -> float:
    value = get(s, module)
    return 2688 / value if convention_of(s).inverse else 2688 * value


def _exchanged(s: Skeleton) -> Skeleton:
    return put(s, {m: stored(s, 2688**2 / _amax(s, m)) for m in modules_of(s)})


def _both(s: Skeleton) -> Skeleton:
    other = MODELOPT if convention_of(s).inverse else COMPRESSED_TENSORS
    name, new = scale_name(s, DOWN), f"{DOWN}.{other.leaf}"
    headers = {f: h | ({new: h[name]} if name in h else {}) for f, h in s["headers"].items()}
    return s | {"headers": headers}


def _foreign(s: Skeleton) -> Skeleton:
    plain = without(s, lambda n: bool(split_name(n)[1]) or n.endswith("weight_scale"))
    config = s["json"]["config.json"] | {"quantization_config": {"quant_method": "awq"}}
    return plain | {"json": s["json"] | {"config.json": config}}


@dataclass(frozen=True)
class Breakage:
    """``label``: what happened to the checkpoint; ``kind`` that an audit must find at ``severity``."""

    label: str
    kind: str
    severity: str
    change: Callable[[Skeleton], Skeleton]
    cut: bool = False

    def build(self, skeleton: Skeleton, folder: Path) -> Path:
        """The broken checkpoint in a new folder."""
        build(self.change(skeleton), folder)
        if self.cut:
            file = next(iter(sorted(folder.glob("*.safetensors"))))
            with file.open("r+b") as stream:
                stream.truncate(file.stat().st_size * 3 // 4)
        return folder


BREAKAGES = (
    Breakage("a linear without a scale", "missing", "error",
             lambda s: without(s, lambda n: n == scale_name(s, DOWN))),
    Breakage("a scale of zero", "zero", "error", lambda s: put(s, {DOWN: 0.0})),
    Breakage("a negative scale", "negative", "error", lambda s: put(s, {DOWN: -get(s, DOWN)})),
    Breakage("an infinite scale", "nonfinite", "error", lambda s: put(s, {DOWN: float("inf")})),
    Breakage("a scale that is NaN", "nonfinite", "error", lambda s: put(s, {DOWN: float("nan")})),
    Breakage("a scale of one", "constant_one", "warning", lambda s: put(s, {DOWN: 1.0})),
    Breakage("experts that were never reached", "imputed_half", "error", _experts_guessed),
    Breakage("k_proj at an eighth of q_proj", "fused_mismatch", "error",
             lambda s: put(s, {KEY: stored(s, _amax(s, QUERY) / 8)})),
    Breakage("one expert 100 times the others", "expert_spread", "warning", _spiky_expert),
    Breakage("one reciprocal stored", "magnitude", "error",
             lambda s: put(s, {QUERY.replace(".q_proj", ".o_proj"):
                               stored(s, 2688**2 / _amax(s, QUERY.replace(".q_proj", ".o_proj")))})),
    Breakage("every reciprocal stored", "magnitude", "error", _exchanged),
    Breakage("both scales stored", "convention", "error", _both),
    Breakage("no scale at all", "convention", "error",
             lambda s: without(s, lambda n: split_name(n)[1] == convention_of(s).leaf)),
    Breakage("scales under the other name", "convention", "error",
             lambda s: renamed(s, lambda n: n.replace(".input_scale", ".input_global_scale")
                               if not convention_of(s).inverse
                               else n.replace(".input_global_scale", ".input_scale"))),
    Breakage("a file that is cut short", "truncated", "error", lambda s: s, cut=True),
    Breakage("another format", "unknown_format", "error", _foreign),
)  # fmt: skip
