# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The notebook sources are clean, and scripts/execute_notebook.py fails when it should."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CELLS = 45
MAX_FUNCTION_LINES = 10

each_notebook = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]


@each_notebook
def test_source_carries_no_outputs(path: Path) -> None:
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@each_notebook
def test_kernel_is_python3(path: Path) -> None:
    assert load(path)["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook
def test_exactly_one_cell_is_tagged_parameters(path: Path) -> None:
    tags = [cell["metadata"].get("tags", []) for cell in load(path)["cells"]]
    assert sum("parameters" in names for names in tags) == 1


@each_notebook
def test_notebook_is_short(path: Path) -> None:
    assert len(load(path)["cells"]) <= MAX_CELLS


@each_notebook
def test_functions_are_short(path: Path) -> None:
    for cell in code_cells(path):
        # IPython's % and ! lines are not Python; `pass` keeps the line count.
        source = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


def test_contents_list_the_notebooks_and_only_those() -> None:
    contents = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    listed = re.findall(r"(?:root|file): notebooks/(\S+)", contents)
    assert sorted(listed) == [path.stem for path in SOURCES]


def write_notebook(path: Path, code: list[str], tagged: int = 1) -> Path:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("papermill")
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    for cell in cells[:tagged]:
        cell.metadata["tags"] = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def execute(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/execute_notebook.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_unknown_parameter_is_refused_and_the_known_ones_named(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "page.ipynb", ["scale = 1.0\nrun: str = ''"])
    result = execute(source, tmp_path / "out.ipynb", "-p", "scael", "2.0")
    assert result.returncode == 1
    assert result.stderr == (
        "error: page.ipynb: unknown parameter 'scael'; its parameters cell has: scale, run\n"
    )
    assert not (tmp_path / "out.ipynb").exists()


def test_text_without_quotes_is_refused(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "page.ipynb", ["run = ''"])
    result = execute(source, tmp_path / "out.ipynb", "-p", "run", "live")
    assert result.returncode == 1
    assert result.stderr == (
        "error: page.ipynb: parameter 'run' got live, expected a Python literal; "
        "quote text, as in -p run '\"live\"'\n"
    )


@pytest.mark.parametrize("tagged", [0, 2])
def test_exactly_one_parameters_cell_is_required(tmp_path: Path, tagged: int) -> None:
    source = write_notebook(tmp_path / "page.ipynb", ["a = 1", "b = 2"], tagged=tagged)
    result = execute(source, tmp_path / "out.ipynb")
    assert result.returncode == 1
    assert result.stderr == (
        f"error: page.ipynb: {tagged} cells are tagged `parameters`, expected exactly one; "
        "tag the cell that holds the notebook's settings\n"
    )


@pytest.mark.parametrize("tags", [[], ["raises-exception"]], ids=["plain", "raises-exception"])
def test_failing_cell_fails_and_leaves_no_output(tmp_path: Path, tags: list[str]) -> None:
    source = write_notebook(tmp_path / "page.ipynb", ["a = 1", "raise KeyError('lost')"])
    content = load(source)
    content["cells"][1]["metadata"]["tags"] = tags
    source.write_text(json.dumps(content), encoding="utf-8")
    output = tmp_path / "out.ipynb"
    output.write_text("the last build's page", encoding="utf-8")
    result = execute(source, output)
    assert result.returncode == 1
    assert "KeyError" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["page.ipynb"]


def test_literals_keep_their_type_and_the_kernel_runs_in_the_root(tmp_path: Path) -> None:
    code = ["rate = 1.0\nrun = ''", "import os\nprint(repr(rate), repr(run), os.getcwd())"]
    source = write_notebook(tmp_path / "page.ipynb", code)
    result = execute(source, tmp_path / "out.ipynb", "-p", "rate", "1e-3", "--run", "1e3")
    assert result.returncode == 0, result.stderr
    outputs = [cell["outputs"] for cell in code_cells(tmp_path / "out.ipynb")]
    assert "".join(outputs[-1][0]["text"]) == f"0.001 '1e3' {ROOT}\n"


def test_nbstripout_as_the_hook_runs_it_keeps_the_parameters_tag(tmp_path: Path) -> None:
    pytest.importorskip("nbstripout")
    source = write_notebook(tmp_path / "page.ipynb", ["a = 1"])
    hook = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    match = re.search(r"entry: \.venv/bin/nbstripout (.*)", hook)
    assert match is not None
    subprocess.run([sys.executable, "-m", "nbstripout", *match[1].split(), source], check=True)
    assert code_cells(source)[0]["metadata"]["tags"] == ["parameters"]
