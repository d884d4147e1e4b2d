"""MindSpore's .ckpt files: its own are indexed right, it reads ours, and damage is a user's error.

| test                                      | proves                                            | judged against       |
| test_files_of_mindspore_are_indexed       | types, shapes and every byte, with a checksum too | arrays that it saved |
| test_tensors_in_several_values_are_joined | the same where MindSpore cuts a tensor            | arrays that it saved |
| test_mindspore_loads_what_we_write ...    | values and shapes, however chunks and values meet | load_checkpoint      |
| test_a_file_has_the_bytes_that ...        | MindSpore would have written the same file        | save_checkpoint      |
| test_... cut_anywhere ...                 | only a cut between two tensors can go unnoticed   | lengths by protobuf  |
| test_damage_is_named                      | one line with the file's name                     | literal messages     |
| test_a_git_lfs_pointer_is_named           | what the file is, and what to do                  | literal message      |
| test_random_damage_is_a_users_error ...   | no other exception, and nothing beyond the file   | 2000 damaged files   |
"""
import random

import mindspore as ms
import numpy as np
import pytest
from conftest import LFS_POINTER, LFS_TEXT
from helpers import write_anew
from mindspore.train import serialization
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors.numpy import save

from mindrlhf.errors import UserError
from mindrlhf.weights import ckpt_file, tensors
from mindrlhf.weights.ckpt_file import check_ckpt, read_ckpt, read_ckpt_files, write_ckpt
from mindrlhf.weights.tensors import InputFile, OutputTensor, Part, Segment, StoredTensor, cast

pytestmark = pytest.mark.stack

UNREADABLE = "not readable as a checkpoint"
MS_TYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
LONG_NAME = "层." * 50 + "weight"


def arrays():
    """Values that float16 and bfloat16 hold exactly; one value, long names, dimensions above 127."""
    source = np.random.default_rng(1)
    shapes = {"layers.0.weight": (130, 4), LONG_NAME: (2, 3, 5), "one": (), "bias": (7,)}
    return {name: source.integers(-128, 128, shape).astype("<f4") / np.float32(8) for name, shape in shapes.items()}


def save_mindspore(path, values, **options):
    ms.save_checkpoint([{"name": name, "data": value} for name, value in values.items()], str(path), **options)


def in_mindspore(dtype):
    return {name: ms.Tensor(array).astype(MS_TYPES[dtype]) for name, array in arrays().items()}


def in_memory(array, dtype):
    """Bytes of values that `dtype` holds exactly."""
    if dtype == "bfloat16":
        return (array.view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def read_all(stored):
    return {name: tensor.read(0, tensor.nbytes) for name, tensor in stored.items()}


def shapes_and_types(stored):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}


def value_bytes(tag, dims, tensor_type, content):
    """One value as MindSpore's protobuf writes it; a file is such values behind one another."""
    checkpoint = Checkpoint()
    value = checkpoint.value.add()
    if tag is not None:
        value.tag = tag
    value.tensor.dims.extend(dims)
    value.tensor.tensor_type = tensor_type
    if content is not None:
        value.tensor.tensor_content = content
    return checkpoint.SerializePartialToString()


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def outputs(tmp_path):
    """A function from types in the source and in the output to output tensors with the values of `arrays`."""
    def make(source, target):
        result = []
        for index, (name, array) in enumerate(arrays().items()):
            path, raw = tmp_path / f"{index}.raw", in_memory(array, source)
            path.write_bytes(raw)
            stored = StoredTensor(source, array.shape, (Segment(InputFile(path), 0, len(raw)),))
            result.append(OutputTensor(name, target, array.shape, (Part(stored, 0, stored.values),)))
        return result

    return make


