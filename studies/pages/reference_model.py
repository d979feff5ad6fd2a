# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The embedded reference model: loading it, and the numbers of its model card."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import torch

from studies import ROOT

MODEL = ROOT / "models" / "reference"


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
    """Held-out loss by mix of the model and its baselines, a column a predictor.

    Nats a token for model, trigram and unigram; the model's bits a token and perplexity.
    """
    table = pd.DataFrame.from_dict(training["held_out_nats_per_token"], orient="index")
    table = table[["unigram", "trigram", "model"]]
    return table.assign(
        **{"model, bits a token": table.model / math.log(2), "perplexity": table.model.map(math.exp)}
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
