# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A model's forward pass: what it is given, its linear layers, and what each of them reads.

A mixture's fused experts keep the weights of all experts in 3-D parameters, [experts, ...], and no
module stands for one product. Run one expert after another, as transformers' eager implementation
does, each product takes one expert's slice of a parameter: a torch function mode sees it and its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

STREAMS = {"input_ids": 7, "decoder_input_ids": 5}  # what tokens a forward is given -> how many to try
SEQUENCES = 2  # to try

# While the model runs to find sites, whatever else is hooked to it hears nothing.
finding: ContextVar[bool] = ContextVar("finding", default=False)

PRODUCTS = ("linear", "matmul", "mm")
# After each forward: the experts' input [tokens, width], the experts of each token [tokens, k], and for
# each parameter the rows it was multiplied with [tokens * k, width], k rows a token.
Tell = Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], None]


def entry_of(model: nn.Module) -> nn.Module:
    """The part of a model that runs all of it but the head."""
    part = getattr(model, "base_model", None) or getattr(model, "model", None)
    return part if isinstance(part, nn.Module) else model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's training flag is put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def first_tensor(args: tuple, kwargs: Mapping) -> torch.Tensor:
    """A module's input."""
    return next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v))


MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def stream_shapes(args: tuple, kwargs: Mapping) -> dict[str, tuple[int, int]]:
    """Sequences and tokens of each stream that a model is given."""
    inputs = dict(kwargs) | ({"input_ids": args[0]} if args else {})
    found = {}
    for stream in STREAMS:
        for name in (stream, stream.replace("input_ids", "inputs_embeds")):
            if torch.is_tensor(inputs.get(name)):
                found[stream] = tuple(inputs[name].shape[:2])
    return found


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward, checked, and the sequences and tokens of each stream."""

    inputs: dict[str, Any]
    shapes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, batch) -> Batch:
        """Raises ``TypeError`` or ``ValueError`` for what is no batch."""
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        for name in (*STREAMS, *MASKS.values(), "inputs_embeds"):
            if name in inputs and not torch.is_tensor(inputs[name]):
                raise TypeError(
                    f"{name} of a batch is a {type(inputs[name]).__name__}; expected a tensor or a dict "
                    'of them. Tokenize with return_tensors="pt", and pass a list of batches.'
                )
        shapes = stream_shapes((), inputs)
        wrong = [s for s in STREAMS if s in inputs and inputs[s].ndim != 2]
        if "input_ids" not in shapes or wrong:
            got = {name: list(v.shape) for name, v in inputs.items() if torch.is_tensor(v)}
            raise ValueError(
                f"a batch holds {got}; expected input_ids [sequences, tokens] or inputs_embeds. Pass a "
                "list of batches, such as tokens.split(8)."
            )
        for stream, name in MASKS.items():
            shape = shapes.get(stream, shapes["input_ids"])
            if name in inputs and inputs[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {list(inputs[name].shape)}; expected {list(shape)}, one number "
                    "per token, 0 for padding. Which tokens count is not known from other masks."
                )
        return cls(inputs, shapes)

    @property
    def sequences(self) -> int:
        """Their number."""
        return self.shapes["input_ids"][0]

    def mask(self, stream: str) -> torch.Tensor | None:
        """1 where a token is no padding; None if none is."""
        mask = self.inputs.get(MASKS[stream])
        if mask is None and stream not in self.shapes and "attention_mask" in self.inputs:
            raise ValueError(
                f"a batch has an attention_mask but neither {stream} nor {MASKS[stream]}; expected "
                "both, as the model makes them up, and what of them is padding is not known."
            )
        return mask

    def parts(self, sizes: list[int]) -> list[Batch]:
        """Consecutive sequences, one forward each."""
        split = {n: v.split(sizes) for n, v in self.inputs.items()
                 if torch.is_tensor(v) and len(v) == self.sequences}  # fmt: skip
        return [Batch.of(self.inputs | {n: v[i] for n, v in split.items()}) for i in range(len(sizes))]


def is_linear(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(module, nn.Linear) or (
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    )


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters that a module holds itself, [experts, ...]; none for a convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.ndim == 3 and p.shape[0] > 1 and min(p.shape[1:]) >= 16}


class _Products(TorchFunctionMode):
    """Notes (expert, rows) of every product with a slice of one of the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.parts: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in parameters}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in PRODUCTS and len(args) > 1 and torch.is_tensor(args[1]):
            for name, parameter in self.parameters.items():
                expert = _slice_of(args[1], parameter)
                if expert is not None:
                    self.parts[name].append((expert, args[0]))
        return func(*args, **(kwargs or {}))


def _slice_of(weight: torch.Tensor, parameter: nn.Parameter) -> int | None:
    """Which expert's slice ``weight`` is, told by its memory, so that no host waits for a device."""
    if weight.ndim != 2 or weight.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None
    offset = weight.storage_offset() - parameter.storage_offset()
    return offset // parameter.stride(0) if 0 <= offset < parameter.numel() else None


