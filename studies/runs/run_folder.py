# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The folder of a run that is being made: who writes it, what it was begun with, what is whole in it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nvfp4_utils.statistics import ActivationStatistics

from .store import read_table, write_json

BEGUN = "begun.json"  # what an unfinished run was begun with
DONE = "run.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the one writer of a run. The system lets go of the lock when the process ends, however it ends.

    Raises ``OSError`` naming the run and who writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OSError(
            f"the run {path} is being written by {file.read_text() or 'another process'}; expected one "
            "writer. Wait until it has ended, or take another name."
        ) from None
    try:
        now = datetime.datetime.now().isoformat(" ", "minutes")
        file.write_text(f"process {os.getpid()} on {platform.node()}, since {now}")
        yield
    finally:
        lock.release()


def _read(file: Path) -> dict[str, Any] | None:
    """What a run was made with, or None where that cannot be read."""
    try:
        info = json.loads(file.read_text())
        _settings_of(info)
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _settings_of(info: dict) -> dict[str, Any]:
    """What must not change while a run is made, or when mixes are added to it."""
    made = info["provenance"]
    settings = {"mixes": info["mixes"], "code": made["source_sha256"], "device": made["device"]}
    settings["revision of the model"] = info.get("model_revision", "")
    for mix, text in info["texts"].items():
        settings[f"texts of {mix}"] = hashlib.sha256(
            json.dumps(text, sort_keys=True).encode()
        ).hexdigest()
    settings |= {f"{name} of the model": sha for name, sha in info.get("model_files", {}).items()}
    return settings | made["parameters"] | {f"version of {n}": v for n, v in made["versions"].items()}


def check_same(path: Path, info: dict) -> None:
    """Refuse to go on with a run that was made with other settings.

    More mixes may follow those of before. Raises ``ValueError`` naming what differs, or the file that
    should say it but cannot be read.
    """
    files = [path / DONE, path / BEGUN]
    known = {file: _read(file) for file in files if file.exists()}
    others = [p for p in path.iterdir() if p not in files] if path.is_dir() else []
    if known and not any(known.values()) and others:
        raise ValueError(
            f"{' and '.join(map(str, known))} cannot be read; expected what the other files there were "
            "made with. Restore it, or delete the folder to capture the run again."
        )
    new = _settings_of(json.loads(json.dumps(info)))
    for old in map(_settings_of, filter(None, known.values())):
        changed = [f"{k} was {old[k]}, is {new[k]}" for k in old
                   if k in new and k != "mixes" and old[k] != new[k]]  # fmt: skip
        models = [k for k in old.keys() ^ new.keys() if k.endswith(" of the model")]
        changed += [f"{k} was {old.get(k, 'not there')}, is {new.get(k, 'not there')}" for k in models]
        if new["mixes"][: len(old["mixes"])] != old["mixes"]:
            changed.append(
                f"mixes was {','.join(old['mixes'])}, is {','.join(new['mixes'])} (more may follow, in "
                "the same order)"
            )
        if changed:
            raise ValueError(
                f"{path} was captured with other settings: {'; '.join(changed)}. Expected the same: "
                "its files would not fit together. Take another name, or delete the folder to "
                "capture it again."
            )


def begin(path: Path, info: dict) -> None:
    """Note what a run is made with, and delete what a broken-off write has left."""
    path.mkdir(parents=True, exist_ok=True)
    for part in path.rglob("*.partial"):
        if part.is_file():
            part.unlink()
    write_json(info, path / BEGUN)


def finish(path: Path, info: dict, made: bool) -> None:
    """Write ``run.json``, last. Where nothing was ``made``, one that says the same stays as it is."""
    old = _read(path / DONE)
    if made or old is None or _settings_of(old) != _settings_of(json.loads(json.dumps(info))):
        write_json(info, path / DONE)
    (path / BEGUN).unlink()


def whole(files: Iterable[Path]) -> bool:
    """Whether every table or statistic is there and can be read; a damaged one is named."""
    for file in files:
        if not file.is_file():
            return False
        try:
            if file.name.startswith("joint."):
                ActivationStatistics.load(file)
            else:
                read_table(file)
        except ValueError as error:
            print(f"made again: {error}", flush=True)
            return False
    return True
