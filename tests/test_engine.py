# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Counters and the quantizer inside vLLM: on modules built like its own, and in it where installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from nvfp4_utils import ActivationStatistics, fake_quantize
from nvfp4_utils.quantize import input_scale_from_amax
from studies.engine import attach
from studies.engine.collect import moved
from studies.runs.quantized import quantized
from studies.runs.settings import Setting

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/downloaded/smollm2"
WIDTH, INNER = 32, 48
KINDS = ("attention_input", "o_proj_input", "mlp_input", "down_proj_input")


class QKVParallelLinear(nn.Module):
    """As vLLM's linears: no ``nn.Linear``, a ``quant_method``, and a bias apart in the output."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.quant_method = input_size, output_size, object()
        g = torch.Generator().manual_seed(input_size)
        self.weight = nn.Parameter(torch.randn(output_size, input_size, generator=g).bfloat16() / 4)

    def forward(self, x):
        return x @ self.weight.T, None


class VocabParallelEmbedding(nn.Module):
    def __init__(self, num_embeddings: int) -> None:
        super().__init__()
        self.num_embeddings, self.input_size, self.quant_method = num_embeddings, WIDTH, object()
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(num_embeddings, WIDTH, generator=g).bfloat16())

    def forward(self, ids):
        return self.weight[ids]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = QKVParallelLinear(WIDTH, 3 * WIDTH)
        self.self_attn.o_proj = QKVParallelLinear(WIDTH, WIDTH)
        self.mlp.gate_up_proj = QKVParallelLinear(WIDTH, 2 * INNER)
        self.mlp.down_proj = QKVParallelLinear(INNER, WIDTH)

    def forward(self, x):
        x = x + self.self_attn.o_proj(self.self_attn.qkv_proj(x)[0][:, :WIDTH])[0]
        gate, up = self.mlp.gate_up_proj(x)[0].chunk(2, -1)
        return x + self.mlp.down_proj((gate.float().sigmoid() * up).bfloat16())[0]


class Engine(nn.Module):
    """The model, and ``apply_model`` of the engine around it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(11)
        self.model.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, ids):
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return x

    def apply_model(self, function):
        return [function(self)]


@pytest.fixture
def model() -> nn.Module:
    return attach.model_of(Engine())


def test_labels_are_those_of_transformers_and_leave_embeddings_out(model):
    expected = [f"layers.{i}.{kind}" for i in (0, 1) for kind in KINDS]
    assert list(attach.find_sites(model)) == expected


def test_steps_are_counted_by_phase_and_hooks_removed(model):
    prompts, step = torch.arange(9), torch.tensor([3, 4])
    with attach.counted(model, decode_rows=2) as found:
        model(prompts)
        model(step)
        model(step + 1)
    model(prompts)  # no longer counted
    embedded = model.model.embed_tokens
    label = "layers.0.attention_input"
    for phase, ids in (("prefill", prompts), ("decode", torch.cat([step, step + 1]))):
        statistics = found.statistics(phase)
        assert found.tokens[phase, label] == len(ids)
        assert list(statistics) == list(attach.find_sites(model))
        expected = ActivationStatistics.from_tensor(embedded(ids).detach())
        assert moved(statistics[label], expected) == 0
        assert statistics[label].amax == embedded(ids).abs().max().item()
        assert statistics["layers.1.down_proj_input"].count == len(ids) * INNER


def test_few_tokens_wait_and_are_not_lost(model, monkeypatch):
    monkeypatch.setattr(attach, "ROWS", 5)
    with attach.counted(model, decode_rows=2) as found:
        for start in range(7):
            model(torch.tensor([start, start + 1]))
    assert found.statistics("prefill") == {}
    assert found.statistics("decode")["layers.0.mlp_input"].count == 14 * WIDTH


def test_the_quantizer_takes_the_engines_sites(model):
    sites = {label: site.readers for label, site in attach.find_sites(model).items()}
    ids, seen = torch.arange(9), []
    x = model.model.embed_tokens(ids)
    amaxes = dict.fromkeys(sites, 2.0)
    hook = model.model.layers[0].self_attn.qkv_proj.register_forward_hook(
        lambda module, args, output: seen.append(args[0])
    )
    with torch.no_grad(), quantized(model, Setting("t", "c", "amax", amaxes=amaxes), sites=sites):
        model(ids)
    model(ids)
    hook.remove()
    expected = fake_quantize(x.detach(), input_scale_from_amax(2.0), underflow="flush")
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], x)


def test_what_is_no_model_of_vllm_is_refused():
    with pytest.raises(ValueError, match=r"has no linear of vLLM's; expected .* model_of\(engine\)"):
        attach.find_sites(nn.Linear(16, 16))
    mixture = Engine()
    mixture.experts = nn.Module()
    mixture.experts.w13_weight = torch.zeros(1)
    with pytest.raises(ValueError, match=r"\['experts'\] are fused experts"):
        attach.find_sites(mixture)
    mixture.apply_model = lambda function: [mixture, mixture]
    with pytest.raises(ValueError, match="runs 2 parts of the model; expected one"):
        attach.model_of(mixture)


def test_moved_counts_elements():
    a = ActivationStatistics.from_tensor(torch.ones(2, 16).bfloat16())
    x = torch.ones(2, 16).bfloat16()
    x[0, 0] = 0.5
    assert moved(a, a) == 0
    assert moved(a, ActivationStatistics.from_tensor(x)) == 1 / 32
    with pytest.raises(ValueError, match="of 32 and 16 elements"):
        moved(a, ActivationStatistics.from_tensor(x[:1]))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_names_what_installs_it():
    with pytest.raises(ImportError, match="make vllm"):
        attach.engine_of("nowhere")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
@pytest.mark.skipif(not MODEL.is_dir(), reason="SmolLM2 is not there: make models")
def test_in_vllm_every_token_is_counted_once_and_greedy_text_is_unchanged():
    from vllm import SamplingParams, TokensPrompt

    engine = attach.engine_of(str(MODEL), max_model_len=64, max_num_batched_tokens=16, max_num_seqs=2,
                              enable_chunked_prefill=True)  # fmt: skip
    model = attach.model_of(engine)
    prompts = [TokensPrompt(prompt_token_ids=[1, *range(200, 209 + i)]) for i in (0, 3)]
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    before = [o.outputs[0].token_ids for o in engine.generate(prompts, greedy)]
    steps = []
    with attach.counted(model, decode_rows=2) as found:
        linear = attach.find_sites(model)["layers.0.mlp_input"].first[1]
        hook = linear.register_forward_pre_hook(lambda module, args: steps.append(len(args[0])))
        during = [o.outputs[0].token_ids for o in engine.generate(prompts, greedy)]
    hook.remove()
    assert before == during
    assert max(steps) == 16  # the prompts' 23 tokens came in two steps
    for label, site in attach.find_sites(model).items():
        counts = [found.statistics(phase)[label].count for phase in attach.PHASES]
        assert sum(counts) == (10 + 13 + 2 * 4) * site.first[1].input_size
