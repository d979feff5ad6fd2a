# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Which activations are sites, what capture refuses, and totals, groups and amaxes of a plain loop."""

import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

transformers = pytest.importorskip("transformers")

from nvfp4_utils import ActivationStatistics, capture, find_coverage, find_sites, hooked  # noqa: E402
from nvfp4_utils.sites import kind_of, layer_of  # noqa: E402
from studies.runs.architectures import tiny_model  # noqa: E402

WIDTH, WORDS = 32, 20


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}")


def same(a, b) -> bool:
    return torch.equal(a.keys, b.keys) and torch.equal(a.counts, b.counts)


def tokens(sequences, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, WORDS, (sequences, length), generator=generator)


class Decoder(nn.Module):
    """Embeds tokens and runs layers on them."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.bfloat16().eval()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Mixture(nn.Module):
    """Experts as modules. ``choose`` says which expert each of [tokens] goes to; the last gets none."""

    def __init__(self, experts=4):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH, bias=False) for n in ("w1", "w2", "w3")})
            for _ in range(experts)
        )

    def choose(self, x):
        return (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, result = self.choose(flat), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero()[:, 0]
            if len(at):
                rows = flat[at]
                hidden = nn.functional.silu(expert["w1"](rows)) * expert["w3"](rows)
                result[at] = expert["w2"](hidden)
        return result.view_as(x)


@pytest.fixture(scope="module")
def model():
    return tiny_model("Llama")


# ------------------------------------------------------------------------------------- what is a site


def test_labels_are_taken_apart_in_one_place():
    assert kind_of("decoder.layers.3.encoder_attn.o_proj_input") == "o_proj_input"
    assert layer_of("decoder.layers.3.encoder_attn.o_proj_input") == 3
    assert layer_of("layers.12.mlp_input") == 12 and layer_of("project_in_input") is None


def test_linears_that_read_one_tensor_share_a_site():
    sites = find_sites(tiny_model("Phi"))  # attention and MLP side by side
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"]
    assert list(sites["layers.0.attention_input"].readers) == [f"model.layers.0.{n}" for n in names]
    assert "layers.0.mlp_input" not in sites


def test_memory_that_was_written_in_between_is_another_activation():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.fc1, self.gate_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            first = self.up_proj(x) + self.gate_proj(x.view(1, *x.shape)[0])
            x += 1
            return first + self.fc1(x)

    sites = find_sites(Decoder(Residual()))
    readers = [[name.rpartition(".")[2] for name in site.readers] for site in sites.values()]
    assert readers == [["up_proj", "gate_proj"], ["fc1"]]
    assert list(sites) == ["layers.0.up_proj_input", "layers.0.fc1_input"]


def test_a_site_is_named_by_kind_label_or_pattern_and_as_often_as_one_likes(model):
    module = r"model\.layers\.1\.mlp\.up_proj"
    names = ["mlp_input", "layers.0.down_proj_input", "mlp_input", module, r".*layers\.1\.mlp\.up_proj"]
    found = find_sites(model, names)
    assert set(found) == {"layers.0.mlp_input", "layers.1.mlp_input", "layers.0.down_proj_input",
                          "model.layers.1.mlp.up_proj"}  # fmt: skip
    counted = capture(model, [tokens(2, 5)], found, progress=False)
    assert same(counted["model.layers.1.mlp.up_proj"].total, counted["layers.1.mlp_input"].total)


def test_two_modules_of_one_label_are_refused_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.mlp_input = nn.Linear(WIDTH, WIDTH), nn.Identity()

        def forward(self, x):
            return self.mlp_input(self.gate_proj(x))

    message = (
        "layers.0.gate_proj and layers.0.mlp_input would both be 'layers.0.mlp_input'; expected one "
        "module per label."
    )
    with raises(ValueError, message):
        find_sites(Decoder(Named()), ["mlp_input", r"layers\.0\.mlp_input"])


def test_stacks_and_branches_have_labels_of_their_own():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x):
            return self.branches[1](self.branches[0](x))

    decoder = Decoder(Branches())
    decoder.other = decoder.layers  # the same modules under a second name
    decoder.more_layers = nn.ModuleList([Branches()])
    decoder.bfloat16()
    coverage = find_coverage(decoder)
    assert list(coverage.sites) == [f"layers.layers.0.branches_{i}_input" for i in range(2)]
    reason = "its forward is not called when the model reads text"
    assert coverage.uncovered == {f"more_layers.0.branches.{i}": reason for i in range(2)}


def test_what_is_not_covered_is_listed_before_anything_runs():
    mamba = tiny_model("Mamba")
    message = (
        "not counted: backbone.layers.*.mixer.dt_proj (2 in all): its forward is not called when the "
        "model reads text"
    )

    def batches():
        assert [str(w.message) for w in caught] == [message]
        yield tokens(2, 5)

    with pytest.warns(UserWarning) as caught:
        found = capture(mamba, batches(), progress=False)
    assert "layers.0.x_proj_input" in found and not [k for k in found if "dt_proj" in k]


def test_widths_and_types_that_no_block_fits_are_not_covered():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.back, self.full = (
                nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), nn.Linear(WIDTH, WIDTH).float())  # fmt: skip

        def forward(self, x):
            return self.back(self.narrow(x)) + self.full(x.float()).to(x.dtype)

    decoder = Decoder(Odd())
    decoder.layers[0].full.float()
    coverage = find_coverage(decoder)
    assert list(coverage.sites) == ["layers.0.narrow_input"]
    assert coverage.uncovered == {
        "layers.0.back": "it reads 24 values per token, no multiple of 16",
        "layers.0.full": "it reads float32, not bfloat16 or float16",
    }


def test_finding_sites_is_not_heard_by_what_is_hooked_already(model):
    heard = []
    with hooked(model, ["mlp_input"], lambda label, x: heard.append(tuple(x.shape))):
        capture(model, [tokens(3, 5)], progress=False)
    assert heard == [(3, 5, 64)] * 2


# -------------------------------------------------------------------------- experts that are modules


def expected_of_experts(decoder, batches, layer=0):
    """Rows that each expert's w1 and w2 see, sequence by sequence, with plain hooks."""
    seen = {}
    handles = [
        expert[role].register_forward_pre_hook(
            lambda m, args, key=(role, i): seen.setdefault(key, []).append(args[0].clone())
        )
        for i, expert in enumerate(decoder.layers[layer].experts)
        for role in ("w1", "w2")
    ]
    with torch.no_grad():
        for batch in batches:
            decoder(batch)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


