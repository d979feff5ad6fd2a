# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The embedded reference model: loading it, and the numbers of its model card."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from studies import ROOT

MODEL = ROOT / "models" / "reference"
HELD_OUT = 256  # sequences a held-out loss is the mean of, where training.json does not say


def load(path: str | Path = MODEL):
    """Model (bfloat16, evaluation mode, CPU) and tokenizer from a folder.

    Raises
    ------
    FileNotFoundError
        If the folder has no ``model.safetensors``.
    """
    path = Path(path)
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {path}; expected the weights of the reference model. Clone "
            "the repository whole, or train it again: `python scripts/train_reference.py train`."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would warn that CPU kernels are PyTorch's own
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(path)


def read_json(name: str, path: str | Path = MODEL) -> dict:
    """``config.json`` or ``training.json`` of a model folder.

    Raises
    ------
    FileNotFoundError
        If the folder has no such file.
    """
    file = Path(path) / name
    if not file.is_file():
        raise FileNotFoundError(
            f"no {name} in {file.parent}; expected what scripts/train_reference.py writes."
        )
    return json.loads(file.read_text())


def held_out_table(training: dict) -> pd.DataFrame:
    """Held-out loss by mix of the model and its baselines, a column per predictor.

    Nats per token for model, trigram and unigram; the model's bits per token and perplexity.
    """
    table = pd.DataFrame.from_dict(training["held_out_nats_per_token"], orient="index")
    table = table[["unigram", "trigram", "model"]]
    return table.assign(
        **{"model, bits per token": table.model / math.log(2), "perplexity": table.model.map(math.exp)}
    )


def loss_curve(training: dict) -> pd.DataFrame:
    """The training loss by step: columns step, loss, tokens (millions)."""
    t = training["training"]
    table = pd.DataFrame(training["history"], columns=["step", "loss", "seconds"])
    return table.assign(tokens=table.step * t["sequences"] * t["length"] / 1e6)


def greedy_reply(model, tokenizer, prompt: str, tokens: int) -> str:
    """The model's greedy answer to one user message."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    stop = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.inference_mode():
        out = model.generate(
            inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=tokens, do_sample=False, eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out_sequences(training: dict) -> int:
    """How many test sequences per mix the held-out losses are the mean of."""
    return training.get("held_out_sequences", HELD_OUT)


def answer(training: dict) -> str:
    """The page's answer, simple HTML."""
    held_out = held_out_table(training)
    gain = held_out.trigram - held_out.model
    better = "better" if gain.min() > 0 else "better (worse where negative)"
    return (
        "<strong>A real, trained decoder in the architecture of Qwen3.5, with "
        f"{training['parameters']:,} parameters, that fits into this repository.</strong> On "
        f"{len(held_out)} held-out mixes it is between {gain.min():.2f} and {gain.max():.2f} nats a "
        f"token {better} than an interpolated trigram trained on the same text. It stands in for the "
        "code path of large models, not for their weights."
    )


def architecture_table(config: dict, training: dict, parameters: int) -> pd.DataFrame:
    """The model card's table, from config.json, training.json and the parameters that were loaded."""
    kinds = pd.Series(config["layer_types"]).value_counts()
    layers = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items())
    rows = {
        "class": config["architectures"][0],
        "parameters": f"{training['parameters']:,} (input and output embeddings tied)",
        "layers": f"{config['num_hidden_layers']}: {layers}",
        "hidden size": config["hidden_size"],
        "MLP": f"SwiGLU, {config['intermediate_size']} wide",
        "full attention": f"{config['num_attention_heads']} heads of {config['head_dim']}, "
        f"{config['num_key_value_heads']} key-value heads, gated output",
        "gated delta net": f"{config['linear_num_key_heads']} key and "
        f"{config['linear_num_value_heads']} value heads of {config['linear_value_head_dim']}, "
        f"convolution over {config['linear_conv_kernel_dim']} tokens",
        "context": f"{config['max_position_embeddings']:,} tokens; trained on "
        f"{training['training']['length']}",
        "tokenizer": f"byte-level BPE, {config['vocab_size']:,} tokens, ChatML template",
        "weights": f"{config['dtype']}, {parameters * 2 / 2**20:.1f} MiB of safetensors",
    }
    return pd.DataFrame({"value": rows})


def draw_training(curve: pd.DataFrame, held_out: pd.DataFrame) -> plt.Figure:
    """Training loss against tokens seen, the final held-out losses and the baselines' means."""
    fig, ax = plt.subplots()
    middle, last = len(curve) // 2, curve.tokens.iloc[-1]

    def label(text, x, y, color, shift, **kwargs):
        ax.annotate(text, (x, y), xytext=shift, color=color, textcoords="offset points", **kwargs)

    ax.plot(curve.tokens, curve.loss, color="#0072B2", lw=1.2)
    label("training", curve.tokens[middle], curve.loss[middle], "#0072B2", (0, -22), ha="center")
    for name, loss in held_out.model.items():
        ax.plot(last, loss, "o", color="#D55E00", ms=5)
        label(f"{name}, held out", last, loss, "#D55E00", (7, 0), va="center", fontsize=9,
              annotation_clip=False)  # fmt: skip
    for name, color in {"trigram": "#009E73", "unigram": "#777777"}.items():
        mean = held_out[name].mean()
        ax.axhline(mean, color=color, ls="--", lw=1)
        label(f"{name}, held out", last / 2, mean, color, (0, 3), ha="center")
    ax.set_xlabel("tokens seen (millions)")
    ax.set_ylabel("cross entropy (nats per token)")
    return fig
