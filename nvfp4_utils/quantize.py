# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The NVFP4 fake quantizer: the PyTorch reference, and the front end that picks a backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

BLOCK_SIZE = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# An element is rounded from E2M1_VALUES[k] to [k + 1] at midpoint k. A tie goes to the even code, so to
# the upper value where k is odd.
E2M1_MIDPOINTS = tuple((a + b) / 2 for a, b in itertools.pairwise(E2M1_VALUES))
E2M1_MAX = E2M1_VALUES[-1]
E4M3_MAX = 448.0
E4M3_MIN_NORMAL = 2.0**-6
E4M3_MIN_SUBNORMAL = 2.0**-9
E4M3_NORMAL_RANGE = E4M3_MAX / E4M3_MIN_NORMAL  # 28672: the safe window is B_max to this times B_min
AMAX_PER_SCALE = E2M1_MAX * E4M3_MAX  # 2688: the largest magnitude at input_scale = 1
# Four Over Six puts the amax at 6 * 256, so that a block may also be scaled to 4: 1.5 * 256 = 384 is
# an E4M3 number, 1.5 * 448 is beyond the largest. 448 / 256 of the amax gives its scale.
FOUR_OVER_SIX_ROOM = E4M3_MAX / 256.0
# A scale must be normal in float32, and leave room for 8 times itself.
LOWEST_SCALE, HIGHEST_SCALE = 2.0**-126, 2.0**124

Underflow = Literal["flush", "floor"]
UNDERFLOWS: tuple[Underflow, ...] = ("flush", "floor")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def input_scale_from_amax(amax):
    """The per-tensor scale a checkpoint stores for a calibrated amax: ``float32(amax / 2688)``.

    Divided in float64, then rounded once to float32; multiplying by 1/2688 instead moves the
    result by one ulp. Source: ModelOpt's export, ``amax / (6 * 448)``.

    Parameters
    ----------
    amax : float, or tensor, array or list of floats
        Calibrated amax, in the units of the activation; finite and positive.

    Returns
    -------
    float (exactly representable in float32) for a float, else a float32 tensor of the same shape.

    Raises
    ------
    ValueError
        If an amax is not finite, not positive, or its scale is below float32's normal range.

    Examples
    --------
    >>> input_scale_from_amax(2688.0)
    1.0
    """
    scale = (torch.as_tensor(amax, dtype=torch.float64) / AMAX_PER_SCALE).to(torch.float32)
    check_scale(scale, name="amax / 2688")
    return scale if isinstance(amax, torch.Tensor) or scale.ndim else scale.item()


def check_scale(input_scale, *, name: str = "input_scale") -> None:
    """Refuse a scale that is not finite, positive and normal in float32."""
    scales = torch.as_tensor(input_scale, dtype=torch.float64)
    bad = ~(torch.isfinite(scales) & (scales >= LOWEST_SCALE) & (scales < HIGHEST_SCALE))
    if bool(bad.any()):
        got = scales[bad].flatten()[0].item()
        raise ValueError(
            f"{name} is {got}; expected a finite positive float32 in [2**-126, 2**124). "
            "Calibrate on data with at least one nonzero finite value, or pass a positive scale."
        )


def check_tensor(x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Refuse what is no tensor, and a dtype or a last dimension the NVFP4 block layout cannot take."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"x is a {type(x).__name__}; expected a tensor. Convert it with torch.tensor(x)."
        )
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"x has dtype {got}; expected one of {names}. Cast it first.")
    if x.ndim == 0 or x.shape[-1] % BLOCK_SIZE or x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected a nonempty tensor whose last dimension is a "
            f"multiple of {BLOCK_SIZE}. Blocks run along the last dimension: reshape or pad it."
        )


def nonfinite_error(bad: int) -> ValueError:
    """The error for ``bad`` values that are NaN or infinite."""
    return ValueError(
        f"x holds {bad} values that are NaN or infinite; expected finite activations. Find the "
        "layer that overflows before calibrating."
    )


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Put a site's name before the message of what is raised inside about its activation."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}" if label else str(error)) from None


def check_underflow(underflow: str) -> None:
    """Refuse an unknown underflow convention."""
    if underflow not in UNDERFLOWS:
        raise ValueError(
            f"underflow is {underflow!r}; expected 'flush' (inference kernels) or 'floor' "
            "(ModelOpt's PyTorch reference)."
        )


def round_e2m1(u: torch.Tensor) -> torch.Tensor:
    """Round nonnegative float32 values to the nearest E2M1 magnitude, ties to even, at most 6.

    The spacing of ``E2M1_VALUES`` is 0.5 below 2, 1 in [2, 4) and 2 from 4 on; ``torch.round`` takes
    ties to the even multiple, which is the even code. ``E2M1_MIDPOINTS`` are the same rule as a table,
    which the exact error uses; a test holds the two together.
    """
    step = torch.where(u < 2, 0.5, torch.where(u < 4, 1.0, 2.0))
    return torch.clamp(torch.round(u / step) * step, max=E2M1_MAX)


def block_scale_e4m3(
    block_amax: torch.Tensor, input_scale: torch.Tensor, underflow: Underflow
) -> torch.Tensor:
    """The E4M3 scale of each block, as float32: ``e4m3(min(block_amax / (6 * g), 448))``.

    ``flush`` keeps what E4M3 rounding gives, so a scale at or under 2**-10 becomes 0. ``floor``
    clamps up to the smallest subnormal, 2**-9, and gives an all-zero block the scale 1.
    """
    s = torch.clamp(block_amax / (E2M1_MAX * input_scale), max=E4M3_MAX)
    s8 = s.to(torch.float8_e4m3fn).to(torch.float32)
    if underflow == "floor":
        s8 = torch.where(s == 0, 1.0, torch.clamp(s8, min=E4M3_MIN_SUBNORMAL))
    return s8


