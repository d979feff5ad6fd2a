# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What can be wrong with stored activation scales: each kind with its rule, threshold and reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from nvfp4_utils.quantize import AMAX_PER_SCALE, HIGHEST_SCALE, LOWEST_SCALE

from .files import Checkpoint
from .scales import (
    COMPRESSED_TENSORS,
    CONVENTIONS,
    EXPERT,
    QuantizedModule,
    expert_sets,
    fused_groups,
    role_of,
)

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
# In the order of the report. "slack" is of an audit against a run.
KINDS = ("unknown_format", "truncated", "convention", "nonfinite", "negative", "zero", "missing",
         "magnitude", "fused_mismatch", "imputed_half", "constant_one", "expert_spread",
         "slack")  # fmt: skip
# ModelOpt's set_expert_quantizer_amax gives 0.5 to experts of a layer none of which calibration reached.
IMPUTED_AMAX = 0.5
IMPUTED_TOLERANCE = 1e-6  # relative: float32 rounding of 0.5 / 2688 is 6e-8
# The largest float16. Read rightly, no policy of the stored runs has a larger median over a
# checkpoint, nor do
# the published layers. With g and 1/g exchanged the median is 2688**2 / amax: above it for scales from
# the amax,
# below for scales aimed at more than 110, which only a run tells apart.
LARGEST_MEDIAN = 65504.0
# A single module is called exchanged if its amax is above that and the other reading lies within this
# factor of the median of its role. One published amax, 774144 in a layer of median 124, is real and 13
# times off.
EXCHANGED_FACTOR = 8.0
# Kernels that take one maximum over the experts of a layer leave the quietest expert this factor less
# room. Half of the median room of the stored runs' sites, 9 octaves, is about this.
EXPERT_SPREAD = 2.0**5


@dataclass(frozen=True)
class Finding:
    """One thing wrong, or worth knowing. ``value``: what was found, JSON; ``message`` ends in its
    rule."""

    tensor: str
    kind: str
    severity: Severity
    message: str
    value: Any = None

    def order(self) -> tuple:
        """Worst first: by severity, kind, expected loss if there is one, and name."""
        loss = self.value["loss_db"] if self.kind == "slack" else 0.0
        return SEVERITIES.index(self.severity), KINDS.index(self.kind), -loss, self.tensor


@dataclass(frozen=True)
class Scale:
    """One stored value [float64] of a module, with the amax that engines read from it."""

    tensor: str
    module: QuantizedModule
    value: float
    amax: float

    @property
    def sound(self) -> bool:
        """Whether a kernel can divide by it: positive, finite, normal in float32."""
        return LOWEST_SCALE <= self.value < HIGHEST_SCALE


def scales_of(
    modules: Mapping[str, QuantizedModule], values: Mapping[str, torch.Tensor]
) -> Iterator[Scale]:
    """Every stored activation scale; of a tensor of several, each element as ``name[i]``."""
    for module in modules.values():
        for convention in CONVENTIONS:
            tensor = module.scales.get(convention.leaf)
            if tensor is None or tensor.name not in values:
                continue
            stored = values[tensor.name]
            for i, (value, amax) in enumerate(zip(stored.tolist(), convention.amax(stored).tolist(),
                                                  strict=True)):  # fmt: skip
                yield Scale(
                    tensor.name if len(stored) == 1 else f"{tensor.name}[{i}]", module, value, amax
                )