def test_experts_that_are_modules_are_pooled_and_reported():
    decoder = Decoder(Mixture(), Mixture(3))
    ids = tokens(7, 6)
    found = capture(decoder, ids.split(4), group_size=3, progress=False)
    kinds = ["mlp_input", "down_proj_input"]
    assert list(found) == [f"layers.{i}.{kind}" for i in range(2) for kind in kinds]
    assert len(find_sites(decoder)["layers.0.mlp_input"].readers) == 8
    for kind, role in zip(kinds, ("w1", "w2"), strict=True):
        site = found[f"layers.0.{kind}"]
        rows = expected_of_experts(decoder, [ids])
        counts = [len(rows.get((role, i), ())) for i in range(4)]
        assert site.expert_tokens.tolist() == counts and counts[3] == 0 and sum(counts) == 42
        assert site.expert_amax[3] == 0 and len(site.sequence_amax) == 7
        assert bool(site.sequence_amax.isnan().all())
        for i in range(3):
            assert site.expert_amax[i] == rows[role, i].float().abs().max()
        for group, part in zip(site.groups, ids.split(3), strict=True):
            every = expected_of_experts(decoder, [part])
            seen = torch.cat([x for (r, _), x in every.items() if r == role])
            assert same(group, ActivationStatistics.from_tensor(seen))


def test_an_expert_that_is_reached_late_is_counted():
    decoder = Decoder(Mixture())
    chosen = decoder.layers[0].choose(decoder.embed.weight)
    words = [int((chosen == i).nonzero()[0, 0]) for i in range(3)]
    batches = [torch.tensor([[words[0]]]), torch.tensor([[words[0]]]), torch.tensor([[words[2]]])]
    found = capture(decoder, batches, group_size=2, progress=False)["layers.0.mlp_input"]
    assert found.expert_tokens.tolist() == [2, 0, 1, 0]
    assert [group.count for group in found.groups] == [2 * WIDTH, WIDTH]
    with raises(ValueError, "layers.0.experts.0.w1 saw "):
        capture(decoder, [tokens(3, 6)], [r"layers\.0\.experts\.\d\.w1"], progress=False)


