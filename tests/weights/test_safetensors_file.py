"""safetensors files: what the safetensors package writes is read, what we write it reads, and damage is named.

| test                                 | proves                                               | judged against   |
| test_files_of_the_package_are_read   | names, types, shapes and every byte                  | NumPy's arrays   |
| test_the_package_reads_what_we_write | the same, cast on the way                            | the package      |
| test_damage_is_named                 | one line with the file; the package refuses it too   | the package      |
| test_cut_or_longer_files_are_refused | every length but the right one                       | the package      |
| test_a_header_far_beyond_the_file ...| sizes and shapes in a header, at once                | literal messages |
| test_random_damage_is_judged_alike   | never another exception; accepted or refused alike   | the package      |
| test_a_git_lfs_pointer_is_named ...  | what the file is, and what to do                     | literal messages |
| test_a_folder_...                    | one file, shards, index; contradictions between them | literal messages |
"""
import itertools
import json
import os
import random

import mindspore as ms
import numpy as np
import pytest
from conftest import LFS_POINTER, LFS_TEXT
from helpers import write_anew
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import load_file, save, save_file

from mindrlhf.errors import UserError
from mindrlhf.json_file import read_json_object
from mindrlhf.weights import tensors
from mindrlhf.weights.safetensors_file import (
    INDEX_NAME,
    read_safetensors,
    read_safetensors_folder,
    write_safetensors,
)
from mindrlhf.weights.tensors import OutputTensor, Part

pytestmark = pytest.mark.stack

CODES = {"float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_bytes(header, data=b""):
    """A file of this header, as an object or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def arrays():
    generator = np.random.default_rng(1)
    return {"layers.0.w": generator.standard_normal((3, 5)).astype("<f4"),
            "layers.0.b": generator.standard_normal(7).astype("<f2"),
            "权重": generator.integers(-9, 9, (1, 2, 3)).astype("<i4"),
            "one": np.array(2.5, "<f4")}


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(stored):
    return {name: tensor.read(0, tensor.nbytes) for name, tensor in stored.items()}


def judged_by_the_package(content):
    """Name -> (shape, bytes), or None where it refuses the content."""
    try:
        return {name: (tuple(item["shape"]), bytes(item["data"])) for name, item in deserialize(content)}
    except SafetensorError:
        return None


def judged_by_us(path):
    """The same by this project; any exception but one line with the file's name is a failure."""
    try:
        stored = read_safetensors(path)
    except UserError as error:
        message = str(error)
    else:
        return {name: (tensor.shape, tensor.read(0, tensor.nbytes)) for name, tensor in stored.items()}
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return None


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "np", "说明": "x\n\"y\""}], ids=str)
def test_files_of_the_package_are_read(tmp_path, metadata):
    save_file(arrays(), tmp_path / "a.safetensors", metadata=metadata)
    stored = read_safetensors(tmp_path / "a.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "layers.0.w": ("float32", (3, 5)), "layers.0.b": ("float16", (7,)), "权重": ("I32", (1, 2, 3)),
        "one": ("float32", ())}
    assert read_all(stored) == {name: array.tobytes() for name, array in arrays().items()}


