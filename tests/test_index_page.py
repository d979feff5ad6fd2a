# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The README states what the stored results say, to the character."""

from studies.pages import index, loss_tables


def test_readme_block_is_computed_from_the_stored_results():
    begin, end = index.MARKERS
    block = index.README.read_text().split(begin)[1].split(end)[0].strip()
    assert block == index.readme_block(loss_tables.models("", index.RUNS)), (
        "run python -m studies.pages.index"
    )
    assert index.FIGURE.is_file()
