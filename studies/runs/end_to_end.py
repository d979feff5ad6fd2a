# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What quantized activations do to a language model: its NLL, and how far its predictions move.

A token here is a prediction: of T tokens in a sequence, the T - 1 positions that have a next one.
Per token, with p the unquantized model's distribution and q the quantized one's:

    KL = sum p (log p - log q)   in nats;   NLL = -log q(next token);   top1 = argmax q == argmax p
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from nvfp4_utils.forward import evaluation_mode

from .predictions import check_model, compare, last_hidden
from .quantized import Sites, TokenSnr, find_linears, not_finite, quantized
from .quantized import quantized_weights as quantize_weights
from .run_folder import whole
from .scoring import resamples
from .settings import KEYS, Setting
from .store import read_table, write_table

CHECKED_TOKENS = 32
MEASURES = ("kl", "nll", "top1")


@dataclass(frozen=True)
class EndToEnd:
    """What ``evaluate`` measured; every tensor on the CPU, in float64.

    ``kl``, ``nll`` (nats), ``top1`` (share): [settings, sequences], means over a sequence's tokens.
    ``kl_p999`` [settings]: the 99.9th percentile of KL over the tokens of all sequences.
    ``token_snr_db`` [settings, sites]: see ``TokenSnr``; NaN at sites left alone. None if not asked for.
    """

    settings: Sequence[Setting]
    kl: torch.Tensor
    nll: torch.Tensor
    top1: torch.Tensor
    kl_p999: torch.Tensor
    sites: Sequence[str]
    token_snr_db: torch.Tensor | None = None

    def sequence_table(self) -> pd.DataFrame:
        """One row per setting and sequence: the setting's labels, sequence, kl, nll, top1, kl_p999."""
        count, sequences = self.kl.shape
        table = self._labels(sequences)
        table["sequence"] = np.tile(np.arange(sequences, dtype=np.int32), count)
        for name in MEASURES:
            table[name] = getattr(self, name).flatten().numpy().astype(np.float32)
        table["kl_p999"] = self.kl_p999.repeat_interleave(sequences).numpy()
        return table

    def snr_table(self) -> pd.DataFrame:
        """One row per setting and quantized site: the setting's labels, site, token_snr_db."""
        if self.token_snr_db is None:
            raise ValueError("token SNR was not measured; pass token_snr=True to evaluate.")
        table = self._labels(len(self.sites))
        table["site"] = list(self.sites) * len(self.settings)
        table["token_snr_db"] = self.token_snr_db.flatten().numpy()
        return table.dropna(ignore_index=True)

    def _labels(self, repeats: int) -> pd.DataFrame:
        keys = [setting.key for setting in self.settings for _ in range(repeats)]
        return pd.DataFrame(keys, columns=list(KEYS))


def evaluate(
    model: nn.Module,
    tokens: torch.Tensor,
    settings: Sequence[Setting],
    *,
    batch: int = 8,
    token_snr: bool = False,
    progress: bool = True,
) -> EndToEnd:
    """Compare ``model`` under every setting with itself unquantized, on the same sequences.

    A batch runs once as it is and once per setting up to the last hidden state. Logits follow from
    these, for some tokens at a time: the unquantized ones are made once and never stored.

    Parameters
    ----------
    model : a causal language model of transformers, on any device
    tokens : int64 [sequences, T]
        Used as they are, T at least 2, no padding.
    settings : their labels must differ
    batch : int
        Sequences in a forward pass. ``len(settings) + 1`` last hidden states of a batch are kept.
    token_snr : bool
        Also measure every quantized site's SNR by token.

    Raises
    ------
    TypeError
        If the tokens are not int64.
    ValueError
        For tokens of another shape, settings with equal labels or without an amax for a site, a model
        whose linears or logits are not understood, and activations that are NaN or infinite.
    """
    _check_inputs(tokens, settings, batch)
    parts = tokens.split(batch)
    with torch.no_grad(), evaluation_mode(model):
        sites = find_linears(model)
        check_model(model, sites, tokens[:1, :CHECKED_TOKENS])
        run = _Evaluation(model, sites, settings, token_snr)
        with tqdm(total=len(parts) * len(settings), unit="pass", disable=not progress) as bar:
            done = [run.measure(part, bar) for part in parts]
        # [measures, settings, sequences, T - 1], on the device; a token's KL is kept until here.
        kl, nll, top1 = torch.cat(done, dim=2)
        means = {name: values.double().mean(-1).cpu()
                 for name, values in zip(MEASURES, (kl, nll, top1), strict=True)}  # fmt: skip
        every = kl.flatten(1)
        rank = every.shape[1] - every.shape[1] // 1000  # 99.9 % of the tokens, rounded up
        p999 = torch.stack([row.kthvalue(rank).values for row in every]).double().cpu()
        snr = torch.stack([s.mean_db() for s in run.snr]) if token_snr else None
    return EndToEnd(settings, **means, kl_p999=p999, sites=list(sites), token_snr_db=snr)