@pytest.mark.parametrize("dtype", list(CODES))
def test_other_types_keep_the_formats_name(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    save_file({"a": array}, tmp_path / "a.safetensors")
    tensor, = read_safetensors(tmp_path / "a.safetensors").values()
    assert (tensor.dtype, tensor.shape) == (CODES[dtype], (2, 3))
    assert tensor.read(0, tensor.nbytes) == array.tobytes()


def test_bfloat16_of_the_package_is_read(tmp_path):
    values = np.array([[1, -2.5], [3e38, 0.15625]], "<f4")
    save_file({"a": ms.Tensor(values).astype(ms.bfloat16).asnumpy()}, tmp_path / "a.safetensors")
    tensor, = read_safetensors(tmp_path / "a.safetensors").values()
    assert (tensor.dtype, tensor.shape) == ("bfloat16", (2, 2))
    output = OutputTensor("a", "float32", (2, 2), (Part(tensor, 0, 4),))
    assert b"".join(output.chunks()) == ms.Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy().tobytes()


@pytest.mark.parametrize("length", [2 ** 63, 2 ** 40, 200_000_000])
def test_a_header_far_beyond_the_file_or_beyond_reason_is_refused_at_once(tmp_path, length):
    """The file has no blocks on the disk, and no more than its first bytes are read."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, 300_000_000)
    message = message_of(read_safetensors, path)
    assert message.startswith(f"{path}: ")
    assert f"a header of {length}" in message.replace(",", "")


@pytest.mark.parametrize("shape", [[10 ** 4000] * 8, [1] * 100_000, [2 ** 64, 0], [2 ** 62, 2 ** 62]])
def test_a_shape_that_no_tensor_has_is_refused(tmp_path, shape):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"a": entry(shape=shape)}, b"12345678"))
    assert "found" in message_of(read_safetensors, path)


def test_a_config_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 10 ** 9)
    assert message_of(read_json_object, path) == (f"{path}: 1,000,000,000 bytes, expected a JSON object of at most "
                                                  "100,000,000")


def test_a_file_without_tensors_is_read(tmp_path):
    save_file({}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert read_safetensors(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("order", list(itertools.permutations(["empty", "first", "second"])), ids=" ".join)
def test_the_headers_order_does_not_matter(tmp_path, order):
    """An empty tensor has the offset of the one behind it."""
    entries = {"first": entry(), "empty": entry(shape=(0, 3), offsets=(8, 8)),
               "second": entry("F16", (2,), (8, 12))}
    content = file_bytes({name: entries[name] for name in order}, bytes(range(12)))
    (tmp_path / "a.safetensors").write_bytes(content)
    found = judged_by_us(tmp_path / "a.safetensors")
    assert found == judged_by_the_package(content) == {
        "first": ((2,), bytes(range(8))), "empty": ((0, 3), b""), "second": ((2,), bytes(range(8, 12)))}


@pytest.fixture
def outputs(tmp_path):
    """A function from types to output tensors, whose values are those of `arrays` and lie in a file."""
    def make(*dtypes):
        save_file(arrays(), tmp_path / "source.safetensors")
        stored = read_safetensors(tmp_path / "source.safetensors")
        names = [name for name in arrays() if name != "权重"]
        return [OutputTensor(f"{name}.写", dtype, stored[name].shape, (Part(stored[name], 0, stored[name].values),))
                for name, dtype in zip(names, itertools.cycle(dtypes))]

    return make


@pytest.mark.parametrize("chunk", [1, 2, 4, 1 << 22])
@pytest.mark.parametrize("dtypes", [("float32",), ("float16",), ("float16", "float32")], ids=str)
def test_the_package_reads_what_we_write(tmp_path, monkeypatch, outputs, dtypes, chunk):
    monkeypatch.setattr(tensors, "_CHUNK", chunk)
    calls = []
    write_safetensors(tmp_path / "a.safetensors", outputs(*dtypes), lambda: calls.append(1))
    expected = {f"{name}.写": arrays()[name].astype(dtype)
                for name, dtype in zip(["layers.0.w", "layers.0.b", "one"], itertools.cycle(dtypes))}
    found = load_file(tmp_path / "a.safetensors")
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        name: (array.dtype, array.shape) for name, array in expected.items()}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(calls) == 3


def test_the_package_reads_the_bfloat16_that_we_write(tmp_path, outputs):
    write_safetensors(tmp_path / "a.safetensors", outputs("bfloat16"), lambda: None)
    found = dict(deserialize((tmp_path / "a.safetensors").read_bytes()))
    assert len(found) == 3
    for name in ("layers.0.w", "layers.0.b", "one"):
        item, array = found[f"{name}.写"], arrays()[name]
        assert (item["dtype"], tuple(item["shape"])) == ("BF16", array.shape)
        wide = (np.frombuffer(item["data"], "<u2").astype("<u4") << 16).view("<f4").reshape(array.shape)
        np.testing.assert_array_equal(wide, ms.Tensor(array).astype(ms.bfloat16).astype(ms.float32).asnumpy())


def test_a_written_header_ends_on_a_multiple_of_eight(tmp_path, outputs):
    for count in range(4):
        write_safetensors(tmp_path / "a.safetensors", outputs("float16")[:count], lambda: None)
        length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
        assert length % 8 == 0
        assert len(load_file(tmp_path / "a.safetensors")) == count


DAMAGED = {
    "empty": (b"", "0 bytes, a header of 0 bytes does not fit in: cut short, or not a safetensors file"),
    "seven bytes": (bytes(7), "7 bytes, a header of 0 bytes does not fit in"),
    "length too large": ((1000).to_bytes(8, "little") + b"{}", "10 bytes, a header of 1000 bytes does not fit in"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes does not fit in"),
    "no header": (bytes(8), "its header is not JSON: damaged, or not a safetensors file"),
    "text": (b"not a safetensors file, only text" * 9, "does not fit in: cut short, or not a safetensors file"),
    "not JSON": (file_bytes(b"{'a': 1}"), "its header is not JSON"),
    "half of JSON": (file_bytes(b'{"a":{"dtype":"F32","shape":[2]'), "its header is not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "its header is not JSON"),
    "nested too deeply": (file_bytes(b"[" * 200_000), "its header is not JSON"),
    "a list": (file_bytes([entry()], bytes(8)), "its header is not an object"),
    "a number": (file_bytes(b"1"), "its header is not an object"),
    "overlap": (file_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "b begins at byte "),
    "the same place": (file_bytes({"a": entry(), "b": entry()}, bytes(8)), "b begins at byte "),
    "gap": (file_bytes({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "b begins at byte "),
    "gap in front": (file_bytes({"a": entry(offsets=(4, 12))}, bytes(12)), "a begins at byte "),
    "backwards": (file_bytes({"a": entry(offsets=(8, 0))}, bytes(8)), "a: found {'dtype': 'F32', 'shape': [2], "
                  "'data_offsets': [8, 0]} in the header, expected dtype, shape and data_offsets that fit together"),
    "too few bytes for the shape": (file_bytes({"a": entry(shape=(3,))}, bytes(8)), "a: found {"),
    "too many bytes for the shape": (file_bytes({"a": entry(shape=(1,))}, bytes(8)), "a: found {"),
    "wrong size for the type": (file_bytes({"a": entry("F16")}, bytes(8)), "a: found {"),
    "unknown type": (file_bytes({"a": entry("F33")}, bytes(8)), "a: found {"),
    "type of no text": (file_bytes({"a": entry([])}, bytes(8)), "a: found {"),
    "negative dimension": (file_bytes({"a": entry(shape=(-2,))}, bytes(8)), "a: found {"),
    "two negative dimensions": (file_bytes({"a": entry(shape=(-1, -2))}, bytes(8)), "a: found {"),
    "fractional dimension": (file_bytes({"a": entry(shape=(2.0,))}, bytes(8)), "a: found {"),
    "boolean dimension": (file_bytes({"a": entry(shape=(True, 2))}, bytes(8)), "a: found {"),
    "dimension as text": (file_bytes({"a": entry(shape="2")}, bytes(8)), "a: found {"),
    "null dimension": (file_bytes({"a": entry(shape=(None, 2))}, bytes(8)), "a: found {"),
    "negative offset": (file_bytes({"a": entry(offsets=(-8, 0))}, bytes(8)), "a: found {"),
    "fractional offset": (file_bytes({"a": entry(offsets=(0, 8.0))}, bytes(8)), "a: found {"),
    "one offset": (file_bytes({"a": entry(offsets=(8,))}, bytes(8)), "a: found {"),
    "three offsets": (file_bytes({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "a: found {"),
    "no dtype": (file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "a: found {"),
    "no shape": (file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "a: found {"),
    "no data_offsets": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "a: found {"),
    "entry of null": (file_bytes({"a": None}, bytes(8)), "a: found None in the header"),
    "entry as list": (file_bytes({"a": ["F32"]}, bytes(8)), "a: found ["),
    "name of two lines": (file_bytes({"a\nb": None}, bytes(8)), "a b: found None in the header"),
    "a byte missing": (file_bytes({"a": entry()}, bytes(7)), ": cut short"),
    "a byte too many": (file_bytes({"a": entry()}, bytes(9)), ": damaged"),
    "data without tensors": (file_bytes({}, bytes(1)), ": damaged"),
}


@pytest.mark.parametrize(("content", "message"), list(DAMAGED.values()), ids=list(DAMAGED))
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    found = message_of(read_safetensors, path)
    assert found.startswith(f"{path}: ")
    assert message in found
    assert len(found) < len(str(path)) + 300
    assert judged_by_the_package(content) is None


def test_cut_or_longer_files_are_refused(tmp_path):
    content, path = save(arrays(), metadata={"format": "pt"}), tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert judged_by_us(path) == judged_by_the_package(content) is not None
    for wrong in (*(content[:length] for length in range(len(content))), content + b"\0", content + content):
        write_anew(path, wrong)
        assert judged_by_us(path) is None
        assert judged_by_the_package(wrong) is None


def test_random_damage_is_judged_alike(tmp_path):
    content, path = save(arrays(), metadata={"format": "pt"}), tmp_path / "model.safetensors"
    header, source = content.index(b"}}") + 2, random.Random(1)
    accepted = 0
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(source.randint(1, 2)):
            place = source.randrange(header)
            damaged[place] = source.choice([source.randrange(256), source.choice(b'0123456789[]{},:-"FI')])
        write_anew(path, damaged)
        found = judged_by_us(path)
        assert found == judged_by_the_package(bytes(damaged))
        accepted += found is not None
    assert 10 < accepted < 1000


def test_a_git_lfs_pointer_is_named_and_a_sound_header_is_no_archive(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LFS_POINTER)
    assert message_of(read_safetensors, path) == f"{path}: not a safetensors file but {LFS_TEXT}"
    length = int.from_bytes(b"\x1f\x8b", "little")  # with which a gzip archive begins
    path.write_bytes(length.to_bytes(8, "little") + json.dumps({"a": entry()}).encode().ljust(length) + bytes(8))
    assert list(read_safetensors(path)) == ["a"]


def test_a_file_that_is_absent_or_a_folder_is_named(tmp_path):
    absent = tmp_path / "a.safetensors"
    assert message_of(read_safetensors, absent) == f"{absent}: cannot be read: No such file or directory"
    assert message_of(read_safetensors, tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize(("content", "message"), [
    (b"", "cannot be read as JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"{", "cannot be read as JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b"\xff", "cannot be read as JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    (b"[1]", "found list, expected a JSON object"),
    (b"null", "found NoneType, expected a JSON object"),
    (LFS_POINTER, f"cannot be read as JSON: {LFS_TEXT}"),
], ids=["empty", "half", "not UTF-8", "list", "null", "pointer"])
def test_json_that_is_no_object_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert message_of(read_json_object, tmp_path / "config.json") == f"{tmp_path / 'config.json'}: {message}"


def test_json_is_read_as_utf_8_and_its_absence_is_named(tmp_path):
    path = tmp_path / "config.json"
    assert message_of(read_json_object, path) == f"{path}: cannot be read as JSON: No such file or directory"
    path.write_text('{"名": [1]}', encoding="utf-8")
    assert read_json_object(path) == {"名": [1]}


def write_shard(path, *names):
    save_file({name: np.full(2, index, "<f4") for index, name in enumerate(names)}, path)


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))


def first_values(stored):
    return {name: np.frombuffer(content, "<f4")[0] for name, content in read_all(stored).items()}


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", SHARDS[0].replace("00002", "00001")])
def test_a_folder_of_one_file_is_read(tmp_path, name):
    write_shard(tmp_path / name, "a", "b")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert first_values(read_safetensors_folder(tmp_path)) == {"a": 0, "b": 1}


@pytest.mark.parametrize("indexed", [False, True])
def test_a_folder_of_shards_is_read_with_and_without_index(tmp_path, indexed):
    write_shard(tmp_path / SHARDS[0], "c", "a")
    write_shard(tmp_path / SHARDS[1], "b")
    if indexed:
        write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]})
    stored = read_safetensors_folder(tmp_path)
    assert first_values(stored) == {"c": 0, "a": 1, "b": 0}
    assert stored["b"].segments[0].path == tmp_path / SHARDS[1]


def test_a_folder_with_an_index_is_read_by_it(tmp_path):
    """Other files beside the named ones are another model's."""
    write_shard(tmp_path / "named.safetensors", "a")
    write_shard(tmp_path / "consolidated.safetensors", "a", "b")
    write_index(tmp_path, {"a": "named.safetensors"})
    assert first_values(read_safetensors_folder(tmp_path)) == {"a": 0}


def test_a_folder_whose_shard_is_missing_is_refused(tmp_path):
    for number in (1, 3):
        write_shard(tmp_path / f"model-0000{number}-of-00004.safetensors", str(number))
    assert message_of(read_safetensors_folder, tmp_path) == (
        f"{tmp_path}: model-00002-of-00004.safetensors is missing; model-00004-of-00004.safetensors is missing")


def test_a_folder_with_a_tensor_in_two_shards_is_refused(tmp_path):
    write_shard(tmp_path / SHARDS[0], "a", "b")
    write_shard(tmp_path / SHARDS[1], "c", "b")
    assert message_of(read_safetensors_folder, tmp_path) == f"{tmp_path / SHARDS[1]}: b is also in {SHARDS[0]}"


def test_a_folder_with_a_damaged_shard_names_the_shard(tmp_path):
    write_shard(tmp_path / SHARDS[0], "a")
    (tmp_path / SHARDS[1]).write_bytes(b"")
    assert message_of(read_safetensors_folder, tmp_path).startswith(f"{tmp_path / SHARDS[1]}: 0 bytes, ")
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    assert message_of(read_safetensors_folder, tmp_path).startswith(f"{tmp_path / SHARDS[1]}: 0 bytes, ")


@pytest.mark.parametrize(("names", "message"), [
    ([], "no .safetensors file in it"),
    (["config.json", "tokenizer.model"], "no .safetensors file in it"),
    (["pytorch_model.bin"], "no .safetensors file in it; pytorch_model.bin is a pickle, which is not read: fetch the "
                            "model's .safetensors files"),
    (["consolidated.00.pt"], "no .safetensors file in it; consolidated.00.pt is a pickle, which is not read: fetch "
                             "the model's .safetensors files"),
], ids=["nothing", "other files", "bin", "pt"])
def test_a_folder_without_safetensors_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert message_of(read_safetensors_folder, tmp_path) == f"{tmp_path}: {message}"


def test_a_folder_that_is_a_file_or_absent_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    expected = "expected a folder with config.json and .safetensors files"
    assert message_of(read_safetensors_folder, path) == f"{path}: no such folder, {expected}"
    write_shard(path, "a")
    assert message_of(read_safetensors_folder, path) == f"{path}: a file, {expected}"


@pytest.mark.parametrize(("weight_map", "message"), [
    ({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]},
     f"{INDEX_NAME}: says that c is in {SHARDS[1]}, where it is not"),
    ({"a": SHARDS[0], "b": SHARDS[0]}, f"{INDEX_NAME}: says that b is in {SHARDS[0]}, where it is not"),
    ({"a": SHARDS[1], "b": SHARDS[0]},
     f"{INDEX_NAME}: says that a is in {SHARDS[1]}, where it is not; says that b is in {SHARDS[0]}, where it is not; "
     f"does not say that a is in {SHARDS[0]}; does not say that b is in {SHARDS[1]}"),
    ({"a": SHARDS[0], "b": "model-00003.safetensors"},
     f": model-00003.safetensors is missing, {INDEX_NAME} names it"),
    ({"a": SHARDS[0], "b": f"../{SHARDS[1]}"},
     f"{INDEX_NAME}: names the file ../{SHARDS[1]}, expected one in the same folder"),
    ({"a": SHARDS[0], "b": "/b.safetensors"},
     f"{INDEX_NAME}: names the file /b.safetensors, expected one in the same folder"),
    ({"a": SHARDS[0], "b": f"sub/{SHARDS[1]}"},
     f"{INDEX_NAME}: names the file sub/{SHARDS[1]}, expected one in the same folder"),
    ({"a": SHARDS[0], "b": ".."}, f": .. is missing, {INDEX_NAME} names it"),
    ({"a": SHARDS[0], "b": ""}, f" is missing, {INDEX_NAME} names it"),
    ({"a": SHARDS[0], "b": "b\0.safetensors"}, f"b\\x00.safetensors is missing, {INDEX_NAME} names it"),
    ({"a": SHARDS[0], "b": 2}, f"{INDEX_NAME}: found no weight_map from tensor names to file names"),
    ({"a": SHARDS[0], "b": [SHARDS[1]]}, f"{INDEX_NAME}: found no weight_map from tensor names to file names"),
    ([SHARDS[0]], f"{INDEX_NAME}: found no weight_map from tensor names to file names"),
    (None, f"{INDEX_NAME}: found no weight_map from tensor names to file names"),
], ids=["tensor in no file", "tensor in another file", "swapped", "absent file", "parent folder", "absolute path",
        "folder below", "parent itself", "no name", "null character", "number", "list of names", "list", "null"])
