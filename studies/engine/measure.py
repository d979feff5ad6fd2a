# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The same tokens through transformers and through vLLM: statistics, losses and generated text.

Each stage reads and writes one folder, as the two live in different environments: statistics as Parquet,
tokens as safetensors, losses as tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from nvfp4_utils.policies import calibrate
from nvfp4_utils.statistics import ActivationStatistics
from studies.data.mixes import EMBEDDED_MIX
from studies.runs.quantized import quantized
from studies.runs.settings import NONE, Setting, policy_settings
from studies.runs.store import write_json, write_table

from . import attach

MODEL, MIX = "smollm2", EMBEDDED_MIX
CALIBRATION, TEST, LENGTH, PROMPT, BATCH = 4, 8, 128, 64, 4
NEW = LENGTH - PROMPT  # tokens that are generated after each prompt
CHUNK = 80  # tokens of a step with chunked prefill: no divisor of a sequence's
SAMPLED = {"greedy": (0.0, 0), "temperature 1": (1.0, 1)}  # temperature and seed
POLICIES = ("amax", "p99.9", "raised")
TRANSFORMERS, SINGLE, VLLM, CHUNKED = "transformers", "transformers, batch of 1", "vLLM", "vLLM, chunked"
DECODE, REREAD, REAL = "decode", "reread", "real text"  # what of generated text is counted

Statistics = Mapping[str, ActivationStatistics]


def keep_statistics(work: Path, source: str, statistics: Statistics) -> None:
    """Write each site's statistic of a source."""
    folder = work / "statistics" / source
    folder.mkdir(parents=True, exist_ok=True)
    for label, statistic in statistics.items():
        statistic.save(folder / f"{label}.parquet")


def kept_statistics(work: Path, source: str, labels: list[str]) -> dict[str, ActivationStatistics]:
    """What ``keep_statistics`` wrote. Raises ``FileNotFoundError`` if a site is missing."""
    folder = work / "statistics" / source
    return {label: ActivationStatistics.load(folder / f"{label}.parquet") for label in labels}


def tokens_of(work: Path) -> dict[str, torch.Tensor]:
    """``calibration`` and ``test``, int64 [sequences, LENGTH].

    Raises ``FileNotFoundError`` if the stage ``tokens`` has not run.
    """
    file = work / "tokens.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; expected the tokens. Run the stage `tokens` first.")
    return {name: t.long() for name, t in load_file(file).items()}


def make_tokens(work: Path) -> None:
    """Tokenize the text that both read."""
    from studies.data.corpora import sequences
    from studies.data.models import begins_with, load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    texts = sequences(MIX, tokenizer, calibration=CALIBRATION, test=TEST, length=LENGTH,
                      begin=begins_with(tokenizer))  # fmt: skip
    tokens = {"calibration": texts.calibration.contiguous(), "test": texts.test.contiguous()}
    save_file(tokens, work / "tokens.safetensors")


def count_transformers(work: Path) -> None:
    """The calibration text in transformers, in a batch and one by one, and its policies."""
    from nvfp4_utils.hooks import capture
    from studies.data.models import load_network

    model, tokens = load_network(MODEL), tokens_of(work)["calibration"]
    for source, batch in ((TRANSFORMERS, BATCH), (SINGLE, 1)):
        counted = capture(model, tokens.split(batch), group_size=len(tokens))
        statistics = {label: s.total for label, s in counted.items()}
        keep_statistics(work, source, statistics)
        if source == TRANSFORMERS:
            _keep_policies(work, source, statistics)


def _keep_policies(work: Path, source: str, statistics: Statistics) -> None:
    calibrated = {label: calibrate(s, POLICIES) for label, s in statistics.items()}
    by_policy = {p: {label: found[p] for label, found in calibrated.items()} for p in POLICIES}
    write_json(by_policy, work / f"policies {source}.json")


def settings_of(work: Path) -> list[Setting]:
    """What is evaluated: unquantized, every policy calibrated in transformers, and vLLM's amaxes."""
    ours, theirs = (
        json.loads((work / f"policies {source}.json").read_text()) for source in (TRANSFORMERS, VLLM)
    )
    calibrations = {TRANSFORMERS: ours, VLLM: {"amax": theirs["amax"]}}
    plain = Setting(MIX, "", NONE, rule=NONE)
    return [plain, *policy_settings(MIX, calibrations, underflows=("flush",))]


def _prompts(tokens: torch.Tensor) -> list[Any]:
    from vllm import TokensPrompt

    return [TokensPrompt(prompt_token_ids=row) for row in tokens.tolist()]


def _read(engine: Any, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """NLL in nats and most likely token of every prediction, [sequences, T - 1]."""
    from vllm import SamplingParams

    outputs = engine.generate(
        _prompts(tokens), SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1), use_tqdm=False
    )
    nll, top = np.zeros((2, len(tokens), tokens.shape[1] - 1))
    for i, (output, row) in enumerate(zip(outputs, tokens.tolist(), strict=True)):
        for t, found in enumerate(output.prompt_logprobs[1:]):
            nll[i, t] = -found[row[t + 1]].logprob
            top[i, t] = next(token for token, entry in found.items() if entry.rank == 1)
    return nll, top.astype(np.int64)


def loss_rows(
    engine: str, setting: Setting, nll: np.ndarray, top: np.ndarray, plain: np.ndarray
) -> pd.DataFrame:
    """One row a sequence: engine, calibration, policy, sequence, nll and top1 (as ``plain``)."""
    return pd.DataFrame({
        "engine": engine, "calibration": setting.calibration, "policy": setting.policy,
        "sequence": np.arange(len(nll)), "nll": nll.mean(1), "top1": (top == plain).mean(1),
    })  # fmt: skip


