# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture activation statistics at named sites of a Hugging Face model while it runs.

Activations are counted where they arise and never written anywhere: what leaves a forward pass is
a joint histogram a group of sequences, and each sequence's amax.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .counters import Counters
from .forward import (
    Batch,
    entry_of,
    evaluation_mode,
    expert_inputs,
    finding,
    first_tensor,
    stream_shapes,
)
from .sites import Site, expert_of, find_coverage, find_sites
from .statistics import SiteStatistics


def _by_sequence(site: Site, x: torch.Tensor, shapes: Mapping) -> torch.Tensor:
    """An activation [sequences, tokens, width], also where a module sees [sequences * tokens, width]."""
    sequences, tokens = shapes.get(site.stream, shapes.get("input_ids", tuple(x.shape[:2])))
    rows = sequences * tokens
    if x.ndim == 2 and (len(x) == rows or (site.form == "within" and rows and len(x) % rows == 0)):
        return x.reshape(sequences, -1, x.shape[-1])
    if x.ndim > 2 and x.shape[:2] == (sequences, tokens):
        return x.flatten(2)  # heads of a token, each with whole blocks, come one after another
    if x.shape[:-1] == (sequences, 1, tokens):
        return x[:, 0]
    raise ValueError(
        f"{site.label} saw shape {tuple(x.shape)}; expected [{sequences}, {tokens}, ...]: its tokens "
        "belong to no sequence. Leave this site out."
    )


@contextmanager
def _observed(
    model: nn.Module, sites: Mapping[str, Site], tell: Callable[[Site, torch.Tensor, Any], None]
) -> Iterator[None]:
    """``tell(site, input, experts)`` before each site's forward, in evaluation mode.

    The input is [sequences, tokens, width]. ``experts``: of a site within fused experts, the expert of
    each of its rows, k a token; of a routed site, which expert is given the input [rows, width].
    """
    shapes: dict[str, tuple[int, int]] = {}

    def enter(module, args, kwargs):
        if given := stream_shapes(args, kwargs):
            shapes.clear()
            shapes.update(given)

    def hear(site: Site, x: torch.Tensor, experts=None) -> None:
        if not finding.get():
            tell(site, x if site.form == "routed" else _by_sequence(site, x, shapes), experts)

    def hook(site: Site, expert: int | None):
        return lambda module, args, kwargs: hear(site, first_tensor(args, kwargs), expert)

    # Some models pass their entry by when they are called as a whole.
    hooks: list[tuple[nn.Module, Callable]] = [(m, enter) for m in {model, entry_of(model)}]
    inside: dict[nn.Module, dict[str, Site]] = {}
    for site in sites.values():
        name, module = site.first
        if site.form == "within":
            inside.setdefault(module, {})[name.rpartition(".")[2]] = site
        elif site.form == "routed":
            first_of = {expert_of(n)[1]: m for n, m in reversed(site.readers.items())}
            hooks += [(m, hook(site, expert)) for expert, m in first_of.items()]
        else:
            hooks.append((module, hook(site, None)))

    def hear_inside(own: dict[str, Site]):
        def hear_all(x, routes, rows):
            for weight, site in own.items():
                hear(site, rows[weight], routes.flatten().long())

        return hear_all

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for module, function in hooks:
            stack.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)
        for module, own in inside.items():
            stack.enter_context(expert_inputs(module, list(own), hear_inside(own)))
        yield


@contextmanager
def hooked(
    model: nn.Module,
    sites: Sequence[str] | Mapping[str, Site] | None,
    callback: Callable[[str, torch.Tensor], None],
) -> Iterator[dict[str, Site]]:
    """Call ``callback(label, input)`` before each site's forward; the model is restored on exit.

    Evaluation mode inside; hooks removed and training flags put back even when a forward raises.
    ``sites`` as ``find_sites`` takes them. The input is [sequences, tokens, width]; of a site within
    fused experts [sequences, tokens * k, width], k rows per token; of experts that are modules
    [rows, width].
    """
    found = find_sites(model, sites)
    with _observed(model, found, lambda site, x, experts: callback(site.label, x)):
        yield found


