# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The sites of a model: its activations that linear layers read, and which layers read each.

They are found by structure, not by names: the model runs once on a few tokens, and linears that are
given the same memory read the same activation, so they share a site and an ``input_scale``. Names only
serve as labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from .forward import SEQUENCES, STREAMS, Trial, is_linear, linears_of
from .quantize import BLOCK_SIZE

# Kind of site -> what its readers are called; any other kind is called after its first reader.
SITES = {
    "attention_input": r"q_proj|qkv_proj|query|query_key_value|c_attn|Wqkv|in_proj_qkvz?|q_a_proj|qkv|q",
    "o_proj_input": r"o_proj|o|[^.]*att(?:entio)?n[^.]*\.(?:output\.)?(?:out_proj|c_proj|dense)",
    "mlp_input": r"gate_proj|up_proj|gate_up_proj|fc1|fc_in|c_fc|dense_h_to_4h|intermediate\.dense|"
    r"w1|w3|wi|wi_[01]",
    "down_proj_input": r"down_proj|fc2|fc_out|mlp\.c_proj|dense_4h_to_h|output\.dense|w2|wo",
}
Form = Literal["whole", "within", "routed"]


@dataclass(frozen=True, eq=False)
class Site:
    """One activation and the linears that read it.

    ``label``: ``layers.<i>.<kind>``, after the name of the stack where a model has several, and with the
    name of a module in between where two sites of a layer are of one kind. ``readers``: name -> module,
    in module order; of fused experts a parameter's name -> their module. ``stream``: which
    tokens it has, those of ``input_ids`` or of ``decoder_input_ids``.
    ``form``: ``whole``, [sequences, tokens, width]; ``within`` fused experts, k rows a token;
    ``routed``, the input of experts that are modules, each of which is given the tokens routed to it.
    ``experts``: how many, of the last two.
    """

    label: str
    readers: dict[str, nn.Module]
    stream: str = "input_ids"
    form: Form = "whole"
    experts: int = 0

    @property
    def first(self) -> tuple[str, nn.Module]:
        """The reader that is hooked."""
        return next(iter(self.readers.items()))


@dataclass(frozen=True)
class Coverage:
    """What ``capture`` can count of a model: ``sites`` by label; ``uncovered`` linear -> why not."""

    sites: dict[str, Site]
    uncovered: dict[str, str] = field(default_factory=dict)

    def described(self) -> str:
        """The linears that are not covered by reason, with ``*`` for the numbers in their names."""
        names: dict[str, list[str]] = {}
        for name, reason in self.uncovered.items():
            names.setdefault(reason, []).append(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        return "; ".join(
            f"{', '.join(dict.fromkeys(group))} ({len(group)} in all): {reason}"
            for reason, group in names.items()
        )


def kind_of(label: str) -> str:
    """``layers.3.mlp_input`` -> ``mlp_input``."""
    return label.rpartition(".")[2]


def layer_of(label: str) -> int | None:
    """``layers.3.mlp_input`` -> 3; None outside the layers."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", label)
    return int(found[1]) if found else None


def expert_of(name: str) -> tuple[str, int, str]:
    """List, number and role of a linear of a list's member: ``layers.0.experts``, 3, ``w1``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if len(numbers) < 2:
        return "", 0, name
    at = numbers[1]
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def _routed(linears: Mapping[str, nn.Module], trial: Trial) -> dict[str, tuple]:
    """Linear of an expert -> its site: members of a list that see some of the tokens each."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in linears:
        members, _, role = expert_of(name)
        groups.setdefault((members, role), []).append(name)
    found: dict[str, tuple] = {}
    whole = {SEQUENCES * tokens for tokens in STREAMS.values()}
    for key, names in groups.items():
        given = [trial.seen[name] for name in names if name in trial.seen]
        some = any(x.numel() // x.shape[-1] not in whole for x in given)
        idle = len(given) < len(names) and any(x.ndim == 2 for x in given)
        if len(names) > 1 and (some or idle):
            found |= dict.fromkeys(names, key)
    # Roles that are given the same rows, as gate and up, are of one site: that of the first.
    first: dict[tuple, tuple] = {}
    memory = trial.memory
    of = {key: first.setdefault(memory[n], key) for n, key in found.items() if n in memory}
    return {name: of[key] for name, key in found.items()}


def _stream(x: torch.Tensor) -> str | None:
    for stream, tokens in STREAMS.items():
        two = (SEQUENCES, tokens)
        if x.shape[:2] == two or x.shape[:-1] in ((SEQUENCES, 1, tokens), (SEQUENCES * tokens,)):
            return stream
    return None


def _refusal(x: torch.Tensor, form: Form, sixteen_bit: bool) -> str:
    """Why an input cannot be counted, or nothing."""
    if x.shape[-1] % BLOCK_SIZE:
        return f"it reads {x.shape[-1]} values per token, no multiple of {BLOCK_SIZE}"
    if form == "whole" and _stream(x) is None:
        return f"it reads the shape {list(x.shape)} for {SEQUENCES} sequences, so not their tokens"
    if sixteen_bit and x.dtype not in (torch.bfloat16, torch.float16):
        return f"it reads {str(x.dtype).removeprefix('torch.')}, not bfloat16 or float16"
    return ""


def find_coverage(model: nn.Module) -> Coverage:
    """All sites of a model, and the linears that belong to none; runs it on a few tokens.

    The head is apart. What the model raises if it does not run on tokens alone is passed on.
    """
    linears = linears_of(model)
    trial = Trial(model, linears)
    routed = _routed(linears, trial)
    samples = dict(trial.seen)  # an expert that was given no token reads what the others read
    for name, x in trial.seen.items():
        if name in routed:
            samples |= {other: x for other, key in routed.items() if key == routed[name]}
    # In a model of float32 alone every site is refused when it is counted, with a better message.
    sixteen_bit = any(x.dtype in (torch.bfloat16, torch.float16) for x in samples.values())
    uncovered: dict[str, str] = {}
    groups: dict[tuple, list[str]] = {}
    forms: dict[tuple, Form] = {}
    for name, module in linears.items():
        form: Form = "routed" if name in routed else "within" if name in trial.inside else "whole"
        if name in samples:
            reason = _refusal(samples[name], form, sixteen_bit)
        elif is_linear(module):
            reason = "its forward is not called when the model reads text"
        else:
            reason = "no products with one expert's weights are seen when the model reads text"
        if reason:
            uncovered[name] = reason
            continue
        key = (form, *(routed[name] if form == "routed" else trial.memory[name]))
        groups.setdefault(key, []).append(name)
        forms[key] = form
    sites = {}
    labels = site_labels(list(groups.values()), linears)
    for label, (key, names) in zip(labels, groups.items(), strict=True):
        readers = {name: linears[name] for name in names}
        experts = 0
        if forms[key] == "routed":
            experts = len({expert_of(name)[1] for name in names})
        elif forms[key] == "within":
            experts = len(getattr(linears[names[0]], names[0].rpartition(".")[2]))
        stream = _stream(samples[names[0]]) or "input_ids"
        sites[label] = Site(label, readers, stream, forms[key], experts)
    for name, module in model.named_modules():
        weight = vars(module)["_parameters"].get("weight")
        known = is_linear(module) or isinstance(module, nn.Embedding)
        if weight is not None and weight.ndim == 2 and not known:
            uncovered[name] = f"{type(module).__name__} is no linear layer, but has a weight like one"
    return Coverage(sites, uncovered)


def _place(name: str) -> tuple[str, str, str]:
    """Stack, layer and the rest: ``model.layers.3.mlp.fc1`` -> ``model.layers``, ``3``, ``mlp.fc1``."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return "", "", name
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])


