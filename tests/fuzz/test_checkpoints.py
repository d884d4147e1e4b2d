"""Checkpoints that are no longer what they were: refused with the file's name, or the tensors that were saved.

| test                                | proves                                                   | judged against      |
| test_reading_of_damaged_checkpoints | with a checksum nothing but what was saved is read;      | arrays, as saved    |
|                                     | without one, the same names, shapes and types            |                     |
| test_reading_of_damaged_safetensors | what is read is what the format's own package reads      | package safetensors |
| test_damaged_small_files_of_json    | config.json, index, data_settings.json: a line, or right | kinds of values     |
| test_a_bogus_length_takes_no_memory | 2^60 bytes announced are not asked for                   | tracemalloc         |
"""
import json
import struct
import tracemalloc

import mindspore as ms
import numpy as np
import pytest
import safetensors
from helpers import write_anew
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DAMAGE, damaged, fuzz, one_line, outcomes_of
from safetensors.numpy import save

from mindrlhf.checkpoints.find import newest_whole_checkpoint
from mindrlhf.checkpoints.load import check_weights, read_checkpoint
from mindrlhf.checkpoints.training_notes import read_training_notes
from mindrlhf.errors import UserError
from mindrlhf.json_file import read_json_object
from mindrlhf.weights.ckpt_file import check_ckpt, read_ckpt
from mindrlhf.weights.safetensors_file import read_safetensors, read_safetensors_folder

pytestmark = pytest.mark.stack

RANDOM = np.random.default_rng(5)
ARRAYS = {"transformer.embedding.embedding_weight": RANDOM.normal(size=(40, 8)).astype("<f4"),
          "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight": RANDOM.normal(size=(130, 3)).astype("<f4"),
          "transformer.encoder.final_layernorm.weight": np.ones(8, "<f4"),
          "v_head0.weight": RANDOM.normal(size=(1, 8)).astype("<f4")}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}
CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@pytest.fixture(scope="module")
def outcomes(request):
    yield from outcomes_of("checkpoints")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def sound(folder):
    """Kind of file -> its bytes, as MindSpore writes them."""
    kinds = {}
    for name, dtype, options in (("checksum", ms.float32, {"crc_check": True}), ("plain", ms.float32, {}),
                                 ("half", ms.bfloat16, {"crc_check": True})):
        path = folder / f"{name}.ckpt"
        ms.save_checkpoint([{"name": key, "data": ms.Tensor(array).astype(dtype)} for key, array in ARRAYS.items()]
                           + [{"name": "epoch_num", "data": ms.Tensor(3, ms.int32)}], str(path), **options)
        path.chmod(0o600)
        kinds[name] = path.read_bytes()
        path.unlink()
    return kinds


def content_of(tensors):
    return {name: (tensor.dtype, tensor.shape, tensor.read(0, tensor.nbytes)) for name, tensor in tensors.items()}


def kinds_of(content):
    return {name: (dtype, shape) for name, (dtype, shape, _) in content.items()}


VARINTS = st.sampled_from([b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\xff\xff\xff\xff\x0f", b"\x80" * 4 + b"\x00", b"\x00",
                           b"\x80\x80\x80\x80\x80\x80\x80\x80\x40"])
WORDS = st.tuples(st.just("word"), st.sampled_from([
    b"Float32", b"BFloat16", b"Int32", b"crc_num", b"v_head0.weight", b"weight", b"layers.0", b"epoch_num"]),
    st.sampled_from([b"Float64", b"Float16", b"Float3", b"Int8", b"String", b"crc_nun", b"v_head0.Weight", b"\xff", b"",
                     b"Float32", b"transformer.embedding.embedding_weight"]))
CKPT_DAMAGE = st.lists(st.one_of(DAMAGE, WORDS, st.tuples(st.just("set"), st.floats(0, 0.02), VARINTS),
                                 st.tuples(st.just("set"), st.floats(0, 0.999), VARINTS)), min_size=1, max_size=2)


def apply(content, damages):
    for damage in damages:
        content = content.replace(*damage[1:], 1) if damage[0] == "word" else damaged(content, damage)
    return content


@example("plain", [("word", b"Float32", b"Float3")])
@example("plain", [("word", b"Float32", b"String")])
@example("plain", [("word", b"Int32", b"Float32")])
@example("checksum", [("word", b"crc_num", b"crc_nun")])
@given(st.sampled_from(["checksum", "checksum", "plain", "half"]), CKPT_DAMAGE)
@fuzz(few=100, full=500)
def test_reading_of_damaged_checkpoints(folder, sound, outcomes, kind, damages):
    path = folder / "run-1_1.ckpt"
    write_anew(path, sound[kind])
    original = content_of(read_ckpt(path))
    content = apply(sound[kind], damages)
    write_anew(path, content)
    try:
        with outcomes.no_hang():
            check_ckpt(path)
            assert newest_whole_checkpoint(path, 0, False, skipped=pytest.fail) == path
            found = content_of(read_ckpt(path))
            check_weights(str(path), {name: shape for name, (_, shape, _) in found.items()}, SHAPES, need_head=True,
                          types={name: kind for name, (kind, _, _) in found.items()})
            parameters = read_checkpoint(path)
    except UserError as error:
        one_line(error, names=path)
        outcomes.count("refused")
        return
    if content[-17:-10] == b"crc_num":
        assert found == original
    else:  # nothing tells a value that is another from the one that was saved
        names = set(ARRAYS)
        assert {name: value for name, value in kinds_of(found).items() if name in names} == \
            {name: value for name, value in kinds_of(original).items() if name in names}
    for name in ARRAYS:
        stored = ms.Tensor(parameters[name])
        assert (stored.dtype, stored.shape) == (ms.bfloat16 if kind == "half" else ms.float32, SHAPES[name])
        assert stored.get_bytes() == found[name][2]
    outcomes.count("read")


