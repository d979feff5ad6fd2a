# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Count, or fake-quantize, what the linears of a model that runs inside vLLM read.

vLLM fuses q, k and v, and gate and up, into one linear each; an activation is [tokens, width], the
tokens of all requests of a step together. So every linear is a site of its own, no token belongs to a
known sequence, and a statistic is of all that ran. The counters are those of ``nvfp4_utils.capture``,
the quantizer that of ``studies.runs.quantized``; on a CUDA device both are its kernels.

>>> engine = LLM(folder, enforce_eager=True, enable_prefix_caching=False)  # doctest: +SKIP
>>> with counted(model_of(engine), decode_rows=16) as found:  # doctest: +SKIP
...     engine.generate(prompts, SamplingParams(max_tokens=128))
>>> found.statistics("decode")["layers.0.mlp_input"].amax  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nvfp4_utils.counters import Counters
from nvfp4_utils.forward import first_tensor
from nvfp4_utils.sites import Site, site_labels
from nvfp4_utils.statistics import ActivationStatistics

PHASES = ("prefill", "decode")
MEMORY = 0.3  # share of the device's memory, or of the host's on a CPU, that the engine reserves
ROWS = 1024  # tokens that are counted at once: a step of decoding has one a request


def engine_of(folder: str, **options: Any) -> Any:
    """A vLLM engine in this process, eager, bfloat16, without a cache of prefixes: every token is run.

    Raises ``ImportError`` naming ``make vllm`` where vLLM is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            f"vLLM cannot be imported ({error}); expected the environment that `make vllm` installs. "
            "Run this with .venv-vllm/bin/python."
        ) from error
    return LLM(folder, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False, seed=0,
               gpu_memory_utilization=MEMORY, **options)  # fmt: skip


def model_of(engine: Any) -> nn.Module:
    """The engine's model, which must live in this process.

    Raises ``ValueError`` if the engine runs it in several.
    """
    models = engine.apply_model(lambda model: model)
    if len(models) != 1:
        raise ValueError(
            f"the engine runs {len(models)} parts of the model; expected one, in this process. Load it "
            "with tensor_parallel_size=1."
        )
    return models[0]


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Site label -> site of every linear but the head, in module order; labels are those of ``capture``.

    A linear of vLLM is told by its structure: it has a ``quant_method`` and an ``input_size``, and no
    ``num_embeddings``, unlike an embedding or the head.

    Raises ``ValueError`` if there is none, and for fused experts, whose second input no module reads.
    """
    modules = dict(model.named_modules())
    experts = [name for name, module in modules.items() if hasattr(module, "w13_weight")]
    if experts:
        raise ValueError(
            f"{experts[:3]} are fused experts; expected linears alone, as what experts read is no "
            "module's input. Capture a mixture with transformers."
        )
    linears = {n: m for n, m in modules.items() if hasattr(m, "quant_method")
               and hasattr(m, "input_size") and not hasattr(m, "num_embeddings")}  # fmt: skip
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no linear of vLLM's; expected the model that runs inside the "
            "engine, model_of(engine)."
        )
    labels = site_labels([[name] for name in linears], linears)
    return {
        label: Site(label, {name: module})
        for label, (name, module) in zip(labels, linears.items(), strict=True)
    }


class PhaseCounters:
    """Statistics of every site, of prefill and of decode apart.

    ``decode_rows``: a step of at most so many tokens is one of decoding. With n requests whose prompts
    are longer than one token and run in one step, that is n; 0 counts everything as prefill.
    """

    def __init__(self, sites: dict[str, Site], decode_rows: int) -> None:
        self.sites, self.decode_rows = sites, decode_rows
        self.counters = {phase: Counters(2**62, sites) for phase in PHASES}  # one group
        self.waiting: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.tokens: dict[tuple[str, str], int] = {}  # by phase and label

    def add(self, label: str, x: torch.Tensor) -> None:
        """Count a step's activation [tokens, width]; few tokens wait for more, as merging takes time."""
        phase = "decode" if len(x) <= self.decode_rows else "prefill"
        waiting = self.waiting.setdefault((phase, label), [])
        waiting.append(x.detach().clone())
        self.tokens[phase, label] = self.tokens.get((phase, label), 0) + len(x)
        if sum(map(len, waiting)) >= ROWS:
            self._count(phase, label)

    def _count(self, phase: str, label: str) -> None:
        rows = torch.cat(self.waiting.pop((phase, label)))
        counters = self.counters[phase]
        counters.add(label, rows[None], len(counters.amaxes[label]), None, [0])

    def statistics(self, phase: str) -> dict[str, ActivationStatistics]:
        """Site label -> statistic of a phase, of the sites that saw tokens in it."""
        for label in [label for waiting_phase, label in self.waiting if waiting_phase == phase]:
            self._count(phase, label)
        counters = self.counters[phase]
        return {
            label: counters.finish(label, len(amaxes)).total
            for label, amaxes in counters.amaxes.items()
            if amaxes
        }


@contextmanager
def counted(model: nn.Module, decode_rows: int = 0) -> Iterator[PhaseCounters]:
    """Count every linear's input while the engine runs inside; hooks are removed on exit.

    Attach after loading: what the engine runs to warm up is then not counted.
    """
    sites = find_sites(model)
    counters = PhaseCounters(sites, decode_rows)

    def hook(label: str):
        return lambda module, args, kwargs: counters.add(label, first_tensor(args, kwargs))

    with ExitStack() as stack:
        for label, site in sites.items():
            removable = site.first[1].register_forward_pre_hook(hook(label), with_kwargs=True)
            stack.callback(removable.remove)
        yield counters
