# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""What an unfinished stage keeps in side files: captured statistics, and the sites that are done.

A site's numbers follow from its statistics alone. So a stage that is broken off after its capture goes
on with the sites that are left, and gives the numbers that it would have given.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from nvfp4_utils.histogram import CODE_BITS
from nvfp4_utils.statistics import ActivationStatistics, SiteStatistics

from .store import read_table, replacing, write_table

FOLDER = "unfinished"
LEVEL = 1  # of compression: the files live as long as their stage
Tables = dict[str, pd.DataFrame]


def keep(folder: Path, sites: dict[str, SiteStatistics]) -> None:
    """Write every site's statistics, one Parquet file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for site, statistics in sites.items():
        groups = [group.to("cpu") for group in statistics.groups]
        number = torch.repeat_interleave(
            torch.arange(len(groups), dtype=torch.int32), torch.tensor([len(g.keys) for g in groups])
        )
        keys = torch.cat([g.keys for g in groups])
        columns = {
            "group": number,
            "block_amax_code": (keys >> CODE_BITS).to(torch.int16),
            "element_code": (keys & (2**CODE_BITS - 1)).to(torch.int16),
            "count": torch.cat([g.counts for g in groups]),
        }
        about = {
            "group_size": statistics.group_size,
            "groups": len(groups),
            "dtype": str(groups[0].dtype).removeprefix("torch."),
            "sequence_amax": statistics.sequence_amax.tolist(),
        }
        table = pa.table({name: column.numpy() for name, column in columns.items()})
        table = table.replace_schema_metadata({"about": json.dumps(about)})
        with replacing(folder / f"{site}.parquet") as part:
            pq.write_table(
                table, part, compression="zstd", compression_level=LEVEL, write_page_checksum=True
            )


def statistics(folder: Path, site: str, device) -> SiteStatistics:
    """What ``keep`` wrote of a site, on a device."""
    table = pq.read_table(folder / f"{site}.parquet", page_checksum_verification=True)
    about = json.loads(table.schema.metadata[b"about"])
    group, block, element, counts = (torch.from_numpy(table[i].to_numpy().copy()) for i in range(4))
    sizes = torch.bincount(group, minlength=about["groups"]).tolist()
    keys = block.to(torch.int64) << CODE_BITS | element.to(torch.int64)
    groups = [
        ActivationStatistics(getattr(torch, about["dtype"]), k.to(device), c.to(device))
        for k, c in zip(keys.split(sizes), counts.split(sizes), strict=True)
    ]
    amaxes = torch.tensor(about["sequence_amax"], dtype=torch.float64)
    return SiteStatistics(about["group_size"], groups, amaxes)


def kept(folder: Path, sites: Iterable[str]) -> bool:
    """Whether the statistics of all sites are there and whole."""
    try:
        for site in sites:
            statistics(folder, site, "cpu")
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return False
    return True


def each_site(folder: Path, sites: list[str], function: Callable[[str], Tables], what: str) -> Tables:
    """The tables that ``function`` gives of every site, joined; sites that are done are read instead.

    Several sites at once: their operations are small and release the lock. An error names its site.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(site: str) -> None:
        if (folder / site).is_dir():
            return
        try:
            tables = function(site)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{site}: {error}") from error
        part = folder / f"{site}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name, table in tables.items():
            write_table(table, part / f"{name}.parquet", LEVEL)
        part.rename(folder / site)  # all of its tables at once

    workers = 8 if torch.cuda.is_available() else torch.get_num_threads()
    pool = ThreadPoolExecutor(workers)
    try:
        for _ in tqdm(pool.map(one, sites), total=len(sites), desc=what):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # a stop does not wait for sites that have not begun
    names = [file.stem for file in sorted((folder / sites[0]).iterdir())]
    return {name: pd.concat([read_table(folder / site / f"{name}.parquet") for site in sites],
                            ignore_index=True) for name in names}  # fmt: skip


def forget(folder: Path) -> None:
    """Delete a stage's side files."""
    shutil.rmtree(folder, ignore_errors=True)
