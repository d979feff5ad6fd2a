# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the explore and reference model pages say, on small made-up tables."""

from __future__ import annotations

import pandas as pd
import pytest

from studies.pages import explore, reference_model


def test_explore_counts_the_policies_that_are_close() -> None:
    landed = pd.DataFrame({"calibrated_amax": [2688.0, 2.0, 8.0], "snr_db": [20.0, 19.0, 20.05]},
                          index=["headroom", "p99", "oracle"])  # fmt: skip
    text = explore.answer(landed, "a site", "a model")
    assert text.startswith(
        "<strong>At a site, 1 of 2 policies land within 0.1 dB of the oracle</strong>"
    )
    assert "span 10.4 octaves; p99 is the lowest, at 19.00 dB. Scope: a model" in text
    table = explore.policy_table(landed)
    assert list(table.index) == ["oracle", "headroom", "p99"]
    assert table.gap.tolist() == pytest.approx([0, 0.05, 1.05])
    assert table.input_scale["headroom"] == "1"


def training_of(model: float) -> dict:
    losses = {"unigram": 9.0, "trigram": 4.0, "model": model}
    return {"parameters": 1234, "held_out_nats_per_token": {"mix": losses}}


def test_model_answer_says_worse_where_it_is() -> None:
    better = reference_model.answer(training_of(3.0))
    assert "with 1,234 parameters" in better and "1.00 and 1.00 nats a token better than" in better
    assert "worse where negative" in reference_model.answer(training_of(5.0))


def test_held_out_sequences_come_from_the_training_report() -> None:
    assert reference_model.held_out_sequences({"held_out_sequences": 8}) == 8
    assert reference_model.held_out_sequences({}) == reference_model.HELD_OUT == 256


def test_architecture_of_the_stored_model() -> None:
    config, training = (reference_model.read_json(n) for n in ("config.json", "training.json"))
    table = reference_model.architecture_table(config, training, training["parameters"]).value
    assert table["layers"] == "8: 6 linear attention, 2 full attention"
    assert table["weights"] == "bfloat16, 15.9 MiB of safetensors"
    assert table["context"] == "2,048 tokens; trained on 512"
