# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The report as one HTML file that fetches nothing."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from traitlets.config import Config

from studies import ROOT

from .words import load

NOTEBOOK = ROOT / "notebooks" / "your_model.ipynb"
BOOK_ONLY = "book-only"  # tag of cells that speak to a reader of the book
STYLE = Path(__file__).with_name("report.css")


def write_page(folder: Path) -> Path:
    """Execute the notebook on ``folder/report.json`` and write ``folder/report.html``; returns its path.

    Raises ``RuntimeError`` with the notebook's error if it fails.
    """
    executed = folder / "parts" / "page.ipynb"
    path = (folder / "report.json").resolve()
    command = [
        sys.executable,
        str(ROOT / "scripts/execute_notebook.py"),
        str(NOTEBOOK),
        str(executed),
        "-p",
        "report",
        repr(str(path)),
    ]
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | backend)
    if done.returncode:
        raise RuntimeError(f"the page could not be made of {path}:\n{done.stderr[-2000:]}")
    page = folder / "report.html"
    part = page.with_suffix(".partial")
    part.write_text(as_html(nbformat.read(executed, as_version=4), load(path)["model"]["name"]))
    part.replace(page)
    return page


def as_html(notebook, model: str) -> str:
    """An executed notebook as a page: outputs and prose, no code, nothing from another host."""
    from nbconvert import HTMLExporter

    exclude = dict.fromkeys(("exclude_input", "exclude_input_prompt", "exclude_output_prompt"), True)
    config = Config(
        {
            "TemplateExporter": exclude,
            "TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": [BOOK_ONLY]},
            "HTMLExporter": {"exclude_anchor_links": True},
        }
    )
    body, _ = HTMLExporter(template_name="basic", config=config).from_notebook_node(notebook)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>NVFP4 input_scale for"
        f" {html.escape(model)}</title>\n<style>{STYLE.read_text()}</style></head>\n"
        f"<body>\n<article>\n{body}\n</article>\n</body></html>\n"
    )
