# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What a report knows of each site: calibrated on one pool of sequences, scored on another.

The scales that are recommended are the ones that are scored, on text that calibration has not seen:
two pools that share no record, rather than halves of one pool that calibrate each other's scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nvfp4_utils import policies
from nvfp4_utils.histogram import codes_to_values
from nvfp4_utils.hooks import capture, hooked
from nvfp4_utils.quantize import UNDERFLOWS, Underflow, input_scale_from_amax
from nvfp4_utils.sites import Site
from nvfp4_utils.statistics import ActivationStatistics, SiteStatistics
from studies.runs.scoring import block_shares
from studies.runs.subsets import NEAR, doublings, seen_law
from studies.runs.token_amaxes import TokenAmaxes

BATCH = {"cpu": 4, "cuda": 16}  # sequences per forward
# Policies with one scale and no search: a search on the calibration pool (mse, aligned) costs as much as
# all else together, and what it gains is within noise wherever the book has measured it.
COMPARED = tuple(
    name
    for name in policies.CALIBRATED
    if policies.POLICIES[name].one_scale and name not in ("mse", "aligned")
)
CANDIDATES = (
    "raised",
    "amax",
    "raised-all",
    "headroom-amax",
)  # that clip nothing seen; first: the default
CURVE_OCTAVES = (*np.arange(-4, 0, 0.5).tolist(), *range(0, 23))  # from the held-out amax
EXACT_DB = 150.0  # stands for the SNR of what is represented without error
Numbers = dict[str, Any]  # of a site
Sites = Mapping[str, Site]


def batches(model, tokens: torch.Tensor):
    """The sequences as int64 batches."""
    return tokens.long().split(BATCH[next(model.parameters()).device.type])


def captured(
    model, tokens: torch.Tensor, wanted: Sites, group_size: int, callbacks=()
) -> dict[str, SiteStatistics]:
    """Statistics of every site, with other callbacks fed by the same forward passes."""
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(hooked(model, wanted, callback))
        return capture(model, batches(model, tokens), wanted, group_size=group_size)


def each(function: Callable[[str], Any], sites: list[str], what: str) -> dict[str, Any]:
    """``function`` of every site, several at once: its operations are small and release the lock."""
    workers = 8 if torch.cuda.is_available() else torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        done = tqdm(pool.map(function, sites), total=len(sites), desc=what, unit="site")
        return dict(zip(sites, done, strict=True))


# ---------------------------------------------------------------------------------- calibration


