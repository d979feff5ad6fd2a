# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What quantization does to a model equals a plain evaluation, and leaves the model as it was."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from nvfp4_reference import reference

transformers = pytest.importorskip("transformers")

from nvfp4_utils import quantize  # noqa: E402
from nvfp4_utils.sites import SITES, find_sites  # noqa: E402
from studies.runs import end_to_end  # noqa: E402
from studies.runs.architectures import tiny_model  # noqa: E402
from studies.runs.end_to_end import evaluate, evaluate_to  # noqa: E402
from studies.runs.quantized import (  # noqa: E402
    find_linears,
    quantize_on_device,
    quantized,
    row_scales,
)
from studies.runs.settings import (  # noqa: E402
    FOUR_OVER_SIX,
    NONE,
    PER_SEQUENCE,
    PER_TOKEN,
    STATIC,
    Setting,
    policy_settings,
    sweep_settings,
    uncalibrated_settings,
)

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
# Written out, not taken from the module under test.
READERS = {
    "attention_input": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o_proj_input": ["self_attn.o_proj"],
    "mlp_input": ["mlp.gate_proj", "mlp.up_proj"],
    "down_proj_input": ["mlp.down_proj"],
}
LABELS = [f"layers.{i}.{kind}" for i in range(2) for kind in READERS]


def llama(dtype=torch.bfloat16, **changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)).to(dtype).eval()


def gemma(**changes):
    torch.manual_seed(1)
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=8, **changes)
    return transformers.Gemma3ForCausalLM(config).bfloat16().eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def tokens(sequences=3, length=20):
    return torch.randint(1, 128, (sequences, length), generator=torch.Generator().manual_seed(2))


def amaxes(model):
    """Each site's own amax on the test tokens, by plain hooks."""
    found = {}
    for label in LABELS:
        layer, kind = label.rsplit(".", 1)

        def note(module, args, label=label):
            found[label] = args[0].abs().max().item()

        module = model.get_submodule(f"model.{layer}.{READERS[kind][0]}")
        handle = module.register_forward_pre_hook(note)
        with torch.no_grad():
            model(tokens())
        handle.remove()
    return found


def raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


# ------------------------------------------------------------------------- against a plain evaluation


def fp32(value):
    return float(np.float32(value))


def direct_quantize(x, setting, label):
    """With the tests' own quantizer: grids enumerated in numpy, one row at a time."""

    def one(part, amax):
        return reference(part, fp32(amax / 2688), setting.underflow, x.dtype, np.float32).view(
            part.shape
        )

    if setting.rule == STATIC:
        return one(x, setting.amaxes[label])
    rows = x.split(1) if setting.rule == PER_SEQUENCE else x.flatten(0, 1).split(1)
    return torch.cat([one(row, row.abs().max().item()) for row in rows]).view(x.shape)