def capture(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Mapping[str, Any]],
    sites: Sequence[str] | Mapping[str, Site] | None = None,
    *,
    group_size: int = 32,
    progress: bool = True,
) -> dict[str, SiteStatistics]:
    """Run ``batches`` through ``model`` and return each site's statistics.

    Parameters
    ----------
    model : nn.Module
        A Hugging Face model that reads token ids, in bfloat16 or float16.
    batches : iterable of int tensors [sequences, tokens] or of dicts
        A dict holds what the model takes: ``input_ids`` or ``inputs_embeds``, and optionally
        ``attention_mask`` [sequences, tokens]; tokens with mask 0 are padding and are never counted.
    sites : as ``find_sites`` takes them
        Without any, every input of a linear layer but the head; a warning lists those that cannot be
        counted before anything runs.
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
        If a site matches nothing, no batch comes, all tokens are padding, a site does not see every
        sequence once, experts that are modules are given padding, or an activation is NaN or infinite.
    TypeError
        If an activation is not 16-bit floating point, or a batch is neither a tensor nor a dict.

    Examples
    --------
    >>> statistics = capture(model, tokens.split(8), ["down_proj_input"])  # doctest: +SKIP
    >>> statistics["layers.3.down_proj_input"].total.amax  # doctest: +SKIP
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; expected at least 1 sequence.")
    if isinstance(batches, Mapping):
        raise TypeError("batches is one dict; expected a list of batches. Pass [batch].")
    if sites is None:
        coverage = find_coverage(model)
        sites = coverage.sites
        if coverage.uncovered:
            warnings.warn(f"not counted: {coverage.described()}", stacklevel=2)
    found = find_sites(model, sites)
    if not found:
        raise ValueError(f"no site of {type(model).__name__} can be counted; expected at least one.")
    device = next(model.parameters()).device
    counters = Counters(group_size, found)
    routed = [label for label, site in found.items() if site.form == "routed"]
    streams = list(dict.fromkeys(site.stream for site in found.values()))
    masks: dict[str, tuple[torch.Tensor, list[int]]] = {}  # of this forward: on the device, padding
    first = 0  # sequences before this forward
    real = False  # whether any token was no padding

    def count(site: Site, x: torch.Tensor, experts) -> None:
        if site.form == "routed":
            return counters.add_routed(site.label, x, first, experts)
        keep, padding = masks.get(site.stream, (None, []))
        if keep is not None:
            k = x.shape[1] // keep.shape[1]
            keep = keep.to(x.device).repeat_interleave(k, dim=1) if k > 1 else keep.to(x.device)
            padding = [k * n for n in padding]
        counters.add(site.label, x, first, keep, padding)
        if experts is not None:
            counters.add_experts(site.label, x, keep, experts)

    with torch.no_grad(), _observed(model, found, count):
        for given in tqdm(batches, desc="capture", unit="batch", disable=not progress):
            batch = Batch.of(given)
            room = group_size - first % group_size
            sizes = _sizes(batch.sequences, room, group_size) if routed else [batch.sequences]
            for part in batch.parts(sizes):
                masks = {stream: (m.bool().to(device, non_blocking=True), (m == 0).sum(dim=1).tolist())
                         for stream in streams if (m := part.mask(stream)) is not None}  # fmt: skip
                padded = sum(sum(padding) for _, padding in masks.values())
                if padded and routed:
                    raise ValueError(
                        f"a batch has {padded} tokens of padding; expected none at {routed[:3]}, whose "
                        "experts are given tokens of unknown sequences. Leave them out, or pad nothing."
                    )
                real |= any(bool((m := part.mask(s)) is None or m.any()) for s in streams)
                # The host goes on to launch this forward while the device still computes the last one.
                inputs = {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                          for name, value in part.inputs.items()}  # fmt: skip
                # The head's logits are not needed, only the layers' inputs.
                entry_of(model)(**inputs)
                first += part.sequences
                counters.check(model, first)
    counters.check(model, first)  # also for what ran after the last batch
    if not first:
        raise ValueError(
            f"no batch reached the sites {list(found)[:4]}; expected at least one batch of "
            "sequences. The dataset may have ended early."
        )
    if not real:
        raise ValueError(
            f"all tokens of {first} sequences are padding; expected some with attention_mask 1."
        )
    return {label: counters.finish(label, first) for label in found}


def _sizes(sequences: int, room: int, group_size: int) -> list[int]:
    """Sequences of each forward when none may cross the end of a group; ``room``: left in this one."""
    sizes = []
    while sequences:
        sizes.append(min(sequences, room))
        sequences, room = sequences - sizes[-1], group_size
    return sizes
