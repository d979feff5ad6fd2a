# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Activations, policies and losses of vLLM beside those of transformers, from stored results."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from nvfp4_utils.sites import kind_of, layer_of
from studies.engine.collect import PREFILL, TARGET
from studies.engine.measure import CHUNKED, DECODE, REAL, REREAD, SAMPLED, SINGLE, TRANSFORMERS, VLLM
from studies.runs.settings import NONE
from studies.runs.store import Run, read_table

NOTICED_DB = 0.1  # a change of SNR that is called one
DECODES = {name: f"{DECODE} {name}" for name in SAMPLED}
KINDS = ("attention_input", "o_proj_input", "mlp_input", "down_proj_input")


@dataclass(frozen=True)
class Stored:
    """What ``python -m studies.engine`` stored: see ``studies.engine.collect``."""

    sites: pd.DataFrame
    policies: pd.DataFrame
    losses: pd.DataFrame
    outcome: dict

    @classmethod
    def read(cls, folder: Path = TARGET) -> Stored:
        """Raises ``FileNotFoundError`` naming the command if nothing is stored."""
        if not (folder / "outcome.json").is_file():
            raise FileNotFoundError(
                f"no {folder / 'outcome.json'}; expected the stored comparison. Make it with "
                "`python -m studies.engine`, whose docstring lists the stages."
            )
        sites, policies, losses = (
            read_table(folder / f"{name}.parquet") for name in ("sites", "policies", "losses")
        )
        return cls(sites, policies, losses, json.loads((folder / "outcome.json").read_text()))

    @property
    def parameters(self) -> dict:
        """Numbers of sequences and tokens."""
        return self.outcome["provenance"]["parameters"]

    def by_site(self, column: str) -> pd.DataFrame:
        """A column of ``sites``: a row a site, in module order, a column a source."""
        order = list(dict.fromkeys(self.sites.site))
        wide = self.sites.astype({"site": str, "source": str})
        return wide.pivot(index="site", columns="source", values=column).loc[order]


