# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the explore and models pages say, on small made-up tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from studies.data import models as pretrained
from studies.pages import explore, models


def test_explore_counts_the_policies_that_are_close() -> None:
    landed = pd.DataFrame({"calibrated_amax": [2688.0, 2.0, 8.0], "snr_db": [20.0, 19.0, 20.05]},
                          index=["headroom", "p99", "oracle"])  # fmt: skip
    text = explore.answer(landed, "a site", "a model")
    assert text.startswith(
        "<strong>At a site, 1 of 2 policies land within 0.1 dB of the oracle.</strong>"
    )
    assert "span 10.4 octaves, and p99 is the lowest. Scope: a model" in text
    table = explore.policy_table(landed)
    assert list(table.index) == ["oracle", "headroom", "p99"]
    assert table.gap.tolist() == pytest.approx([0, 0.05, 1.05])
    assert table.input_scale["headroom"] == "1"


def run_of(nll: float, mixes: tuple[str, ...] = ("mix",)) -> Any:
    table = pd.DataFrame([
        {"test": mix, "policy": policy, "weights": weights, "only": "", "sequences": 8,
         "nll": nll + more}
        for mix in mixes
        for policy, weights, more in (("none", "bf16", 0), ("none", "nvfp4", 1), ("amax", "bf16", 2))
    ])  # fmt: skip
    sites = ["layers.0.mlp_input", "layers.0.down_proj_input"]
    info = {"texts": {mixes[0]: {"length": 512}}, "model_sha256": "other"}
    return SimpleNamespace(end_to_end=lambda: table, mixes=list(mixes), sites=sites, info=info,
                           kinds=["mlp_input", "down_proj_input"], featured_mix=mixes[0])  # fmt: skip


def test_losses_are_of_the_unquantized_model() -> None:
    loss = models.loss_table({"reference": run_of(2.0), "smollm2": run_of(3.0)})
    assert loss.loc["mix"].to_dict() == {"reference": 2.0, "smollm2": 3.0}


def test_models_answer_follows_the_runs() -> None:
    text = models.answer({"reference": run_of(2.0), "smollm2": run_of(3.5)})
    assert "On 2 trained decoders with 4 sites, public ones" in text
    assert "2.00 to 3.50 nats per token" in text
    assert models.test_size(run_of(2.0)) == "8 sequences of 512 tokens"


def test_reconciliation_says_where_the_prediction_fails() -> None:
    loss = pd.DataFrame({"smollm2": {"english": 2.0, "greek": 6.0}})
    text = models.reconciliation(loss, {"smollm2": 49152})
    assert "at most 56% of a uniform guess, not less than half" in text
    assert text.endswith("The hardest mix is greek for smollm2.")


def test_a_model_that_was_not_fetched_is_named_and_left_out(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NVFP4_MODELS", str(tmp_path))
    present = models.load_present()
    assert list(present) == ["reference"]
    text = models.absent_prose(present)
    assert "`smollm2` was not fetched" in text and "`make models`" in text
    assert list(models.architecture_table(present)) == ["reference"]
    assert models.absent_prose(dict.fromkeys(models.RUNS)) == ""


def test_origin_names_licence_package_and_checksum() -> None:
    table = models.origin_table({name: run_of(1.0) for name in models.RUNS})
    gemma = pretrained.MODELS["gemma3"]
    assert table.loc["SHA-256 of the file in it", "gemma3"] == gemma.sha256
    assert "Gemma Terms of Use" in table.loc["licence", "gemma3"]
    assert table.loc["weights", "reference"] == "trained and stored in bfloat16"
    assert table.loc["sites measured", "smollm2"] == "2: mlp_input, down_proj_input"


def test_check_refuses_another_model_than_the_runs() -> None:
    network = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="holds 6 parameters; expected the 7 of"):
        models.check({"reference": (network, None)}, {}, {"parameters": 7})
    with pytest.raises(ValueError, match="is not the model of its stored run"):
        models.check({"reference": (network, None)}, {"reference": run_of(1.0)}, {"parameters": 6})


def training_of(model: float) -> dict:
    losses = {"unigram": 9.0, "trigram": 4.0, "model": model}
    settings = {"sequences": 2, "length": 8}
    return {"held_out_nats_per_token": {"mix": losses}, "tokens_seen": 3e6, "steps_done": 5,
            "training": settings, "device": "a device"}  # fmt: skip


def test_training_prose_says_worse_where_it_is() -> None:
    assert "1.00 to 1.00 nats per token better than" in models.training_prose(training_of(3.0))
    assert "worse where negative" in models.training_prose(training_of(5.0))


def test_held_out_sequences_come_from_the_training_report() -> None:
    assert models.held_out_sequences({"held_out_sequences": 8}) == 8
    assert models.held_out_sequences({}) == models.HELD_OUT == 256


def test_the_stored_model_continues_a_prompt() -> None:
    network, tokenizer = pretrained.load("reference")
    assert "8: 6 linear attention, 2 full attention" in set(
        models.architecture_table({"reference": (network, tokenizer)}).reference
    )
    assert models.greedy_text(network, tokenizer, "The capital", 2).startswith("The capital")