def format_findings(
    checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule], others: int
) -> Iterator[Finding]:
    """``truncated`` and ``unknown_format``: what stands in the way of reading any scale."""
    for file, problem in checkpoint.cut.items():
        lost = [t.name for t in checkpoint.tensors.values() if t.file == file and
                t.end > (file.stat().st_size if file.is_file() else 0)]  # fmt: skip
        yield Finding(
            lost[0] if lost else "", "truncated", "error",
            f"{file.name} {problem}; {len(lost)} tensors of its header are lost. Download or copy it "
            "again. Rule: a file is as long as its header says, and there if the index names it.",
            file.name,
        )  # fmt: skip
    for name, promised in checkpoint.absent.items():
        yield Finding(
            name, "truncated", "error",
            f"the index says it is in {promised}, whose header does not have it. Index and files are of "
            "different exports: copy both from one. Rule: every tensor of the index is in its file.",
            promised,
        )  # fmt: skip
    if not modules and not checkpoint.cut:
        declared = _declared(checkpoint.config) or "no quantization"
        yield Finding(
            "", "unknown_format", "error",
            f"no linear has NVFP4 weights; config.json declares {declared}. Expected ModelOpt's "
            "weight_scale_2 or compressed-tensors' weight_packed and weight_global_scale. Rule: at "
            "least one module has either.",
            declared,
        )  # fmt: skip
    if modules and others:
        yield Finding(
            "", "unknown_format", "info",
            f"{others} more modules have an input_scale but no NVFP4 weights, as FP8 has; they are not "
            "audited. Rule: an activation scale is NVFP4's where weight_scale_2 stands beside it.",
            others,
        )  # fmt: skip
    for module in modules.values():
        for tensor in module.scales.values():
            if tensor.dtype != "F32":
                yield Finding(
                    tensor.name, "unknown_format", "warning",
                    f"is {tensor.dtype}; both exporters write F32, and rounding moves the amax by up to "
                    "0.4 % (BF16). Rule: the dtype of a scale is F32.",
                    tensor.dtype,
                )  # fmt: skip


def _declared(config: Mapping) -> str:
    quantization = config.get("quantization_config") or config.get("hf_quant", {}).get(
        "quantization", {}
    )
    return str(quantization.get("quant_algo") or quantization.get("quant_method") or "")


def static_activations(config: Mapping) -> Literal["yes", "no", "some"]:
    """Whether the config says that activations have a stored scale: of all NVFP4 modules, none or some.

    Without a config the answer is yes, since nothing says otherwise.
    """
    quantization = config.get("quantization_config", {})
    groups = quantization.get("config_groups", {})
    if quantization.get("quant_method") == "compressed-tensors" and groups:
        inputs = [group.get("input_activations") for group in groups.values()]
        # "local": block scales at run time, the tensor's scale stored; True: both at run time.
        answers = {bool(i) and i.get("dynamic") in (False, "local") for i in inputs}
        return "some" if len(answers) == 2 else "yes" if answers.pop() else "no"
    algorithm = str(
        quantization.get("quant_algo")
        or config.get("hf_quant", {}).get("quantization", {}).get("quant_algo")
        or "NVFP4"
    )
    if algorithm == "MIXED_PRECISION":
        return "some"
    return "no" if "A16" in algorithm else "yes"


def presence_findings(
    checkpoint: Checkpoint, modules: Mapping[str, QuantizedModule]
) -> Iterator[Finding]:
    """``missing`` and ``convention``: no scale, two, or one that the weights' convention does not
    read."""
    static = static_activations(checkpoint.config)
    bare = [m for m in modules.values() if not m.scales]
    if modules and len(bare) == len(modules):
        yield _none_at_all(static, next(iter(modules.values())))
        bare = []
    for module in bare:
        yield Finding(
            f"{module.name}.{module.convention.leaf}", "missing",
            "error" if static == "yes" else "warning",
            "the weights are NVFP4 and no activation scale is stored: an engine runs it with whatever "
            "its buffer holds, or refuses. Calibrate it; an expert never reached gets the largest of "
            "the others (make export does). Rule: other modules have "
            f"one{', config.json allows some without' * (static == 'some')}.",
        )  # fmt: skip
    for module in modules.values():
        if len(module.scales) == 2:
            message = "both input_scale and input_global_scale are stored; engines read one of them."
        elif module.scales and module.convention.leaf not in module.scales:
            own = module.convention
            message = f"the weights are {own.name}'s, whose engines read {own.leaf}."
        else:
            continue
        yield Finding(
            f"{module.name}.{next(iter(module.scales))}", "convention", "error",
            f"{message} Delete or rename by one exporter's rule. Rule: one convention for weights and "
            "activations of a module.",
            sorted(module.scales),
        )  # fmt: skip
    used = {m.convention.name: m for m in modules.values()}
    if len(used) > 1:
        yield Finding(
            "", "convention", "error",
            f"weights of both conventions: {', '.join(sorted(used))}, as in "
            f"{', '.join(m.name for m in used.values())}. "
            "An engine picks one loader by config.json. Rule: one convention per checkpoint.",
            sorted(used),
        )  # fmt: skip


