# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Settings under which a model is run: what is quantized, by which rule and with which scales."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nvfp4_utils.quantize import UNDERFLOWS, Underflow, check_underflow
from nvfp4_utils.sites import kind_of

STATIC, PER_SEQUENCE, PER_TOKEN = "static", "dynamic per sequence", "dynamic per token"
FOUR_OVER_SIX = "four-over-six"
NONE = "none"
CALIBRATED = (STATIC, FOUR_OVER_SIX)  # rules that need an amax per site
RULES = (*CALIBRATED, PER_SEQUENCE, PER_TOKEN, NONE)
KEYS = ("test", "calibration", "policy", "underflow", "weights", "only")  # columns of the tables

Weights = Literal["bf16", "nvfp4"]
Amaxes = Mapping[str, float]


@dataclass(frozen=True)
class Setting:
    """One way to quantize a model.

    ``test``, ``calibration``, ``policy``: labels, copied to the tables.
    ``weights``: ``bf16`` leaves all weights, ``nvfp4`` quantizes those of every decoder linear.
    ``only``: quantize activations at this kind of site, or this one site, alone; empty for all. Weights
    do not heed it.
    ``rule``: ``static`` (one scale per site), ``four-over-six`` (likewise, with that quantizer),
    ``dynamic per sequence``, ``dynamic per token`` or ``none`` (activations untouched).
    ``amaxes``: site label -> calibrated amax, in the activation's units, of the first two rules.

    Raises ``ValueError`` for an unknown value, and for amaxes that are missing or not used.
    """

    test: str
    calibration: str
    policy: str
    underflow: Underflow = "flush"
    weights: Weights = "bf16"
    only: str = ""
    rule: str = STATIC
    amaxes: Amaxes = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        check_underflow(self.underflow)
        for name, got, expected in (
            ("weights", self.weights, ("bf16", "nvfp4")),
            ("rule", self.rule, RULES),
        ):
            if got not in expected:
                raise ValueError(f"{name} is {got!r}; expected one of {', '.join(map(repr, expected))}.")
        if self.only and not self.only.endswith("_input"):
            raise ValueError(
                f"only is {self.only!r}; expected '', a kind of site such as 'mlp_input', or a label."
            )
        if bool(self.amaxes) != (self.rule in CALIBRATED):
            raise ValueError(
                f"the rule {self.rule!r} was given {len(self.amaxes)} amaxes; expected one per site for "
                f"{' and '.join(map(repr, CALIBRATED))}, none for the others."
            )

    @property
    def key(self) -> tuple[str, ...]:
        """The labels that tell one setting from another: the columns ``KEYS``."""
        return tuple(getattr(self, name) for name in KEYS)

    @property
    def name(self) -> str:
        """The labels as a person reads them."""
        return " / ".join(filter(None, self.key))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all labels, the rule and every amax."""
        content = json.dumps([self.key, self.rule, sorted(self.amaxes.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def quantizes(self, site: str) -> bool:
        """Whether the activation at a site, by its label, is replaced."""
        return self.rule != NONE and self.only in ("", site, kind_of(site))


def policy_settings(
    test: str,
    calibrations: Mapping[str, Mapping[str, Amaxes]],
    *,
    underflows: Iterable[Underflow] = UNDERFLOWS,
    weights: Weights = "bf16",
    only: str = "",
) -> list[Setting]:
    """A setting for every mix, policy and convention; ``calibrations``: mix -> policy -> site -> amax.

    The policy ``four-over-six`` takes the quantizer of that name.
    """
    return [
        Setting(test, mix, policy, underflow, weights, only,
                FOUR_OVER_SIX if policy == FOUR_OVER_SIX else STATIC, amaxes)
        for underflow in underflows
        for mix, policies in calibrations.items()
        for policy, amaxes in policies.items()
    ]  # fmt: skip


def sweep_settings(
    test: str,
    calibration: str,
    amaxes: Amaxes,
    exponents: Iterable[float],
    *,
    weights: Weights = "bf16",
    only: str = "",
) -> list[Setting]:
    """All sites' amaxes times ``2**k``, a policy ``x2^k`` for each exponent, under both conventions."""
    scaled = {f"x2^{k:g}": {site: a * 2.0**k for site, a in amaxes.items()} for k in exponents}
    return policy_settings(test, {calibration: scaled}, weights=weights, only=only)


def uncalibrated_settings(test: str, *, weights: Weights = "bf16", only: str = "") -> list[Setting]:
    """What needs no calibration: activations untouched, and a scale per sequence or per token.

    With untouched activations and ``bf16`` weights the model is the unquantized one: its NLL.
    """
    return [Setting(test, "", NONE, weights=weights, rule=NONE)] + [
        Setting(test, "test", rule, underflow, weights, only, rule)
        for rule in (PER_SEQUENCE, PER_TOKEN)
        for underflow in UNDERFLOWS
    ]
