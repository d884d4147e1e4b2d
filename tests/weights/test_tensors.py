"""Tensors in files: read from several places, cast as NumPy and MindSpore cast, cut into chunks and shards.

| test                                   | proves                                            | judged against       |
| test_float32_to_float16_is_numpys      | rounding, subnormals, NaN, infinities, zeros      | NumPy's astype       |
| test_..._to_bfloat16_is_mindspores     | the same                                          | MindSpore's cast     |
| test_halfway_values_go_to_the_even ... | every tie of both narrow types, and values beside | the definition       |
| test_every_narrow_value_is_widened ... | all 65536 patterns, there and back                | the definition       |
| test_a_finite_value_never_becomes ...  | the largest values, and the first that do not fit | literal bit patterns |
| test_read_...                          | any range of several segments                     | slices of bytes      |
| test_what_takes_the_name_of_a_file_... | nothing of it is read; what is written is refused | bytes, the message   |
| test_a_file_is_closed_...              | with the last tensor of it                        | the descriptor       |
| test_output_...                        | parts, rows, chunks, the error's name             | NumPy's arrays       |
| test_shards_...                        | order, limit, and that shards are filled          | literal numbers      |
"""
import itertools
import os
import random
import time

import mindspore as ms
import numpy as np
import pytest

from mindrlhf.errors import UserError
from mindrlhf.weights import tensors
from mindrlhf.weights.tensors import (
    FLOAT_BYTES,
    InputFile,
    OutputTensor,
    Part,
    Segment,
    StoredTensor,
    cast,
    split_into_shards,
)

pytestmark = pytest.mark.stack

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SPECIAL = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFBFFFFF, 1,
                    0x80000001, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x387FC000, 0x38800000, 0x477FE000],
                   "<u4")
PATTERNS = np.arange(1 << 16, dtype="<u2")


@pytest.fixture(scope="module")
def float32_values():
    """Random bit patterns; with ties of both narrow types, with subnormals, and with exponents that float16 has."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, 50_000, dtype=np.uint32)
    in_float16 = (bits & 0x801FFFFF) | (bits >> 21) % 34 + 102 << 23
    return np.concatenate([SPECIAL, bits, bits & 0xFFFF0000 | 0x8000, bits & 0x807FFFFF, in_float16,
                           in_float16 & 0xFFFFE000 | 0x1000]).astype("<u4").view("<f4")


def fitting(values, expected):
    """Both without the finite values that became infinite."""
    kept = np.isfinite(expected) | ~np.isfinite(values)
    return values[kept], expected[kept]


def assert_same_bits(found, expected):
    """Equal bit by bit, apart from what a NaN carries."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    number = ~np.isnan(expected)
    unsigned = f"<u{expected.itemsize}"
    np.testing.assert_array_equal(found.view(unsigned)[number], expected.view(unsigned)[number])


def as_float32(raw, dtype):
    return np.frombuffer(cast(raw, dtype, "float32"), "<f4")


def in_mindspore(values):
    """Values as MindSpore's bfloat16, widened."""
    return ms.Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy()


def save(path, array, dtype=None):
    path.write_bytes(array.tobytes())
    return StoredTensor(dtype or array.dtype.name, array.shape, (Segment(InputFile(path), 0, array.nbytes),))


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def test_float32_to_float16_is_numpys(float32_values):
    with np.errstate(over="ignore"):
        values, expected = fitting(float32_values, float32_values.astype("<f2"))
    assert len(values) > 100_000
    assert_same_bits(np.frombuffer(cast(values.tobytes(), "float32", "float16"), "<f2"), expected)


def test_float32_to_bfloat16_is_mindspores(float32_values):
    values, expected = fitting(float32_values, in_mindspore(float32_values))
    assert len(values) > 200_000
    raw = cast(values.tobytes(), "float32", "bfloat16")
    assert len(raw) == 2 * len(values)
    assert_same_bits(as_float32(raw, "bfloat16"), expected)


def test_float16_to_bfloat16_is_mindspores():
    raw = cast(PATTERNS.tobytes(), "float16", "bfloat16")
    assert_same_bits(as_float32(raw, "bfloat16"), in_mindspore(PATTERNS.view("<f2")))


def test_bfloat16_to_float16_is_numpys():
    values = as_float32(PATTERNS.tobytes(), "bfloat16")
    with np.errstate(over="ignore"):
        fits, expected = fitting(values, values.astype("<f2"))
    raw = PATTERNS[np.isin(values, fits) | np.isnan(values)].tobytes()
    assert_same_bits(np.frombuffer(cast(raw, "bfloat16", "float16"), "<f2"), expected)


