# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which sites are found on which architecture: tiny random models of each, and the table of them.

    python -m studies.runs.architectures

writes ``results/architectures.json``, which a test compares with what is found, and its table into
``book/reproduce.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nvfp4_utils.sites import Coverage, find_coverage, kind_of
from studies import ROOT

from .store import write_json

TABLE = ROOT / "results" / "architectures.json"
PAGE = ROOT / "book" / "reproduce.md"
SIZES = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
PLAIN = SIZES | dict(intermediate_size=128, num_key_value_heads=2, head_dim=16)
HEADS = dict(vocab_size=64, n_layer=2, n_head=4)
FEW = dict(eos_token_id=0, bos_token_id=0, pad_token_id=0)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR_ATTENTION = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
LATENT = dict(
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    n_group=1, topk_group=1, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1,
    num_key_value_heads=4,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
    patch_size=8,
)  # fmt: skip

# Name -> class of model, class of config, and the settings of a tiny one.
ARCHITECTURES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", PLAIN),
    "Mistral": ("MistralForCausalLM", "MistralConfig", PLAIN),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", PLAIN),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", PLAIN),
    "Qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", PLAIN | LINEAR_ATTENTION),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", PLAIN),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", PLAIN),
    "Phi": ("PhiForCausalLM", "PhiConfig", SIZES | dict(intermediate_size=128)),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", PLAIN | FEW),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", HEADS | FEW | dict(n_embd=64)),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", HEADS | FEW | dict(n_embd=64, rotary_dim=8)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | dict(intermediate_size=128)),
    "OPT": ("OPTForCausalLM", "OPTConfig", SIZES | dict(ffn_dim=128, word_embed_proj_dim=64)),
    "Falcon": ("FalconForCausalLM", "FalconConfig", SIZES | FEW),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", HEADS | dict(hidden_size=64)),
    "MPT": ("MptForCausalLM", "MptConfig", dict(vocab_size=64, d_model=64, n_layers=2, n_heads=4)),
    "Mamba": ("MambaForCausalLM", "MambaConfig",
              dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, time_step_rank=16)),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", PLAIN | dict(num_local_experts=4)),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                  PLAIN | EXPERTS | dict(num_experts=8, shared_expert_intermediate_size=64)),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", PLAIN | EXPERTS | dict(num_experts=8)),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig",
                PLAIN | dict(num_local_experts=4, num_experts_per_tok=2)),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", PLAIN | EXPERTS | LATENT),
    "Nemotron-H": ("NemotronHForCausalLM", "NemotronHConfig",
                   PLAIN | EXPERTS | dict(
                       layers_block_type=["mamba", "moe", "attention", "mlp"],
                       mamba_num_heads=4, n_groups=2, mamba_head_dim=16, ssm_state_size=16,
                       chunk_size=8, n_routed_experts=8,
                       n_shared_experts=1, moe_shared_expert_intermediate_size=64, moe_latent_size=32)),
    "BART (encoder-decoder)": ("BartForConditionalGeneration", "BartConfig", dict(
        vocab_size=64, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128)),
    "T5 (encoder-decoder)": ("T5ForConditionalGeneration", "T5Config", dict(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)),
    "BERT (encoder)": ("BertModel", "BertConfig", SIZES | dict(intermediate_size=128)),
    "Gemma 3 (multimodal)": ("Gemma3ForConditionalGeneration", "Gemma3Config", dict(
        text_config=PLAIN, vision_config=VISION, mm_tokens_per_image=4, image_token_index=60,
        boi_token_index=61, eoi_token_index=62)),
}  # fmt: skip


def tiny_model(name: str) -> nn.Module:
    """A random bfloat16 model of an architecture: two layers, 64 wide. Raises ``AttributeError``
    where transformers has no such classes."""
    import transformers

    model, config, settings = ARCHITECTURES[name]
    settings = dict(settings)
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    return getattr(transformers, model)(made).bfloat16().eval()


def row(coverage: Coverage) -> dict[str, Any]:
    """One architecture: how many sites, which kinds, linears covered of all, and why not the others."""
    covered = sum(len(site.readers) for site in coverage.sites.values())
    return {
        "sites": len(coverage.sites),
        "kinds": sorted(set(map(kind_of, coverage.sites))),
        "covered": covered,
        "linears": covered + len(coverage.uncovered),
        "refused": coverage.described(),
    }


def markdown(rows: Mapping[str, dict]) -> str:
    """The table of the reproduce page."""
    # A linear's own name is enough here: the models' layers are alike.
    lines = ["| architecture | sites | linears covered | not covered, and why |", "|---|---|---|---|"]
    for name, r in rows.items():
        refused = re.sub(r"[\w*]+(?:\.[\w*]+)*\.(\w+)", r"\1", r["refused"])
        lines.append(f"| {name} | {r['sites']} | {r['covered']} of {r['linears']} | {refused} |")
    return "\n".join(lines)


def with_table(page: str, rows: Mapping[str, dict]) -> str:
    """The page with its table, between two comments, made anew."""
    begin, end = "<!-- python -m studies.runs.architectures -->", "<!-- end of architectures -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n\n{markdown(rows)}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    rows = {name: row(find_coverage(tiny_model(name))) for name in ARCHITECTURES}
    write_json(rows, TABLE)
    PAGE.write_text(with_table(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