def test_padding_is_refused_at_experts_that_are_modules():
    batch = {"input_ids": tokens(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    message = "a batch has 1 tokens of padding; expected none at ['layers.0.mlp_input',"
    with raises(ValueError, message):
        capture(Decoder(Mixture()), [batch], progress=False)


# ------------------------------------------------------------------- sequences seen and sequences fed


def test_fused_experts_keep_sequences_and_padding_apart():
    mixture = tiny_model("Qwen2-MoE")
    ids, mask = tokens(6, 8), torch.ones(6, 8, dtype=torch.long)
    mask[1, 3:] = mask[4, 5:] = 0
    batches = [{"input_ids": i, "attention_mask": m}
               for i, m in zip(ids.split(2), mask.split(2), strict=True)]  # fmt: skip
    coverage = find_coverage(mixture)
    found = capture(mixture, batches, coverage.sites, group_size=4, progress=False)
    real = int(mask.sum())
    for label, site in found.items():
        assert len(site.sequence_amax) == 6 and len(site.groups) == 2
        inside = coverage.sites[label].form == "within"
        width = {"down_proj_input": 32 if inside else 64}.get(kind_of(label), 64)
        assert site.total.count == real * width * (2 if inside else 1)
        assert site.expert_tokens is None or int(site.expert_tokens.sum()) == 2 * real


def test_another_forward_inside_a_capture_is_refused(model):
    def nested(last):
        for i, batch in enumerate(tokens(4, 5).split(2)):
            yield batch
            if i == last:
                capture(model, [batch], ["down_proj_input"], progress=False)

    for last, seen in ((0, 6), (1, 6)):
        with raises(ValueError, f"layers.0.mlp_input saw {seen} sequences of 4; expected each once."):
            capture(model, nested(last), ["mlp_input"], progress=False)


def test_two_threads_on_one_model_are_refused(model):
    started, outcomes = threading.Barrier(2), []

    def batches():
        for batch in tokens(4, 5).split(2):
            started.wait(60)
            yield batch

    def run():
        try:
            outcomes.append(capture(model, batches(), ["mlp_input"], progress=False))
        except ValueError as error:
            started.abort()
            outcomes.append(str(error))
        except threading.BrokenBarrierError:
            outcomes.append("stopped")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [o for o in outcomes if isinstance(o, str) and "expected each once" in o]
    assert not [o for o in outcomes if isinstance(o, dict)]


# -------------------------------------------------------------------------------- what a batch may be


def test_every_form_of_a_batch_counts_the_same(model):
    ids = tokens(3, 6)
    expected = capture(model, [ids], ["mlp_input"], progress=False)
    ones = torch.ones_like(ids)
    for batch in (
        {"input_ids": ids, "attention_mask": None},
        {"input_ids": ids, "use_cache": False},
        {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
        transformers.BatchEncoding({"input_ids": ids, "attention_mask": ones}),
        {"input_ids": ids, "attention_mask": ones.bool()},
    ):
        found = capture(model, [batch], ["mlp_input"], progress=False)
        for label, site in found.items():
            assert same(site.total, expected[label].total)
            assert site.sequence_amax.tolist() == expected[label].sequence_amax.tolist()


IDS = tokens(2, 4)


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        ({"input_ids": IDS}, TypeError, "batches is one dict; expected a list of batches."),
        (IDS, ValueError, "a batch holds {'input_ids': [4]}; expected input_ids [sequences, tokens] or"),
        (["text"], TypeError, "input_ids of a batch is a str; expected a tensor or a dict of them."),
        ([{"input_ids": [[1, 2]]}], TypeError, "input_ids of a batch is a list; expected a tensor"),
        ([{"attention_mask": IDS}], ValueError, "a batch holds {'attention_mask': [2, 4]}; expected"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(2, 4, 4)}], ValueError,
         "attention_mask has shape [2, 4, 4]; expected [2, 4], one number per token, 0 for padding."),
        ([{"input_ids": IDS, "attention_mask": torch.ones(2, 3)}], ValueError,
         "attention_mask has shape [2, 3]; expected [2, 4]"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros(2, 4).long()}] * 2, ValueError,
         "all tokens of 4 sequences are padding; expected some with attention_mask 1."),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused(model, batches, kind, message):
    with raises(kind, message):
        capture(model, batches, ["mlp_input"], progress=False)


