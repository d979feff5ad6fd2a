# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What the repository promises about itself: licences, sizes, pins, and an API page in step."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADER = "# SPDX-License-Identifier: Apache-2.0\n# Copyright The NVFP4 Calibration Book authors\n"
MAX_BYTES = 16 * 2**20


def repository_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_python_file_has_the_licence_header() -> None:
    sources = [path for path in repository_files() if path.suffix == ".py"]
    bare = [path for path in sources if not path.read_text(encoding="utf-8").startswith(HEADER)]
    assert bare == []


def test_no_file_exceeds_16_mib() -> None:
    assert [path for path in repository_files() if path.stat().st_size > MAX_BYTES] == []


def test_readme_gives_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make book" in readme
    assert "make test" in readme


@pytest.mark.parametrize(
    "name",
    ["requirements.txt", "requirements-dev.txt", "requirements-browser.txt", "requirements-vllm.txt"],
)
def test_requirements_are_pinned(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert lines
    assert [line for line in lines if not re.match(r"[\w.-]+==[\w.]+(;|$)", line)] == []


def test_api_page_lists_the_public_names_and_only_those() -> None:
    page = ROOT / "book/api.md"
    if not page.exists():
        pytest.skip("book/api.md is not written yet")
    import nvfp4_utils

    text = page.read_text(encoding="utf-8")
    listed = set(re.findall(r"(?m)^#{2,} +`(?:nvfp4_utils\.)?(\w+)`", text))
    listed |= set(re.findall(r"(?m)auto(?:function|class|module):: +nvfp4_utils\.(\w+) *$", text))
    assert listed == set(nvfp4_utils.__all__)
