# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Run a causal language model with the inputs, and the weights, of its linears fake-quantized.

A site is an activation that one linear or several read: q, k and v share one, and gate and up. What
else reads the tensor, a norm or a residual, keeps the unquantized one, as in a deployed model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nvfp4_utils.forward import evaluation_mode, is_linear
from nvfp4_utils.quantize import (
    AMAX_PER_SCALE,
    BLOCK_SIZE,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    Underflow,
    check_tensor,
    fake_quantize,
    fake_quantize_reference,
    four_over_six_reference,
    input_scale_from_amax,
)
from nvfp4_utils.sites import Coverage, find_coverage, kind_of

from .settings import CALIBRATED, FOUR_OVER_SIX, PER_TOKEN, STATIC, Setting

Sites = dict[str, dict[str, nn.Module]]


def find_linears(model: nn.Module) -> Sites:
    """Site label -> the linears that read it, by name, in module order: all of a model but its head.

    Raises ``ValueError`` naming linears whose input cannot be replaced, and if there is none at all.
    """
    coverage = find_coverage(model)
    missing = dict(coverage.uncovered)
    for site in coverage.sites.values():
        if site.form == "routed" or not all(map(is_linear, site.readers.values())):
            missing |= dict.fromkeys(site.readers, "experts of a mixture")
    if missing:
        raise ValueError(
            f"end-to-end evaluation does not cover {Coverage({}, missing).described()}; expected a "
            "model of nn.Linear layers that all run. Where fused kernels replace them, load it without."
        )
    if not coverage.sites:
        raise ValueError(
            f"{type(model).__name__} has no linear apart from its head; expected a causal language "
            "model of nn.Linear layers."
        )
    return {label: site.readers for label, site in coverage.sites.items()}


def quantized_weights(sites: Sites) -> dict[str, torch.Tensor]:
    """Linear name -> its weight as an NVFP4 checkpoint holds it, in the weight's shape and dtype.

    Blocks run along the input dimension; one scale per linear, its amax / 2688; ``floor``, as exports.
    """
    weights = {}
    for linears in sites.values():
        for name, linear in linears.items():
            weight: torch.Tensor = linear.get_parameter("weight").detach()
            turned = not isinstance(linear, nn.Linear)  # transformers' Conv1D holds [in, out]
            scale = input_scale_from_amax(weight.abs().max().item())
            rows = weight.T.contiguous() if turned else weight
            quantized_rows = fake_quantize(rows, scale, underflow="floor")
            weights[name] = quantized_rows.T.contiguous() if turned else quantized_rows
    return weights


def quantize_on_device(
    x: torch.Tensor, scale: torch.Tensor, underflow: Underflow, bad: torch.Tensor
) -> torch.Tensor:
    """``fake_quantize`` by its kernel, without waiting for the device.

    ``scale``: float32 [1] on the device. ``bad``: int32 [1] there, which becomes 1 if ``x`` has NaN or
    infinity or the scale is out of range; the caller looks at it when it waits anyhow.
    """
    from nvfp4_utils.kernels.fake_quantize import launch  # needs Triton

    x = x.contiguous()
    y = torch.empty_like(x)
    launch(x, y, bad, scale, underflow == "floor", BLOCK_SIZE, LOWEST_SCALE, HIGHEST_SCALE)
    return y