@pytest.mark.parametrize("crc_check", [False, True])
@pytest.mark.parametrize("dtype", list(MS_TYPES))
def test_files_of_mindspore_are_indexed(tmp_path, dtype, crc_check):
    path = tmp_path / "a.ckpt"
    save_mindspore(path, in_mindspore(dtype), crc_check=crc_check)
    assert (b"crc_num" in path.read_bytes()) is crc_check
    stored = read_ckpt(path)
    assert shapes_and_types(stored) == {name: (dtype, array.shape) for name, array in arrays().items()}
    assert list(stored) == list(arrays())
    assert read_all(stored) == {name: in_memory(array, dtype) for name, array in arrays().items()}


def test_other_types_keep_mindspores_name(tmp_path):
    counts = np.arange(6, dtype="<i4").reshape(2, 3)
    save_mindspore(tmp_path / "a.ckpt", {"count": ms.Tensor(counts), "mask": ms.Tensor([True, False])},
                   append_dict={"epoch_num": 3, "loss_scale": 0.5, "note": "text"})
    stored = read_ckpt(tmp_path / "a.ckpt")
    assert shapes_and_types(stored) == {"count": ("Int32", (2, 3)), "mask": ("Bool", (2,)), "epoch_num": ("Int64", ()),
                                        "loss_scale": ("float32", ()), "note": ("str", ())}
    found = read_all(stored)
    assert found["count"] == counts.tobytes()
    assert found["epoch_num"] == (3).to_bytes(8, "little")
    assert found["loss_scale"] == np.array(0.5, "<f4").tobytes()


def test_one_value_in_an_older_file_has_the_dimension_zero(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(value_bytes("one", [0], "Float32", bytes(4)))
    assert shapes_and_types(read_ckpt(tmp_path / "a.ckpt")) == {"one": ("float32", ())}


@pytest.mark.parametrize("crc_check", [False, True])
def test_tensors_in_several_values_are_joined(tmp_path, monkeypatch, crc_check):
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    values = np.arange(1530).reshape(30, 51)
    save_mindspore(tmp_path / "a.ckpt", {
        "whole": ms.Tensor(values[:1].astype("<f4")), "wide": ms.Tensor(values.astype("<f4")),
        "narrow": ms.Tensor(values % 256, ms.bfloat16), "count": ms.Tensor(values.astype("<i4")),
        "after": ms.Tensor(values[:1].astype("<f2"))}, crc_check=crc_check)
    stored = read_ckpt(tmp_path / "a.ckpt")
    assert shapes_and_types(stored) == {"whole": ("float32", (1, 51)), "wide": ("float32", (30, 51)),
                                        "narrow": ("bfloat16", (30, 51)), "count": ("Int32", (30, 51)),
                                        "after": ("float16", (1, 51))}
    assert [len(tensor.segments) for tensor in stored.values()] == [1, 6, 3, 6, 1]
    assert read_all(stored) == {
        "whole": values[:1].astype("<f4").tobytes(), "wide": values.astype("<f4").tobytes(),
        "narrow": in_memory((values % 256).astype("<f4"), "bfloat16"), "count": values.astype("<i4").tobytes(),
        "after": values[:1].astype("<f2").tobytes()}


def test_values_of_different_lengths_are_joined(tmp_path):
    array = np.arange(21, dtype="<f4").reshape(7, 3)
    pieces = [array[:3].tobytes(), b"", array[3:].tobytes()[:5], array[3:].tobytes()[5:]]
    (tmp_path / "a.ckpt").write_bytes(b"".join(value_bytes("a", array.shape, "Float32", piece) for piece in pieces))
    assert read_all(read_ckpt(tmp_path / "a.ckpt")) == {"a": array.tobytes()}


def assert_mindspore_loads(path, dtype):
    loaded = ms.load_checkpoint(str(path))
    assert list(loaded) == list(arrays())
    for name, array in arrays().items():
        assert loaded[name].dtype == MS_TYPES[dtype]
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name].astype(ms.float32).asnumpy(), array)


@pytest.mark.parametrize("source", list(MS_TYPES))
@pytest.mark.parametrize("target", list(MS_TYPES))
def test_mindspore_loads_what_we_write_in_any_type(tmp_path, outputs, source, target):
    calls = []
    write_ckpt(tmp_path / "a.ckpt", outputs(source, target), lambda: calls.append(1))
    assert_mindspore_loads(tmp_path / "a.ckpt", target)
    assert len(calls) == len(arrays())