def presence() -> str:
    """Whether this page's environment has vLLM, and what is shown; Markdown."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed where this page was built: what follows is the stored comparison."
    return "vLLM is installed where this page was built. What follows is still the stored comparison."


def check(stored: Stored) -> str:
    """Every source must have counted its tokens at every site. Markdown; else raises ``ValueError``."""
    count, p = stored.by_site("count"), stored.parameters
    width = count[TRANSFORMERS] / (p["calibration"] * p["length"])
    later = p["test"] * (p["length"] - p["prompt"] - 1)
    for source in count:
        tokens = p["calibration"] * p["length"] if source in PREFILL else later
        if not (count[source] == tokens * width).all():
            raise ValueError(f"{source} counted other tokens than {tokens} at some site.")
    return (
        f"Every one of {len(count)} sites counted {p['calibration'] * p['length']} tokens of the "
        f"calibration text in each of {len(PREFILL)} ways to run it, and {later} tokens after the "
        "prompts in each way to get them: no padding, no warm-up, nothing twice."
    )


def prefill_table(stored: Stored) -> pd.DataFrame:
    """By engine: how its statistics of the calibration text differ from those of transformers."""
    amax, moved = stored.by_site("amax"), stored.by_site("moved")
    loss = stored.by_site("snr_db") - stored.by_site("calibrated_snr_db")
    block = stored.by_site("block_snr_db") - stored.by_site("calibrated_block_snr_db")
    rows = {}
    for source in PREFILL[1:]:
        ratio = amax[source] / amax[TRANSFORMERS]
        rows[source] = {
            "sites with the same statistic": int((moved[source] == 0).sum()),
            "sites with the same amax": int((ratio == 1).sum()),
            "lowest amax ratio": ratio.min(), "highest amax ratio": ratio.max(),
            "moved elements, median (%)": 100 * moved[source].median(),
            "largest SNR change (dB)": loss[source].abs().max(),
            "largest block SNR change (dB)": block[source].abs().max(),
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.astype({name: int for name in table if name.startswith("sites with")})


def policy_table(stored: Stored) -> pd.DataFrame:
    """By policy: the calibrated amax in vLLM over that in transformers, in octaves."""
    wide = stored.policies.astype({"source": str, "policy": str, "site": str}).pivot(
        index=["policy", "site"], columns="source", values="calibrated_amax"
    )
    octaves = np.log2(wide[VLLM] / wide[TRANSFORMERS]).groupby("policy", sort=False)
    return pd.DataFrame({
        "equal sites": octaves.apply(lambda o: int((o == 0).sum())),
        "median (octaves)": octaves.median(), "lowest": octaves.min(), "highest": octaves.max(),
    })  # fmt: skip


def first_moved(stored: Stored) -> pd.DataFrame:
    """The sites of the first layer, in the order in which they run: moved elements in percent."""
    moved = 100 * stored.by_site("moved")[list(PREFILL[1:])]
    return moved[[layer_of(site) == 0 for site in moved.index]]


def growth(stored: Stored) -> pd.DataFrame:
    """Amax after the prompts over that of the calibration text, a row a site, a column a source.

    The calibration text is read by the same engine: vLLM for what it decodes, else transformers.
    """
    amax = stored.by_site("amax")
    ratio = {name: amax[source] / amax[VLLM] for name, source in DECODES.items()}
    ratio |= {"generated, read at once": amax[REREAD] / amax[TRANSFORMERS]}
    return pd.DataFrame(ratio | {"real text": amax[REAL] / amax[TRANSFORMERS]})


def growth_table(stored: Stored) -> pd.DataFrame:
    """By source: sites whose amax the calibration text did not reach, and what its scale costs there."""
    ratio = growth(stored)
    lost = stored.by_site("snr_db") - stored.by_site("calibrated_snr_db")
    sources = [*DECODES.values(), REREAD, REAL]
    rows = {}
    for name, source in zip(ratio, sources, strict=True):
        rows[name] = {
            "sites above": int((ratio[name] > 1).sum()),
            "median ratio": ratio[name].median(),
            "highest ratio": ratio[name].max(),
            "at site": ratio[name].idxmax(),
            "largest SNR loss (dB)": lost[source].max(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_growth(stored: Stored) -> plt.Figure:
    """Amax ratios by layer, a panel a kind of site."""
    ratio = growth(stored)
    fig, axes = plt.subplots(2, 2, figsize=(8.4, 5.6), sharex=True, sharey=True)
    marks = dict(zip(ratio, ("o", "^", "x", "."), strict=False))
    for ax, kind in zip(axes.flat, KINDS, strict=True):
        rows = ratio[[kind_of(site) == kind for site in ratio.index]]
        layers = [layer_of(site) for site in rows.index]
        for name in rows:
            ink = "#999999" if name == "real text" else "k"
            ax.plot(layers, rows[name], marks[name], ms=4, color=ink, mfc="none", label=name)
        ax.axhline(1, color="k", lw=0.8)
        ax.set_yscale("log", base=2)
        ax.set_title(kind, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    for ax in axes[:, 0]:
        ax.set_ylabel("amax / calibration's (log2 axis)")
    axes.flat[0].legend(fontsize=8)
    return fig


def loss_table(stored: Stored) -> pd.DataFrame:
    """By setting: NLL of the held-out text in each engine, its rise, and predictions that stay."""
    table = stored.losses.astype({"engine": str, "calibration": str, "policy": str})
    means = table.groupby(["engine", "calibration", "policy"], sort=False)[["nll", "top1"]].mean()
    rows = {}
    for calibration, policy in dict.fromkeys(zip(table.calibration, table.policy, strict=True)):
        row = {}
        for engine in (TRANSFORMERS, VLLM):
            own = means.loc[engine, calibration, policy]
            row[f"NLL, {engine}"] = own.nll
            row[f"rise, {engine}"] = own.nll - means.loc[engine, "", NONE].nll
            row[f"same, {engine} (%)"] = 100 * own.top1
        name = "unquantized" if policy == NONE else f"{policy}, calibrated in {calibration}"
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def engine_gap(stored: Stored) -> tuple[float, float]:
    """Largest difference of the rises of NLL in the two engines, a mean, and its standard error."""
    table = stored.losses.astype({"engine": str, "calibration": str, "policy": str})
    nll = table.pivot(index="sequence", columns=["engine", "calibration", "policy"], values="nll")
    found = []
    for calibration, policy in dict.fromkeys(zip(table.calibration, table.policy, strict=True)):
        if policy != NONE:
            rise = {e: nll[e, calibration, policy] - nll[e, "", NONE] for e in (TRANSFORMERS, VLLM)}
            gap = rise[VLLM] - rise[TRANSFORMERS]
            found.append((float(gap.mean()), float(gap.sem())))
    return max(found, key=lambda pair: abs(pair[0]))


def stored_rises(run: Run, policies: list[str]) -> pd.DataFrame:
    """The run's own rise of NLL by policy, on the test text of its first mix."""
    mix = run.mixes[0]
    table = run.end_to_end()
    own = table[(table.test == mix) & (table.only == "") & (table.weights == "bf16")]
    own = own[own.underflow == "flush"].astype({"policy": str, "calibration": str})
    plain = own[own.policy == NONE].nll.iloc[0]
    own = own[own.calibration == mix].set_index("policy")
    return pd.DataFrame({
        "rise of NLL, nats": own.nll[policies] - plain, "same predictions (%)": 100 * own.top1[policies]
    })  # fmt: skip


