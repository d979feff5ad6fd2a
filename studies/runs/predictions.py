# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Next-token distributions of a model under several settings, compared some tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.functional import linear

from nvfp4_utils.forward import evaluation_mode

from .quantized import Sites

# Logits of this size, float32, are made at once; four such tensors live at a time.
LOGITS_BYTES = {"cuda": 2**29, "cpu": 2**26}


def last_hidden(model, tokens: torch.Tensor) -> torch.Tensor:
    """What the head reads, [sequences, T, width]."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def head_logits(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits [tokens, vocabulary] of hidden states [tokens, width].

    Not rounded to bfloat16 in between: beyond 16 that is an error of variance 0.125**2 / 12, and alone
    would put two models up to 1e-3 nats apart.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)  # accumulated so anyhow
        return logits if head.bias is None else logits.add_(head.bias)
    return linear(
        hidden.float(), head.weight.float(), head.bias if head.bias is None else head.bias.float()
    )


def compare(head: nn.Linear, states: Sequence[torch.Tensor], following: torch.Tensor) -> torch.Tensor:
    """KL, NLL and agreement of each token, float32 [3, len(states) - 1, tokens].

    ``states``: last hidden states [tokens, width], the unquantized model's first; ``following``: the
    next token of each.
    """
    result = torch.empty(3, len(states) - 1, len(following), device=following.device)
    at_once = max(1, LOGITS_BYTES[following.device.type] // (4 * head.out_features))
    for start in range(0, len(following), at_once):
        part = slice(start, start + at_once)
        log_p = head_logits(head, states[0][part]).log_softmax(-1)
        p, best = log_p.exp(), log_p.argmax(-1)
        for i, state in enumerate(states[1:]):
            log_q = head_logits(head, state[part]).log_softmax(-1)
            kl, nll, top1 = result[:, i, part]
            nll.copy_(-log_q.gather(-1, following[part, None])[:, 0])
            top1.copy_(log_q.argmax(-1) == best)
            kl.copy_(torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1))
    return result


def check_model(model, sites: Sites, tokens: torch.Tensor) -> None:
    """Refuse a model with a linear that is not called, or logits that are not its head's.

    A linear that runs without its forward, as in a fused kernel, would go unquantized unseen; a soft cap
    or a factor on the logits would be lost. ``tokens`` [1, few].
    """
    linears = {name: module for group in sites.values() for name, module in group.items()}
    called: set[str] = set()
    tokens = tokens.to(next(model.parameters()).device)
    with torch.no_grad(), evaluation_mode(model), ExitStack() as stack:
        for name, module in linears.items():
            hook = module.register_forward_pre_hook(lambda m, args, name=name: called.add(name))
            stack.callback(hook.remove)
        expected = model(input_ids=tokens, use_cache=False).logits[0].float()
        got = head_logits(model.get_output_embeddings(), last_hidden(model, tokens)[0])
    idle = [name for name in linears if name not in called]
    if idle:
        raise ValueError(
            f"{len(idle)} linears are never called, {idle[:3]}; expected all to run their forward. "
            "Load the model without fused kernels, such as attn_implementation='eager'."
        )
    difference, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    if difference > 2**-6 * largest:  # four roundings to bfloat16
        raise ValueError(
            f"the model's logits differ by {difference:.3g} from head(last hidden state), of at most "
            f"{largest:.3g}; expected equal ones. A soft cap or a factor on logits is not supported."
        )
