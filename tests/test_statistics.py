# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""The joint histogram gives the same errors and order statistics as the tensor itself."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from nvfp4_reference import BF16, FP16, FP32, all_regimes, odd_scale

from nvfp4_utils import (
    ActivationStatistics,
    fake_quantize,
    histogram,
    input_scale_from_amax,
    statistic_file,
)
from nvfp4_utils.quantize import UNDERFLOWS


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name: str, dtype) -> torch.Tensor:
    x = normal(64, 256)
    if name == "heavy":
        x = x.sign() * torch.exp(3 * normal(64, 256, seed=1))
        x = x.clamp(-6e4, 6e4)
    elif name == "outlier":  # one value carries nearly all of the signal
        x = x.sign() * torch.exp(normal(64, 256, seed=1))
        x[3, 5] = 3e4
    elif name == "equal":
        x = torch.full((64, 256), 1.25)
    elif name == "sparse":
        x = torch.relu(x - 2)
        x[:, ::3] *= -1
    return x.to(dtype)


NAMES = ("gaussian", "heavy", "outlier", "equal", "sparse")


def direct(x, g, underflow, out_dtype=FP32) -> float:
    y = fake_quantize(x, g, underflow=underflow, out_dtype=out_dtype)
    squares = (y.double() - x.double()).square().numpy()
    return float(squares.sum(dtype=np.longdouble)) / x.numel()


def scales_of(x) -> list[float]:
    """From 2**12 under the amax (all clipped) to past the last underflow; odd and plain scales."""
    amax = x.float().abs().max().item()
    octaves = np.concatenate([np.linspace(-12, 24, 16), [0.0]])
    values = [amax * 2**e / 2688 for e in octaves]
    return values + [odd_scale(v) for v in values[::3]]


def equal(a: ActivationStatistics, b: ActivationStatistics) -> bool:
    return a.dtype == b.dtype and torch.equal(a.keys, b.keys) and torch.equal(a.counts, b.counts)


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


# ------------------------------------------------------------------------------------- the error


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", NAMES)
def test_mse_equals_direct_evaluation(name, dtype, underflow):
    x = make(name, dtype)
    statistics = ActivationStatistics.from_tensor(x)
    scales = scales_of(x)
    found = statistics.mse(scales, underflow)
    expected = [direct(x, g, underflow) for g in scales]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
    assert statistics.mse(scales[2], underflow) == pytest.approx(found[2], rel=1e-13)


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["gaussian", "heavy", "sparse"])
def test_mse_of_16_bit_output_equals_direct_evaluation(name, dtype, underflow):
    x = make(name, dtype)
    scales = scales_of(x)
    found = ActivationStatistics.from_tensor(x).mse(scales, underflow, out_dtype=dtype)
    expected = [direct(x, g, underflow, dtype) for g in scales]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_mse_over_all_regimes_at_once(underflow):
    x = all_regimes(64, 256, BF16, seed=7)
    scales = scales_of(x) + [2.0**e for e in range(-30, 20, 3)]
    found = ActivationStatistics.from_tensor(x).mse(scales, underflow)
    expected = [direct(x, g, underflow) for g in scales]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def test_mse_of_float16_output_stays_finite_where_an_unused_level_overflows():
    x = torch.zeros(2, 16, dtype=FP16)
    x[1] = 1.0
    g = 2.0**15
    found = ActivationStatistics.from_tensor(x).mse(g, "floor", out_dtype=FP16)
    assert found == direct(x, g, "floor", FP16) == 0.5


def test_values_the_format_holds_have_no_error():
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 8).reshape(2, 32).bfloat16()
    statistics = ActivationStatistics.from_tensor(x)
    assert statistics.mse([1.0, 2.0**-8, 2.0**6]).tolist() == [0.0, 0.0, 0.0]
    assert statistics.snr_db(1.0) == math.inf


def test_snr_is_signal_over_error_and_scales_keep_their_shape():
    x = make("gaussian", BF16)
    statistics = ActivationStatistics.from_tensor(x)
    power = x.double().square().mean().item()
    assert statistics.signal_power == pytest.approx(power, rel=1e-14)
    g = torch.tensor([[0.001, 0.002, 0.01], [0.1, 1.0, 10.0]])
    mse, snr = statistics.mse(g), statistics.snr_db(g)
    assert mse.shape == snr.shape == (2, 3) and mse.dtype == np.float64
    np.testing.assert_allclose(snr, 10 * np.log10(power / mse), rtol=1e-13)
    assert isinstance(statistics.mse(0.001), float) and isinstance(statistics.snr_db(0.001), float)