def calibration_stage(model, tokenizer, tokens: torch.Tensor, wanted: Sites) -> dict[str, Numbers]:
    """What the calibration pool says of every site; nothing of the held-out pool is seen."""
    largest = TokenAmaxes()
    rows: dict[str, int] = {}  # of a sequence: several per token within fused experts

    def count(site: str, x: torch.Tensor) -> None:
        if x.ndim == 3:  # else an expert's share of the tokens, whose sequences are not known
            rows[site] = x.shape[1]
            largest.count(site, x)

    sites = captured(model, tokens, wanted, len(tokens), [count])

    def describe(site: str) -> Numbers:
        found = describe_pool(sites[site])
        if found["amax"] > 0 and site in rows:
            at = torch.cat(largest.parts[site], dim=1).cpu().numpy()
            found["massive"] = massive(at, tokens, rows[site] // tokens.shape[1], tokenizer)
        return found

    return each(describe, list(sites), "calibrate")


def describe_pool(statistics: SiteStatistics) -> Numbers:
    """One site's calibration: amaxes of policies, block amaxes, growth with the number of sequences."""
    total = statistics.total
    m = total.marginals
    found: Numbers = {
        "elements": m.count,
        "amax": m.amax,
        "distinct_magnitudes": len(m.element_codes),
        "zero_blocks": float(m.block_counts[m.block_codes == 0].sum() / m.block_counts.sum()),
        "calibrated_amax": dict.fromkeys(COMPARED),
        "block_amax": None,
        "room_octaves": None,
        "massive": None,
        "growth": None,
        "experts": experts_of(statistics),
    }
    if not m.amax > 0:
        return found
    found["calibrated_amax"] = calibrated_amaxes(total)
    found["room_octaves"] = policies.room(total)
    found["block_amax"] = {
        "min": float(codes_to_values(m.block_codes[m.block_codes > 0][:1], m.dtype)[0]),
        "p1": m.block_amax_percentile(1.0, above=0.0),
        "p99.99": m.block_amax_percentile(99.99, above=0.0),
        "amax": m.amax,
    }
    found["growth"] = growth(statistics.sequence_amax.numpy())
    return found


def calibrated_amaxes(total: ActivationStatistics) -> dict[str, float | None]:
    """The amax of each of ``COMPARED``; None where a policy has none, as a percentile that is zero."""
    found = policies.calibrate(total, COMPARED)
    return {name: amax if math.isfinite(amax) else None for name, amax in found.items()}


def massive(at: np.ndarray, tokens: torch.Tensor, rows: int, tokenizer) -> Numbers:
    """The largest token beside the others: ``over_token`` is the amax over the median token's.

    ``at``: what ``TokenAmaxes`` keeps, a column per sequence; ``rows``: of the activation, per token.
    """
    amax, position, channel, _, median, _ = at
    top, typical = int(amax.argmax()), float(np.median(median))
    token = int(tokens[top, int(position[top]) // rows])
    return {
        "over_token": float(amax[top]) / typical if typical > 0 else None,
        "at_position_0": float((position // rows == 0).mean()),
        "token": str(tokenizer.convert_ids_to_tokens([token])[0]),
        "channel": int(channel[top]),
    }


def growth(amaxes: np.ndarray) -> Numbers | None:
    """Expected share of the pool's amax in ``n`` of its sequences, exactly, and the first that will do.

    ``enough_at``: the smallest n of 1, 2, 4, ... and half with an expected share of at least ``NEAR``;
    None if half of the pool has less: only what half shows can say that more is not needed. None for all
    of it where sequences are not told apart.
    """
    if not np.isfinite(amaxes).all():
        return None
    half = max(1, len(amaxes) // 2)
    law = seen_law(amaxes, sorted({*doublings(len(amaxes)), half}))
    enough = law.n[(law.share >= NEAR) & (law.n <= half)]
    return {
        "sequences": law.n.tolist(),
        "share": law.share.tolist(),
        "share_of_half": float(law.share[law.n == half].iloc[0]),
        "enough_at": int(enough.iloc[0]) if len(enough) else None,
    }


def experts_of(statistics: SiteStatistics) -> Numbers | None:
    """Tokens and amax of each expert of a mixture, else None."""
    tokens, amax = statistics.expert_tokens, statistics.expert_amax
    return None if tokens is None or amax is None else {"tokens": tokens.tolist(), "amax": amax.tolist()}


# ------------------------------------------------------------------------------------- scoring

Amaxes = Mapping[str, float | None]


def scoring_stage(
    model, tokens: torch.Tensor, wanted: Sites, calibrated: Mapping[str, Amaxes], what: str
) -> dict[str, Numbers]:
    """Every site's scales on sequences that they were not calibrated on."""
    sites = captured(model, tokens, wanted, 1)

    def score(site: str) -> Numbers:
        return score_site(sites[site], calibrated[site])

    return each(score, list(sites), what)


def score_site(statistics: SiteStatistics, calibrated: Amaxes) -> Numbers:
    """One site: each policy's numbers, the oracle's, the error curve, and sums by sequence.

    ``groups`` holds float64 sums by sequence, from which intervals of a loss are drawn.
    """
    total = statistics.total
    amax = total.amax
    if not amax > 0:
        return {
            "amax": amax,
            "room_octaves": None,
            "policies": {},
            "oracle": None,
            "curve": None,
            "groups": None,
        }
    room = policies.room(total)
    oracle: dict[Underflow, float] = {"flush": policies.oracle(total, "flush")}
    # Where no block underflows at the best scale the conventions agree on it: floor needs no search.
    apart = block_shares(total.marginals, np.array([oracle["flush"]]))["underflow"][0] > 0
    oracle["floor"] = policies.oracle(total, "floor") if apart else oracle["flush"]
    names = [name for name, value in calibrated.items() if value is not None]
    curve = [amax * 2.0**k for k in CURVE_OCTAVES]
    menu = np.array([calibrated[n] for n in names] + list(oracle.values()) + curve, dtype=float)
    shares = block_shares(total.marginals, menu)
    flush = _numbers(total, menu, "flush")
    numbers = {"flush": flush, "floor": _floor_numbers(total, menu, flush, shares["underflow"] > 0)}
    best = {u: {measure: values.max() for measure, values in numbers[u].items()} for u in UNDERFLOWS}

    def entry(i: int, underflow: Underflow) -> Numbers:
        of = {name: float(values[i]) for name, values in numbers[underflow].items()}
        losses = [best[underflow][name] - of[name] for name in of]
        return of | {"loss_db": float(max(losses))}

    found = {
        name: {
            "slack_low_octaves": math.log2(menu[i] / amax),
            "slack_high_octaves": math.log2(amax / menu[i]) + room,
            "saturated": float(shares["saturated"][i]),
            "subnormal": float(shares["subnormal"][i]),
            "flushed": float(shares["underflow"][i]),
        }
        | {u: entry(i, u) for u in UNDERFLOWS}
        for i, name in enumerate(names)
    }
    ends = len(names) + np.arange(len(UNDERFLOWS) + 1)
    at_best = [int(values.argmax()) for values in numbers["flush"].values()]
    kept = [n for n in CANDIDATES if n in names]
    scales = menu[[names.index(n) for n in kept] + at_best]
    return {
        "amax": amax,
        "room_octaves": room,
        "policies": found,
        "oracle": {
            u: {"calibrated_amax": oracle[u]} | entry(len(names) + i, u)
            for i, u in enumerate(UNDERFLOWS)
        },
        "curve": (
            {"octaves": list(CURVE_OCTAVES)}
            | {u: {name: v[ends[-1] :].tolist() for name, v in numbers[u].items()} for u in UNDERFLOWS}
        ),
        "groups": group_sums(statistics, kept, scales),
    }


def _numbers(total, amaxes: np.ndarray, underflow: Underflow) -> dict[str, np.ndarray]:
    scales = input_scale_from_amax(amaxes)
    return {
        "snr_db": np.minimum(total.snr_db(scales, underflow), EXACT_DB),
        "block_snr_db": np.minimum(total.block_snr_db(scales, underflow), EXACT_DB),
    }


def _floor_numbers(total, amaxes, flush: dict[str, np.ndarray], differ: np.ndarray):
    """As under flush but where block scales underflow: elsewhere the two conventions are one."""
    found = {name: values.copy() for name, values in flush.items()}
    if differ.any():
        for name, values in _numbers(total, amaxes[differ], "floor").items():
            found[name][differ] = values
    return found


def group_sums(statistics: SiteStatistics, names: list[str], amaxes: np.ndarray) -> Numbers:
    """Energy and squared error by sequence under flush, of elements and of blocks divided by their amax.

    The last two of ``amaxes`` are those of the best SNR and of the best block SNR.
    """
    scales = input_scale_from_amax(amaxes)
    rows: dict[str, list] = {"signal": [], "error": [], "unit_signal": [], "unit_error": []}
    for group in statistics.groups:
        if not group.amax > 0:
            for name, values in rows.items():
                values.append([0.0] * len(amaxes) if name.endswith("error") else 0.0)
            continue
        block = codes_to_values(group.block_codes, group.dtype)
        element = codes_to_values(group.element_codes, group.dtype)
        unit = float(((element / block.clamp(min=1e-300)).square() * group.counts).sum())
        rows["signal"].append(group.signal_power * group.count)
        rows["error"].append((group.mse(scales) * group.count).tolist())
        rows["unit_signal"].append(unit)
        rows["unit_error"].append((unit / 10 ** (group.block_snr_db(scales) / 10)).tolist())
    return {"policies": names} | rows