@pytest.mark.parametrize("value_size", [1, 3, 4, 10, 100, 2080])
@pytest.mark.parametrize("chunk", [2, 3, 64, 1 << 22])
def test_mindspore_loads_what_we_write_in_small_pieces(tmp_path, monkeypatch, outputs, value_size, chunk):
    monkeypatch.setattr(ckpt_file, "_VALUE_BYTES", value_size)
    monkeypatch.setattr(tensors, "_CHUNK", chunk)
    path = tmp_path / "a.ckpt"
    write_ckpt(path, outputs("bfloat16", "float32"), lambda: None)
    assert_mindspore_loads(path, "float32")
    assert read_all(read_ckpt(path)) == {name: array.tobytes() for name, array in arrays().items()}
    checkpoint = Checkpoint()
    checkpoint.ParseFromString(path.read_bytes())
    for name, array in arrays().items():
        sizes = [len(value.tensor.tensor_content) for value in checkpoint.value if value.tag == name]
        assert sizes == [value_size] * (array.nbytes // value_size) + [array.nbytes % value_size] * (
            array.nbytes % value_size > 0)


def test_parts_of_several_tensors_are_written_across_values(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt_file, "_VALUE_BYTES", 10)
    monkeypatch.setattr(tensors, "_CHUNK", 4)
    save_mindspore(tmp_path / "a.ckpt", {"a": ms.Tensor(np.arange(18, dtype="<f4").reshape(6, 3)),
                                         "b": ms.Tensor(np.arange(9).reshape(3, 3), ms.bfloat16)})
    stored = read_ckpt(tmp_path / "a.ckpt")
    parts = (Part.rows(stored["a"], 4, 6), Part.rows(stored["b"], 0, 3), Part.rows(stored["a"], 0, 2))
    write_ckpt(tmp_path / "b.ckpt", [OutputTensor("joined", "float32", (7, 3), parts)], lambda: None)
    loaded = ms.load_checkpoint(str(tmp_path / "b.ckpt"))["joined"].asnumpy()
    np.testing.assert_array_equal(loaded, np.concatenate([np.arange(12, 18), np.arange(9), np.arange(6)]).reshape(7, 3))