def direct(model, setting, monkeypatch):
    """Per-sequence KL, NLL, agreement and the 99.9th percentile, with ``linear`` itself replaced."""
    plain = torch.nn.functional.linear
    label_of = {
        id(model.get_submodule(f"model.{label.rsplit('.', 1)[0]}.{name}").weight): label
        for label in LABELS
        for name in READERS[label.rsplit(".", 1)[1]]
    }

    def linear(x, weight, bias=None):
        label = label_of.get(id(weight))
        if label is not None and setting.rule != NONE and setting.only in ("", label.split(".")[2]):
            x = direct_quantize(x, setting, label)
        if label is not None and setting.weights == "nvfp4":
            g = fp32(weight.abs().max().item() / 2688)
            weight = reference(weight.detach(), g, "floor", weight.dtype, np.float32).view(weight.shape)
        return plain(x, weight, bias)

    def log_softmax():
        with torch.no_grad():
            hidden = model.model(tokens()).last_hidden_state.double()
        logits = hidden @ model.lm_head.weight.detach().double().T
        return logits - torch.log(torch.exp(logits).sum(-1, keepdim=True))

    p = log_softmax()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        q = log_softmax()
    kl, nll, top1 = [], [], []
    for s in range(len(p)):
        for t in range(p.shape[1] - 1):
            kl.append(float((p[s, t].exp() * (p[s, t] - q[s, t])).sum()))
            nll.append(-float(q[s, t, tokens()[s, t + 1]]))
            top1.append(float(p[s, t].argmax() == q[s, t].argmax()))
    means = [np.mean(np.reshape(v, (len(p), -1)), axis=1) for v in (kl, nll, top1)]
    return *means, sorted(kl)[int(np.ceil(0.999 * len(kl))) - 1]


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (llama, dict(rule=STATIC)),
        (llama, dict(rule=STATIC, weights="nvfp4", underflow="floor")),
        (gemma, dict(rule=STATIC, only="down_proj_input", underflow="floor")),
        (gemma, dict(rule=PER_TOKEN)),
        (llama, dict(rule=PER_SEQUENCE, only="mlp_input")),
        (gemma, dict(rule=NONE, weights="nvfp4")),
    ],
    ids=lambda value: value.__name__ if callable(value) else " ".join(value.values()),
)
def test_a_cell_equals_its_plain_evaluation(make, changes, monkeypatch):
    model = make()
    own = {"amaxes": amaxes(model)} if changes["rule"] == STATIC else {}
    setting = Setting("t", "c", "p", **changes, **own)
    found = evaluate(model, tokens(), [setting], batch=3, progress=False)
    kl, nll, top1, p999 = direct(model, setting, monkeypatch)
    assert kl.min() > 1e-4
    assert found.kl[0].numpy() == pytest.approx(kl, rel=1e-3)
    assert found.nll[0].numpy() == pytest.approx(nll, rel=1e-5)
    assert found.top1[0].numpy() == pytest.approx(top1)
    assert float(found.kl_p999[0]) == pytest.approx(p999, rel=1e-3)


def test_a_scale_so_fine_that_nothing_is_lost_gives_no_divergence(model, monkeypatch):
    """NVFP4 has no such scale, so the E2M1 grid is made 2**20 times as fine; all else is as ever."""
    calibrated = amaxes(model)
    setting = Setting("t", "c", "p", amaxes=calibrated)
    assert evaluate(model, tokens(), [setting], progress=False).kl.min() > 1e-4
    monkeypatch.setattr(quantize, "round_e2m1", lambda u: (u * 2**20).round() / 2**20)
    found = evaluate(model, tokens(), [setting], progress=False)
    assert found.kl.abs().max() < 1e-6 and found.top1.min() == 1


def test_the_unquantized_model_diverges_from_itself_by_nothing(model):
    unquantized = uncalibrated_settings("t")[0]
    found = evaluate(model, tokens(), [unquantized], progress=False)
    assert not found.kl.any() and bool((found.top1 == 1).all())
    with torch.no_grad():
        loss = model(tokens(), labels=tokens()).loss
    assert float(found.nll.mean()) == pytest.approx(float(loss), rel=1e-3)  # its logits are bfloat16


def test_an_octave_more_changes_nothing_in_the_safe_window(model):
    settings = sweep_settings("t", "c", amaxes(model), [1, 2])
    assert [s.policy for s in settings] == ["x2^1", "x2^2"] * 2
    kl = evaluate(model, tokens(), settings, progress=False).kl
    assert torch.equal(kl[0], kl[1]) and torch.equal(kl[2], kl[3])


def test_batch_size_does_not_matter():
    model = llama(torch.float32)
    settings = [Setting("t", "c", "p", amaxes=amaxes(model)), *uncalibrated_settings("t")]
    one, all_ = (
        evaluate(model, tokens(), settings, batch=b, token_snr=True, progress=False) for b in (1, 3)
    )
    for name in ("kl", "nll", "top1", "kl_p999", "token_snr_db"):
        a, b = getattr(one, name), getattr(all_, name)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_chunks_of_logits_do_not_matter(model, monkeypatch):
    setting = Setting("t", "c", "p", amaxes=amaxes(model))
    whole = evaluate(model, tokens(), [setting], progress=False)
    monkeypatch.setattr("studies.runs.predictions.LOGITS_BYTES", {"cpu": 7 * 4 * 128})
    parts = evaluate(model, tokens(), [setting], progress=False)
    torch.testing.assert_close(whole.kl, parts.kl, rtol=1e-4, atol=1e-7)