def _losses(work: Path, engine: str, settings: list[Setting], read: Callable[[Setting], tuple]) -> None:
    tables, plain = [], np.zeros(0)
    for setting in settings:
        nll, top = read(setting)
        if setting.policy == NONE:
            plain = top
            save_file({"top": torch.from_numpy(top)}, work / f"top {engine}.safetensors")
        tables.append(loss_rows(engine, setting, nll, top, plain))
    write_table(pd.concat(tables, ignore_index=True), work / f"losses {engine}.parquet")


def _count_prefill(work: Path, source: str, model: Any, engine: Any) -> None:
    from vllm import SamplingParams

    tokens = tokens_of(work)["calibration"]
    with attach.counted(model) as found:
        engine.generate(_prompts(tokens), SamplingParams(max_tokens=1), use_tqdm=False)
    _check_tokens(found, "prefill", tokens.numel())
    statistics = found.statistics("prefill")
    keep_statistics(work, source, statistics)
    _keep_policies(work, source, statistics)


def _check_tokens(found: attach.PhaseCounters, phase: str, expected: int) -> None:
    """Refuse a count of other than all tokens: padding or a warm-up would be in the statistic."""
    for label in found.sites:
        seen = found.tokens.get((phase, label), 0)
        if seen != expected:
            raise ValueError(
                f"{label} saw {seen} tokens of {phase}; expected {expected}. The engine ran others too, "
                "or the prompts in several steps: raise max_num_batched_tokens."
            )


def _count_generation(work: Path, model: Any, engine: Any) -> None:
    """Generate after the test text's prompts, and count what decoding reads."""
    from vllm import SamplingParams

    prompts = tokens_of(work)["test"][:, :PROMPT]
    generated = {}
    for name, (temperature, seed) in SAMPLED.items():
        sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=NEW, ignore_eos=True)
        with attach.counted(model, decode_rows=len(prompts)) as found:
            outputs = engine.generate(_prompts(prompts), sampling, use_tqdm=False)
        _check_tokens(found, "prefill", prompts.numel())
        _check_tokens(found, "decode", len(prompts) * (NEW - 1))
        keep_statistics(work, f"{DECODE} {name}", found.statistics("decode"))
        generated[name] = torch.tensor([list(o.outputs[0].token_ids) for o in outputs])
        save_file(generated, work / "generated vLLM.safetensors")


def run_vllm(work: Path) -> None:
    """Whole prompts in vLLM: calibration text, generation, and held-out text under every setting."""
    folder = _folder()
    engine = attach.engine_of(folder, max_model_len=2 * LENGTH, max_num_batched_tokens=TEST * LENGTH)
    model = attach.model_of(engine)
    _count_prefill(work, VLLM, model, engine)
    _count_generation(work, model, engine)
    sites = {label: site.readers for label, site in attach.find_sites(model).items()}
    test = tokens_of(work)["test"]

    def read(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        with quantized(model, setting, sites=sites):
            return _read(engine, test)

    _losses(work, VLLM, settings_of(work), read)


def run_vllm_chunked(work: Path) -> None:
    """Steps of ``CHUNK`` tokens, so prompts in pieces: calibration text, held-out text as it is."""
    engine = attach.engine_of(_folder(), max_model_len=2 * LENGTH, max_num_batched_tokens=CHUNK,
                              max_num_seqs=TEST, enable_chunked_prefill=True)  # fmt: skip
    _count_prefill(work, CHUNKED, attach.model_of(engine), engine)
    test = tokens_of(work)["test"]
    _losses(work, CHUNKED, settings_of(work)[:1], lambda _: _read(engine, test))


def _folder() -> str:
    from studies.data.models import resolve

    return resolve(MODEL)


def finish_transformers(work: Path) -> None:
    """In transformers: losses, greedy text, and later tokens of generated and real text counted."""
    from studies.data.models import load_network
    from studies.runs.quantized import find_linears

    model, test = load_network(MODEL), tokens_of(work)["test"]
    sites = find_linears(model)

    def read(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        with quantized(model, setting, sites=sites), torch.inference_mode():
            parts = [_predictions(model(part).logits, part) for part in test.split(BATCH)]
        nll, top = (torch.cat(p).numpy() for p in zip(*parts, strict=True))
        return nll, top

    _losses(work, TRANSFORMERS, settings_of(work), read)
    greedy = model.generate(test[:, :PROMPT], attention_mask=torch.ones_like(test[:, :PROMPT]),
                            do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)  # fmt: skip
    save_file({"greedy": greedy[:, PROMPT:].contiguous()}, work / "generated transformers.safetensors")
    keep_statistics(work, REAL, _later(model, test))
    new = load_file(work / "generated vLLM.safetensors")["greedy"]
    keep_statistics(work, REREAD, _later(model, torch.cat([test[:, :PROMPT], new], 1)))


def _predictions(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL, float64, and most likely token of every prediction, [sequences, T - 1]."""
    log = logits[:, :-1].float().log_softmax(-1)
    return -log.gather(-1, tokens[:, 1:, None])[..., 0].double(), log.argmax(-1)


def _later(model: Any, tokens: torch.Tensor) -> dict[str, ActivationStatistics]:
    """Of tokens [sequences, LENGTH] read at once, those that decoding reads: after the prompt."""
    from nvfp4_utils.sites import find_sites
    from studies.runs.captured import follow

    found: dict[str, ActivationStatistics] = {}

    def count(label: str, x: torch.Tensor) -> None:
        found.setdefault(label, ActivationStatistics()).update(x[:, PROMPT : LENGTH - 1])

    follow(model, find_sites(model), [tokens], count)
    return found