# -------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(
    "name, dtype", [("gaussian", BF16), ("heavy", BF16), ("sparse", BF16), ("sparse", FP16)]
)
def test_any_split_and_order_gives_the_same_statistic(name, dtype):
    x = make(name, dtype)
    whole = ActivationStatistics.from_tensor(x)
    parts = [ActivationStatistics.from_tensor(p) for p in x.reshape(-1, 16).split([1, 199, 824])]
    updated = ActivationStatistics()
    for rows in reversed(x.split(25)):
        assert updated.update(rows) is updated
    merged = ActivationStatistics().merge(parts[2]).merge(parts[0]).merge(parts[1])
    shuffled = x.reshape(-1, 16)[torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    for other in (
        updated,
        merged,
        parts[1] + parts[0] + parts[2],
        ActivationStatistics.merged(parts),
        ActivationStatistics.merged(parts[::-1]),
        ActivationStatistics.from_tensor(shuffled.reshape(16, 4, 256)),
        ActivationStatistics.from_tensor(x.reshape(2, 32, 256).transpose(0, 1)),
    ):
        assert equal(other, whole)
        assert other.mse([0.001, 1.0]).tolist() == whole.mse([0.001, 1.0]).tolist()
    assert parts[0].count == 16  # sums leave their terms alone
    assert whole.count == x.numel()
    assert whole.keys.dtype == whole.counts.dtype == torch.int64


def test_results_follow_an_update():
    x = make("gaussian", BF16)
    statistics = ActivationStatistics.from_tensor(x)
    before = statistics.mse(0.001), statistics.amax
    statistics.update(100 * x)
    assert (statistics.mse(0.001), statistics.amax) != before
    both = torch.cat([x, (100 * x)])
    assert statistics.mse(0.001) == pytest.approx(direct(both, 0.001, "flush"), rel=1e-12)
    assert statistics.amax == both.float().abs().max().item()


def test_counts_beyond_32_bits():
    x = make("gaussian", BF16)
    statistics = ActivationStatistics.from_tensor(x)
    once = statistics.mse([0.001, 0.3]), statistics.percentile(75)
    for _ in range(20):
        statistics = statistics + statistics
    assert statistics.count == x.numel() * 2**20 > 2**31
    np.testing.assert_allclose(statistics.mse([0.001, 0.3]), once[0], rtol=1e-12)
    assert statistics.percentile(75) == once[1]
    huge = ActivationStatistics(BF16, statistics.keys, statistics.counts * 2**20)
    assert huge.count == x.numel() * 2**40
    assert (huge + huge).count == x.numel() * 2**41
    np.testing.assert_allclose(huge.mse([0.001, 0.3]), once[0], rtol=1e-12)


def pairs_of(x: torch.Tensor) -> dict[int, int]:
    codes = (x.contiguous().view(torch.int16) & 0x7FFF).reshape(-1, 16).tolist()
    pairs: dict[int, int] = {}
    for block in codes:
        for code in block:
            key = max(block) << 15 | code
            pairs[key] = pairs.get(key, 0) + 1
    return pairs


@pytest.mark.parametrize("cells", [0, 2**14, 2**20, 2**26])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_size_of_table_gives_the_same_statistic(dtype, cells, monkeypatch):
    x = torch.cat([all_regimes(64, 256, dtype, seed=8), make("sparse", dtype)])
    monkeypatch.setattr(histogram, "MIN_CELLS", 2**26)
    monkeypatch.setattr(histogram, "MAX_CELLS", cells)
    monkeypatch.setattr(histogram, "BLOCKS_AT_ONCE", 100)
    statistics = ActivationStatistics.from_tensor(x)
    assert statistics.keys.tolist() == sorted(pairs_of(x))
    found = dict(zip(statistics.keys.tolist(), statistics.counts.tolist(), strict=True))
    assert found == pairs_of(x)


def test_tensors_counted_in_parts_add_up(monkeypatch):
    x = make("heavy", BF16)
    whole = ActivationStatistics.from_tensor(x)
    monkeypatch.setattr(histogram, "MAX_BLOCKS", 300)
    assert equal(ActivationStatistics.from_tensor(x), whole)


def test_pairs_are_those_of_the_tensor():
    x = all_regimes(16, 64, BF16, seed=9)
    pairs = pairs_of(x)
    statistics = ActivationStatistics.from_tensor(x)
    assert dict(zip(statistics.keys.tolist(), statistics.counts.tolist(), strict=True)) == pairs
    assert statistics.keys.tolist() == sorted(pairs)


# -------------------------------------------------------------------------- the order statistics


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", NAMES)
def test_percentiles_are_kthvalues(name, dtype):
    x = make(name, dtype)
    statistics = ActivationStatistics.from_tensor(x)
    magnitudes = x.float().abs().flatten()
    blocks = magnitudes.reshape(-1, 16).amax(1)
    nonzero = blocks[blocks > 0]
    for p in (1e-6, 0.1, 1, 33.3, 50, 99, 99.9, 99.99, 99.999, 100):

        def kth(values, p=p):
            k = max(1, min(len(values), round(p / 100 * len(values))))
            return values.kthvalue(k).values.item()

        assert statistics.percentile(p) == kth(magnitudes)
        assert statistics.block_amax_percentile(p) == kth(blocks)
        assert statistics.block_amax_percentile(p, above=0.0) == kth(nonzero)
        middle = nonzero.median().item() * 0.999
        above = nonzero[nonzero > middle]
        assert statistics.block_amax_percentile(p, above=middle) == kth(above)
    assert statistics.amax == magnitudes.max().item() == statistics.percentile(100)


@pytest.mark.parametrize("p", [0, -1, 100.1, math.nan])
def test_bad_percentile(p):
    statistics = ActivationStatistics.from_tensor(make("gaussian", BF16))
    for order in (statistics.percentile, statistics.block_amax_percentile):
        with raises(ValueError, f"percentile is {p}; expected a percentage in (0, 100]."):
            order(p)


def test_no_block_left_to_rank():
    statistics = ActivationStatistics.from_tensor(torch.zeros(1, 16, dtype=BF16))
    with raises(ValueError, "no value is left to rank; expected at least one nonzero block."):
        statistics.block_amax_percentile(50, above=0.0)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("dtype", [FP32, torch.float64])
def test_other_dtypes_are_refused_with_the_fix(dtype):
    message = (
        f"x has dtype {str(dtype).removeprefix('torch.')}; expected bfloat16 or float16: the joint "
        "histogram counts 16-bit codes. Cast with x.to(torch.bfloat16), which is what a bfloat16 "
        "model feeds its quantizers."
    )
    with raises(TypeError, message):
        ActivationStatistics.from_tensor(torch.ones(1, 16, dtype=dtype))


def test_bad_shape():
    message = (
        "x has shape (4, 20); expected a nonempty tensor whose last dimension is a multiple of 16. "
        "Blocks run along the last dimension: reshape or pad it."
    )
    with raises(ValueError, message):
        ActivationStatistics.from_tensor(torch.ones(4, 20, dtype=BF16))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_nan_and_infinity(dtype, bad):
    x = torch.ones(4, 16, dtype=dtype)
    x[2, 3:5] = bad
    message = (
        "x holds 2 values that are NaN or infinite; expected finite activations. Find the layer "
        "that overflows before calibrating."
    )
    statistics = ActivationStatistics.from_tensor(torch.ones(1, 16, dtype=dtype))
    with raises(ValueError, message):
        statistics.update(x)
    assert statistics.count == 16  # nothing of the refused tensor was counted


def test_dtypes_do_not_mix():
    a, b = (ActivationStatistics.from_tensor(torch.ones(1, 16, dtype=d)) for d in (BF16, FP16))
    message = (
        "cannot merge statistics of torch.bfloat16 and torch.float16; expected one dtype. Cast the "
        "activations to one dtype before counting."
    )
    with raises(TypeError, message):
        a.merge(b)
    message = (
        "cannot merge statistics of ['torch.bfloat16', 'torch.float16']; expected at least one "
        "statistic, all of one dtype."
    )
    with raises(TypeError, message):
        ActivationStatistics.merged([a, b])
    message = "cannot merge statistics of []; expected at least one statistic, all of one dtype."
    with raises(TypeError, message):
        ActivationStatistics.merged([])


def test_the_empty_statistic_has_nothing_to_say(tmp_path):
    message = "the statistic is empty; expected at least one update(x) before."
    empty = ActivationStatistics()
    assert empty.count == 0
    for ask in (lambda: empty.amax, lambda: empty.mse(1.0), lambda: empty.percentile(50),
                lambda: empty.save(tmp_path / "x.parquet")):  # fmt: skip
        with raises(ValueError, message):
            ask()


def test_bad_scale_and_convention():
    statistics = ActivationStatistics.from_tensor(make("gaussian", BF16))
    message = (
        "input_scale is -1.0; expected a finite positive float32 in [2**-126, 2**124). Calibrate "
        "on data with at least one nonzero finite value, or pass a positive scale."
    )
    with raises(ValueError, message):
        statistics.mse([1.0, -1.0])
    message = (
        "underflow is 'none'; expected 'flush' (inference kernels) or 'floor' (ModelOpt's PyTorch "
        "reference)."
    )
    with raises(ValueError, message):
        statistics.mse(1.0, "none")


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_save_and_load(dtype, tmp_path):
    x = all_regimes(64, 256, dtype, seed=10)
    statistics = ActivationStatistics.from_tensor(x)
    statistics.counts = statistics.counts * 2**33
    path = tmp_path / "s.parquet"
    statistics.save(path, metadata={"site": "layers.0.mlp_input"})
    loaded = ActivationStatistics.load(str(path))
    assert equal(loaded, statistics)
    g = [0.01, 1.0]
    assert loaded.mse(g, "floor").tolist() == statistics.mse(g, "floor").tolist()
    assert pq.read_schema(path).metadata[b"site"] == b"layers.0.mlp_input"


def test_missing_file(tmp_path):
    path = tmp_path / "none.parquet"
    message = (
        f"no statistic at {path}; expected a Parquet file written by ActivationStatistics.save. "
        "Run the capture that makes it first."
    )
    with raises(FileNotFoundError, message):
        ActivationStatistics.load(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_file(keep, tmp_path):
    path = tmp_path / "s.parquet"
    ActivationStatistics.from_tensor(make("gaussian", BF16)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    message = (
        rf"^{re.escape(str(path))} is not readable as Parquet \(.+\); expected a file written by "
        r"ActivationStatistics\.save\. It may be truncated: capture it again\.$"
    )
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        ActivationStatistics.load(path)


def test_another_parquet_file(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    message = (
        f"{path} has columns {{'a': 'int64'}} and dtype None, and its header lacks ['dtype', 'count']; "
        "expected {'block_amax_code': 'int16', 'element_code': 'int16', 'count': 'int64'}, bfloat16 or "
        "float16, and to lack nothing. It is not an ActivationStatistics."
    )
    with raises(ValueError, message):
        ActivationStatistics.load(path)


PAIRS = {  # two blocks of amax 0x3F80 (1.0), one of zeros
    "block_amax_code": [0, 0x3F80, 0x3F80],
    "element_code": [0, 0x3F00, 0x3F80],
    "count": [16, 20, 12],
}
HEADER = {"dtype": "bfloat16", "count": "48"}


def written(path, header=None, types=("int16", "int16", "int64"), **columns):
    """``PAIRS`` with some columns replaced, under a header that fits unless told otherwise."""
    columns = PAIRS | columns
    total = str(sum(count or 0 for count in columns["count"]))
    arrays = [pa.array(v, t) for v, t in zip(columns.values(), types, strict=True)]
    table = pa.table(dict(zip(columns, arrays, strict=True)))
    pq.write_table(table.replace_schema_metadata(header or {"dtype": "bfloat16", "count": total}), path)
    return path


def test_a_file_of_old_without_checksums_loads(tmp_path):
    loaded = ActivationStatistics.load(written(tmp_path / "s.parquet"))
    x = torch.zeros(3, 16, dtype=BF16)
    x[1:] = 0.5
    x[1:, :6] = 1.0
    assert equal(loaded, ActivationStatistics.from_tensor(x))


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"element_code": [0, -1, 0x3F80]}, "codes from 0"),
        ({"block_amax_code": [0, 0x3F80, 0x7F80]}, "finite block amaxes"),
        ({"element_code": [0, 0x3F81, 0x3F80]}, "no element above its block's amax"),
        ({"element_code": [0, 0x3F80, 0x3F00]}, "sorted pairs without repeats"),
        ({"element_code": [0, 0x3F80, 0x3F80]}, "sorted pairs without repeats"),
        ({"block_amax_code": [0x3F80, 0x3F80, 0]}, "no element above its block's amax"),
        ({"count": [32, 32, -16]}, "positive counts"),
        ({"count": [16, 32, 0]}, "positive counts"),
        ({"count": [2**62, 2**62, 2**62]}, "counts whose sum fits 64 bits"),
        ({"count": [16, 21, 12]}, "counts of whole blocks of 16"),
        ({"element_code": [0, 0x3E80, 0x3F00]}, "each block amax among its elements"),
        ({"count": [16, 31, 1]}, "each block's amax in each block"),
        ({"header": HEADER | {"count": "64"}}, "64 elements, as its header says"),
        ({"header": HEADER | {"crc32": "7"}}, "the pairs of its header's crc32"),
        ({"count": [16, 20, None]}, "no missing values"),
    ],
)  # fmt: skip
def test_what_no_tensor_can_have_is_refused(columns, expected, tmp_path):
    path = written(tmp_path / "s.parquet", **columns)
    with raises(ValueError, f"{path} is damaged; expected {expected}. Capture it again."):
        ActivationStatistics.load(path)