# --------------------------------------------------------------------------------- what linears see


def inputs_of_linears(model):
    """A list that fills with (linear's name, input) as the linears really get them, and its hooks."""
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, args[0])))
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    return seen, handles


def test_all_linears_see_the_site_s_quantized_tensor_and_nothing_else_does(model):
    calibrated = amaxes(model)
    mlp_inputs = []
    note = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda m, args: mlp_inputs.append(args[0])
    )
    seen, handles = inputs_of_linears(model)
    with torch.no_grad():
        model(tokens())
        plain, seen[:] = dict(seen), []
        with quantized(model, Setting("t", "c", "p", amaxes=calibrated)):
            model(tokens())
        replaced = dict(seen)
    for handle in (*handles, note):
        handle.remove()
    assert len(replaced) == 14
    for layer in range(2):
        for kind, readers in READERS.items():
            first, *others = (replaced[f"layers.{layer}.{name}"] for name in readers)
            assert all(other is first for other in others)  # quantized once
            g = fp32(calibrated[f"layers.{layer}.{kind}"] / 2688)
            assert torch.equal(
                first, reference(first, g, "flush", first.dtype, np.float32).view(first.shape)
            )
    name = "layers.0.self_attn.q_proj"
    assert not torch.equal(plain[name], replaced[name])
    # The module's own input stays: only its linears read the quantized tensor.
    assert not torch.equal(mlp_inputs[1], replaced["layers.0.mlp.gate_proj"])


@pytest.mark.parametrize("rule", [FOUR_OVER_SIX, PER_SEQUENCE, PER_TOKEN])
def test_each_rule_s_quantizer(model, rule):
    calibrated = {site: 1.75 * a for site, a in amaxes(model).items()}
    own = {"amaxes": calibrated} if rule == FOUR_OVER_SIX else {}
    seen, handles = inputs_of_linears(model)
    with torch.no_grad():
        model(tokens())
        x = dict(seen)["layers.0.self_attn.q_proj"]
        seen.clear()
        setting = Setting("t", "c", "p", rule=rule, **own)
        with quantized(model, setting):
            model(tokens())
    for handle in handles:
        handle.remove()
    if rule == FOUR_OVER_SIX:
        g = torch.tensor(calibrated["layers.0.attention_input"] / 2688, dtype=torch.float32)
        expected = quantize.four_over_six_reference(x, g, "flush", x.dtype)
    else:
        expected = direct_quantize(x, setting, "")
    assert torch.equal(dict(seen)["layers.0.self_attn.k_proj"], expected)


@pytest.mark.parametrize("underflow", ["flush", "floor"])
def test_a_zero_token_stays_zero_under_dynamic_scales(underflow):
    x = torch.randn(2, 3, 32).bfloat16()
    x[0, 1] = 0
    y = quantize.fake_quantize_reference(x, row_scales(x, True), underflow, x.dtype)
    assert not y[0, 1].any() and bool(y.isfinite().all()) and bool(y[1].any())
    assert row_scales(x, True).shape == row_scales(x, False).shape == (12, 1)


def test_only_one_kind_of_site(model):
    seen, handles = inputs_of_linears(model)
    with torch.no_grad():
        model(tokens())
        plain, seen[:] = dict(seen), []
        with quantized(model, Setting("t", "c", "p", only="down_proj_input", amaxes=amaxes(model))):
            seen.clear()
            model(tokens())
    for handle in handles:
        handle.remove()
    changed = {name for name, x in dict(seen).items() if not torch.equal(x, plain[name])}
    assert "layers.0.mlp.down_proj" in changed
    assert not changed & {name for name in plain if name.startswith("layers.0") and "down" not in name}