def _kind(names: Sequence[str]) -> tuple[str, str]:
    """A site's kind and the reader that it is called after."""
    for name in names:
        for kind, pattern in SITES.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return kind, name
    return _own_kind(names[0]), names[0]


def _own_kind(name: str) -> str:
    """A kind called after one linear, or after its list if it has but a number."""
    parts = name.split(".")
    return "_".join(parts[-2 if parts[-1].isdecimal() else -1 :]) + "_input"


def site_labels(groups: Sequence[Sequence[str]], linears: Mapping[str, nn.Module]) -> list[str]:
    """A label for each site, with as much of its module's name as tells it from the others."""
    stacks = {stack: "" for stack, layer, _ in map(_place, linears) if layer}
    if len(stacks) > 1:
        short = [stack.rpartition(".")[0].rpartition(".")[2] for stack in stacks]
        stacks = {s: n if short.count(n) == 1 else s for s, n in zip(stacks, short, strict=True)}
    labels = [""] * len(groups)
    equal = list(range(len(groups)))
    for detail in ("kind", "module", "everything"):
        for i in equal:
            kind, name = _kind(groups[i])
            stack, layer, rest = _place(name)
            modules = rest.split(".")[:-1]
            if detail == "everything":
                kind = _own_kind(name)
            elif detail == "module":
                modules = [part for part in modules if not part.isdecimal()][-1:]
            else:
                modules = []
            place = [stacks.get(stack, ""), f"layers.{layer}" if layer else "", *modules, kind]
            labels[i] = ".".join(filter(None, place))
        equal = [i for i in equal if labels.count(labels[i]) > 1]
    return labels


def find_sites(
    model: nn.Module, sites: Sequence[str] | Mapping[str, Site] | None = None
) -> dict[str, Site]:
    """Site label -> site, in module order; all that ``find_coverage`` finds, or those asked for.

    Parameters
    ----------
    sites : kinds such as ``mlp_input``, labels, or regular expressions on the full names of modules
        A module that is named by an expression is a site of its own, labelled with its name. Sites that
        were found before are given back.

    Raises
    ------
    ValueError
        For a name that matches nothing, and for two modules that would have one label.
    TypeError
        For a text in place of a list.
    """
    if isinstance(sites, str):
        raise TypeError(f"sites is the text {sites!r}; expected a list of names, [{sites!r}].")
    if isinstance(sites, Mapping):
        return dict(sites)
    if sites is None:
        return find_coverage(model).sites
    modules = dict(model.named_modules())
    matches = {site: [name for name in modules if re.fullmatch(site, name)] for site in sites}
    coverage = Coverage({}) if all(matches.values()) else find_coverage(model)
    found: dict[str, Site] = {}
    for site, names in matches.items():
        members = {k: s for k, s in coverage.sites.items() if site in (k, kind_of(k))}
        members |= {name: Site(name, {name: modules[name]}) for name in names}
        if not members:
            kinds = dict.fromkeys(map(kind_of, coverage.sites))
            linears = [name for name, module in modules.items() if is_linear(module)]
            raise ValueError(
                f"site {site!r} matches no module of {type(model).__name__}; expected one of "
                f"{', '.join(kinds)}, a site's label or a regular expression on a full module name, "
                f"such as {linears[:3]}."
            )
        for label, member in members.items():
            (other, module), (own, same) = found.get(label, member).first, member.first
            if module is not same:
                raise ValueError(
                    f"{other} and {own} would both be {label!r}; expected one module per label. Name "
                    "either by a regular expression that the other does not match."
                )
        found |= members
    return {label: found[label] for label in coverage.sites if label in found} | found