def test_other_types_a_header_without_count_and_absurd_sizes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "s.parquet"
    for options, got in (
        ({"types": ("int16", "int16", "float64")}, "'count': 'double'} and dtype 'bfloat16', and "),
        ({"types": ("int32", "int16", "int64")}, "{'block_amax_code': 'int32', "),
        ({"header": {"dtype": "bfloat16"}}, "and its header lacks ['count']; expected "),
        ({"header": {"dtype": "float32", "count": "48"}}, "dtype 'float32', and its header lacks []; "),
    ):
        with pytest.raises(ValueError, match=re.escape(got)):
            ActivationStatistics.load(written(path, **options))
    written(path, block_amax_code=[], element_code=[], count=[])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} has 0 rows; expected 1 to "):
        ActivationStatistics.load(path)
    monkeypatch.setattr(statistic_file, "MOST_PAIRS", 2)
    with pytest.raises(ValueError, match="has 3 rows; expected 1 to 2"):
        ActivationStatistics.load(written(path))
    with pytest.raises(ValueError, match="pairs; expected at most 2, which a file may hold"):
        ActivationStatistics.from_tensor(make("gaussian", BF16)).save(path)


def test_metadata_cannot_override_the_header(tmp_path):
    statistics = ActivationStatistics.from_tensor(make("gaussian", BF16))
    message = (
        "metadata holds ['dtype']; expected other names than ['dtype', 'count', 'crc32'], which say "
        "what the file holds. Rename them."
    )
    with raises(ValueError, message):
        statistics.save(tmp_path / "s.parquet", {"dtype": "float16", "site": "a"})
    assert not (tmp_path / "s.parquet").exists()