def test_labels_are_those_of_capture(model):
    assert set(find_linears(model)) == set(find_sites(model, tuple(SITES))) == set(LABELS)
    assert sum(len(linears) for linears in find_linears(model).values()) == 14


def test_the_linears_of_a_linear_attention_model():
    config = transformers.Qwen3_5TextConfig(
        **SIZES, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.Qwen3_5ForCausalLM(config).bfloat16()
    names = [f"model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")]
    assert list(find_linears(model)["layers.0.attention_input"]) == names
    found = evaluate(model, tokens(), uncalibrated_settings("t"), progress=False)
    assert bool((found.kl[1:] > 0).all())


def test_the_kernel_is_called_without_waiting():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there, in Triton's interpreter
    x = torch.randn(2, 3, 32, device=device).half().transpose(0, 1)
    bad, scale = torch.zeros(1, dtype=torch.int32, device=device), torch.tensor(0.001, device=device)
    y = quantize_on_device(x, scale, "flush", bad)
    assert torch.equal(y.cpu(), quantize.fake_quantize(x.cpu(), 0.001)) and not bad.any()
    quantize_on_device(torch.full_like(x, torch.inf), scale, "flush", bad)
    assert bad.all()


# ----------------------------------------------------------------------------- the model is restored


@pytest.mark.parametrize("where", ["forward", "hooks"])
def test_the_model_is_restored_when_something_raises(where, monkeypatch):
    model = llama()
    model.model.layers[1].train()
    flags = [module.training for module in model.modules()]
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    setting = Setting("t", "c", "p", weights="nvfp4", amaxes=amaxes(model))

    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    if where == "forward":
        monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    else:
        monkeypatch.setattr(model.model.layers[1].mlp.up_proj, "register_forward_pre_hook", fail)
    with pytest.raises(RuntimeError, match="stop"), quantized(model, setting), torch.no_grad():
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight,
                               before["model.layers.0.mlp.up_proj.weight"][2])  # fmt: skip
        model(tokens())
    for name, parameter in model.named_parameters():
        same, pointer, value = before[name]
        assert parameter is same and parameter.data_ptr() == pointer and torch.equal(parameter, value)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert [module.training for module in model.modules()] == flags


# ------------------------------------------------------------------------------------------ refusals


def test_a_linear_without_a_site_is_refused_by_name():
    model = llama()
    model.model.layers[0].mlp.extra = torch.nn.Linear(64, 64)
    message = "end-to-end evaluation does not cover model.layers.*.mlp.extra (1 in all): its forward"
    with raises(message):
        find_linears(model)


def test_experts_are_refused_by_name():
    message = (
        "end-to-end evaluation does not cover model.layers.*.mlp.gate (2 in all): MixtralTopKRouter"
    )
    with raises(message), quantized(tiny_model("Mixtral"), Setting("t", "c", "p", rule=PER_TOKEN)):
        pass


def test_a_kind_that_the_model_lacks_is_refused(model):
    setting = Setting("t", "c", "p", only="x_proj_input", rule=PER_TOKEN)
    message = (
        "only is 'x_proj_input'; expected a kind or a label of the model's sites, such as ['layers.0."
    )
    with raises(message), quantized(model, setting):
        pass


def test_a_weight_that_is_stored_turned_is_quantized_along_its_input():
    model = tiny_model("GPT-2")
    linear = model.transformer.h[0].mlp.c_proj  # a Conv1D, [in, out]
    weight = linear.weight.detach().clone()
    with quantized(model, Setting("t", "c", "p", rule=PER_TOKEN, weights="nvfp4")):
        got = linear.weight.detach().clone()
    scale = fp32(weight.abs().max().item() / 2688)
    rows = reference(weight.T.contiguous(), scale, "floor", weight.dtype, np.float32)
    assert torch.equal(got, rows.view(weight.T.shape).T) and not torch.equal(got, weight)
    assert torch.equal(linear.weight, weight)