@pytest.mark.parametrize("sign", [0, 0x8000])
@pytest.mark.parametrize(("dtype", "largest"), [("float16", 0x7BFF), ("bfloat16", 0x7F7F)])
def test_halfway_values_go_to_the_even_neighbour_and_others_to_the_nearest(dtype, largest, sign):
    """Patterns of one sign are in the values' order, so `lower` and `lower + 1` are neighbours."""
    lower = np.arange(largest, dtype="<u2") | sign
    below, above = (as_float32(pattern.tobytes(), dtype).astype("<f8") for pattern in (lower, lower + np.uint16(1)))
    middle = ((below + above) / 2).astype("<f4")
    for values, expected in ((middle, lower + (lower & 1)), (np.nextafter(middle, below.astype("<f4")), lower),
                             (np.nextafter(middle, above.astype("<f4")), lower + 1)):
        np.testing.assert_array_equal(np.frombuffer(cast(values.tobytes(), "float32", dtype), "<u2"), expected)


def by_definition(pattern, exponent_bits, fraction_bits):
    bias = (1 << exponent_bits - 1) - 1
    exponent = (pattern >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = pattern & ((1 << fraction_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        size = float("nan") if fraction else float("inf")
    else:
        size = (fraction + (bool(exponent) << fraction_bits)) * 2.0 ** (max(exponent, 1) - bias - fraction_bits)
    return -size if pattern >> 15 else size


@pytest.mark.parametrize(("dtype", "exponent_bits", "fraction_bits"), [("float16", 5, 10), ("bfloat16", 8, 7)])
def test_every_narrow_value_is_widened_exactly_and_comes_back(dtype, exponent_bits, fraction_bits):
    wide = cast(PATTERNS.tobytes(), dtype, "float32")
    expected = np.array([by_definition(pattern, exponent_bits, fraction_bits) for pattern in PATTERNS.tolist()], "<f4")
    assert_same_bits(np.frombuffer(wide, "<f4"), expected)
    back = np.frombuffer(cast(wide, "float32", dtype), "<u2")
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(back[number], PATTERNS[number])
    assert np.isnan(as_float32(back[~number].tobytes(), dtype)).all()


@pytest.mark.parametrize("dtype", list(FLOAT_BYTES))
def test_the_same_type_keeps_every_bit(dtype):
    assert cast(PATTERNS.tobytes(), dtype, dtype) == PATTERNS.tobytes()


@pytest.mark.parametrize(("source", "target", "fits", "result", "too_large"), [
    ("float32", "float16", 0x477FEFFF, 0x7BFF, 0x477FF000),
    ("float32", "bfloat16", 0x7F7F7FFF, 0x7F7F, 0x7F7F8000),
    ("bfloat16", "float16", 0x477F, 0x7BF8, 0x4780),
    ("float32", "float16", 0xC77FEFFF, 0xFBFF, 0xFF7FFFFF),
    ("float32", "bfloat16", 0xFF7F7FFF, 0xFF7F, 0xFF7FFFFF),
    ("bfloat16", "float16", 0xC77F, 0xFBF8, 0xFF7F),
])
def test_a_finite_value_never_becomes_infinite(source, target, fits, result, too_large):
    def raw(*patterns):
        return np.array(patterns, f"<u{FLOAT_BYTES[source]}").tobytes()

    assert cast(raw(0, fits), source, target) == np.array([0, result], "<u2").tobytes()
    with pytest.raises(OverflowError):
        cast(raw(0, too_large, 0), source, target)


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_the_largest_float32_is_too_large_for_either_narrow_type(target):
    largest = np.finfo("<f4").max
    with pytest.raises(OverflowError, match="found -3.40282e[+]38"):
        cast(np.array([1, -largest, largest], "<f4").tobytes(), "float32", target)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOAT_BYTES, repeat=2)))
def test_infinities_and_signed_zeros_stay(source, target):
    values = np.array([np.inf, -np.inf, 0.0, -0.0], "<f4")
    raw = cast(cast(values.tobytes(), "float32", source), source, target)
    assert len(raw) == len(values) * FLOAT_BYTES[target]
    assert_same_bits(as_float32(raw, target), values)


def test_read_joins_any_range_over_segments(tmp_path):
    content = bytes(range(12))
    (tmp_path / "one").write_bytes(b"xx" + content[:5] + b"yyy" + content[9:] + b"z")
    (tmp_path / "two").write_bytes(content[5:9])
    one, two = InputFile(tmp_path / "one"), InputFile(tmp_path / "two")
    tensor = StoredTensor("float32", (3,), (
        Segment(one, 2, 5), Segment(two, 2, 0), Segment(two, 0, 4), Segment(one, 10, 3)))
    assert (tensor.values, tensor.nbytes) == (3, 12)
    for begin, end in itertools.combinations_with_replacement(range(13), 2):
        assert tensor.read(begin, end) == content[begin:end]


def test_what_takes_the_name_of_a_file_that_is_read_changes_nothing(tmp_path):
    """As a training run's next weights do."""
    path, values = tmp_path / "a.ckpt", np.arange(6, dtype="<f4")
    tensor = save(path, values)
    assert tensor.read(0, 8) == values[:2].tobytes()
    (tmp_path / "next").write_bytes(bytes(24))
    (tmp_path / "next").replace(path)
    assert tensor.read(8, 16) == values[2:4].tobytes()
    path.unlink()
    assert tensor.read(16, 24) == values[4:].tobytes()