# --- safetensors ----------------------------------------------------------------------------------------------------

ENTRIES = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "F64", "f32", "", None, 1, [], "F4"]),
    "shape": st.one_of(st.none(), st.lists(st.sampled_from([0, 1, 2, 8, 40, -1, 1.0, True, "8", 2 ** 63, 10 ** 30]),
                                           max_size=4)),
    "data_offsets": st.one_of(st.none(), st.lists(st.sampled_from([0, 1, 32, 1280, -1, 2 ** 63, 10 ** 30, "0"]),
                                                  max_size=3)),
    "more": st.just(1)})
HEADERS = st.one_of(
    st.tuples(st.just("entry"), st.sampled_from(sorted(ARRAYS)), ENTRIES),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 7, 2 ** 20, 2 ** 40, 2 ** 63, 2 ** 64 - 1]), st.none()),
    st.tuples(st.just("header"), st.sampled_from([b"", b"{}", b"[]", b"null", b"{", b" {}", b"[" * 10_000, b"\xff",
                                                b"{}" * 3, b'{"a":{}}', b'{"__metadata__": 1}', b'{"a": null}']),
              st.none()),
    st.tuples(st.just("twice"), st.sampled_from(sorted(ARRAYS)), st.none()),
    st.tuples(st.just("bytes"), DAMAGE, st.none()), st.tuples(st.just("head"), DAMAGE, st.none()))


def mutated_safetensors(content, change):
    what, which, value = change
    length = int.from_bytes(content[:8], "little")
    header, data = content[8:8 + length], content[8 + length:]
    if what == "bytes":
        return damaged(content, which)
    if what == "length":
        return struct.pack("<Q", which) + content[8:]
    if what == "head":
        header = damaged(header, which)
    elif what == "header":
        header = which
    elif what == "twice":
        entry = json.dumps(json.loads(header)[which]).encode()
        header = header.rstrip()[:-1] + b', "' + which.encode() + b'": ' + entry + b"}"
    else:
        parsed = json.loads(header)
        parsed[which] = {**parsed[which], **value}
        header = json.dumps(parsed).encode()
    return struct.pack("<Q", len(header)) + header + data


@example(("twice", "v_head0.weight", None))
@example(("header", b"[" * 10_000, None))
@given(HEADERS)
@fuzz(few=100, full=500)
def test_reading_of_damaged_safetensors(folder, outcomes, change):
    whole = save(ARRAYS)
    path = folder / "model.safetensors"
    content = mutated_safetensors(whole, change)
    write_anew(path, content)
    try:
        with outcomes.no_hang():
            found = content_of(read_safetensors(path))
            assert content_of(read_safetensors_folder(folder)) == found
    except UserError as error:
        one_line(error, names=path)
        outcomes.count("refused")
        return
    expected = {name: (CODES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"]))
                for name, entry in safetensors.deserialize(content)}
    assert found == expected
    outcomes.count("read")


# --- the small files beside them ------------------------------------------------------------------------------------

def read_settings(folder):
    ms.save_checkpoint([{"name": "a", "data": ms.Tensor([1.0])}], str(folder / "a.ckpt"))
    settings = read_training_notes(folder).values
    assert isinstance(settings.get("tokenizer", {}), dict)
    assert isinstance(settings.get("prompt_template", ""), str)


@pytest.mark.parametrize("content", [
    b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, "{}".encode("utf-16"),
    b'{"weight_map": 1}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../x"}}',
    b'{"weight_map": {"a": "b\\u0000"}}', b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}',
    b'{"weight_map": {"a": "\\ud800"}}', b'{"tokenizer": "x"}', b'{"prompt_template": 1}'])
@pytest.mark.parametrize(("name", "read"), [
    ("config.json", lambda folder: read_json_object(folder / "config.json")),
    ("model.safetensors.index.json", read_safetensors_folder), ("data_settings.json", read_settings)],
    ids=["config.json", "index", "data_settings.json"])
def test_damaged_small_files_of_json_are_one_line(tmp_path, name, read, content):
    write_anew(tmp_path / name, content)
    try:
        read(tmp_path)
    except UserError as error:
        one_line(error, names=tmp_path)


# --- memory ---------------------------------------------------------------------------------------------------------

def announced(field, length):
    """A value of a .ckpt file whose field announces so many bytes."""
    varint = b""
    while length > 0x7f:
        varint, length = varint + bytes([length & 0x7f | 0x80]), length >> 7
    return b"\x0a\x20" + bytes([field << 3 | 2]) + varint + bytes([length]) + b"x" * 40


@pytest.mark.parametrize("content", [
    *(announced(field, 2 ** bits) for field in (1, 2, 3) for bits in (5, 20, 31, 40, 60)),
    *(struct.pack("<Q", 2 ** bits) + b"{" * 100 for bits in (20, 31, 40, 60))])
def test_a_bogus_length_takes_no_memory(tmp_path, content):
    for name, read in (("a.ckpt", check_ckpt), ("a.safetensors", read_safetensors)):
        write_anew(tmp_path / name, content)
        tracemalloc.start()
        with pytest.raises(UserError):
            read(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
