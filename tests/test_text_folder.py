# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A folder of one's own text: whole files, files that take turns, errors that name file and line."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from transformers import AutoTokenizer

from studies import ROOT
from studies.data.text_folder import RECORD_CHARACTERS, text_records
from studies.report.texts import read_text


def test_records_hold_all_text_and_files_take_turns(tmp_path):
    paragraphs = [f"{i} " * 700 for i in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "b.jsonl.gz", "wt") as file:
        for i in range(3):
            file.write(json.dumps({"messages": [{"role": "user", "content": str(i)}]}) + "\n\n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    records = list(text_records(tmp_path))
    texts = [r for r in records if "text" in r]
    assert "".join(r["text"] for r in texts).split() == " ".join(paragraphs).split()
    assert len(texts) > 1 and all(len(r["text"]) < 2 * RECORD_CHARACTERS for r in texts)
    assert [m["messages"][0]["content"] for m in records if "messages" in m] == ["0", "1", "2"]
    assert {"text" in r for r in records[:2]} == {True, False}
    assert len({r["id"] for r in records}) == len(records)
    assert records == list(text_records(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"other": 1}\n',
            'line 2: expected an object with "text" or "messages"',
        ),
        ("a.jsonl", b'{"text": "x"}\nno json\n', "line 2: Expecting value"),
        ("a.txt", b"\xff\xfe\xfa", "line 0: 'utf-8' codec can't decode"),
        ("a.txt.gz", gzip.compress(b"x" * 9999)[:20], "damaged or truncated gzip"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{re.escape(message)}"):
        list(text_records(tmp_path))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no text; expected files named"):
        list(text_records(tmp_path))


def test_calibration_and_held_out_sequences_share_no_record(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.md").write_text(f"file{i} " * 100)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "reference")
    options = dict(calibration=8, held_out=4, length=64, begin=[])
    found = read_text(str(tmp_path), tokenizer, **options)
    assert (found.calibration.shape, found.test.shape) == ((8, 64), (4, 64))
    seen = [set(re.findall(r"file\d+", tokenizer.decode(t.flatten().tolist())))
            for t in (found.calibration, found.test)]  # fmt: skip
    whole = [{f for f in files if f"{f} {f}" in tokenizer.decode(t.flatten().tolist())}
             for files, t in zip(seen, (found.calibration, found.test), strict=True)]  # fmt: skip
    assert whole[0] and whole[1] and not whole[0] & whole[1]
    with pytest.raises(ValueError, match="too few sequences of 64 tokens"):
        read_text(str(tmp_path), tokenizer, **options | {"held_out": 4000})
