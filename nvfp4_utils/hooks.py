# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture activation statistics at named sites of a Hugging Face model while it runs.

Activations are counted where they arise and never written anywhere: what leaves a forward pass is
a joint histogram a group of sequences, and each sequence's amax.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .statistics import ActivationStatistics, SiteStatistics

# The modules whose first input is the site's activation. The projections that read the same input
# (q, k, v; gate, up; the linear-attention in_projs) share one site and one input_scale.
SITES = {
    "attention_input": r"self_attn\.q_proj|linear_attn\.in_proj_qkv|self_attn\.qkv_proj|"
    r"attention\.self\.query",
    "o_proj_input": r"self_attn\.o_proj|linear_attn\.out_proj|attention\.output\.dense",
    "mlp_input": r"mlp|intermediate\.dense",
    "down_proj_input": r"mlp\.down_proj|(?<=\d\.)output\.dense",
}

CLOSED_BYTES = 2**32  # of tables of complete groups that have not been turned sparse


class _Counter:
    """One statistic, updated at once; bfloat16 on a CUDA device has ``DeviceCounter`` instead."""

    next_window = None
    table_bytes = 0

    def __init__(self) -> None:
        self.statistics = ActivationStatistics()

    def add(self, x: torch.Tensor, keep: torch.Tensor | None, padding: int) -> torch.Tensor:
        """Count ``x`` [sequences, tokens, ...] where ``keep``; returns each sequence's amax."""
        rows = x if keep is None else x[keep]
        if rows.numel():
            self.statistics.update(rows)
        magnitude = x.abs() if keep is None else x.abs().masked_fill(~keep[..., None], 0)
        return magnitude.flatten(1).amax(dim=1)

    def close(self) -> None:
        """Nothing comes after."""

    def flush(self) -> None:
        """There is no table to turn sparse."""

    def finish(self) -> ActivationStatistics:
        """The statistic."""
        return self.statistics


class _Counters:
    """Counters of every site and group, and the amax of every sequence, while a model runs."""

    room = math.inf  # bytes on the device for the statistics of complete groups

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.sites: dict[str, list] = {}  # a counter a group
        self.amaxes: dict[str, list[torch.Tensor]] = {}
        self.reports: Any = None  # of all ``DeviceCounter``
        self.closed: deque = deque()  # counters of complete groups that still have a table
        self.closed_bytes = 0  # of these tables
        self.sparse_bytes = 0  # of statistics that were tables

    def add(self, label: str, x: torch.Tensor, first: int, keep, padding: list[int]) -> None:
        """Count ``x`` at a site; ``first``: sequences before it, ``padding``: tokens each has."""
        counters = self.sites.setdefault(label, [])
        start = 0
        while start < len(x):
            room = self.group_size - (first + start) % self.group_size
            part = slice(start, start + room)
            if (first + start) % self.group_size == 0:
                self._start_group(counters, x)
            mask = None if keep is None else keep[part]
            amax = counters[-1].add(x[part], mask, sum(padding[part]))
            self.amaxes.setdefault(label, []).append(amax)
            start += room

    def _start_group(self, counters: list, x: torch.Tensor) -> None:
        window = None
        if counters:
            self._close(counters[-1])
            window = counters[-1].next_window
        if x.is_cuda and x.dtype == torch.bfloat16:
            from .device_counter import DeviceCounter, Reports  # need Triton

            if self.reports is None:
                self.reports = Reports()
                self.room = torch.cuda.mem_get_info(x.device)[0] // 4
            counters.append(DeviceCounter(self.reports, window))
        else:
            counters.append(_Counter())

    def _close(self, counter) -> None:
        """Free tables once they take much memory: the oldest, whose counting has long ended."""
        counter.close()
        self.closed.append(counter)
        self.closed_bytes += counter.table_bytes
        while self.closed_bytes > CLOSED_BYTES:
            oldest = self.closed.popleft()
            self.closed_bytes -= oldest.table_bytes
            oldest.flush()
            self.sparse_bytes += oldest.statistics.nbytes
            if self.sparse_bytes > self.room:  # slow, as the host waits for each, but it ends
                oldest.statistics = oldest.statistics.to("cpu")

    def check(self, fed: int) -> None:
        """Refuse a site that has not seen every sequence once: an expert, a repeated module."""
        for label, amaxes in self.amaxes.items():
            if (seen := sum(map(len, amaxes))) != fed:
                raise ValueError(
                    f"{label} saw {seen} sequences of {fed}; expected each once. Its module runs not "
                    "once a forward, or another forward runs too. Leave this site out."
                )

    def finish(self, label: str) -> SiteStatistics:
        """The site's statistics; waits for the device."""
        counters = self.sites[label]
        counters[-1].close()
        amax = torch.cat(self.amaxes[label]).to(torch.float64).cpu()
        return SiteStatistics(self.group_size, [counter.finish() for counter in counters], amax)