def test_a_folder_that_contradicts_its_index_is_refused(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        write_shard(place / SHARDS[0], "a")
        write_shard(place / SHARDS[1], "b")
    write_index(folder, weight_map)
    found = message_of(read_safetensors_folder, folder)
    assert found.startswith(str(folder))
    assert message in found


def test_a_folder_with_a_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    write_shard(tmp_path / SHARDS[0], "a", "extra")
    write_index(tmp_path, {"a": SHARDS[0]})
    assert message_of(read_safetensors_folder, tmp_path) == (
        f"{tmp_path / INDEX_NAME}: does not say that extra is in {SHARDS[0]}")


def test_a_folder_with_a_tensor_in_two_indexed_shards_is_refused(tmp_path):
    write_shard(tmp_path / SHARDS[0], "a")
    write_shard(tmp_path / SHARDS[1], "b", "a")
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    assert message_of(read_safetensors_folder, tmp_path) == (
        f"{tmp_path / INDEX_NAME}: does not say that a is in {SHARDS[1]}")


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON: "),
    ("", "cannot be read as JSON: "),
    ("[]", "found list, expected a JSON object"),
    ("{}", "found no weight_map from tensor names to file names"),
], ids=["half", "empty", "list", "no weight_map"])
def test_a_folder_with_a_damaged_index_is_refused(tmp_path, content, message):
    write_shard(tmp_path / "model.safetensors", "a")
    (tmp_path / INDEX_NAME).write_text(content)
    assert message_of(read_safetensors_folder, tmp_path).startswith(f"{tmp_path / INDEX_NAME}: {message}")
