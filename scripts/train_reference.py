# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Train the reference model: a small decoder in the Qwen3.5 architecture on the open corpora.

    python scripts/train_reference.py tokenizer
    python scripts/train_reference.py train --work /tmp/train --minutes 9

``train`` stops after ``--minutes`` with a checkpoint in ``--work`` and goes on from it when called
again. When the last step is done it writes the bfloat16 model, its loss curve, and its held-out
loss beside a unigram and a trigram baseline. About 10 minutes on one H100.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from studies.data import corpora
from studies.data.mixes import FOLDER_STREAMS

MODEL = Path(__file__).resolve().parents[1] / "models" / "reference"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER_BYTES = 6_000_000  # of each corpus, from its second half: outside every reserve


@dataclass(frozen=True)
class Training:
    """All settings of a run."""

    vocab_size: int = 8192
    steps: int = 2200
    sequences: int = 256  # a step
    length: int = 512  # tokens a sequence
    peak_lr: float = 3e-3
    warmup_steps: int = 100
    final_lr: float = 0.05  # of the peak, after a cosine
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0


def model_config(training: Training) -> Qwen3_5TextConfig:
    """8 layers, three gated delta nets to one full attention, SwiGLU 3x, tied embeddings."""
    return Qwen3_5TextConfig(
        vocab_size=training.vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(folder: Path) -> None:
    """Byte-level BPE on the second half of each corpus, with ChatML special tokens."""

    def texts():
        for stream in FOLDER_STREAMS.values():
            records = list(corpora._folder_records(stream, folder))
            reserved = (stream.calibration_reserve + stream.test_reserve) * corpora.RESERVE_LENGTH
            if 2 * 4 * reserved > sum(len(str(record)) for record in records):
                continue  # too short: its second half reaches into the reserves
            size = 0
            for record in records[len(records) // 2 :]:
                content = corpora._content(stream, record)
                if not isinstance(content, str):
                    content = "\n".join(message["content"] for message in content)
                yield content
                size += len(content)
                if size > TOKENIZER_BYTES:
                    break

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=Training.vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(MODEL)


def load_tokens(work: Path, folder: Path | None) -> np.ndarray:
    """All training text as uint16 token ids, made once."""
    path = work / "tokens.npy"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        texts = list(corpora.training_text(tokenizer, folder=folder))
        parts = [
            np.asarray(e.ids, dtype=np.uint16)
            for start in range(0, len(texts), 1000)
            for e in tokenizer.backend_tokenizer.encode_batch(
                texts[start : start + 1000], add_special_tokens=False
            )
        ]
        np.save(path, np.concatenate(parts))
    return np.load(path)


def learning_rate(step: int, t: Training) -> float:
    """Linear warm-up, then a cosine to ``final_lr`` of the peak."""
    if step < t.warmup_steps:
        return t.peak_lr * (step + 1) / t.warmup_steps
    done = (step - t.warmup_steps) / max(1, t.steps - t.warmup_steps)
    return t.peak_lr * (t.final_lr + (1 - t.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy, nats."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def save_checkpoint(path: Path, model, optimizer, step: int, history: list) -> None:
    """Weights and optimizer state as safetensors, the step and the loss curve as JSON."""
    state = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path / "checkpoint.safetensors")
    (path / "checkpoint.json").write_text(json.dumps({"step": step, "history": history}))


def load_checkpoint(path: Path, model, optimizer) -> tuple[int, list]:
    """Restore what ``save_checkpoint`` wrote; (0, []) when there is none."""
    if not (path / "checkpoint.json").exists():
        return 0, []
    state = load_file(path / "checkpoint.safetensors")
    weights = {k[6:]: v for k, v in state.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    moments: dict[int, dict] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    progress = json.loads((path / "checkpoint.json").read_text())
    return progress["step"], progress["history"]


def train(work: Path, minutes: float, folder: Path | None, out: Path, t: Training) -> None:
    """Train from the checkpoint in ``work``, if any, for at most ``minutes``."""
    began = time.time()
    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = load_tokens(work, folder)
    data = torch.from_numpy(tokens.astype(np.int32)).to(device)
    print(f"{len(data):,} training tokens, ready after {time.time() - began:.0f} s", flush=True)
    torch.manual_seed(t.seed)
    model = Qwen3_5ForCausalLM(model_config(t))
    model = model.to(device)  # type: ignore[arg-type]
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": t.weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=t.peak_lr, betas=t.betas, fused=device == "cuda")
    step, history = load_checkpoint(work, model, optimizer)
    before = history[-1][2] if history else 0.0  # seconds of earlier calls
    window = torch.arange(t.length + 1, device=device)
    while step < t.steps and time.time() - began < 60 * minutes:
        generator = torch.Generator().manual_seed(1_000_000 * t.seed + step)
        start = torch.randint(len(data) - t.length - 1, (t.sequences,), generator=generator)
        ids = data[start.to(device)[:, None] + window].long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t)
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            history.append([step, loss.item(), round(before + time.time() - began, 1)])
            if step % 200 == 0:
                print(step, f"{loss.item():.3f}", f"{time.time() - began:.0f} s", flush=True)
            if not math.isfinite(history[-1][1]):
                raise ValueError(f"loss is {history[-1][1]} at step {step}; lower peak_lr.")
    save_checkpoint(work, model, optimizer, step, history)
    print(f"step {step} of {t.steps}", flush=True)
    finish(model, tokens, history, folder, out, t)


@torch.no_grad()
def finish(model, tokens, history, folder, out: Path, t: Training) -> None:
    """Write the bfloat16 model and its report."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = model.to(torch.bfloat16).eval()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    held_out = {}
    for mix in ("open-news-instruct", "open-sft-seven", "open-prose"):
        ids = corpora.sequences(mix, tokenizer, calibration=0, test=256, folder=folder).test
        losses = [loss_of(model, part.to(model.device).long()).item() for part in ids.split(32)]
        held_out[mix] = {"model": float(np.mean(losses))} | ngram_losses(tokens, ids.numpy())
    report = {
        "training": asdict(t),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_available": len(tokens),
        "steps_done": history[-1][0],
        "tokens_seen": history[-1][0] * t.sequences * t.length,
        "history": history,
        "held_out_nats_per_token": held_out,
        "held_out_sequences": len(ids),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(report))
    print(json.dumps(held_out), flush=True)


def ngram_losses(tokens: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Unigram and interpolated trigram (Witten-Bell) cross entropy, nats a token."""
    base = Training.vocab_size
    train_ids, ids = tokens.astype(np.int64), test.astype(np.int64)
    probability = ((np.bincount(train_ids, minlength=base) + 1) / (len(train_ids) + base))[ids]
    losses = {"unigram": float(-np.log(probability[:, 1:]).mean())}
    key, key_test = train_ids, ids  # of the n-gram that ends at each position
    for order in (2, 3):
        context, context_test = key[:-1], key_test[:, :-1]
        key = context * base + train_ids[order - 1 :]
        key_test = context_test * base + ids[:, order - 1 :]
        grams, counts = np.unique(key, return_counts=True)
        contexts, first, kinds = np.unique(grams // base, return_index=True, return_counts=True)
        total = np.add.reduceat(counts, first)
        n, k = (_look_up(contexts, values, context_test) for values in (total, kinds))
        joint = _look_up(grams, counts, key_test)
        lower = probability[:, 1:]
        probability = np.where(n > 0, (joint + k * lower) / np.maximum(n + k, 1), lower)
    return losses | {"trigram": float(-np.log(probability).mean())}


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("tokenizer", "train"))
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--corpora", type=Path, default=None)
    arguments = parser.parse_args()
    folder = corpora.corpora_folder(arguments.corpora)
    if folder is None:
        parser.error("no corpora folder: pass --corpora, or set NVFP4_CORPORA")
    if arguments.action == "tokenizer":
        train_tokenizer(folder)
    else:
        settings = Training(steps=arguments.steps)
        train(arguments.work, arguments.minutes, folder, arguments.out, settings)


if __name__ == "__main__":
    main()