def _none_at_all(static: str, example: QuantizedModule) -> Finding:
    if static == "no":
        return Finding(
            "", "missing", "info",
            "weights only: no activation scale is stored, and config.json asks for none. Rule: the "
            "declared scheme is A16 or dynamic.",
        )  # fmt: skip
    return Finding(
        "", "convention", "error",
        f"neither input_scale nor input_global_scale is stored for any module, and config.json declares "
        f"static activations; {example.convention.name} stores {example.convention.leaf}. Rule: one of "
        "both where activations are static.",
        [],
    )  # fmt: skip


def value_findings(scales: Iterable[Scale]) -> Iterator[Finding]:
    """``zero``, ``negative``, ``nonfinite``, ``constant_one``, ``imputed_half``: one value by itself."""
    for scale in scales:
        finding = _unsound(scale) or _placeholder(scale)
        if finding:
            yield finding


def _unsound(scale: Scale) -> Finding | None:
    if scale.sound:
        return None
    if scale.value == 0:
        kind, effect = "zero", "its reciprocal is infinite, so outputs are NaN or zero"
    elif scale.value < 0:
        kind, effect = "negative", "an amax cannot be negative; every sign would flip"
    else:
        kind, effect = "nonfinite", "outputs are NaN, zero or infinite"
    return Finding(
        scale.tensor, kind, "error",
        f"is {scale.value:g}; {effect}. Usual cause: a linear that calibration never reached. "
        "Calibrate it or "
        "give it its group's largest amax. Rule: finite, positive and in float32's normal range.",
        repr(scale.value) if kind == "nonfinite" else scale.value,
    )  # fmt: skip


def _placeholder(scale: Scale) -> Finding | None:
    if scale.value == 1:
        inverse = COMPRESSED_TENSORS.leaf in scale.tensor
        cause = ("compressed-tensors writes 1 in place of a scale that is not finite" if inverse else
                 "ModelOpt's constant_amax for experts writes it")  # fmt: skip
        return Finding(
            scale.tensor, "constant_one", "warning",
            f"is exactly 1, amax {AMAX_PER_SCALE:g}: a constant, not calibrated; {cause}. Audit "
            "with RUN= "
            "to see what it costs. Rule: the value is 1.",
            1.0,
        )  # fmt: skip
    if abs(scale.amax / IMPUTED_AMAX - 1) <= IMPUTED_TOLERANCE:
        expert = EXPERT.search(scale.tensor) is not None
        cause = ("ModelOpt's fallback for experts that calibration never reached" if expert else
                 "exact in bfloat16, so it may be real; ModelOpt's fallback is experts'")  # fmt: skip
        return Finding(
            scale.tensor, "imputed_half", "error" if expert else "info",
            f"amax is {IMPUTED_AMAX}: {cause}. Calibrate on more text or take the largest amax of other "
            f"layers' experts. Rule: within {IMPUTED_TOLERANCE:g} of {IMPUTED_AMAX}; an error at "
            "experts.",
            scale.amax,
        )  # fmt: skip
    return None


