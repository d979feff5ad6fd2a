# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The tokenizer that a GGUF file describes, rebuilt from its vocabulary.

What transformers 5.17 builds from the two files of `studies.data.models` is not what the models were
trained with: Gemma's text falls into single characters, and SmolLM2's end-of-sequence token is its
beginning-of-sequence one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kinds of pieces in `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
FIELDS = ("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "bos_token_id",
          "eos_token_id", "unknown_token_id", "padding_token_id")  # fmt: skip


def read_fields(path: Path) -> dict[str, Any]:
    """Return what a GGUF file says of its tokenizer: `FIELDS`, chat template and context length."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    names = {f"tokenizer.ggml.{name}": name for name in FIELDS}
    names["tokenizer.chat_template"] = "chat_template"
    names |= {key: "context_length" for key in reader.fields if key.endswith(".context_length")}
    return {name: reader.fields[key].contents() for key, name in names.items() if key in reader.fields}


def merges_by_score(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every split of every normal piece into two pieces, the highest score first.

    A SentencePiece vocabulary keeps a score a piece instead of the merges that made it.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece))) if kind == NORMAL else ()
        splits = [(left, right) for left, right in halves if left in ids and right in ids]
        splits.sort(key=lambda split: (ids[split[0]], ids[split[1]]))
        found += [(score, split) for split in splits]
    found.sort(key=lambda item: -item[0])  # stable: the splits of one piece keep their order
    return [split for _, split in found]


def _sentencepiece(fields: dict[str, Any], vocabulary: dict[str, int]) -> Any:
    """Return a BPE tokenizer whose words begin with ▁ and whose rare characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges_by_score(fields["tokens"], fields["scores"], fields["token_type"]),
            unk_token=fields["tokens"][fields["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _byte_level(fields: dict[str, Any], vocabulary: dict[str, int]) -> Any:
    """Return a byte-level BPE tokenizer that keeps every digit apart, as SmolLM's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if fields["pre"] != "smollm":
        raise ValueError(
            f"got the pre-tokenizer {fields['pre']!r}, expected 'smollm'; add its splits to {__name__}"
        )
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BUILDERS = {"llama": _sentencepiece, "gpt2": _byte_level}


def tokenizer_from_gguf(path: str | Path) -> Any:
    """Return the transformers tokenizer of a GGUF file.

    Control pieces are special tokens; user-defined pieces are found in the text before anything is
    split; text begins with the beginning-of-sequence token where the file says so.

    Raises
    ------
    ValueError
        If the file's tokenizer is of a kind that is not known here.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    fields = read_fields(Path(path))
    if fields.get("model") not in BUILDERS:
        raise ValueError(
            f"{path} has a tokenizer of kind {fields.get('model')!r}; expected one of {sorted(BUILDERS)}"
        )
    pieces = fields["tokens"]
    tokenizer = BUILDERS[fields["model"]](fields, {piece: i for i, piece in enumerate(pieces)})
    added = [
        AddedToken(piece, normalized=False, special=kind == CONTROL)
        for piece, kind in zip(pieces, fields["token_type"], strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if fields.get("add_bos_token"):
        bos = fields["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[bos]} $A", pair=f"{pieces[bos]} $A $B", special_tokens=[(pieces[bos], bos)]
        )
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": pieces[fields[f"{long}_token_id"]]
        for long, short in names.items()
        if f"{long}_token_id" in fields
    }
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=fields["context_length"],
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
    result.chat_template = fields.get("chat_template")
    return result
