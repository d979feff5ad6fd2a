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
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #ffffff; --line: #d0d7de; --soft: #f2f5f8;
  --accent: #0b6e4f; --quiet: #57606a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #14181d; --line: #3b434d;
  --soft: #1e242b; --accent: #5fd0a5; --quiet: #a3adb8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; font-size: 1.25rem; } h3 { font-size: 1.05rem; }
code { background: var(--soft); padding: .1em .3em; border-radius: 3px; }
.admonition { border-left: 5px solid var(--accent); background: var(--soft); padding: .6rem 1rem; border-radius: 4px; }
.admonition-title { font-size: 1.3rem; font-weight: 700; margin: .2rem 0 .6rem; }
table { border-collapse: collapse; font-size: .82rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right; vertical-align: top;
  overflow-wrap: normal; white-space: nowrap; }
table.wrap th, table.wrap td { text-align: left; white-space: normal; min-width: 7rem; }
tbody th { text-align: left; font-weight: 600; }
figure { margin: 1rem 0; } figure img { background: #fff; width: 100%; border-radius: 4px; }
figcaption, em { color: var(--quiet); font-size: .88rem; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; font-size: .8rem; white-space: pre-wrap; }
"""


def write_page(folder: Path) -> Path:
    """Execute the notebook on ``folder/report.json`` and write ``folder/report.html``; returns its path.

    Raises ``RuntimeError`` with the notebook's error if it fails.
    """
    executed = folder / "parts" / "page.ipynb"
    path = (folder / "report.json").resolve()
    command = [sys.executable, str(ROOT / "scripts/execute_notebook.py"), str(NOTEBOOK), str(executed),
               "-p", "report", repr(str(path))]  # fmt: skip
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
    config = Config({
        "TemplateExporter": exclude,
        "TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": [BOOK_ONLY]},
        "HTMLExporter": {"exclude_anchor_links": True},
    })  # fmt: skip
    body, _ = HTMLExporter(template_name="basic", config=config).from_notebook_node(notebook)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>NVFP4 input_scale for {html.escape(model)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n<article>\n{body}\n</article>\n</body></html>\n"
    )
