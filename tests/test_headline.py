# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The README states what the stored results say, to the character."""

from nvfp4_utils import headline


def test_readme_block_is_computed_from_the_stored_results():
    begin, end = headline.MARKERS
    block = headline.README.read_text().split(begin)[1].split(end)[0].strip()
    assert block == headline.readme_block(), "run python -m nvfp4_utils.headline"
    assert headline.FIGURE.is_file()
