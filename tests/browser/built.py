# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""Where `make book` leaves the pages, and which there are."""

from pathlib import Path

HTML = Path(__file__).resolve().parents[2] / "build/book/_build/html"


def built_pages() -> list[str]:
    """Every page of the book, its address below the root; not the one that only leads to the first."""
    found = (p.relative_to(HTML).as_posix() for p in sorted(HTML.rglob("*.html")))
    return [
        name for name in found if not name.startswith(("_static/", "_sources/")) and name != "index.html"
    ]