@pytest.mark.parametrize("size", [23, 24, 25])
def test_a_file_that_is_written_to_while_it_is_read_is_named(tmp_path, size):
    path = tmp_path / "a.ckpt"
    tensor = save(path, np.zeros(6, "<f4"))
    time.sleep(0.02)  # a file's time is that of the kernel's last tick
    path.write_bytes(bytes(size))
    assert message_of(tensor.read, 0, 8) == (
        f"{path}: was written to while it was read: begin again when that is over")


def test_a_file_is_closed_when_nothing_of_it_is_to_be_read(tmp_path):
    tensor = save(tmp_path / "a.ckpt", np.zeros(2, "<f4"))
    descriptor = tensor.segments[0].file.descriptor
    os.fstat(descriptor)
    del tensor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 24, 1 << 22])
def test_output_is_its_parts_behind_one_another_in_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tensors, "_CHUNK", chunk)
    first = np.random.default_rng(1).standard_normal((3, 5)).astype("<f4")
    second = np.random.default_rng(2).standard_normal((2, 5)).astype("<f2")
    parts = [save(tmp_path / "first", first), save(tmp_path / "second", second)]
    output = OutputTensor("w", "float16", (5, 5), tuple(Part(part, 0, part.values) for part in parts))
    chunks = list(output.chunks())
    expected = np.concatenate([first.astype("<f2"), second])
    assert b"".join(chunks) == expected.tobytes()
    assert output.nbytes == expected.nbytes
    assert len(chunks) == -(-15 // chunk) + -(-10 // chunk)
    assert max(map(len, chunks)) <= chunk * 2


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3)])
def test_output_of_rows_is_a_slice_of_the_first_dimension(tmp_path, monkeypatch, shape, chunk):
    monkeypatch.setattr(tensors, "_CHUNK", chunk)
    array = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
    tensor = save(tmp_path / "a", array)
    for begin, end in itertools.combinations_with_replacement(range(7), 2):
        output = OutputTensor("w", "float32", (end - begin, *shape[1:]), (Part.rows(tensor, begin, end),))
        assert b"".join(output.chunks()) == array[begin:end].tobytes()
        assert output.nbytes == array[begin:end].nbytes


def test_output_of_one_value_without_dimensions(tmp_path):
    tensor = save(tmp_path / "a", np.array(1.5, "<f4"))
    output = OutputTensor("w", "bfloat16", (), (Part(tensor, 0, tensor.values),))
    assert (b"".join(output.chunks()), output.nbytes) == (b"\xc0\x3f", 2)


def test_output_names_the_tensor_whose_value_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK", 2)
    tensor = save(tmp_path / "a", np.array([1, 2, 3, 70_000], "<f4"))
    chunks = OutputTensor("layers.0.w", "float16", (4,), (Part(tensor, 0, 4),)).chunks()
    assert next(chunks) == np.array([1, 2], "<f2").tobytes()
    assert message_of(next, chunks) == (
        "layers.0.w: found 70000; expected values that float16 can hold (choose another --dtype)")


def sizes_of_shards(sizes, limit):
    """Lists of (position, size) for tensors of these many bytes."""
    outputs = [OutputTensor(str(index), "float16", (size // 2,), ()) for index, size in enumerate(sizes)]
    return [[(int(tensor.name), tensor.nbytes) for tensor in shard] for shard in split_into_shards(outputs, limit)]


@pytest.mark.parametrize(("sizes", "limit", "expected"), [
    ([4, 4, 4, 4], 8, [[4, 4], [4, 4]]),
    ([4, 4, 4], 16, [[4, 4, 4]]),
    ([4, 4, 2], 9, [[4, 4], [2]]),
    ([2, 20, 2], 8, [[2], [20], [2]]),
    ([20, 2, 2], 8, [[20], [2, 2]]),
    ([2, 2, 20], 8, [[2, 2], [20]]),
    ([20, 20], 8, [[20], [20]]),
], ids=str)
def test_shards_by_hand(sizes, limit, expected):
    assert [[size for _, size in shard] for shard in sizes_of_shards(sizes, limit)] == expected


def test_shards_keep_the_order_and_the_limit_and_are_filled():
    source = random.Random(1)
    for _ in range(200):
        sizes = [2 * source.randint(1, 15) for _ in range(source.randint(1, 20))]
        shards = sizes_of_shards(sizes, 20)
        assert [item for shard in shards for item in shard] == list(enumerate(sizes))
        assert all(len(shard) == 1 or sum(size for _, size in shard) <= 20 for shard in shards)
        assert all(sum(size for _, size in shard) + following[0][1] > 20
                   for shard, following in zip(shards, shards[1:]))