def find_sites(model: nn.Module, sites: Sequence[str]) -> dict[str, nn.Module]:
    """Site label -> module. A site is a name in ``SITES`` or a regular expression on module names.

    Labels are ``layers.<i>.<site>``, or the module's own name for a regular expression.
    """
    if isinstance(sites, str):
        raise TypeError(f"sites is the text {sites!r}; expected a list of names, [{sites!r}].")
    found: dict[str, nn.Module] = {}
    for site in sites:
        before = len(found)
        if site in SITES:
            pattern = re.compile(rf"(?:.*\.)?layers?\.(\d+)\.(?:.*\.)?(?:{SITES[site]})")
        else:
            pattern = re.compile(site)
        for name, module in model.named_modules():
            match = pattern.fullmatch(name)
            if match:
                label = f"layers.{match[1]}.{site}" if site in SITES else name
                if label in found and found[label] is not module:
                    raise ValueError(
                        f"a second module, {name!r}, is {label!r} too; expected one. Pass a part of the "
                        "model, such as its decoder, or a regular expression."
                    )
                found[label] = module
        if len(found) == before:
            linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            raise ValueError(
                f"site {site!r} matches no module of {type(model).__name__}; expected one of "
                f"{', '.join(SITES)} or a regular expression on a full module name, such as "
                f"{linears[:3]}."
            )
    return found


@contextmanager
def hooked(
    model: nn.Module, sites: Sequence[str], callback: Callable[[str, torch.Tensor], None]
) -> Iterator[dict[str, nn.Module]]:
    """Call ``callback(site, input)`` before each site's forward; the model is restored on exit.

    Evaluation mode inside; hooks removed and training flags put back even when a forward raises.
    """
    found = find_sites(model, sites)

    def pre_hook(label: str):
        def hook(module, args, kwargs):
            x = args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v))
            callback(label, x)

        return hook

    handles = [
        module.register_forward_pre_hook(pre_hook(label), with_kwargs=True)
        for label, module in found.items()
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield found
    finally:
        for module, flag in training.items():
            module.training = flag
        for handle in handles:
            handle.remove()


def _by_sequence(label: str, x: torch.Tensor, sequences: int, tokens: int) -> torch.Tensor:
    """An activation [sequences, tokens, ...], also where a module sees [sequences * tokens, width]."""
    if x.ndim == 2 and len(x) == sequences * tokens:
        return x.view(sequences, tokens, -1)
    if x.shape[:2] != (sequences, tokens):
        raise ValueError(
            f"{label} saw shape {tuple(x.shape)}; expected [{sequences}, {tokens}, ...]: its tokens "
            "belong to no sequence. Leave this site out."
        )
    return x


def capture(
    model: nn.Module,
    batches: Iterable[torch.Tensor | dict[str, torch.Tensor]],
    sites: Sequence[str] = ("mlp_input", "down_proj_input"),
    *,
    group_size: int = 32,
    progress: bool = True,
) -> dict[str, SiteStatistics]:
    """Run ``batches`` through ``model`` and return each site's statistics.

    Parameters
    ----------
    model : nn.Module
        Any Hugging Face model whose decoder layers are named ``layers.<i>`` or ``layer.<i>``, in
        bfloat16 or float16.
    batches : iterable of int tensors [sequences, tokens] or of dicts
        A dict holds ``input_ids`` and optionally ``attention_mask`` [sequences, tokens]; tokens
        with mask 0 are padding and are never counted.
    sites : names in ``SITES``, or regular expressions on module names
    group_size : int
        Sequences per statistics group. A group keeps 16 bytes per site and distinct pair on the device
        (the performance page says how many there are); past a quarter of the memory that was free, on
        the host, which is slower.
    progress : bool
        Show a tqdm bar.

    Returns
    -------
    dict of site label -> SiteStatistics, in module order.

    Raises
    ------
    ValueError
        If a site matches nothing, no batch comes, or an activation is NaN or infinite.
    TypeError
        If an activation is not 16-bit floating point.

    Examples
    --------
    >>> statistics = capture(model, tokens.split(8), ["down_proj_input"])  # doctest: +SKIP
    >>> statistics["layers.3.down_proj_input"].total.amax  # doctest: +SKIP
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; expected at least 1 sequence.")
    device = next(model.parameters()).device
    counters = _Counters(group_size)
    mask: torch.Tensor | None = None  # of this batch, on the device
    padding: list[int] = []  # tokens a sequence of this batch
    first = 0  # sequences seen before this batch
    shape = (0, 0)  # sequences and tokens of this batch

    def count(label: str, x: torch.Tensor) -> None:
        x = _by_sequence(label, x, *shape)
        keep = mask.bool().to(x.device) if mask is not None else None
        counters.add(label, x, first, keep, padding)

    with torch.no_grad(), hooked(model, sites, count) as found:
        for batch in tqdm(batches, desc="capture", unit="batch", disable=not progress):
            inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
            shape = tuple(inputs["input_ids"].shape)
            mask = inputs.get("attention_mask")
            padding = [] if mask is None else (mask == 0).sum(dim=1).tolist()
            # The host goes on to launch this batch while the device still computes the last one.
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
            mask = inputs.get("attention_mask")
            # The head's logits are not needed, only the layers' inputs.
            getattr(model, "model", model)(**inputs)
            first += shape[0]
            counters.check(first)
    if not counters.sites:
        raise ValueError(
            f"no batch reached the sites {list(found)[:4]}; expected at least one batch of "
            "sequences. The dataset may have ended early."
        )
    return {label: counters.finish(label) for label in found if label in counters.sites}