def relation_findings(scales: Iterable[Scale]) -> Iterator[Finding]:
    """``fused_mismatch``, ``expert_spread``, ``magnitude``: a value beside the others. Sound ones
    only."""
    sound = [scale for scale in scales if scale.sound]
    by_module = {s.module.name: s for s in sound if s.module.convention.leaf in s.tensor
                 and not s.tensor.endswith("]")}  # fmt: skip
    for group in fused_groups(by_module):
        yield from _mismatch([by_module[m] for m in group])
    for group in expert_sets(by_module):
        yield from _spread([by_module[m] for m in group])
    yield from _exchanged(sound)


def _mismatch(members: list[Scale]) -> Iterator[Finding]:
    low, high = min(members, key=lambda s: s.amax), max(members, key=lambda s: s.amax)
    if low.value == high.value:
        return
    factor = high.amax / low.amax
    if members[0].module.convention is COMPRESSED_TENSORS:
        effect = (f"vLLM and SGLang take the largest 1/g, the smallest amax: {high.tensor} "
                  f"saturates from {1 / factor:.3g} of its amax on")  # fmt: skip
    else:
        effect = (f"vLLM takes the largest amax, so none saturates and {low.tensor} has its blocks "
                  f"{factor:.3g} times lower in E4M3; TensorRT-LLM refuses to load it")  # fmt: skip
    yield Finding(
        low.tensor, "fused_mismatch", "error",
        f"amax {low.amax:.6g}, while {high.tensor} of the same fused group has {high.amax:.6g}: "
        f"{effect}. "
        "Store the largest amax for all (make export does). Rule: members of a fused group are equal.",
        factor,
    )  # fmt: skip


def _spread(experts: list[Scale]) -> Iterator[Finding]:
    low, high = min(experts, key=lambda s: s.amax), max(experts, key=lambda s: s.amax)
    if high.amax / low.amax > EXPERT_SPREAD:
        yield Finding(
            high.tensor, "expert_spread", "warning",
            f"amax {high.amax:.4g} is {high.amax / low.amax:.4g} times that of {low.tensor} among "
            f"{len(experts)} experts: kernels that take one maximum per layer run the quiet ones that "
            f"far above their amax. Rule: largest over smallest above {EXPERT_SPREAD:g}, half of a "
            "typical site's room.",
            high.amax / low.amax,
        )  # fmt: skip


def _exchanged(scales: list[Scale]) -> Iterator[Finding]:
    if not scales:
        return
    middle = median(s.amax for s in scales)
    if middle > LARGEST_MEDIAN:
        yield Finding(
            "", "magnitude", "error",
            f"the median amax is {middle:.4g}; read as the reciprocal it would be "
            f"{AMAX_PER_SCALE**2 / middle:.4g}. Value and reciprocal look exchanged in the whole "
            "checkpoint. "
            f"Rule: a median above {LARGEST_MEDIAN:g}, the largest float16.",
            middle,
        )  # fmt: skip
        return
    roles: dict[str, list[float]] = {}
    for s in scales:
        roles.setdefault(role_of(s.module.name), []).append(s.amax)
    for s in scales:
        if s.amax <= LARGEST_MEDIAN:
            continue
        other, typical = AMAX_PER_SCALE**2 / s.amax, median(roles[role_of(s.module.name)])
        exchanged = 1 / EXCHANGED_FACTOR <= other / typical <= EXCHANGED_FACTOR
        verdict = (
            "Value and reciprocal look exchanged"
            if exchanged
            else "No float16 model could have it; check it"
        )
        yield Finding(
            s.tensor, "magnitude", "error" if exchanged else "warning",
            f"amax {s.amax:.4g}; as the reciprocal {other:.4g}, and the median of its role is "
            f"{typical:.4g}. {verdict}. "
            f"Rule: above {LARGEST_MEDIAN:g}; an error if the reciprocal is within "
            f"{EXCHANGED_FACTOR:g} times the median.",
            s.amax,
        )  # fmt: skip
