# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Mixes: quotas, disjoint zones, balanced order, and errors that name the stream and the fix."""

import gzip
import json
import random
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from studies.data import corpora
from studies.data.corpora import sequences
from studies.data.mixes import EMBEDDED_MIX, FOLDER_STREAMS, MIXES, STAND_INS, Member, Stream, quotas

EOS = "<|end|>"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that token counts are known and texts come back exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    made.chat_template = TEMPLATE
    return made


def write(path, records):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)


def prose(name, n, size=200):
    """Return records of text that name their rank in the order of ids, shuffled in the file."""
    records = [{"id": f"{i:016x}", "text": f"<{name}{i:05d}>".ljust(size, ".")} for i in range(n)]
    random.Random(0).shuffle(records)
    return records


def chat(name, n, size=200):
    return [
        {"id": r["id"], "messages": [{"role": "user", "content": r["text"]}]}
        for r in prose(name, n, size)
    ]


def ranks(tokenizer, rows):
    """Return (name, rank) of every record named in the rows."""
    text = "".join(tokenizer.decode(rows.flatten().tolist()))
    return [(name, int(rank)) for name, rank in re.findall(r"<([a-z_]+)(\d{5})>", text)]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Four folder streams with reserves of 4 and 2 sequences of 32 tokens, in two mixes."""
    monkeypatch.setattr(corpora, "RESERVE_LENGTH", 32)
    streams = [
        Stream(n, "folder", n, field=f, calibration_reserve=4, test_reserve=2)
        for n, f in (("a", "text"), ("b", "text"), ("c", "messages"), ("d", "text"))
    ]
    a, b, c, d = streams
    monkeypatch.setattr(corpora, "FOLDER_STREAMS", {s.name: s for s in streams})
    monkeypatch.setitem(MIXES, "wide", (Member("plain", (a, b)), Member("chat", (c,))))
    monkeypatch.setitem(MIXES, "narrow", (Member("plain", (a,)), Member("other", (d,))))
    monkeypatch.setitem(MIXES, "single", (Member("plain", (a,)),))
    for name in "abd":
        write(tmp_path / f"{name}.jsonl.gz", prose(name, 40, size=50))
    write(tmp_path / "c.jsonl.gz", chat("c", 40, size=50))
    return tmp_path


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


# -------------------------------------------------------------------------------------- quotas


@pytest.mark.parametrize("total", [0, 1, 7, 255, 1024])
@pytest.mark.parametrize("mix", MIXES)
def test_quotas_add_up_to_the_total(mix, total):
    assert sum(map(sum, quotas(total, MIXES[mix]))) == total


def test_remainders_go_to_the_first_member_and_to_the_last_stream():
    assert quotas(1023, MIXES["cnn_nemotron_v2_mix"]) == [[512], [127, 127, 127, 130]]
    seven = quotas(1024, MIXES["nemotron-post-training-v3"])
    assert [sum(q) for q in seven] == [148, 146, 146, 146, 146, 146, 146]
    assert seven[2] == [36, 36, 36, 38]
    assert seven[6] == [8] * 17 + [10]


def test_the_hub_mixes_are_the_studys():
    found = {
        mix: {m.name: [(s.source, s.split or s.data_files) for s in m.streams] for m in MIXES[mix]}
        for mix in STAND_INS
    }
    v2 = "nvidia/Nemotron-Post-Training-Dataset-v2"
    assert found["cnn_nemotron_v2_mix"] == {
        "cnn": [("abisee/cnn_dailymail", "train")],
        "nemotron-v2": [(v2, s) for s in ("stem", "chat", "math", "code")],
    }
    assert found["chat-only"] == {"chat": [(v2, "chat")]}
    seven = found["nemotron-post-training-v3"]
    assert [len(s) for s in seven.values()] == [1, 2, 4, 1, 5, 1, 18]
    assert seven["agentic"] == [("nvidia/Nemotron-SFT-Agentic-v2", "data/search*.jsonl")]
    assert set(STAND_INS.values()) <= set(MIXES)


@pytest.mark.parametrize("mix", MIXES)
def test_reserves_hold_a_mix_at_1024_and_256_but_for_the_small_sources(mix):
    small = {"open-code-only", EMBEDDED_MIX}
    calibration, test = quotas(1024, MIXES[mix]), quotas(256, MIXES[mix])
    fits = all(
        n <= s.calibration_reserve and t <= s.test_reserve
        for member, ns, ts in zip(MIXES[mix], calibration, test, strict=True)
        for s, n, t in zip(member.streams, ns, ts, strict=True)
    )
    assert fits == (mix not in small)


# --------------------------------------------------------------------------- zones and the order


def test_calibration_test_and_training_follow_one_another_without_a_shared_record(small, tokenizer):
    result = sequences("wide", tokenizer, calibration=8, test=4, length=32, folder=small,
                       progress=False)  # fmt: skip
    assert result.calibration.shape == (8, 32) and result.calibration.dtype == torch.int32
    assert result.test.shape == (4, 32) and result.shortfall == {}
    training = [
        (n, int(r))
        for text in corpora.training_text(tokenizer, folder=small)
        for n, r in re.findall(r"<([a-z_]+)(\d{5})>", text)
    ]
    for name in "abc":
        first = [r for n, r in ranks(tokenizer, result.calibration) if n == name]
        second = [r for n, r in ranks(tokenizer, result.test) if n == name]
        third = [r for n, r in training if n == name]
        assert first == sorted(first) and first[0] == 0 and second
        assert max(first) < min(second) and max(second) < min(third)
        assert third == list(range(third[0], 40))


def test_zones_do_not_depend_on_the_mix_the_counts_or_the_length(small, tokenizer):
    def test_records(mix, **counts):
        rows = sequences(mix, tokenizer, folder=small, progress=False, **counts).test
        return [r for n, r in ranks(tokenizer, rows) if n == "a"]

    first = test_records("wide", calibration=8, test=4, length=32)[0]
    assert test_records("narrow", calibration=2, test=2, length=32)[0] == first
    assert test_records("single", calibration=0, test=1, length=64)[0] == first


def test_sequences_join_the_rendered_records_and_drop_nothing(small, tokenizer):
    rows = sequences("single", tokenizer, calibration=4, test=0, length=32, folder=small,
                     progress=False).calibration  # fmt: skip
    whole = "".join(r["text"] + EOS for r in sorted(prose("a", 9, 50), key=lambda r: r["id"]))
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"][: 4 * 32]
    assert rows.flatten().tolist() == ids


def test_messages_go_through_the_chat_template(small, tokenizer):
    texts = list(corpora.training_text(tokenizer, folder=small))
    assert f"[user] {'<c00039>'.ljust(50, '.')}\n{EOS}" in texts
    assert f"{'<a00039>'.ljust(50, '.')}{EOS}" in texts


def test_a_tool_turn_speaks_for_the_user_when_there_is_none(tokenizer):
    stream = FOLDER_STREAMS["swe"]
    messages = [{"role": "assistant", "content": "ls"}, {"role": "tool", "content": "x"}]
    [(_, text, _)] = corpora._texts([{"id": "0", "messages": messages}], stream, tokenizer)
    assert text == f"[assistant] ls\n[user] x\n{EOS}"


def test_several_answers_to_one_prompt_stay_in_one_zone(small, tokenizer):
    records = [
        {"id": f"{i * 17 % 60:016x}", "messages": [
            {"role": "user", "content": f"<q{i % 20:05d}>"}, {"role": "assistant", "content": "y"}
        ]}
        for i in range(60)
    ]  # fmt: skip
    write(small / "c.jsonl.gz", records)
    stream = corpora.FOLDER_STREAMS["c"]
    zones: dict[str, set[str]] = {}
    for zone, text, _ in corpora._zoned(corpora.folder_records(stream, small), stream, tokenizer):
        zones.setdefault(text[:15], set()).add(zone)
    assert len(zones) == 20 and all(len(z) == 1 for z in zones.values())
    assert set.union(*zones.values()) == {"calibration", "test", "training"}


def test_every_prefix_holds_a_balanced_mix(small, tokenizer):
    result = sequences("wide", tokenizer, calibration=8, test=4, length=32, folder=small,
                       progress=False)  # fmt: skip
    assert result.calibration_source == ["plain/a", "chat/c", "plain/b", "chat/c"] * 2
    assert result.test_source == ["plain/a", "chat/c", "plain/b", "chat/c"]
    for n in range(9):
        members = [s.split("/")[0] for s in result.calibration_source[:n]]
        assert abs(members.count("plain") - members.count("chat")) <= 1
    for source, row in zip(result.calibration_source, result.calibration, strict=True):
        assert all(n == source[-1] for n, _ in ranks(tokenizer, row))


def test_provenance_names_the_file_and_the_tokens(small, tokenizer):
    def run():
        return sequences("wide", tokenizer, calibration=4, test=2, length=32, folder=small,
                         progress=False)  # fmt: skip

    provenance = run().provenance
    assert provenance == run().provenance and json.loads(json.dumps(provenance)) == provenance
    assert {k: provenance[k] for k in ("mix", "calibration", "test", "length")} == {
        "mix": "wide", "calibration": 4, "test": 2, "length": 32,
    }  # fmt: skip
    stream = provenance["streams"]["plain/a"]
    assert len(stream["file_sha256"]) == len(stream["calibration"]["sha256"]) == 64
    assert stream["calibration"]["sequences"] == 1


# ------------------------------------------------------------------------------------ shortfall


def test_a_stream_that_ends_early_is_an_error_that_names_it(small, tokenizer):
    write(small / "b.jsonl.gz", prose("b", 2, size=50))  # 102 tokens: three sequences, no test
    message = (
        "mix 'wide' has too few sequences of 32 tokens: calibration:plain/b got 3, wanted 4; "
        "test:plain/b got 0, wanted 1. Ask for fewer calibration or test sequences, or pass "
        "allow_shortfall=True to record the shortfall."
    )
    roomy = replace(corpora.FOLDER_STREAMS["c"], calibration_reserve=8)
    MIXES["wide"] = (MIXES["wide"][0], Member("chat", (roomy,)))  # the fixture restores it
    arguments = {"calibration": 15, "test": 4, "length": 32, "folder": small, "progress": False}
    with raises(ValueError, message):
        sequences("wide", tokenizer, **arguments)
    result = sequences("wide", tokenizer, allow_shortfall=True, **arguments)
    assert result.shortfall == {"calibration:plain/b": (3, 4), "test:plain/b": (0, 1)}


def test_more_than_the_reserve_is_an_error_before_anything_is_read(tokenizer, tmp_path):
    message = (
        "mix 'open-code-only' has too few sequences of 512 tokens: calibration:code/code got 180, "
        "wanted 1024; test:code/code got 48, wanted 256. Ask for fewer calibration or test "
        "sequences, or pass allow_shortfall=True to record the shortfall."
    )
    with raises(ValueError, message):
        sequences("open-code-only", tokenizer, folder=tmp_path / "absent")


# ------------------------------------------------------------------------------------ bad input


def read(small, tokenizer, mix="single", **arguments):
    counts = {"calibration": 2, "test": 1, "length": 32, "folder": small, "progress": False}
    return sequences(mix, tokenizer, **{**counts, **arguments})


def test_unknown_mixes_and_bad_counts_are_refused(small, tokenizer):
    with raises(ValueError, f"unknown mix 'c4'. Known mixes: {', '.join(MIXES)}."):
        read(small, tokenizer, mix="c4")
    message = (
        "got calibration=0, test=0, length=32; expected counts of at least 0, not both 0, and a "
        "length of at least 1."
    )
    with raises(ValueError, message):
        read(small, tokenizer, calibration=0, test=0)


def test_a_missing_folder_or_file_points_to_the_embedded_mix(small, tokenizer):
    absent = small / "absent"
    message = (
        f"corpora folder {absent} does not exist; stream 'a' is a.jsonl.gz in it, one record of text "
        f"per line. Set NVFP4_CORPORA or pass folder=, or use the embedded mix 'python-library', which "
        f"needs no files."
    )
    with raises(FileNotFoundError, message):
        read(absent, tokenizer)
    (small / "a.jsonl.gz").unlink()
    message = (
        f"corpora folder {small} has no a.jsonl.gz. Add the file, or use the embedded mix "
        f"'python-library', which needs no files."
    )
    with raises(FileNotFoundError, message):
        read(small, tokenizer)


def test_truncated_gzip_names_the_file_and_the_line(small, tokenizer):
    path = small / "a.jsonl.gz"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 12])
    pattern = (
        rf"^{re.escape(str(path))}, after line \d+: damaged or truncated gzip \(Compressed file "
        r"ended before the end-of-stream marker was reached\)\. Fetch it again\.$"
    )
    with pytest.raises(ValueError, match=pattern):
        read(small, tokenizer)
    path.write_bytes(b"plain text")
    message = (
        f"{path}, after line 0: damaged or truncated gzip (Not a gzipped file (b'pl')). Fetch it again."
    )
    with raises(ValueError, message):
        read(small, tokenizer)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": ', "Expecting value: line 2 column 1 (char 8)"),
        ("[1]", 'expected an object with a string "id"'),
        ('{"text": "x"}', 'expected an object with a string "id"'),
        ('{"id": "1"}', "expected a string under 'text', got keys ['id']"),
        ('{"id": "1", "text": 3}', "expected a string under 'text', got keys ['id', 'text']"),
    ],
)
def test_bad_records_name_the_file_and_the_line(small, tokenizer, line, reason):
    path = small / "a.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.write('{"id": "0", "text": "fine"}\n' + line + "\n")
    with raises(ValueError, f"{path}, line 2: {reason}"):
        read(small, tokenizer)


def test_messages_without_a_chat_template_are_refused(small, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    message = (
        "stream 'c' holds chat messages but the tokenizer has no chat template. Set "
        "tokenizer.chat_template or choose a mix of plain text."
    )
    with raises(ValueError, message):
        read(small, bare, mix="wide", calibration=4, test=4)
    assert read(small, bare).calibration.shape == (2, 32)
    bare.eos_token = None
    with raises(ValueError, "the tokenizer has no eos_token, which ends every record. Set it."):
        read(small, bare)


# ---------------------------------------------------------------------------- embedded and hub


def test_the_embedded_mix_needs_no_files_and_repeats(tokenizer, tmp_path):
    def run():
        return sequences("python-library", tokenizer, calibration=8, test=4, length=128,
                         folder=tmp_path / "absent", progress=False)  # fmt: skip

    first, second = run(), run()
    assert torch.equal(first.calibration, second.calibration)
    assert torch.equal(first.test, second.test) and first.provenance == second.provenance
    assert first.calibration_source == ["documentation/documentation", "source/source"] * 4
    assert "assert" in tokenizer.decode(first.calibration[0].tolist())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve every hub data set locally and record what was asked for."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    visited: list[tuple] = []
    load = datasets.load_dataset

    def rows(name, field):
        for i in range(12):
            text = f"<{name.lower()}{i:05d}>".ljust(3000, ".")
            yield {field: [{"role": "user", "content": text}] if field == "messages" else text}

    def fake(path, name=None, *, split, streaming, revision=None, data_files=None):
        assert streaming
        visited.append((path, name, split, data_files))
        if path == "text":  # the same builder, on local files
            file = tmp_path / "search_0.jsonl"
            # rows of different types under one key, which a typed JSON reader refuses
            lines = [{**r, "tools": i if i % 2 else [str(i)]}
                     for i, r in enumerate(rows("search", "messages"))]  # fmt: skip
            file.write_text("".join(json.dumps(r) + "\n" for r in lines))
            return load("text", data_files=str(tmp_path / "search*.jsonl"), split=split,
                        streaming=True, cache_dir=str(tmp_path / "cache"))  # fmt: skip
        assert revision == "abc123"
        field = "article" if path == "abisee/cnn_dailymail" else "messages"
        return datasets.IterableDataset.from_generator(
            rows, gen_kwargs={"name": split.replace("0", "o").replace("1", "i"), "field": field}
        )

    class Info:
        sha = "abc123"

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Info())
    monkeypatch.setattr(corpora, "RESERVE_LENGTH", 8)
    return visited


@pytest.mark.parametrize("mix", STAND_INS)
def test_hub_mixes_visit_every_split(hub, tokenizer, mix):
    streams = [(m.name, s) for m in MIXES[mix] for s in m.streams]
    result = sequences(mix, tokenizer, calibration=126, test=0, length=8, progress=False)
    assert len(hub) == len(streams)
    for (path, config, split, files), (_, stream) in zip(hub, streams, strict=True):
        if stream.data_files:
            url = f"hf://datasets/{stream.source}@abc123/{stream.data_files}"
            assert (path, split, files) == ("text", "train", url)
        else:
            assert (path, config, split) == (stream.source, stream.config, stream.split)
    assert set(result.calibration_source) == {f"{m}/{s.name}" for m, s in streams}
    origins = result.provenance["streams"].values()
    assert {o["revision"] for o in origins} == {"abc123"}


def test_a_hub_failure_names_the_data_set_and_the_stand_in(hub, tokenizer, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise PermissionError("401")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = (
        "could not read nvidia/Nemotron-Post-Training-Dataset-v2 (chat) from the Hugging Face hub: "
        "PermissionError: 401. It may be gated (accept its terms and log in) and it needs a "
        "network; the open stand-in mix is open-chat-only or open-news-instruct."
    )
    with raises(OSError, message):
        sequences("chat-only", tokenizer, calibration=4, test=0, length=8, progress=False)


def test_a_sequence_begins_as_inference_begins(small, tokenizer):
    plain = read(small, tokenizer, mix="narrow", length=30)
    begun = read(small, tokenizer, mix="narrow", length=32, begin=(7, 8))
    assert (begun.calibration[:, :2] == torch.tensor([7, 8])).all()
    assert torch.equal(begun.calibration[:, 2:], plain.calibration)
    assert torch.equal(begun.test[:, 2:], plain.test)
    assert begun.provenance["begin"] == [7, 8]


def test_one_record_per_sequence_is_cut_or_filled_up(small, tokenizer):
    packed = read(small, tokenizer, mix="single", length=16, calibration=3)
    single = read(small, tokenizer, mix="single", length=16, calibration=3, packed=False, begin=(7,))
    assert single.calibration.shape == (3, 16) and (single.calibration[:, 0] == 7).all()
    assert (packed.calibration_lengths == 16).all()
    # The first record is the first packed text; it ends with the end-of-sequence token.
    assert torch.equal(single.calibration[0, 1:16], packed.calibration[0, :15])
    for row, n in zip(single.calibration, single.calibration_lengths.tolist(), strict=True):
        assert 1 < n <= 16 and (row[n:] == tokenizer.eos_token_id).all()


def test_without_a_folder_the_error_says_how_to_get_text(tokenizer, monkeypatch):
    monkeypatch.delenv("NVFP4_CORPORA", raising=False)
    message = (
        "no corpora folder is set; stream 'chat' is chat.jsonl.gz in it, one record of text per line. "
        "Set NVFP4_CORPORA or pass folder=, or use the embedded mix 'python-library', which needs no "
        "files."
    )
    with raises(FileNotFoundError, message):
        sequences("open-chat-only", tokenizer, calibration=1, test=1, progress=False)