def row_scales(x: torch.Tensor, per_token: bool) -> torch.Tensor:
    """Scale of each block of ``x`` [sequences, ..., 16 k] from its token's or sequence's own amax.

    float32 [blocks, 1]. All-zero rows get the smallest scale, with which they stay zero.
    """
    amax = x.abs().flatten(0 if per_token else 1, -2 if per_token else -1).amax(-1)
    scale = (amax.double() / AMAX_PER_SCALE).float().clamp(min=LOWEST_SCALE)
    return scale.repeat_interleave(x.numel() // BLOCK_SIZE // len(scale))[:, None]


class TokenSnr:
    """Mean over tokens of ``10 log10(energy / squared error)`` in dB, for each site of a setting.

    The signal is the activation as it arrives, in the model whose earlier layers are quantized too.
    Tokens that are zero or lose nothing have no finite SNR and are left out. ``sums`` float64 [sites].
    """

    def __init__(self, sites: Sites, device: torch.device) -> None:
        self.index = {label: i for i, label in enumerate(sites)}
        self.sums = torch.zeros(len(sites), dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.sums)

    def add(self, label: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count the tokens of ``x`` [..., width], quantized to ``y``."""
        energy, error = (v.float().square().sum(-1) for v in (x, y.float() - x))
        snr = 10 * torch.log10(energy / error).double()
        finite = snr.isfinite()
        self.sums[self.index[label]] += snr.where(finite, 0.0).sum()
        self.counts[self.index[label]] += finite.sum()

    def mean_db(self) -> torch.Tensor:
        """float64 [sites] on the CPU; NaN where no token was counted."""
        return (self.sums / self.counts).cpu()


class _Quantizer:
    """Replaces what enters the linears; siblings that read one tensor share its quantized copy."""

    def __init__(self, setting: Setting, labels: list[str], bad: torch.Tensor, snr: TokenSnr | None):
        self.setting, self.bad, self.snr = setting, bad, snr
        self.scales: Mapping[str, torch.Tensor] = {}
        if setting.rule in CALIBRATED:
            scales = input_scale_from_amax(
                torch.tensor([setting.amaxes[label] for label in labels], dtype=torch.float64)
            )
            self.scales = dict(zip(labels, scales.to(bad.device), strict=True))
        # One slot: siblings run one after another, and all sites' tensors would take much memory.
        self.last: tuple = ("", None, None)

    def __call__(self, label: str, x: torch.Tensor) -> torch.Tensor:
        site, seen, y = self.last
        if label != site or x is not seen:
            check_tensor(x)
            y = self.quantize(label, x)
            self.last = (label, x, y)
            if self.snr is not None:
                self.snr.add(label, x, y)
        return y

    def quantize(self, label: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and self.setting.rule == STATIC:
            return quantize_on_device(x, self.scales[label], self.setting.underflow, self.bad)
        self.bad |= ~x.abs().amax().isfinite()  # several times faster than all elements' isfinite
        # One sequence at a time keeps a CPU's temporaries in its cache; [tokens, width] has none.
        parts = x.split(1 if x.ndim > 2 and not x.is_cuda else len(x))
        return torch.cat([self.reference(label, part) for part in parts])

    def reference(self, label: str, x: torch.Tensor) -> torch.Tensor:
        rule = self.setting.rule
        scale = self.scales[label] if rule in CALIBRATED else row_scales(x, rule == PER_TOKEN)
        quantize = four_over_six_reference if rule == FOUR_OVER_SIX else fake_quantize_reference
        return quantize(x, scale, self.setting.underflow, x.dtype)


@contextmanager
def _replaced_weights(sites: Sites, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    parameters: dict[str, Any] = {
        name: m.weight for linears in sites.values() for name, m in linears.items()
    }
    originals = {name: parameters[name].data for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight
        yield
    finally:
        for name, weight in originals.items():
            parameters[name].data = weight


@contextmanager
def quantized(
    model: nn.Module,
    setting: Setting,
    *,
    sites: Sites | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    bad: torch.Tensor | None = None,
    snr: TokenSnr | None = None,
) -> Iterator[None]:
    """Inside, ``model`` computes as ``setting`` says; it is restored on exit, also when anything raises.

    Hooks are removed, training flags put back, and weights are again the tensors they were.

    Parameters
    ----------
    sites, weights : what ``find_linears`` and ``quantized_weights`` give, to spare finding them again
    bad : int32 tensor [1] on the model's device
        Becomes 1 if an activation is NaN or infinite. Without it that raises on exit.
    snr : TokenSnr
        Told of every quantized activation.

    Raises
    ------
    ValueError
        If a linear is not covered, a site has no amax, an amax is not positive and finite,
        or an activation is NaN or infinite and nobody else looks.

    Examples
    --------
    >>> with quantized(model, setting):  # doctest: +SKIP
    ...     logits = model(tokens).logits
    """
    sites = find_linears(model) if sites is None else sites
    if setting.only and setting.only not in {*sites, *map(kind_of, sites)}:
        raise ValueError(
            f"only is {setting.only!r}; expected a kind or a label of the model's sites, such as "
            f"{list(sites)[:3]}."
        )
    labels = [label for label in sites if setting.quantizes(label)]
    missing = [label for label in labels if label not in setting.amaxes]
    if setting.rule in CALIBRATED and missing:
        raise ValueError(
            f"the setting {setting.name!r} has no amax for {len(missing)} sites, {missing[:3]}; "
            f"expected one for each of the model's {len(labels)}. It has {list(setting.amaxes)[:3]}: "
            "calibrate on the same model and sites."
        )
    if setting.weights == "nvfp4" and weights is None:
        weights = quantized_weights(sites)
    flag = torch.zeros(1, dtype=torch.int32, device=next(model.parameters()).device)
    quantizer = _Quantizer(setting, labels, flag if bad is None else bad, snr)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if setting.weights == "nvfp4":
            stack.enter_context(_replaced_weights(sites, weights or {}))
        for label in labels:
            for linear in sites[label].values():
                hook = linear.register_forward_pre_hook(
                    lambda module, args, label=label: (quantizer(label, args[0]), *args[1:])
                )
                stack.callback(hook.remove)
        yield
    if bad is None and flag.item():
        raise not_finite([setting])


def not_finite(settings: list[Setting]) -> ValueError:
    """The error for settings under which an activation was NaN or infinite."""
    return ValueError(
        f"an activation is NaN or infinite under {[s.name for s in settings][:3]}; expected finite "
        "ones. Find the layer that overflows: run the unquantized model first."
    )