def test_a_group_of_padding_alone_adds_nothing(model):
    mask = torch.ones(4, 4, dtype=torch.long)
    mask[3] = 0
    batch = {"input_ids": tokens(4, 4), "attention_mask": mask}
    found = capture(model, [batch], ["mlp_input"], group_size=3, progress=False)["layers.0.mlp_input"]
    assert [group.count for group in found.groups] == [3 * 4 * 64, 0]
    assert same(found.total, found.groups[0]) and found.sequence_amax[3] == 0


def test_padding_of_a_decoder_is_its_own():
    bart = tiny_model("BART (encoder-decoder)")
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with raises(
        ValueError, "a batch has an attention_mask but neither decoder_input_ids nor decoder_att"
    ):
        capture(bart, [batch], progress=False)
    decoder_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    batch |= {"decoder_input_ids": tokens(3, 3, 1), "decoder_attention_mask": decoder_mask}
    found = capture(bart, [batch], progress=False)
    assert found["encoder.layers.1.mlp_input"].total.count == 16 * 64
    assert found["decoder.layers.1.mlp_input"].total.count == 6 * 64
    assert found["decoder.layers.0.k_proj_input"].total.count == 16 * 64  # of the encoder's output


def test_values_that_are_not_finite_are_reported_with_their_site(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight.data.clone()
    weight.data[0, 0] = torch.nan
    try:
        with raises(ValueError, "layers.1.down_proj_input: x holds 8 values that are NaN or infinite;"):
            capture(model, [IDS], progress=False)
    finally:
        weight.data = kept


# ------------------------------------------------------------------------------------- any batches


class Twice(nn.Module):
    """Two sites, one of them given [sequences * tokens, width]."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).flatten(0, 1)).view_as(x)


TWICE = Decoder(Twice())
lengths_of_batches = st.lists(
    st.integers(1, 5).flatmap(lambda n: st.tuples(st.lists(st.integers(0, 6), min_size=n, max_size=n),
                                                  st.booleans())),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths_of_batches, st.integers(1, 7), st.integers(0, 5))
def test_totals_groups_and_amaxes_are_those_of_a_plain_loop(lengths, group_size, seed):
    batches, sequences = [], []
    for part, left in lengths:
        longest = max(*part, 1)
        ids = tokens(len(part), longest, seed)
        place = torch.arange(longest)
        mask = torch.stack([place >= longest - n if left else place < n for n in part])
        batches.append({"input_ids": ids, "attention_mask": mask.long()})
        sequences += [row[kept] for row, kept in zip(ids, mask, strict=True)]
    if not any(map(len, sequences)):
        with raises(ValueError, f"all tokens of {len(sequences)} sequences are padding"):
            capture(TWICE, batches, group_size=group_size, progress=False)
        return
    found = capture(TWICE, batches, group_size=group_size, progress=False)
    with torch.no_grad():  # a token's activation does not depend on the others here
        inputs = [TWICE.embed(s) for s in sequences]
        hidden = [TWICE.layers[0].gate_proj(TWICE.embed.weight)[s] for s in sequences]
    for label, rows in (("layers.0.mlp_input", inputs), ("layers.0.down_proj_input", hidden)):
        site = found[label]
        amaxes = [r.float().abs().max().item() if len(r) else 0.0 for r in rows]
        assert site.sequence_amax.tolist() == amaxes
        groups = [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
        assert len(site.groups) == len(groups)
        for group, part in zip(site.groups, groups, strict=True):
            x = torch.cat(part)
            expected = ActivationStatistics.from_tensor(x) if len(x) else ActivationStatistics()
            assert same(group, expected)
        assert same(site.total, ActivationStatistics.from_tensor(torch.cat(rows)))