@pytest.mark.parametrize("kilobytes", [1, 2, 512 * 1024])
@pytest.mark.parametrize("dtype", list(MS_TYPES))
def test_a_file_has_the_bytes_that_mindspore_would_have_written(tmp_path, monkeypatch, outputs, dtype, kilobytes):
    monkeypatch.setattr(serialization, "SLICE_SIZE", kilobytes)
    monkeypatch.setattr(ckpt_file, "_VALUE_BYTES", kilobytes * 1024)
    save_mindspore(tmp_path / "theirs.ckpt", in_mindspore(dtype))
    write_ckpt(tmp_path / "ours.ckpt", outputs(dtype, dtype), lambda: None)
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_mindspore_widens_every_bfloat16_as_we_do(tmp_path):
    every = np.arange(1 << 16, dtype="<u2")
    raw = every[every & 0x7F80 != 0x7F80].tobytes()  # but NaN and infinity, which are not written
    (tmp_path / "raw").write_bytes(raw)
    stored = StoredTensor("bfloat16", (len(raw) // 2,), (Segment(InputFile(tmp_path / "raw"), 0, len(raw)),))
    write_ckpt(tmp_path / "a.ckpt", [OutputTensor("a", "bfloat16", stored.shape, (Part(stored, 0, len(raw) // 2),))],
               lambda: None)
    theirs = ms.load_checkpoint(str(tmp_path / "a.ckpt"))["a"].astype(ms.float32).asnumpy()
    ours = np.frombuffer(cast(raw, "bfloat16", "float32"), "<f4")
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[ours == 0]), np.signbit(theirs[theirs == 0]))


def test_a_file_cut_anywhere_is_refused_or_lacks_whole_tensors(tmp_path):
    values = [value_bytes("a", [2, 2], "Float32", bytes(7)), value_bytes("a", [2, 2], "Float32", bytes(9)),
              value_bytes("b", [3], "BFloat16", bytes(6)), value_bytes("c", [], "Float16", bytes(2))]
    content, ends = b"".join(values), np.cumsum([len(value) for value in values])
    readable = {ends[1]: {"a"}, ends[2]: {"a", "b"}, ends[3]: {"a", "b", "c"}}
    path = tmp_path / "a.ckpt"
    for length in range(len(content) + 1):
        write_anew(path, content[:length])
        if length in readable:
            assert set(read_ckpt(path)) == readable[length]
        else:
            assert message_of(read_ckpt, path).startswith(f"{path}: {UNREADABLE}")


@pytest.mark.parametrize("crc_check", [False, True])
def test_a_saved_file_cut_anywhere_is_refused_or_lacks_whole_tensors(tmp_path, crc_check):
    path, cut = tmp_path / "a.ckpt", tmp_path / "cut.ckpt"
    whole = {"a": ms.Tensor([1.5, 2.5]), "b": ms.Tensor([[3]], ms.bfloat16), "c": ms.Tensor(1.0)}
    save_mindspore(path, whole, crc_check=crc_check)
    content, expected = path.read_bytes(), read_all(read_ckpt(path))
    found = []
    for length in range(len(content)):
        write_anew(cut, content[:length])
        try:
            found.append(read_all(read_ckpt(cut)))
        except UserError:
            continue
    names = ["a", "b", "c"][:3 if crc_check else 2]
    assert found == [{name: expected[name] for name in names[:count]} for count in range(1, len(names) + 1)]


DAMAGED = {
    "empty": (b"", "nothing in it"),
    "text": (b"not a checkpoint, only text", "no value at byte 1"),
    "zeros": (bytes(100), "no value at byte 1"),
    "ones": (b"\xff" * 100, "a number that is too long before byte 10"),
    "archive": (b"PK\x03\x04" + bytes(range(200)), "a ZIP archive (or an Excel sheet, or PyTorch's weights): "),
    "safetensors": (save({"a": np.zeros(3, "<f4")}), "no value at byte 1"),
    "checksum alone": (b"crc_num" + bytes(10), "no value at byte 1"),
    "one byte": (b"\x0a", "the end at byte 1, in the middle of a value"),
    "length beyond the end": (b"\x0a\x7f\x0a\x01a", "127 bytes announced at byte 2, 3 are there"),
    "number across the end of a value": (b"\x0a\x01\x8a\x01", "the end at byte 4, in the middle of a value"),
    "text behind a value": (value_bytes("a", [2], "Float32", bytes(8)) + b"rest", "no value at byte "),
    "no name": (value_bytes(None, [2], "Float32", bytes(8)), "a value without name or content before byte "),
    "no content": (value_bytes("a", [2], "Float32", None), "a tensor without content before byte "),
    "name not UTF-8": (value_bytes("ab", [2], "Float32", bytes(8)).replace(b"ab", b"\xff\xff"),
                       "a name that is not UTF-8 before byte "),
    "name of 5000 bytes": (value_bytes("a" * 5000, [2], "Float32", bytes(8)), "a name of 5000 bytes at byte "),
    "larger shape": (value_bytes("a", [2, 3], "Float32", bytes(20)),
                     "a has 20 bytes, expected 24 for its shape (2, 3)"),
    "smaller shape": (value_bytes("a", [2, 2], "BFloat16", bytes(10)),
                      "a has 10 bytes, expected 8 for its shape (2, 2)"),
    "another type": (value_bytes("a", [4], "Float16", bytes(16)), "a has 16 bytes, expected 8 for its shape (4,)"),
    "no dimensions": (value_bytes("a", [], "Float32", bytes(8)), "a has 8 bytes, expected 4 for its shape ()"),
    "negative dimension": (value_bytes("a", [-2], "Float32", bytes(8)), "a has 8 bytes, expected "),
    "no values": (value_bytes("a", [2], "Float32", b""), "a has 0 bytes, expected 8 for its shape (2,)"),
    "a tensor twice": (value_bytes("a", [2], "Float32", bytes(8)) * 2,
                       "a has 16 bytes, expected 8 for its shape (2,)"),
    "name of two lines": (value_bytes("a\nb", [2], "Float32", bytes(9)), "a b has 9 bytes, expected 8"),
}


@pytest.mark.parametrize(("content", "message"), list(DAMAGED.values()), ids=list(DAMAGED))
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    found = message_of(read_ckpt, path)
    assert found.startswith(f"{path}: {UNREADABLE}")
    assert f": {message}" in found


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(LFS_POINTER)
    for read in (read_ckpt, check_ckpt):
        assert message_of(read, tmp_path / "a.ckpt") == f"{tmp_path / 'a.ckpt'}: {UNREADABLE}: {LFS_TEXT}"


def test_a_file_that_is_absent_or_a_folder_is_named(tmp_path):
    absent = tmp_path / "a.ckpt"
    assert message_of(read_ckpt, absent) == f"{absent}: cannot be read: No such file or directory"
    assert message_of(read_ckpt, tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


def damage(content, source):
    """The content with one to four bytes changed, taken out or put in."""
    damaged = bytearray(content)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(damaged))
        change = source.randrange(6)
        if change == 0:
            del damaged[place]
        elif change == 1:
            damaged.insert(place, source.randrange(256))
        elif change == 2:
            damaged[place] ^= 1 << source.randrange(8)
        else:
            damaged[place] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])
    return bytes(damaged)


def test_random_damage_is_a_users_error_or_goes_unnoticed(tmp_path):
    path = tmp_path / "a.ckpt"
    save_mindspore(path, {"w": ms.Tensor(np.ones((2, 3), "<f4")), "层.b": ms.Tensor([1, 2], ms.bfloat16),
                          "count": ms.Tensor([1], ms.int32), "one": ms.Tensor(1.0)}, crc_check=True)
    content, damaged, source, messages = path.read_bytes(), tmp_path / "damaged.ckpt", random.Random(1), []
    for _ in range(2000):
        write_anew(damaged, damage(content, source))
        try:
            stored = read_ckpt(damaged)
        except UserError as error:
            messages.append(str(error))
        else:
            assert all(len(raw) == stored[name].nbytes for name, raw in read_all(stored).items())
    assert all(message.startswith(f"{damaged}: {UNREADABLE}") and "\n" not in message for message in messages)
    assert 1000 < len(messages) < 2000


def test_a_checkpoint_in_several_files_is_one(tmp_path):
    paths = [tmp_path / f"model-0000{number}-of-00003.ckpt" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        save_mindspore(path, {f"b{number}": ms.Tensor([float(number)]), f"a{number}": ms.Tensor([1], ms.int32)})
    stored = read_ckpt_files(paths)
    assert list(stored) == ["b0", "a0", "b1", "a1", "b2", "a2"]
    assert stored["b2"].segments[0].path == paths[2]
    assert read_all(stored)["b2"] == np.array([2], "<f4").tobytes()


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name, values in (("one.ckpt", {"a": 1.0, "b": 1.0}), ("two.ckpt", {"c": 1.0, "b": 1.0})):
        save_mindspore(tmp_path / name, {key: ms.Tensor(value) for key, value in values.items()})
    assert message_of(read_ckpt_files, [tmp_path / "one.ckpt", tmp_path / "two.ckpt"]) == (
        f"{tmp_path / 'two.ckpt'}: b is also in one.ckpt")


def test_a_damaged_file_among_several_is_named(tmp_path):
    save_mindspore(tmp_path / "one.ckpt", {"a": ms.Tensor(1.0)})
    (tmp_path / "two.ckpt").write_bytes(b"")
    assert message_of(read_ckpt_files, [tmp_path / "one.ckpt", tmp_path / "two.ckpt"]) == (
        f"{tmp_path / 'two.ckpt'}: {UNREADABLE}: nothing in it")
