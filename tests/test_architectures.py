# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""On every architecture, capture counts what plain hooks see, and no linear is left out unsaid."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

transformers = pytest.importorskip("transformers")

from nvfp4_utils import ActivationStatistics, capture, find_coverage, hooked  # noqa: E402
from studies.runs import architectures  # noqa: E402
from studies.runs.architectures import ARCHITECTURES, tiny_model  # noqa: E402

each = pytest.mark.parametrize("name", ARCHITECTURES)


def made(name):
    model, config, _ = ARCHITECTURES[name]
    if not (hasattr(transformers, model) and hasattr(transformers, config)):
        pytest.skip(f"this transformers has no {config}")
    return tiny_model(name)


def linear_like(model) -> set[str]:
    """Counted here anew: linears, GPT-2's Conv1D, experts' parameters, and routers."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D):
            found |= {name} if module is not head else set()
        elif type(module).__name__.endswith(("Experts", "NaiveMoe", "MoE_Experts")):
            found |= {f"{name}.{n}" for n, p in module.named_parameters() if p.ndim == 3}
        elif type(module).__name__.endswith(("Router", "TopkRouter")):
            found.add(name)
    return found


def batch_of(model) -> dict:
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, 50, (3, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 50, (3, 6), generator=generator)
    return batch


def by_hand(experts, hidden, routes):
    """What each choice of each token gives the down projection, [tokens * k, width]."""
    tokens, k = routes.shape
    rows = {}
    for expert in range(len(experts.down_proj)):
        chosen = [(t, p) for p in range(k) for t in range(tokens) if routes[t, p] == expert]
        if not chosen:
            continue
        x = hidden[[t for t, _ in chosen]]
        weight = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[expert]
        y = x @ weight if experts.is_transposed else functional.linear(x, weight)
        y = y + experts.gate_up_proj_bias[expert] if experts.has_bias else y
        y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
        rows |= {t * k + p: row for (t, p), row in zip(chosen, y, strict=True)}
    return torch.stack([rows[i] for i in range(tokens * k)])


def seen_by_hand(model, batch, coverage):
    """Site -> its activation, and of experts inside which expert each row went to, by plain hooks."""
    seen, handles = {}, []

    def note(site):
        def hook(module, args, kwargs):
            tensors = [v for v in (*args, *kwargs.values()) if torch.is_tensor(v)]
            inside = site.form == "within"
            x = by_hand(module, *tensors[:2]) if inside else tensors[0]
            seen[site.label] = x.clone(), tensors[1] if inside else None

        return hook

    for site in coverage.sites.values():
        module = next(iter(site.readers.values()))
        handles.append(module.register_forward_pre_hook(note(site), with_kwargs=True))
    with torch.no_grad():
        output = model(**batch)
    for handle in handles:
        handle.remove()
    return seen, output[0]


@each
def test_capture_counts_what_plain_hooks_see(name):
    model = made(name)
    coverage = find_coverage(model)
    readers = [reader for site in coverage.sites.values() for reader in site.readers]
    assert len(set(readers)) == len(readers) and not set(readers) & set(coverage.uncovered)
    assert {*readers, *coverage.uncovered} == linear_like(model)
    configs = [m.config for m in model.modules() if hasattr(m, "_apply_gate")]
    default = [config._experts_implementation for config in configs]
    batch = batch_of(model)
    found = capture(model, [batch], coverage.sites, group_size=2, progress=False)
    assert [config._experts_implementation for config in configs] == default
    for config in configs:
        config._experts_implementation = "eager"
    seen, expected = seen_by_hand(model, batch, coverage)
    with hooked(model, coverage.sites, lambda label, x: None), torch.no_grad():
        assert torch.equal(model(**batch)[0], expected)  # the model computes what eager does
    assert set(found) == set(seen) == set(coverage.sites)
    for label, (x, routes) in seen.items():
        x = x.reshape(3, -1, x.shape[-1])
        got = found[label]
        for group, part in zip(got.groups, x.split(2), strict=True):
            counted = ActivationStatistics.from_tensor(part)
            assert torch.equal(group.keys, counted.keys) and torch.equal(group.counts, counted.counts)
        assert got.sequence_amax.tolist() == x.float().abs().flatten(1).amax(1).tolist()
        if routes is None:
            assert got.expert_tokens is None and got.expert_amax is None
            continue
        rows = x.reshape(-1, x.shape[-1]).float().abs().amax(1)
        chosen = routes.flatten().tolist()
        experts = coverage.sites[label].experts
        assert got.expert_tokens.tolist() == [chosen.count(e) for e in range(experts)]
        assert got.expert_amax.tolist() == [
            max([r for r, e in zip(rows.tolist(), chosen, strict=True) if e == expert], default=0.0)
            for expert in range(experts)
        ]
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@each
def test_the_stored_table_is_what_is_found(name):
    stored = json.loads(architectures.TABLE.read_text())
    assert stored[name] == architectures.row(find_coverage(made(name)))


def test_the_page_shows_the_stored_table():
    rows = json.loads(architectures.TABLE.read_text())
    assert list(rows) == list(ARCHITECTURES)
    page = architectures.PAGE.read_text()
    assert architectures.with_table(page, rows) == page