def test_no_bit_flip_passes(tmp_path):
    """Each is refused, with the file's name, or changes nothing that is loaded."""
    path = tmp_path / "s.parquet"
    statistics = ActivationStatistics.from_tensor(normal(8, 64).bfloat16())
    statistics.save(path)
    good = path.read_bytes()
    refused = 0
    for bit in np.random.default_rng(0).choice(8 * len(good), 500, replace=False):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert equal(ActivationStatistics.load(path), statistics), bit
        except ValueError as error:
            assert str(path) in str(error), bit
            refused += 1
    assert 300 < refused < 500


def test_empty_parts_add_nothing():
    """A group of sequences that are all padding counts no element and so has no dtype."""
    full, empty = ActivationStatistics.from_tensor(make("gaussian", BF16)), ActivationStatistics()
    assert equal(ActivationStatistics.merged([empty, full, empty]), full)
    assert ActivationStatistics.merged([empty, empty]).count == 0


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
@pytest.mark.parametrize("underflow", UNDERFLOWS)
def test_block_snr_is_that_of_blocks_divided_by_their_amax(kind, underflow):
    x = make(kind, BF16)
    statistics = ActivationStatistics.from_tensor(x)
    blocks = x.double().reshape(-1, 16)
    amax = blocks.abs().amax(1, keepdim=True)
    blocks, used = blocks[amax[:, 0] > 0], amax[amax[:, 0] > 0]
    for octaves in (-3, 0, 9, 16, 20):
        scale = input_scale_from_amax(statistics.amax * 2.0**octaves)
        y = fake_quantize(x, scale, underflow=underflow, out_dtype=torch.float32).double()
        error = (y.reshape(-1, 16)[amax[:, 0] > 0] - blocks) / used
        expected = 10 * math.log10((blocks / used).square().sum() / error.square().sum())
        assert statistics.block_snr_db(scale, underflow) == pytest.approx(expected, abs=1e-8)
    both = statistics.block_snr_db([scale, 2 * scale], underflow)
    assert both.shape == (2,)
    assert both[0] == pytest.approx(statistics.block_snr_db(scale, underflow), abs=1e-9)


def test_block_snr_sees_what_snr_does_not():
    """One massive block holds the energy; a scale that fits it alone flushes every other block."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[0, 0] = 2.0**22
    statistics = ActivationStatistics.from_tensor(x)
    scale = input_scale_from_amax(statistics.amax)
    assert statistics.snr_db(scale) > 20 > 1 > statistics.block_snr_db(scale)