def greedy(stored: Stored) -> str:
    """How far greedy text of the two engines agrees; Markdown."""
    a = stored.outcome["agreement"]
    first, n = a["tokens_before_difference"], a["generated"]
    last = max((f for f in first if f < n), default=n)
    return (
        f"Unquantized, the two predict the same token at {a['same_prediction'][VLLM]:.1%} of the "
        f"held-out positions; vLLM with whole and with chunked prompts at "
        f"{a['same_prediction_chunked']:.1%}. Greedy text of {n} tokens is the same to its end for "
        f"{sum(f == n for f in first)} of {len(first)} prompts; the others part after {min(first)} to "
        f"{last} tokens. Once a token differs the texts are two texts."
    )


def answer(stored: Stored) -> str:
    """The page's answer, simple HTML."""
    table, grown = prefill_table(stored), growth_table(stored)
    row, n = table.loc[VLLM], len(stored.by_site("amax"))
    snr, block = (row[f"largest {name} change (dB)"] for name in ("SNR", "block SNR"))
    verdict = ("The same to the bit" if row["sites with the same statistic"] == n else
               "Not the same bits, but no site's SNR notices" if max(snr, block) < NOTICED_DB else
               "Not the same bits; the blocks do not notice, the SNR of some sites does"
               if block < NOTICED_DB else "No: at some sites the blocks need other scales")  # fmt: skip
    top, real = grown.loc[list(DECODES)], grown.loc["real text"]
    return (
        f"<strong>{verdict}.</strong> Transformers' scales change the SNR in vLLM by up to {snr:.2f} dB "
        f"at one site, with every block weighted alike by {block:.2f} dB. While generating, up to "
        f"{top['sites above'].max()} sites exceed the calibration text's amax; real text after the same "
        f"prompts does so at {real['sites above']}."
    )


def details(stored: Stored) -> str:
    """What the answer rests on, a sentence each; Markdown."""
    table, raised = prefill_table(stored), policy_table(stored).loc["raised"]
    row, n = table.loc[VLLM], len(stored.by_site("amax"))
    same, equal = (int(row[f"sites with the same {what}"]) for what in ("statistic", "amax"))
    low, high = row["lowest amax ratio"], row["highest amax ratio"]
    gap, error = engine_gap(stored)
    return (
        f"Of {n} sites {same} have the same statistic in vLLM and in transformers, and {equal} the same "
        f"amax; it is off by factors of {low:.3f} to {high:.3f}. "
        f"`raised` moves by {raised.lowest:+.2f} to {raised.highest:+.2f} octaves. The rise of NLL "
        f"differs by at most {gap:+.3f} nats (standard error {error:.3f})."
    )


def reconciliation(stored: Stored) -> str:
    """The predictions beside what was found; Markdown."""
    table, grown, amax = prefill_table(stored), growth_table(stored), stored.by_site("amax")
    chunk = np.log2(amax[CHUNKED] / amax[VLLM]).abs()
    above, real = grown["sites above"][list(DECODES)], grown.loc["real text", "sites above"]
    reread = np.log2(amax[DECODES["greedy"]] / amax[REREAD]).abs()
    other = stored.by_site("moved")[VLLM]
    begins = other.index[other > 0]
    start = f", from {begins[0]} on" if len(begins) else ""
    return (
        f"- *Other bits*: at {len(begins)} of {len(other)} sites{start}. Batches are not the cause: one "
        f"sequence at a time, transformers differs from itself at "
        f"{int((stored.by_site('moved')[SINGLE] > 0).sum())} sites.\n"
        f"- *Same amax to a bfloat16 step or few*: ratios of "
        f"{table.loc[VLLM, 'lowest amax ratio']:.3f} to {table.loc[VLLM, 'highest amax ratio']:.3f}; a "
        "step is a factor of 1.004 to 1.008.\n"
        f"- *Chunks change nothing more*: between whole and chunked prompts amaxes differ by up to "
        f"{chunk.max():.3f} octaves, {int((chunk == 0).sum())} of {len(chunk)} are equal.\n"
        f"- *Generated text exceeds the calibration text's amax at no more sites than real text*: "
        f"{' and '.join(f'{count} sites ({name})' for name, count in above.items())}, real text "
        f"{real}: {'no' if above.max() > real else 'yes'}, at equal numbers of tokens. The same tokens "
        f"read at once by transformers have amaxes within {reread.max():.3f} octaves of those that "
        f"vLLM decoded, median {reread.median():.3f}."
    )
