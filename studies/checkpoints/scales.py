# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The two conventions of a stored activation scale, and which linears must agree on one.

ModelOpt stores ``input_scale``, ``g = amax / 2688``; compressed-tensors ``input_global_scale``,
``G = 2688 / amax``. Sources: Model-Optimizer ``qtensor/nvfp4_tensor.py``; compressed-tensors
``quantization/utils/helpers.py``, ``generate_gparam``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from nvfp4_utils.quantize import AMAX_PER_SCALE, check_scale

from .files import Checkpoint, StoredTensor


@dataclass(frozen=True)
class Convention:
    """``leaf``: the stored name; ``inverse``: it holds 1/g; ``marks``: tensors that only weights
    quantized to NVFP4 in this convention have; ``shape`` of an activation scale."""

    name: str
    leaf: str
    inverse: bool
    marks: tuple[str, ...]
    shape: tuple[int, ...]

    def amax(self, stored: torch.Tensor) -> torch.Tensor:
        """The calibrated amax that engines read from stored values, float64."""
        return AMAX_PER_SCALE / stored if self.inverse else stored * AMAX_PER_SCALE

    def stored(self, amax: float) -> float:
        """The float32 to store for an amax: divided in float64, rounded once.

        Raises ``ValueError`` where it is not a positive, normal, finite float32.
        """
        ratio = AMAX_PER_SCALE / amax if self.inverse else amax / AMAX_PER_SCALE
        value = torch.tensor(ratio, dtype=torch.float64).float().item()
        check_scale(value, name=f"{self.leaf} of amax {amax}")
        return value


MODELOPT = Convention("ModelOpt", "input_scale", False, ("weight_scale_2",), ())
COMPRESSED_TENSORS = Convention(
    "compressed-tensors", "input_global_scale", True, ("weight_packed", "weight_global_scale"), (1,)
)
CONVENTIONS = (MODELOPT, COMPRESSED_TENSORS)
LEAVES = tuple(leaf for c in CONVENTIONS for leaf in (c.leaf, *c.marks))
# Linears that engines join into one, so that one scale must do for all. Sources: vLLM's
# packed_modules_mapping; TensorRT-LLM's fused QKV and gate-up loaders, w1 and w3 of experts.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
EXPERT = re.compile(r"(?<=\.)((?:\w*_)?experts)\.(\d+)(?=\.)")


@dataclass(frozen=True)
class QuantizedModule:
    """A linear with NVFP4 weights: its convention by its weights, and its activation scales by leaf."""

    name: str
    convention: Convention
    scales: dict[str, StoredTensor] = field(default_factory=dict)


def split_name(tensor: str) -> tuple[str, str]:
    """``("model.layers.0.mlp.up_proj", "input_scale")``; fused experts join the two by ``_``.

    The leaf is empty for a tensor that is no scale of ``LEAVES``.
    """
    for leaf in LEAVES:
        if tensor.endswith((f".{leaf}", f"_{leaf}")):
            return tensor[: -len(leaf) - 1], leaf
    return tensor, ""


def quantized_modules(checkpoint: Checkpoint) -> dict[str, QuantizedModule]:
    """Modules whose weights are NVFP4 in either convention, in order of name.

    FP8 modules have an ``input_scale`` too, but no ``weight_scale_2``; they are left out.
    """
    leaves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, leaf = split_name(name)
        if leaf:
            leaves.setdefault(module, {})[leaf] = tensor
    found = {}
    for module, own in sorted(leaves.items()):
        for convention in CONVENTIONS:
            if own.keys() & set(convention.marks):
                scales = {c.leaf: own[c.leaf] for c in CONVENTIONS if c.leaf in own}
                found[module] = QuantizedModule(module, convention, scales)
                break
    return found


def fused_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Modules that engines run as one, in groups of two or more."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module in modules:
        parent, _, last = module.rpartition(".")
        for members in FUSED:
            if last in members:
                groups.setdefault((parent, members), []).append(module)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def expert_sets(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The same linear of every expert of a layer, in groups of two or more."""
    sets: dict[str, list[str]] = {}
    for module in modules:
        if EXPERT.search(module):
            sets.setdefault(EXPERT.sub(r"\1.*", module), []).append(module)
    return [tuple(group) for group in sets.values() if len(group) > 1]


def role_of(module: str) -> str:
    """The name without its numbers: what the linears of all layers and experts have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


def unify(amaxes: Mapping[str, float]) -> tuple[dict[str, float], list[dict]]:
    """One amax per fused group, the largest; and the members that moved: module, amax, given, group.

    The largest saturates no member; a smaller one would.
    """
    unified, moved = dict(amaxes), []
    for group in fused_groups(amaxes):
        largest = max(amaxes[module] for module in group)
        for module in group:
            if amaxes[module] != largest:
                moved.append({"module": module, "amax": amaxes[module], "given": largest,
                              "group": list(group)})  # fmt: skip
                unified[module] = largest
    return unified, moved


def fill_experts(
    amaxes: Mapping[str, float], modules: Iterable[str]
) -> tuple[dict[str, float], list[dict]]:
    """The amaxes of ``modules``; an expert without one gets the largest of its layer's others.

    Also the experts that were filled: module, given. Modules that are no experts stay missing.
    """
    modules = list(modules)
    filled = {module: amaxes[module] for module in modules if module in amaxes}
    given = []
    for group in expert_sets(modules):
        known = [amaxes[module] for module in group if module in amaxes]
        for module in group:
            if module not in amaxes and known:
                filled[module] = max(known)
                given.append({"module": module, "given": max(known)})
    return filled, given


def site_readers(readers: Mapping[str, Iterable[str]], modules: Iterable[str]) -> dict[str, str]:
    """Module -> the site it reads, of those ``modules`` that read one.

    ``readers``: site -> the linears that read it, as a run stores them. Prefixes such as
    ``language_model.`` do not matter, and an expert reads what the fused parameter of its role reads.
    """
    known = {_core(name): site for site, names in readers.items() for name in names}
    found = {module: known.get(_core(module)) or known.get(_fused(_core(module))) for module in modules}
    return {module: site for module, site in found.items() if site}


def _core(module: str) -> str:
    """From the last ``layers.<i>.`` on: what a name has in common among wrappers of a model."""
    start = module.rfind("layers.")
    return module[start:] if start >= 0 else module


def _fused(expert: str) -> str:
    """``mlp.experts.7.up_proj`` -> ``mlp.experts.gate_up_proj``, as transformers joins experts."""
    name = re.sub(r"(?<=\.experts\.)\d+\.(?:gate_proj|up_proj|w1|w3)$", "gate_up_proj", expert)
    return re.sub(r"(?<=\.experts\.)\d+\.(?:down_proj|w2)$", "down_proj", name)