def test_a_linear_that_is_not_called_is_refused_by_name():
    model = llama()
    model.model.layers[1].mlp.forward = lambda x: x
    message = "end-to-end evaluation does not cover model.layers.*.mlp.gate_proj,"
    with raises(message):
        evaluate(model, tokens(), uncalibrated_settings("t"), progress=False)


def test_missing_amaxes_are_refused_by_name(model):
    calibrated = amaxes(model)
    del calibrated["layers.1.mlp_input"]
    with raises(
        "the setting 't / c / p / flush / bf16' has no amax for 1 sites, ['layers.1.mlp_input']"
    ):
        evaluate(model, tokens(), [Setting("t", "c", "p", amaxes=calibrated)], progress=False)


def test_a_soft_cap_is_refused():
    model = gemma(final_logit_softcapping=2.0)
    with raises("A soft cap or a factor on logits is not supported."):
        evaluate(model, tokens(), uncalibrated_settings("t"), progress=False)


def test_infinite_activations_are_refused_by_setting():
    model = llama()
    model.model.layers[1].input_layernorm.weight.data[3] = torch.inf
    setting = Setting("t", "c", "p", amaxes=dict.fromkeys(LABELS, 1.0))
    with raises("an activation is NaN or infinite under ['t / c / p / flush / bf16']"):
        evaluate(model, tokens(), [setting], progress=False)
    with raises("an activation is NaN"), torch.no_grad(), quantized(model, setting):
        model(tokens())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(only="lm_head"), "only is 'lm_head'; expected '', a kind of site such as 'mlp_input'"),
        (dict(weights="int4"), "weights is 'int4'; expected one of 'bf16', 'nvfp4'."),
        (dict(rule="magic"), "rule is 'magic'; expected one of 'static'"),
        (dict(underflow="drop"), "underflow is 'drop'; expected 'flush'"),
        (dict(rule=PER_TOKEN), "the rule 'dynamic per token' was given 1 amaxes; expected one per site"),
        (dict(amaxes={}), "the rule 'static' was given 0 amaxes"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with raises(message):
        Setting("t", "c", "p", **{"amaxes": {"layers.0.mlp_input": 1.0}} | changes)


def test_wrong_tokens_and_equal_labels_are_refused(model):
    settings = uncalibrated_settings("t")
    with pytest.raises(TypeError, match=r"expected torch.int64. Call tokens.long\(\)\."):
        evaluate(model, tokens().int(), settings)
    with raises("tokens have shape (3, 1); expected [sequences, T]"):
        evaluate(model, tokens()[:, :1], settings)
    with raises("2 settings, with equal labels ['t / none / flush / bf16']"):
        evaluate(model, tokens(), [settings[0]] * 2)


# -------------------------------------------------------------------------------------------- tables


def some_settings(model):
    calibrated = amaxes(model)
    policies = {"amax": calibrated, FOUR_OVER_SIX: {k: 1.75 * a for k, a in calibrated.items()}}
    return policy_settings("t", {"c": policies}) + uncalibrated_settings("t", weights="nvfp4")


def test_policies_take_their_quantizer(model):
    rules = {(s.policy, s.rule) for s in some_settings(model)}
    assert rules == {("amax", STATIC), *((r, r) for r in (FOUR_OVER_SIX, PER_SEQUENCE, PER_TOKEN, NONE))}


def test_an_interrupted_evaluation_goes_on_and_equals_an_uninterrupted_one(model, tmp_path, monkeypatch):
    settings, calls = some_settings(model), []
    plain = end_to_end.evaluate

    def counted(model, tokens, settings, **options):
        calls.append(settings[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(model, tokens, settings, **options)

    options = dict(group=2, batch=2, token_snr=True, progress=False)
    evaluate_to(tmp_path / "whole", model, tokens(), settings, **options)
    monkeypatch.setattr(end_to_end, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_to(tmp_path / "parts", model, tokens(), settings, **options)
    assert not (tmp_path / "parts/end_to_end.parquet").exists()
    for _ in range(2):  # the second time there is nothing left to do
        evaluate_to(tmp_path / "parts", model, tokens(), settings, **options)
        assert calls == [settings[i].name for i in (0, 2, 4, 4, 6, 8)]
    for name in ("end_to_end", "end_to_end_sequences", "end_to_end_snr"):
        whole, parts = (pd.read_parquet(tmp_path / f / f"{name}.parquet") for f in ("whole", "parts"))
        pd.testing.assert_frame_equal(whole, parts)


def test_the_tables(model, tmp_path):
    settings = some_settings(model)
    evaluate_to(tmp_path, model, tokens(), settings, token_snr=True, progress=False)
    keys = ["test", "calibration", "policy", "underflow", "weights", "only"]
    table = pd.read_parquet(tmp_path / "end_to_end.parquet")
    sequences = pd.read_parquet(tmp_path / "end_to_end_sequences.parquet")
    assert list(table) == [*keys, "sequences", "nll", "kl", "kl_p999", "top1", "low", "high"]
    assert list(sequences) == [*keys, "sequence", "kl", "nll", "top1"]
    assert [tuple(row) for row in table[keys].to_numpy()] == [s.key for s in settings]
    assert set(sequences[["kl", "nll", "top1"]].dtypes) == {np.dtype("float32")}
    found = evaluate(model, tokens(), settings, token_snr=True, progress=False)
    assert sequences.kl.to_numpy() == pytest.approx(found.kl.flatten().numpy(), rel=1e-6)
    assert table.kl.to_numpy() == pytest.approx(found.kl.mean(1).numpy(), rel=1e-6)
    # The interval, draw by draw: one resample of sequences serves every setting.
    times = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=2000)
    for kl, row in zip(found.kl.numpy(), table.itertuples(), strict=True):
        draws = [float(np.average(kl, weights=weight)) for weight in times]
        assert (row.low, row.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), rel=1e-5)
    snr = pd.read_parquet(tmp_path / "end_to_end_snr.parquet")
    assert len(snr) == (len(settings) - 1) * len(LABELS)  # none where activations are left alone


def test_token_snr_is_the_mean_over_tokens_in_db(model):
    setting = Setting("t", "c", "p", amaxes=amaxes(model))
    seen, handles = inputs_of_linears(model)
    with torch.no_grad():
        model(tokens())
    for handle in handles:
        handle.remove()
    x = dict(seen)["layers.0.self_attn.q_proj"].flatten(0, 1)
    y = direct_quantize(x, setting, "layers.0.attention_input")
    energy, error = (v.double().square().sum(1).numpy() for v in (x, y.double() - x.double()))
    expected = np.mean(10 * np.log10(energy / error))
    found = evaluate(model, tokens(), [setting], batch=1, token_snr=True, progress=False)
    at = found.sites.index("layers.0.attention_input")
    assert float(found.token_snr_db[0, at]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("what", ["tokens", "amax"])
def test_a_folder_of_other_settings_or_tokens_is_refused_by_name(model, tmp_path, what):
    settings = some_settings(model)[:1]
    evaluate_to(tmp_path, model, tokens(), settings, progress=False)
    if what == "tokens":
        with raises("000.parquet was made with other tokens; expected the same."):
            evaluate_to(tmp_path, model, tokens(4), settings, progress=False)
    else:
        other = dataclasses.replace(settings[0], amaxes=dict.fromkeys(LABELS, 1.0))
        with raises("was made with other setting t / c / amax / flush / bf16; expected the same."):
            evaluate_to(tmp_path, model, tokens(), [other], progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_agrees_with_the_cpu(model):
    settings = some_settings(model) + sweep_settings("t", "d", amaxes(model), [-2, 14])
    cpu = evaluate(model, tokens(), settings, progress=False)
    gpu = evaluate(llama().cuda(), tokens(), settings, progress=False)
    # Sums in another order flip codes here and there.
    torch.testing.assert_close(cpu.kl.mean(1), gpu.kl.mean(1), rtol=0.2, atol=1e-3)
    torch.testing.assert_close(cpu.nll.mean(1), gpu.nll.mean(1), rtol=0.02, atol=0)