class _Evaluation:
    """What stays the same from batch to batch, and the SNRs that add up over them."""

    def __init__(self, model, sites: Sites, settings: Sequence[Setting], token_snr: bool) -> None:
        self.model, self.sites, self.settings = model, sites, settings
        self.device = next(model.parameters()).device
        self.snr = [TokenSnr(sites, self.device) for _ in settings] if token_snr else []
        wanted = any(setting.weights == "nvfp4" for setting in settings)
        self.weights = quantize_weights(sites) if wanted else None

    def measure(self, tokens: torch.Tensor, bar: tqdm) -> torch.Tensor:
        """KL, NLL and agreement of each token, float32 [3, settings, sequences, T - 1]."""
        tokens = tokens.to(self.device)
        bad = torch.zeros(len(self.settings), dtype=torch.int32, device=self.device)
        states = [self._predicting(tokens)]
        for i, setting in enumerate(self.settings):
            snr = self.snr[i] if self.snr else None
            with quantized(self.model, setting, sites=self.sites, weights=self.weights,
                           bad=bad[i : i + 1], snr=snr):  # fmt: skip
                states.append(self._predicting(tokens))
            bar.update()
        measures = compare(self.model.get_output_embeddings(), states, tokens[:, 1:].flatten())
        if bad.any():  # the one time the host waits for this batch
            raise not_finite([s for s, flag in zip(self.settings, bad.tolist(), strict=True) if flag])
        return measures.view(3, len(self.settings), len(tokens), -1)

    def _predicting(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states of the positions that have a next token, [tokens, width]."""
        return last_hidden(self.model, tokens)[:, :-1].flatten(0, 1)


def _check_inputs(tokens: torch.Tensor, settings: Sequence[Setting], batch: int) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens have dtype {tokens.dtype}; expected torch.int64. Call tokens.long().")
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; expected [sequences, T] with at least one "
            "sequence and T at least 2, as the first token predicts the second."
        )
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1 sequence.")
    names = [setting.name for setting in settings]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise ValueError(
            f"{len(names)} settings, with equal labels {repeated[:3]}; expected at least one, and "
            "labels that differ: rows of the tables are told apart by them."
        )


def evaluate_to(
    path: Path,
    model: nn.Module,
    tokens: torch.Tensor,
    settings: Sequence[Setting],
    *,
    group: int = 32,
    token_snr: bool = False,
    **options,
) -> None:
    """``evaluate`` into ``path``, ``group`` settings at a time; what is there already is kept.

    Writes ``end_to_end.parquet`` (one row per setting, see ``summary``) and
    ``end_to_end_sequences.parquet`` (the setting's labels, sequence, kl, nll, top1), with ``token_snr``
    also ``end_to_end_snr.parquet`` (labels, site, token_snr_db). Each group's part of them stays in
    ``path/end_to_end``: from there a repeated call goes on. ``options`` are those of ``evaluate``.

    Raises as ``evaluate``, and ``ValueError`` if a group was evaluated with other settings or tokens.
    """
    _check_inputs(tokens, settings, 1)
    folder = path / "end_to_end"
    folder.mkdir(parents=True, exist_ok=True)
    tables, snrs = [], []
    for number, start in enumerate(range(0, len(settings), group)):
        part = settings[start : start + group]
        file, snr_file = folder / f"{number:03}.parquet", folder / f"{number:03}_snr.parquet"
        made_with = _identity(tokens, part, token_snr)
        if whole([file, snr_file] if token_snr else [file]):
            _check_same(file, made_with)
        else:
            result = evaluate(model, tokens, part, token_snr=token_snr, **options)
            if token_snr:
                write_table(result.snr_table(), snr_file)
            table = result.sequence_table()
            table.attrs = made_with
            write_table(table, file)  # last: where it is, the group is done
        tables.append(read_table(file))
        snrs += [read_table(snr_file)] if token_snr else []
    everything = pd.concat(tables, ignore_index=True)
    write_table(summary(everything), path / "end_to_end.parquet")
    write_table(everything.drop(columns="kl_p999"), path / "end_to_end_sequences.parquet")
    if token_snr:
        write_table(pd.concat(snrs, ignore_index=True), path / "end_to_end_snr.parquet")


def _identity(tokens: torch.Tensor, settings: Sequence[Setting], token_snr: bool) -> dict[str, str]:
    """What a group's file was made with: name -> hash."""
    content = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
    made_with = {"tokens": f"{tuple(tokens.shape)} {content}", "token_snr": str(token_snr)}
    return made_with | {f"setting {s.name}": s.fingerprint for s in settings}


def _check_same(file: Path, new: dict[str, str]) -> None:
    old = read_table(file).attrs
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        raise ValueError(
            f"{file} was made with other {', '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}; expected the same. Take another folder, or "
            f"delete {file.parent} to evaluate again."
        )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: its labels, sequences, nll, kl, kl_p999, top1, low, high.

    Means over sequences, and the 95 % interval of the mean KL: a percentile bootstrap over sequences,
    2000 draws. One resample serves all settings, as the same sequences pass through them.
    """
    grouped = table.groupby(list(KEYS), sort=False, observed=True)
    result = grouped.agg(sequences=("sequence", "size"), nll=("nll", "mean"), kl=("kl", "mean"),
                         kl_p999=("kl_p999", "first"), top1=("top1", "mean"))  # fmt: skip
    kl = np.stack([values.to_numpy(np.float64) for _, values in grouped["kl"]])
    sequences = kl.shape[1]
    result["low"], result["high"] = np.quantile(
        resamples(sequences) @ kl.T / sequences, (0.025, 0.975), axis=0
    )
    return result.reset_index()
