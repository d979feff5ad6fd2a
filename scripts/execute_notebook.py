# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Execute one notebook with papermill from the repository root; any failure leaves no output."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillException

ROOT = Path(__file__).resolve().parents[1]


def declared_parameters(path: Path) -> list[str]:
    """Names assigned in the one cell tagged `parameters`.

    Raises ValueError unless exactly one cell is tagged: papermill itself accepts none or many.
    """
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f"{path.name}: {len(tagged)} cells are tagged `parameters`, expected exactly one; "
            "tag the cell that holds the notebook's settings"
        )
    names = []
    for node in ast.parse(tagged[0].source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def parse_parameters(pairs: list[list[str]], known: list[str], name: str) -> dict[str, Any]:
    """Parse (name, literal) pairs, so that 1e-3 is a float; unknown names raise ValueError."""
    parameters = {}
    for key, text in pairs:
        if key not in known:
            raise ValueError(
                f"{name}: unknown parameter {key!r}; its parameters cell has: {', '.join(known)}"
            )
        try:
            parameters[key] = ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"{name}: parameter {key!r} got {text}, expected a Python literal; "
                f"quote text, as in -p {key} '\"{text}\"'"
            ) from error
    return parameters


def execute(source: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Write the executed notebook to `output`; raise RuntimeError if it recorded an exception."""
    partial = output.with_name(f"{output.stem}.partial.ipynb")
    try:
        # An explicit cwd: papermill would run the kernel wherever it was started itself.
        papermill.execute_notebook(
            str(source), str(partial), parameters, kernel_name="python3", cwd=str(ROOT)
        )
        for cell in nbformat.read(partial, as_version=4).cells:
            # A cell tagged `raises-exception` records one without stopping papermill.
            for result in cell.get("outputs", []):
                if result.output_type == "error":
                    raise RuntimeError(f"{source.name}: {result.ename}: {result.evalue}")
        partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        output.unlink(missing_ok=True)
        raise


def main() -> int:
    """Command line: SOURCE OUTPUT [-p NAME LITERAL]... [--run NAME]."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "LITERAL"))
    parser.add_argument("--run", help="value of the parameter `run`, for notebooks that have it")
    args = parser.parse_args()
    try:
        known = declared_parameters(args.source)
        parameters = parse_parameters(args.p, known, args.source.name)
        if args.run and "run" in known:
            parameters["run"] = args.run
        execute(args.source, args.output, parameters)
    except (ValueError, RuntimeError, PapermillException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