def _in_token_order(parts: list[tuple[int, torch.Tensor]], routes: torch.Tensor) -> torch.Tensor | None:
    """Rows of the experts, one after another, as [tokens * k, width]; None if they do not fit.

    An expert's rows come choice by choice, and token by token within a choice.
    """
    experts = [expert for expert, _ in parts]
    if experts != sorted(set(experts)) or sum(len(x) for _, x in parts) != routes.numel():
        return None
    tokens, k = routes.shape
    rows = torch.cat([x for _, x in parts])
    order = routes.T.flatten().argsort(stable=True)
    found = torch.empty_like(rows)
    found[(order % tokens) * k + order // tokens] = rows
    return found


@contextmanager
def expert_inputs(module: nn.Module, parameters: list[str], tell: Tell) -> Iterator[None]:
    """Inside, a fused module's forward runs expert by expert, and ``tell`` hears what they read.

    Restored on exit. Parameters whose rows are not understood are left out of what ``tell`` is given.
    """
    config: Any = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    replaced, forward = "forward" in vars(module), module.forward
    weights = {name: p for name, p in expert_weights(module).items() if name in parameters}

    def observed(*args, **kwargs):
        tensors = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v)]
        with _Products(weights) as products:
            result = forward(*args, **kwargs)
        routes = next((t for t in tensors if t.dtype in (torch.int64, torch.int32)), None)
        if routes is not None and tensors[0].ndim == routes.ndim == 2:
            rows = {name: _in_token_order(p, routes) for name, p in products.parts.items()}
            tell(tensors[0], routes, {name: r for name, r in rows.items() if r is not None})
        return result

    if chosen is not None:
        config._experts_implementation = "eager"
    module.forward = observed  # type: ignore[method-assign]
    try:
        yield
    finally:
        if replaced:
            module.forward = forward  # type: ignore[method-assign]
        else:
            del module.forward
        if chosen is not None:
            config._experts_implementation = chosen


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear but the head: name -> module; of fused experts every parameter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            found[name] = module
        found |= {f"{name}.{weight}": module for weight in expert_weights(module)}
    return found


def _trial_tokens(model: nn.Module, tokens: int, device: torch.device) -> torch.Tensor:
    """Token ids [SEQUENCES, tokens] without those that stand for images and the like."""
    words = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(words, nn.Embedding):
        words = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if words is None:
        raise ValueError(
            f"{type(model).__name__} has no embedding of tokens; expected a language model."
        )
    config: Any = getattr(model, "config", None)
    texts: tuple = (config, config.get_text_config()) if config is not None else ()
    special = {v for c in texts for k, v in vars(c).items() if k.endswith(("token_id", "token_index"))
               and isinstance(v, int)}  # fmt: skip
    usual = [i for i in range(min(words.num_embeddings, 1000)) if i not in special] or [0]
    ids = [usual[i % len(usual)] for i in range(SEQUENCES * tokens)]
    return torch.tensor(ids, device=device).view(SEQUENCES, tokens)


class Trial:
    """What every linear was given while the model ran on a few tokens. Keeps all tensors alive."""

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self.seen: dict[str, torch.Tensor] = {}  # the first input of each
        self.memory: dict[str, tuple] = {}  # equal for views of the same values in the same rows
        self.inside: set[str] = set()  # parameters of fused experts that read no token itself
        device = next(model.parameters()).device
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluation_mode(model))
            token = finding.set(True)
            stack.callback(finding.reset, token)
            fused: dict[nn.Module, dict[str, str]] = {}
            for name, module in linears.items():
                if is_linear(module):
                    hook = module.register_forward_pre_hook(self._note(name), with_kwargs=True)
                    stack.callback(hook.remove)
                else:
                    fused.setdefault(module, {})[name.rpartition(".")[2]] = name
            for module, names in fused.items():
                stack.enter_context(expert_inputs(module, list(names), self._note_experts(names)))
            two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            try:
                streams = list(STREAMS)[: 2 if two else 1]
                entry_of(model)(**{s: _trial_tokens(model, STREAMS[s], device) for s in streams})
            except Exception as error:
                error.add_note(
                    f"{type(model).__name__} was run on a few tokens to find its sites; expected a "
                    "model that runs on input_ids alone. Else name its modules by regular expressions."
                )
                raise

    def _add(self, name: str, x: torch.Tensor) -> None:
        if name not in self.seen:
            self.seen[name] = x
            self.memory[name] = x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x._version

    def _note(self, name: str):
        return lambda module, args, kwargs: self._add(name, first_tensor(args, kwargs))

    def _note_experts(self, names: dict[str, str]):
        def tell(x, routes, rows):
            every = x.repeat_interleave(routes.shape[1], dim=0)
            outer = {weight for weight, r in rows.items() if torch.equal(r, every)}
            for weight in rows if outer else ():  # without one the order of rows is not known
                self._add(names[weight], x if weight in outer else rows[weight])
                if weight not in outer:
                    self.inside.add(names[weight])

        return tell
