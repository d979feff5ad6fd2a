# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The file of a joint histogram: Parquet, checked in full when it is read.

Columns ``block_amax_code``, ``element_code`` (int16) and ``count`` (int64), one row per pair, sorted.
The header holds ``dtype``, ``count`` (of all elements) and ``crc32`` of the pairs and counts.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from .histogram import CODE_BITS, INFINITY_CODE
from .quantize import BLOCK_SIZE

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in INFINITY_CODE}
COLUMNS = {"block_amax_code": "int16", "element_code": "int16", "count": "int64"}
MOST_PAIRS = 2**25  # 0.8 GB in memory; real activations have 1e5 to 2e6


def write_pairs(path, dtype: torch.dtype, keys, counts, metadata: dict[str, str]) -> None:
    """Write sorted keys and counts, int64 CPU tensors; ``metadata`` is added to the header."""
    import pyarrow as pa  # here and below: half of what importing the package would cost
    import pyarrow.parquet as pq

    header = {
        "dtype": str(dtype).removeprefix("torch."),
        "count": str(int(counts.sum())),
        "crc32": _crc32(keys.numpy(), counts.numpy()),
    }
    if header.keys() & metadata.keys():
        raise ValueError(
            f"metadata holds {sorted(header.keys() & metadata.keys())}; expected other names than "
            f"{list(header)}, which say what the file holds. Rename them."
        )
    if len(keys) > MOST_PAIRS:
        raise ValueError(
            f"the statistic has {len(keys)} pairs; expected at most {MOST_PAIRS}, which a file may "
            "hold. Save groups of the data apart."
        )
    codes = (keys >> CODE_BITS, keys & (2**CODE_BITS - 1))
    arrays = [*(code.to(torch.int16).numpy() for code in codes), counts.numpy()]
    table = pa.table(dict(zip(COLUMNS, arrays, strict=True)))
    table = table.replace_schema_metadata(header | metadata)
    # Sorted codes rise by little, and few bytes of a count are used: 40 % less than plain columns.
    encoding = {"element_code": "DELTA_BINARY_PACKED", "count": "BYTE_STREAM_SPLIT"}
    pq.write_table(table, path, compression="zstd", compression_level=12, write_page_checksum=True,
                   use_dictionary=["block_amax_code"], column_encoding=encoding)  # fmt: skip


def read_pairs(path) -> tuple[torch.dtype, torch.Tensor, torch.Tensor]:
    """dtype, sorted keys and counts of what ``write_pairs`` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated or damaged, not a statistic, or says what no tensor can have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no statistic at {path}; expected a Parquet file written by "
            "ActivationStatistics.save. Run the capture that makes it first."
        )
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not 0 < file.metadata.num_rows <= MOST_PAIRS:
                raise ValueError(
                    f"{path} has {file.metadata.num_rows} rows; expected 1 to {MOST_PAIRS}. It is no "
                    "ActivationStatistics of activations, or damaged: capture it again."
                )
            dtype, header = _dtype_and_header(path, file.schema_arrow)
            table = file.read()
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not readable as Parquet ({error}); expected a file written by "
            "ActivationStatistics.save. It may be truncated: capture it again."
        ) from error
    if any(column.null_count for column in table.columns):
        raise ValueError(f"{path} is damaged; expected no missing values. Capture it again.")
    block, element, counts = (column.to_numpy().astype(np.int64) for column in table.columns)
    keys = block << CODE_BITS | element
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    ends = np.append(starts[1:], len(block)) - 1
    of_block = np.add.reduceat(counts, starts)
    # Together these are what a tensor's pairs have to be, and all that they have to be.
    for holds, expected in (
        (block.min() >= 0 and element.min() >= 0, "codes from 0"),
        (block.max() < INFINITY_CODE[dtype], "finite block amaxes"),
        ((element <= block).all(), "no element above its block's amax"),
        ((np.diff(keys) > 0).all(), "sorted pairs without repeats"),
        (counts.min() > 0, "positive counts"),
        (counts.astype(np.float64).sum() < 2.0**63, "counts whose sum fits 64 bits"),
        ((of_block % BLOCK_SIZE == 0).all(), f"counts of whole blocks of {BLOCK_SIZE}"),
        ((block[ends] == element[ends]).all(), "each block amax among its elements"),
        ((counts[ends] >= of_block // BLOCK_SIZE).all(), "each block's amax in each block"),
        (header.get("crc32") in (None, _crc32(keys, counts)), "the pairs of its header's crc32"),
    ):
        if not holds:
            raise ValueError(f"{path} is damaged; expected {expected}. Capture it again.")
    if str(counts.sum()) != header["count"]:
        raise ValueError(
            f"{path} holds {counts.sum()} elements; expected {header['count']} as its "
            "header says. It is damaged: capture it again."
        )
    return dtype, torch.from_numpy(keys), torch.from_numpy(counts)


def _dtype_and_header(path: Path, schema) -> tuple[torch.dtype, dict[str, str]]:
    """Refuse a file with other columns than a statistic's, or without its header."""
    header = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    if schema.names != list(COLUMNS) or header.get("dtype") not in DTYPE_NAMES:
        raise ValueError(
            f"{path} has columns {schema.names} and dtype {header.get('dtype')!r}; "
            f"expected {list(COLUMNS)} and bfloat16 or float16. It is not an ActivationStatistics."
        )
    types = [str(column.type) for column in schema]
    if types != list(COLUMNS.values()):
        raise ValueError(
            f"{path} has columns of types {types}; expected {list(COLUMNS.values())}. It is not an "
            "ActivationStatistics."
        )
    if "count" not in header:
        raise ValueError(
            f"{path} has no 'count' in its header; expected the number of elements. It is not written "
            "by ActivationStatistics.save, or damaged: capture it again."
        )
    return DTYPE_NAMES[header["dtype"]], header


def _crc32(keys: np.ndarray, counts: np.ndarray) -> str:
    return str(zlib.crc32(counts.tobytes(), zlib.crc32(keys.tobytes())))