def _magnitudes(blocks, block_amax, input_scale, underflow: Underflow) -> torch.Tensor:
    """Quantized magnitudes of float32 blocks [n, 16] whose block scale takes ``block_amax`` to 6."""
    step = block_scale_e4m3(block_amax, input_scale, underflow) * input_scale
    q = round_e2m1(blocks.abs() / step)
    return torch.where(step == 0, 0.0, q * step)  # a flushed block is zero, not 0 / 0


def fake_quantize_reference(
    x: torch.Tensor, input_scale: torch.Tensor, underflow: Underflow, out_dtype: torch.dtype
) -> torch.Tensor:
    """The oracle of every other backend: PyTorch, float32 arithmetic, one line per rule.

    ``input_scale`` is one scale, or one per block as [blocks, 1].
    """
    blocks = x.to(torch.float32).reshape(-1, BLOCK_SIZE)
    block_amax = blocks.abs().amax(dim=-1, keepdim=True)
    y = _magnitudes(blocks, block_amax, input_scale, underflow)
    return torch.copysign(y, blocks).reshape(x.shape).to(out_dtype)


def four_over_six_reference(
    x: torch.Tensor, input_scale: torch.Tensor, underflow: Underflow, out_dtype: torch.dtype
) -> torch.Tensor:
    """Four Over Six: each block's amax goes to 6 or to 4, whichever has the lower squared error.

    Scaling to 4 is a block scale 1.5 times as large; ties keep 6. Which one is lower depends on all
    16 elements together, so no histogram of single elements holds this error. ``input_scale`` is
    that of ``FOUR_OVER_SIX_ROOM * amax``. Arguments as ``fake_quantize_reference``; source:
    Cook et al., arXiv 2512.02010, and their PyTorch reference, rule ``mse``.
    """
    blocks = x.to(torch.float32).reshape(-1, BLOCK_SIZE)
    block_amax = blocks.abs().amax(dim=-1, keepdim=True)
    six, four = (
        _magnitudes(blocks, stretch * block_amax, input_scale, underflow) for stretch in (1.0, 1.5)
    )
    error_six, error_four = (
        (y - blocks.abs()).double().square().sum(-1, keepdim=True) for y in (six, four)
    )
    y = torch.where(error_four < error_six, four, six)
    return torch.copysign(y, blocks).reshape(x.shape).to(out_dtype)


def fake_quantize_kernel(
    x: torch.Tensor, input_scale: torch.Tensor, underflow: Underflow, out_dtype: torch.dtype
) -> torch.Tensor:
    """The Triton kernel, for what ``fake_quantize`` has checked; the host waits once.

    Raises ``ValueError`` for NaN or infinity in ``x`` and a scale out of range; the kernel finds both.
    """
    from .kernels import fake_quantize as kernel  # needs Triton

    x = x.contiguous()
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    bad = kernel.new_flag(x)
    floor = underflow == "floor"
    kernel.launch(x, y, bad, input_scale, floor, BLOCK_SIZE, LOWEST_SCALE, HIGHEST_SCALE)
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
    if bad.item():
        check_scale(input_scale)
        raise nonfinite_error(int((~torch.isfinite(x)).sum()))
    return y


def fake_quantize(
    x: torch.Tensor,
    input_scale: float | torch.Tensor,
    *,
    underflow: Underflow = "flush",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    r"""Quantize to NVFP4 and back, block by block along the last dimension.

    For a block with amax ``b`` and the tensor's scale ``g``, in float32 throughout:

    ``s = b / (6 g)``; ``s8 = e4m3(min(s, 448))``; ``q = e2m1(|x| / (s8 g))``;
    ``y = sign(x) q (s8 g)``.

    Ties go to the even code in both roundings; elements saturate at ``q = 6`` and block scales at
    448. CPU tensors take the PyTorch reference, CUDA tensors a Triton kernel, bit-equal to it.

    Parameters
    ----------
    x : Tensor[..., 16 k], bfloat16, float16 or float32
        Activations; finite.
    input_scale : float or one-element tensor
        ``g``, the value checkpoints store: ``amax / 2688``. Rounded to float32.
    underflow : {"flush", "floor"}
        What happens to a block scale below E4M3's smallest subnormal: ``flush`` zeroes the block
        (vLLM, TensorRT-LLM, FlashInfer), ``floor`` clamps it to 2**-9 (ModelOpt's reference).
    out_dtype : dtype, optional
        Of the result; the input's by default, as a fake-quantized layer sees it.

    Returns
    -------
    Tensor of ``x``'s shape.

    Raises
    ------
    TypeError
        For another dtype.
    ValueError
        For a last dimension that is not a multiple of 16, a scale that is not positive and
        finite, an unknown convention, or NaN or infinity in ``x``.

    Examples
    --------
    >>> x = torch.full((1, 16), 1.25)
    >>> fake_quantize(x, input_scale_from_amax(1.25))[0, 0].item()
    1.25
    """
    check_tensor(x)
    check_underflow(underflow)
    if not (x.is_cuda and torch.is_tensor(input_scale) and input_scale.is_cuda):
        check_scale(input_scale)  # else the kernel does, so that the host need not wait twice
    scale = torch.as_tensor(input_scale, dtype=torch.float32, device=x.device).reshape(())
    out_dtype = out_dtype or x.dtype
    if out_dtype not in DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; expected bfloat16, float16 or float32.")
    if x.is_cuda:
        return fake_quantize_kernel(x, scale, underflow, out_dtype)
    if not math.isfinite(x.abs().max().item()):
        raise nonfinite_error(int((~torch.isfinite(x)).sum()))
    return fake_quantize_reference(x, scale, underflow, out_dtype)
