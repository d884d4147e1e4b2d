"""Weights between Hugging Face and MindSpore, in both directions.

Models are the reference cases: the same tensors under transformers' names (hf/) and under MindFormers' (weight/). Input
folders are written by the safetensors package, checkpoints by MindSpore, and what comes out is read by these two again.

| test                                          | proves                                    | judged against          |
| test_there_and_back_again_no_bit_changes      | both directions, layouts, types, shards   | safetensors,            |
|                                               |                                           | transformers' tensors   |
| test_mindspore_reads_every_weight ...         | the .ckpt files written                   | mindspore, the          |
|                                               |                                           | reference's weights     |
| test_converted_weights_give_the_scores_of ... | the mapping as a whole                    | transformers' GlmModel, |
|                                               |                                           | 1e-4                    |
| test_dtype_rounds_as_ ...                     | --dtype, both directions                  | MindSpore and NumPy     |
| test_..._refused_..., test_full_disk_...      | one line with file and fact; nothing is   | messages, the folder    |
|                                               | left, and what was there stays            |                         |
| test_the_tokenizer_of_an_export_is_ ...       | a tokenizer.json is the rank file again   | the first export        |
| test_the_notes_of_training_go_to_ ...         | template, tokenizer, dimensions, types    | what was noted          |
| test_an_output_that_is_...                    | inputs are kept, links and FIFOs stay     | messages, the folder    |
| test_a_file_size_limit ...                    | the same for a real failure of the system | a process under ulimit  |
| test_memory_stays_below_a_shard               | peak memory below 1.25 x a shard's size   | VmHWM of a process      |
| test_script_...                               | exit codes, one line on stderr            | a process               |
"""
import builtins
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import yaml
from conftest import REFERENCE_CASES, REFERENCE_GRAPHS, ROOT, SAMPLE, TINY_YAML, dimensions_of, weights_of_mindformers
from helpers import write_anew
from mindformers.models.glm2.glm2 import ChatGLM2ForConditionalGeneration
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindspore import Tensor

from mindrlhf.checkpoints.load import load_strictly, read_checkpoint
from mindrlhf.checkpoints.training_notes import model_notes, read_training_notes
from mindrlhf.config.run_config import Model
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.huggingface.convert import hf_to_ms, ms_to_hf
from mindrlhf.models.glm4.dimensions import Dimensions
from mindrlhf.weights import ckpt_file, safetensors_file, tensors

pytestmark = pytest.mark.stack

SCRIPT = ROOT / "scripts" / "convert_weight.py"
TOKENIZER = SAMPLE / "tokenizer.model"
HEAD, LM_HEAD = "v_head0.weight", "transformer.output_layer.weight"
MS_TYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
HF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
INDEX = "model.safetensors.index.json"
SOURCES = ("transformers with value head", "transformers with LM head", "original")


# --- models as they are published ------------------------------------------------------------------------------------

def size_of(arrays):
    """Dimensions of a case under MindFormers' names."""
    return json.loads(str(arrays["dimensions"]))


def group(arrays, prefix):
    return {name[len(prefix):]: value for name, value in arrays.items() if name.startswith(prefix)}


def lm_head(arrays):
    size = size_of(arrays)
    return np.random.default_rng(4).normal(size=(size["padded_vocab_size"], size["hidden_size"])).astype(np.float32)


def transformers_tensors(arrays, *heads):
    found = {**group(arrays, "hf/"), "lm_head.weight": lm_head(arrays)}
    return {name: value for name, value in found.items() if name.startswith("model.") or name in heads}


def original_tensors(arrays):
    found = {name.replace("embedding.embedding_weight", "embedding.word_embeddings.weight"): value
             for name, value in group(arrays, "weight/").items() if name != HEAD}
    return {**found, LM_HEAD: lm_head(arrays), "transformer.rotary_pos_emb.inv_freq": np.ones(4, np.float32)}


def transformers_config(size):
    theta = 10000.0 * size["rope_ratio"]
    return {"architectures": ["GlmForCausalLM"], "model_type": "glm", "hidden_act": "silu", "attention_bias": True,
            "hidden_size": size["hidden_size"], "intermediate_size": size["ffn_hidden_size"],
            "num_hidden_layers": size["num_layers"], "num_attention_heads": size["num_attention_heads"],
            "num_key_value_heads": size["multi_query_group_num"], "head_dim": size["kv_channels"],
            "vocab_size": size["padded_vocab_size"], "max_position_embeddings": size["seq_length"],
            "rms_norm_eps": size["layernorm_epsilon"], "rope_theta": theta, "partial_rotary_factor": 0.5,
            "attention_dropout": 0.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def original_config(size):
    keys = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "multi_query_group_num",
            "kv_channels", "padded_vocab_size", "seq_length", "layernorm_epsilon", "rope_ratio")
    return {"architectures": ["ChatGLMModel"], "model_type": "chatglm", **{key: size[key] for key in keys},
            "num_hidden_layers": size["num_layers"], "add_bias_linear": False, "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
            "attention_softmax_in_fp32": True, "hidden_dropout": 0.0, "multi_query_attention": True,
            "original_rope": True, "post_layer_norm": True, "rmsnorm": True, "fp32_residual_connection": False,
            "eos_token_id": [151329, 151336, 151338], "torch_dtype": "bfloat16"}


def save(path, values):
    """One file by the safetensors package. It has no bfloat16 for NumPy: the header calls uint16 arrays that."""
    raw = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in values.items()})
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].rstrip().replace(b'"U16"', b'"BF16"')
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def read(folder):
    """Name -> (type, shape, bytes) of all .safetensors files of a folder, by the safetensors package."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in safetensors.deserialize(path.read_bytes()):
            assert name not in found
            found[name] = (value["dtype"], tuple(value["shape"]), bytes(value["data"]))
    return found


def raw(values):
    """Like `read`, of arrays."""
    codes = {"float32": "F32", "uint16": "BF16", "float16": "F16"}
    return {name: (codes[str(value.dtype)], value.shape, value.tobytes()) for name, value in values.items()}


def bfloat16(value):
    """The upper 16 bits of float32 values, as uint16."""
    return (np.ascontiguousarray(value).view(np.uint32) >> 16).astype(np.uint16)


def widened(value):
    """float32 values of an array, of bfloat16 bits too."""
    return (value.astype(np.uint32) << 16).view(np.float32) if value.dtype == np.uint16 else value.astype(np.float32)


def as_type(values, dtype):
    change = {"float32": np.asarray, "bfloat16": bfloat16, "float16": lambda value: value.astype(np.float16)}[dtype]
    return {name: change(value) for name, value in values.items()}


def write_model(folder, values, config, shards=1, index=True):
    """A model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save(folder / "model.safetensors", values)
        return folder
    names = sorted(values)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save(folder / file, {name: values[name] for name in names[number::shards]})
        weight_map.update(dict.fromkeys(names[number::shards], file))
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def write_source(folder, arrays, source, dtype="float32", **options):
    """A case as one of `SOURCES`."""
    size = size_of(arrays)
    values, config = (original_tensors(arrays), original_config(size)) if source == "original" else (
        transformers_tensors(arrays, "score.weight" if source.endswith("value head") else "lm_head.weight"),
        transformers_config(size))
    return write_model(folder, as_type(values, dtype), config, **options)


def model_of(size, **changed):
    """What conversions are told of a run's YAML."""
    size = {**size, **changed}
    return Model(Dimensions.from_yaml(size, "model.model_config"), "float32", "float32", flash_attention=False,
                 recompute=False, pad_token_id=size.get("pad_token_id", 0))


def save_checkpoint(path, values, dtype=ms.float32, **options):
    """A checkpoint by MindSpore itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ms.save_checkpoint([{"name": name, "data": Tensor(np.ascontiguousarray(value)).astype(dtype)}
                        for name, value in values.items()], str(path), **options)
    return path


def contents(folder):
    """Relative path -> bytes of everything in a folder, hidden files and folders (None) too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def message_of(function, *args, **kwargs):
    """The one line of the `UserError` that a call ends with."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def outputs(tmp_path):
    """A folder with the output of an earlier run, base.ckpt."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "base.ckpt").write_bytes(b"earlier")
    return folder


def refused(outputs, source, **options):
    """The message of `hf_to_ms`, which must leave `outputs` as it was, for a file and for a folder alike."""
    first = message_of(hf_to_ms, source, outputs / "base.ckpt", **options)
    assert contents(outputs) == {"base.ckpt": b"earlier"}
    message_of(hf_to_ms, source, outputs / "shards", **options)
    assert contents(outputs) == {"base.ckpt": b"earlier"}
    return first


# --- what is right ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shards", [1, 5], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_there_and_back_again_no_bit_changes(tmp_path, load_reference, case, source, dtype, shards):
    arrays = load_reference(case)
    folder = write_source(tmp_path / "in", arrays, source, dtype, shards=shards)
    there = tmp_path / ("there.ckpt" if shards == 1 else "there")
    hf_to_ms(folder, there, max_shard_bytes=5000)
    language_model = source != SOURCES[0]
    ms_to_hf(str(there), model_of(size_of(arrays)), tmp_path / "back", language_model=language_model,
             max_shard_bytes=5000 if shards > 1 else 10 ** 9)
    expected = transformers_tensors(arrays, "lm_head.weight" if language_model else "score.weight")
    assert read(tmp_path / "back") == raw(as_type(expected, dtype))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1 or shards == 1
    assert there.is_file() or len(list(there.glob("*.ckpt"))) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_mindspore_reads_every_weight_of_the_reference(tmp_path, load_reference, case, source, dtype):
    arrays = load_reference(case)
    hf_to_ms(write_source(tmp_path / "in", arrays, source, dtype), tmp_path / "base.ckpt")
    expected = {**group(arrays, "weight/"), LM_HEAD: lm_head(arrays)}
    del expected[LM_HEAD if source == SOURCES[0] else HEAD]
    found = weights_in(tmp_path / "base.ckpt")
    assert set(found) == set(expected)
    for name, value in as_type(expected, dtype).items():
        assert found[name].dtype == MS_TYPES[dtype], name
        assert found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name].astype(ms.float32).asnumpy(), widened(value), err_msg=name)


def test_weights_are_the_same_however_they_are_cut_into_chunks_and_values(tmp_path, monkeypatch, reference):
    """A chunk ends within a row, a value of the .ckpt within a chunk, as those of large tensors do."""
    folder = write_source(tmp_path / "in", reference, "transformers with value head")
    monkeypatch.setattr(tensors, "_CHUNK", 37)
    monkeypatch.setattr(ckpt_file, "_VALUE_BYTES", 1000)
    hf_to_ms(folder, tmp_path / "base.ckpt")
    content = (tmp_path / "base.ckpt").read_bytes()
    assert content.count(b"transformer.embedding.embedding_weight") == 9  # 8192 bytes in parts of 1000
    found = weights_in(tmp_path / "base.ckpt")
    for name, value in group(reference, "weight/").items():
        np.testing.assert_array_equal(found[name].asnumpy(), value, err_msg=name)
    ms_to_hf(str(tmp_path / "base.ckpt"), model_of(size_of(reference)), tmp_path / "back")
    assert read(tmp_path / "back") == raw(group(reference, "hf/"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("crc_check", [False, True], ids=["no checksum", "checksum"])
def test_a_checkpoint_by_mindspore_is_read_with_large_tensors_in_parts(tmp_path, monkeypatch, reference, dtype,
                                                                        crc_check):
    """MindSpore cuts a tensor every 512 MB, here every KB."""
    monkeypatch.setattr(ms.train.serialization, "SLICE_SIZE", 1)
    values = {name: widened(value) for name, value in as_type(group(reference, "weight/"), dtype).items()}
    path = save_checkpoint(tmp_path / "a.ckpt", values, MS_TYPES[dtype], crc_check=crc_check)
    ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "back")
    assert read(tmp_path / "back") == raw(as_type(group(reference, "hf/"), dtype))


def test_shards_hold_what_the_index_says_and_keep_to_the_limit(tmp_path, reference):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    result = ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "out", max_shard_bytes=20_000)
    count = len(result.files)
    assert count > 2
    assert result.files == tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    assert sorted(contents(tmp_path / "out")) == sorted(["README.md", "config.json", INDEX, *result.files])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = {name: value.nbytes for name, value in group(reference, "hf/").items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    for file in result.files:
        with safetensors.safe_open(tmp_path / "out" / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}  # without it transformers 4 refuses the file
            names = set(opened.keys())
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(sizes[name] for name in names) <= 20_000
    assert set(index["weight_map"]) == set(sizes)


def test_one_file_needs_no_index(tmp_path, reference):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "a [b] 模型"])
def test_the_exported_folder_may_have_any_name(tmp_path, reference, name):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "out" / name)
    assert sorted(contents(tmp_path / "out" / name)) == ["README.md", "config.json", "model.safetensors"]


def test_shards_without_an_index_are_read_too(tmp_path, reference):
    folder = write_source(tmp_path / "in", reference, "original", shards=3, index=False)
    result = hf_to_ms(folder, tmp_path / "base.ckpt")
    assert result.layout == "original"
    assert set(weights_in(tmp_path / "base.ckpt")) == {*group(reference, "weight/"), LM_HEAD} - {HEAD}


def test_query_key_and_value_of_two_types_become_float32(tmp_path, reference):
    values = transformers_tensors(reference, "score.weight")
    key = "model.layers.0.self_attn.k_proj.weight"
    values[key] = bfloat16(values[key])
    hf_to_ms(write_model(tmp_path / "in", values, transformers_config(size_of(reference))), tmp_path / "base.ckpt")
    found = weights_in(tmp_path / "base.ckpt")["transformer.encoder.layers.0.self_attention."
                                                            "query_key_value.weight"]
    expected = [widened(values[f"model.layers.0.self_attn.{part}_proj.weight"]) for part in "qkv"]
    assert found.dtype == ms.float32
    np.testing.assert_array_equal(found.asnumpy(), np.concatenate(expected))


def test_new_output_takes_the_place_of_an_earlier_file_and_of_an_empty_folder(tmp_path, outputs, reference):
    folder = write_source(tmp_path / "in", reference, "original")
    hf_to_ms(folder, outputs / "base.ckpt")
    (outputs / "shards").mkdir()
    hf_to_ms(folder, outputs / "shards")
    hf_to_ms(folder, outputs / "not" / "yet" / "there" / "base.ckpt")
    assert sorted(name for name, content in contents(outputs).items() if content) == [
        "base.ckpt", "not/yet/there/base.ckpt", "shards/model.ckpt"]
    assert (outputs / "base.ckpt").read_bytes() == (outputs / "shards" / "model.ckpt").read_bytes()


@pytest.fixture(scope="module")
def networks(build_model, load_reference):
    """A function from a case to its network, whose weights are all 0: what it scores comes from what is loaded."""
    built = {}

    def get(case):
        if case not in built:
            built[case] = build_model(**dimensions_of(load_reference(case))).set_train(False)
        for parameter in built[case].get_parameters():
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
        return built[case]

    return get


def score(network, arrays):
    """End scores (N,) of a case's inputs."""
    ids, mask, ends = (Tensor(arrays[name], ms.int32) for name in ("input_ids", "attention_mask", "end_ind"))
    return network(ids, None, mask, None, ends).asnumpy()[:, 0]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", REFERENCE_GRAPHS)
def test_converted_weights_give_the_scores_of_transformers_glm(tmp_path, networks, load_reference, case, source):
    arrays = load_reference(case)
    output = tmp_path / ("shards" if source == "original" else "base.ckpt")
    hf_to_ms(write_source(tmp_path / "in", arrays, source), output, max_shard_bytes=20_000)
    network = networks(case)
    has_head = source == SOURCES[0]
    report = load_strictly(network, read_checkpoint(output), str(output), need_head=has_head)
    assert report.left_over == ()
    assert report.fresh == (() if has_head else (HEAD,))
    if not has_head:
        head = next(parameter for parameter in network.get_parameters() if parameter.name == HEAD)
        head.set_data(Tensor(arrays[f"weight/{HEAD}"]))
    np.testing.assert_allclose(score(network, arrays), arrays["end_scores"], atol=1e-4)


@pytest.mark.parametrize("case", [case if case == "rope500" else pytest.param(case, marks=pytest.mark.further)
                                  for case in REFERENCE_CASES if case.endswith("rope500")])
def test_scores_differ_with_another_rope_ratio(tmp_path, build_model, load_reference, case):
    """The comparison above can fail: the weights are the same, and only the dimension is wrong."""
    arrays = load_reference(case)
    hf_to_ms(write_source(tmp_path / "in", arrays, SOURCES[0]), tmp_path / "base.ckpt")
    network = build_model(**{**dimensions_of(arrays), "rope_ratio": 1}).set_train(False)
    load_strictly(network, read_checkpoint(tmp_path / "base.ckpt"), "base.ckpt", need_head=True)
    assert np.abs(score(network, arrays) - arrays["end_scores"]).max() > 1e-3


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_dimensions_are_read_from_both_kinds_of_config_json(load_reference, case):
    size = size_of(load_reference(case))
    expected = {**{key: value for key, value in size.items() if key != "pad_token_id"}, "add_qkv_bias": True}
    newer = transformers_config(size)
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": newer.pop("rope_theta"),
                                "partial_rotary_factor": newer.pop("partial_rotary_factor")}
    for config, layout in ((transformers_config(size), "transformers"), (newer, "transformers"),
                           (original_config(size), "original")):
        assert asdict(Dimensions.from_huggingface(config, layout, "config.json")) == expected


# --- --dtype ---------------------------------------------------------------------------------------------------------

# Ties and a value just above one, the largest of float16 and one that is rounded to it, and tiny ones.
AWKWARD = np.array([1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -8 + 2 ** -20, 1 + 2 ** -11, 1 + 3 * 2 ** -11, -0.0, 65504,
                    65519, -1e-30, 1e-40, 6e-8], np.float32)


def cast(value, dtype):
    """float32 -> dtype -> float32 by MindSpore (bfloat16) and NumPy (float16)."""
    if dtype == "bfloat16":
        return Tensor(value).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    return value.astype(dtype).astype(np.float32)


@pytest.mark.parametrize(("stored", "wanted"), [
    ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("bfloat16", "float16"),
    ("float16", "float32"), ("float16", "bfloat16")])
def test_dtype_rounds_as_mindspore_and_numpy_do_in_both_directions(tmp_path, reference, stored, wanted):
    values = transformers_tensors(reference, "score.weight")
    values["model.norm.weight"] = values["model.norm.weight"].copy()
    values["model.norm.weight"][:len(AWKWARD)] = cast(AWKWARD, stored)
    if (stored, wanted) == ("bfloat16", "float16"):  # 65504 and 65519 are 65536 there, and float16 cannot hold that
        values["model.norm.weight"][6:8] = 65280
    values = as_type(values, stored)
    size = size_of(reference)
    hf_to_ms(write_model(tmp_path / "in", values, transformers_config(size)), tmp_path / "base.ckpt", dtype=wanted)
    expected = {name: cast(widened(value), wanted) for name, value in values.items()}

    found = weights_in(tmp_path / "base.ckpt")
    assert {value.dtype for value in found.values()} == {MS_TYPES[wanted]}
    np.testing.assert_array_equal(
        found["transformer.encoder.final_layernorm.weight"].astype(ms.float32).asnumpy(), expected["model.norm.weight"])
    np.testing.assert_array_equal(
        found["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"].astype(ms.float32).asnumpy(),
        expected["model.layers.1.mlp.gate_up_proj.weight"])

    hf_to_ms(tmp_path / "in", tmp_path / "as_stored.ckpt")
    ms_to_hf(str(tmp_path / "as_stored.ckpt"), model_of(size), tmp_path / "out", dtype=wanted)
    for name, (code, _, content) in read(tmp_path / "out").items():
        assert code == HF_TYPES[wanted]
        back = widened(np.frombuffer(content, {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}[code]))
        np.testing.assert_array_equal(back, expected[name].ravel(), err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == wanted


@pytest.mark.parametrize(("value", "dtype", "text"), [
    (70000, "float16", "70000"), (-65520, "float16", "-65520"), (3.4e38, "bfloat16", "3.4e+38")], ids=str)
def test_value_too_large_for_the_type_is_refused_and_nothing_is_left(tmp_path, outputs, reference, value, dtype, text):
    values = transformers_tensors(reference, "score.weight")
    values["model.norm.weight"] = values["model.norm.weight"].copy()
    values["model.norm.weight"][3] = value
    size = size_of(reference)
    folder = write_model(tmp_path / "in", values, transformers_config(size))
    expected = f"found {text}; expected values that {dtype} can hold (choose another --dtype)"
    assert refused(outputs, folder, dtype=dtype) == f"transformer.encoder.final_layernorm.weight: {expected}"
    hf_to_ms(folder, tmp_path / "base.ckpt")
    message = message_of(ms_to_hf, str(tmp_path / "base.ckpt"), model_of(size), outputs / "hf", dtype=dtype)
    assert message == f"model.norm.weight: {expected}"
    assert contents(outputs) == {"base.ckpt": b"earlier"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_nan_or_infinite_are_refused_by_name(tmp_path, outputs, reference, value, dtype):
    values = transformers_tensors(reference, "score.weight")
    size = size_of(reference)
    for name in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
        values[name] = values[name].copy()
        values[name].flat[-1] = value
    folder = write_model(tmp_path / "in", as_type(values, dtype), transformers_config(size), shards=2)
    assert refused(outputs, folder) == (
        f"{folder}: NaN or infinity in 2 of the 17 weights, expected finite values: transformer.encoder.layers.1."
        "self_attention.query_key_value.weight, transformer.encoder.final_layernorm.weight")
    checkpoint = save_checkpoint(tmp_path / "rm.ckpt", {
        name: np.where(np.arange(array.size).reshape(array.shape) == 0, value, array) if name == HEAD else array
        for name, array in group(reference, "weight/").items()}, MS_TYPES[dtype])
    message = message_of(ms_to_hf, str(checkpoint), model_of(size), outputs / "hf", dtype="float32")
    assert message.startswith(f"{checkpoint}: NaN or infinity in 1 of the ")
    assert message.endswith(" weights, expected finite values: score.weight")
    assert contents(outputs) == {"base.ckpt": b"earlier"}


# --- what hf_to_ms says ----------------------------------------------------------------------------------------------

def test_report_counts_tensors_bytes_and_heads(tmp_path, reference):
    folder = write_source(tmp_path / "in", reference, "original", shards=2)
    result = hf_to_ms(folder, tmp_path / "out", max_shard_bytes=40_000)
    weights = {**group(reference, "weight/"), LM_HEAD: lm_head(reference)}
    del weights[HEAD]
    total = sum(value.nbytes for value in weights.values())
    assert (result.taken, result.bytes_taken, result.written, result.bytes_written) == (len(weights), total,
                                                                                        len(weights), total)
    lines = result.as_text().splitlines()
    assert lines[0] == (f"mapped {len(weights)} tensors ({total / 1e6:.2f} MB) of the original layout to "
                        f"{len(weights)} ({total / 1e6:.2f} MB): backbone, LM head")
    assert lines[1] == "left out: transformer.rotary_pos_emb.inv_freq"
    assert lines[2].startswith("no value head in it: training starts from one with random weights")
    assert lines[-1] == f"wrote {tmp_path / 'out'}, {len(result.files)} files {result.files[0]} ..."


def test_report_of_a_model_with_value_head(tmp_path, reference):
    result = hf_to_ms(write_source(tmp_path / "in", reference, SOURCES[0]), tmp_path / "a.ckpt", dtype="bfloat16")
    hf, weights = group(reference, "hf/"), group(reference, "weight/")
    total = sum(value.nbytes for value in hf.values())
    assert result.as_text().splitlines() == [
        f"mapped {len(hf)} tensors ({total / 1e6:.2f} MB) of the transformers layout to {len(weights)} "
        f"({total / 2e6:.2f} MB): backbone, value head", f"wrote {tmp_path / 'a.ckpt'}"]


def test_differences_from_the_yaml_are_listed_with_both_values(tmp_path, load_reference):
    arrays = load_reference("rope500")
    size = size_of(arrays)
    yaml_values = model_of(size, num_layers=3, rope_ratio=1, seq_length=8, add_qkv_bias=False, layernorm_epsilon=1e-5)
    result = hf_to_ms(write_source(tmp_path / "in", arrays, "original"), tmp_path / "a.ckpt", model=yaml_values)
    lines = result.as_text().splitlines()
    start = lines.index("the YAML's model.model_config differs; edit it before training:")
    rows = [line.split() for line in lines]
    assert rows[start + 1] == ["key", "checkpoint", "YAML"]
    assert sorted(rows[start + 3:start + 8]) == sorted([
        ["num_layers", "1", "3"], ["rope_ratio", "500", "1"], ["seq_length", "16", "8"],
        ["add_qkv_bias", "True", "False"], ["layernorm_epsilon", "1.5625e-07", "1e-05"]])
    assert "seq_length is how long a text the model was made for; the YAML's may be shorter" in result.as_text()
    assert "same dimensions" not in result.as_text()


@pytest.mark.parametrize("source", SOURCES)
def test_equal_dimensions_are_said_to_be_equal(tmp_path, load_reference, source):
    arrays = load_reference("rope500")
    result = hf_to_ms(write_source(tmp_path / "in", arrays, source), tmp_path / "a.ckpt",
                      model=model_of(size_of(arrays)))
    assert "the YAML's model.model_config has the same dimensions" in result.as_text()
    assert "differs" not in result.as_text()


# --- bad input of hf_to_ms -------------------------------------------------------------------------------------------

def cut(size):
    """Shorten a shard to `size` bytes, from the end if negative."""
    def change(folder):
        path = folder / "model-00002-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:size])
    return change


def replaced(content, name="model-00002-of-00003.safetensors"):
    return lambda folder: (folder / name).write_bytes(content)


def header_of(**tensor):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def edited(name, change):
    """Change the object in a JSON file."""
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return apply


def without_index(change):
    def apply(folder):
        (folder / INDEX).unlink()
        change(folder)
    return apply


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(("change", "parts"), [
    (lambda folder: (folder / SHARD).unlink(), [f"in: {SHARD} is missing, {INDEX} names it"]),
    (without_index(lambda folder: (folder / SHARD).unlink()), [f"in: {SHARD} is missing"]),
    (without_index(lambda folder: (folder / SHARD.replace("00002-", "00003-")).unlink()),
     ["in: model-00003-of-00003.safetensors is missing"]),
    (cut(-1), [f"{SHARD}: ", "cut short"]),
    (cut(100), [f"{SHARD}: 100 bytes, a header of ", "cut short"]),
    (cut(5), [f"{SHARD}: 5 bytes", "cut short"]),
    (cut(0), [f"{SHARD}: 0 bytes", "cut short"]),
    (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"\0"), [f"{SHARD}: ", "damaged"]),
    (replaced(b"<!DOCTYPE html><html>Not found</html>"), [f"{SHARD}: not a safetensors file but a web page"]),
    (replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), [f"{SHARD}: ", "not a safetensors"]),
    (replaced((2).to_bytes(8, "little") + b"[]"), [f"{SHARD}: its header is not an object"]),
    (replaced((4).to_bytes(8, "little") + b"{{{{"), [f"{SHARD}: its header is not JSON"]),
    (replaced(header_of(shape=[3])), [f"{SHARD}: a: found ", "expected dtype, shape and data_offsets"]),
    (replaced(header_of(data_offsets=[8, 16])), [f"{SHARD}: a begins at byte ", "damaged"]),
    (replaced(header_of(data_offsets=[-8, 0])), [f"{SHARD}: a: found "]),
    (replaced(header_of(dtype=["F32"])), [f"{SHARD}: a: found "]),
    (edited(INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "other.safetensors"})),
     ["in: other.safetensors is missing"]),
    (edited(INDEX, lambda index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
     [f"{INDEX}: names the file ../x.safetensors, expected one in the same folder"]),
    (edited(INDEX, lambda index: index["weight_map"].update({"model.norm.bias": SHARD})),
     [f"{INDEX}: says that model.norm.bias is in {SHARD}, where it is not"]),
    (edited(INDEX, lambda index: index["weight_map"].pop("model.norm.weight")),
     [f"{INDEX}: does not say that model.norm.weight is in model-0000"]),
    (edited(INDEX, lambda index: index.pop("weight_map")), [f"{INDEX}: found no weight_map"]),
    (edited(INDEX, lambda index: index.update(weight_map={"a": 1})), [f"{INDEX}: found no weight_map"]),
    (replaced(b"{", INDEX), [f"{INDEX}: cannot be read as JSON"]),
    (without_index(lambda folder: shutil.copy(folder / SHARD, folder / "copy.safetensors")),
     [f"{SHARD}: ", "is also in copy.safetensors"]),
], ids=["shard missing", "shard missing, no index", "last shard missing, no index", "one byte short", "header short",
        "5 bytes", "empty", "one byte too many", "a web page", "a git-lfs pointer", "header is a list",
        "header is no JSON", "shape contradicts offsets", "hole", "negative offset", "type is a list",
        "index: absent file", "index: other folder", "index: absent tensor", "index: tensor not named",
        "index: no map", "index: map to numbers", "index: no JSON", "tensor in two files"])
def test_bad_files_are_refused_with_file_and_fact(tmp_path, outputs, reference, change, parts):
    folder = write_source(tmp_path / "in", reference, SOURCES[0], shards=3)
    change(folder)
    message = refused(outputs, folder)
    assert message.startswith(str(folder))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("name", "expected"), [
    ("absent", "absent: no such folder, expected a folder with config.json and .safetensors files"),
    ("in/config.json", "config.json: a file, expected a folder with config.json and .safetensors files"),
    ("empty", "empty: no .safetensors file in it"),
    ("pickles", "pickles: no .safetensors file in it; pytorch_model.bin is a pickle, which is not read: fetch the "
                "model's .safetensors files"),
])
def test_a_path_that_is_no_model_folder_is_refused(tmp_path, outputs, reference, name, expected):
    write_source(tmp_path / "in", reference, "original")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").touch()
    assert refused(outputs, tmp_path / name).endswith(expected)


def without(*names):
    return lambda values: [values.pop(name) for name in names]


def also(**added):
    return lambda values: values.update({name.replace("__", "."): value for name, value in added.items()})


def changed(name, function):
    return lambda values: values.update({name: function(values[name])})


ROW = np.zeros((1, 32), np.float32)


@pytest.mark.parametrize(("source", "change", "expected"), [
    (SOURCES[0], without("model.norm.weight"), "1 weights are missing: model.norm.weight"),
    (SOURCES[0], without("model.layers.1.self_attn.k_proj.bias"),
     "1 weights are missing: model.layers.1.self_attn.k_proj.bias"),
    ("original", without("transformer.encoder.final_layernorm.weight", "transformer.embedding.word_embeddings.weight"),
     "2 weights are missing: transformer.embedding.word_embeddings.weight, transformer.encoder.final_layernorm.weight"),
    (SOURCES[0], also(model__extra__weight=ROW),
     "1 tensors have no place in the transformers layout of 2 layers: model.extra.weight"),
    (SOURCES[1], also(model__layers__2__input_layernorm__weight=ROW[0]),
     "1 tensors have no place in the transformers layout of 2 layers: model.layers.2.input_layernorm.weight"),
    ("original", also(transformer__vision__conv__weight=ROW),
     "1 tensors have no place in the original layout of 2 layers: transformer.vision.conv.weight"),
    ("original", also(model__norm__weight=ROW[0]),
     "1 tensors have no place in the original layout of 2 layers: model.norm.weight"),
    (SOURCES[0], changed("model.layers.0.self_attn.k_proj.weight", lambda value: value[:8]),
     "1 weights have another shape than config.json says: model.layers.0.self_attn.k_proj.weight is [8, 32], "
     "expected [16, 32]"),
    ("original", changed("transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", lambda value: value.T),
     "1 weights have another shape than config.json says: transformer.encoder.layers.0.mlp.dense_h_to_4h.weight is "
     "[32, 96], expected [96, 32]"),
    (SOURCES[0], changed("score.weight", lambda value: np.concatenate([value, value])),
     "1 weights have another shape than config.json says: score.weight is [2, 32], expected [1, 32]"),
    (SOURCES[0], changed("model.norm.weight", lambda value: value.astype(np.int8)),
     "1 weights are not of type float32, bfloat16, float16: model.norm.weight is I8"),
    ("original", changed("transformer.encoder.layers.1.mlp.dense_4h_to_h.weight",
                         lambda value: value.astype(np.int8)),
     "1 weights are not of type float32, bfloat16, float16: "
     "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight is I8"),
    (SOURCES[0], changed("score.weight", lambda value: value.astype(np.float64)),
     "1 weights are not of type float32, bfloat16, float16: score.weight is F64"),
], ids=["norm missing", "bias missing", "two missing", "superfluous", "superfluous layer", "vision tower",
        "other layout's name", "one key-value head", "transposed", "two labels", "int8 norm", "int8 matrix",
        "float64 head"])
def test_bad_tensors_are_refused_by_name(tmp_path, outputs, reference, source, change, expected):
    values = original_tensors(reference) if source == "original" else transformers_tensors(
        reference, "score.weight" if source == SOURCES[0] else "lm_head.weight")
    config = (original_config if source == "original" else transformers_config)(size_of(reference))
    change(values)
    folder = write_model(tmp_path / "in", values, config, shards=2)
    assert refused(outputs, folder) == f"{folder}: {expected}"


@pytest.mark.parametrize("names", [
    ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"],
    ["bert.encoder.layer.0.output.dense.weight"]], ids=["Llama", "BERT"])
def test_another_kind_of_model_is_refused(tmp_path, outputs, reference, names):
    folder = write_model(tmp_path / "in", dict.fromkeys(names, ROW), transformers_config(size_of(reference)))
    message = refused(outputs, folder)
    assert message.startswith(f"{folder}: not a GLM-4 model: found {names[0]}")
    assert "expected names as transformer.encoder.layers.0.mlp.dense_h_to_4h.weight (THUDM/glm-4-9b) or " in message


def test_config_json_of_other_dimensions_is_refused(tmp_path, outputs, reference):
    folder = write_source(tmp_path / "in", reference, "original")
    size = size_of(reference)
    for changes, expected in (
            ({"num_layers": 3}, "7 weights are missing: transformer.encoder.layers.2.input_layernorm.weight"),
            ({"num_layers": 1}, "7 tensors have no place in the original layout of 1 layers: transformer.encoder.layers"
                                ".1."),
            ({"multi_query_group_num": 1}, "4 weights have another shape than config.json says: transformer.encoder."
                                           "layers.0.self_attention.query_key_value.weight is [64, 32], expected "
                                           "[48, 32]"),
            ({"padded_vocab_size": 65}, "2 weights have another shape than config.json says: transformer.embedding."
                                        "word_embeddings.weight is [64, 32], expected [65, 32]"),
            ({"add_qkv_bias": False}, "2 tensors have no place in the original layout of 2 layers: ")):
        (folder / "config.json").write_text(json.dumps({**original_config(size), **changes}))
        assert refused(outputs, folder).startswith(f"{folder}: {expected}")


@pytest.mark.parametrize(("content", "expected"), [
    (None, "cannot be read as JSON: No such file or directory"),
    (b"", "cannot be read as JSON: "),
    (b"{'hidden_size': 32}", "cannot be read as JSON: "),
    (b"\xff\xfe{}", "cannot be read as JSON: "),
    (b"[1]", "found list, expected a JSON object"),
    (b"{}", "num_hidden_layers is None, expected a whole number above 0"),
], ids=["absent", "empty", "single quotes", "not UTF-8", "a list", "no key"])
def test_unreadable_config_json_is_refused(tmp_path, outputs, reference, content, expected):
    folder = write_source(tmp_path / "in", reference, SOURCES[1])
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    assert refused(outputs, folder).startswith(f"{folder / 'config.json'}: {expected}")


@pytest.mark.parametrize(("source", "config", "key"), [
    ("original", transformers_config, "num_layers"), (SOURCES[1], original_config, "intermediate_size")])
def test_config_json_of_the_other_layout_is_refused(tmp_path, outputs, reference, source, config, key):
    folder = write_source(tmp_path / "in", reference, source)
    (folder / "config.json").write_text(json.dumps(config(size_of(reference))))
    message = refused(outputs, folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert f"{key} is None, expected a whole number above 0" in message


@pytest.mark.parametrize(("source", "changes", "expected"), [
    (SOURCES[0], {"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected a whole number above 0"),
    (SOURCES[0], {"hidden_size": 32.0}, "hidden_size is 32.0, expected a whole number above 0"),
    (SOURCES[0], {"hidden_size": True}, "hidden_size is True, expected a whole number above 0"),
    (SOURCES[0], {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    (SOURCES[0], {"partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0, expected 0.5"),
    (SOURCES[0], {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type is 'yarn', expected 'default'"),
    (SOURCES[0], {"rope_theta": 0}, "rope_"),
    (SOURCES[0], {"rope_theta": "10000"}, "rope_"),
    (SOURCES[0], {"rope_theta": None}, "rope_"),
    (SOURCES[0], {"rope_theta": float("inf")}, "rope_"),
    (SOURCES[0], {"rope_parameters": ["default"]}, "rope_"),
    (SOURCES[0], {"rope_scaling": "linear"}, "rope_"),
    ("original", {"rope_ratio": "500"}, "rope_ratio is '500', expected a number above 0"),
    ("original", {"rope_ratio": float("inf")}, "rope_ratio is inf, expected a number above 0"),
    ("original", {"rmsnorm": False}, "rmsnorm is False, expected True"),
    ("original", {"add_qkv_bias": 1}, "add_qkv_bias is 1, expected true or false"),
    ("original", {"add_bias_linear": True}, "add_bias_linear is True, expected False"),
    ("original", {"layernorm_epsilon": float("nan")}, "layernorm_epsilon is nan, expected a number above 0"),
], ids=str)
def test_config_json_with_a_bad_value_is_refused_by_key(tmp_path, outputs, reference, source, changes, expected):
    folder = write_source(tmp_path / "in", reference, source)
    edited("config.json", lambda config: config.update(changes))(folder)
    message = refused(outputs, folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert expected in message


# --- output of both directions ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "expected"), [
    ("full", "--output: {}: not empty, expected a new or empty folder"),
    ("file", "--output: {}: a file, expected a new or empty folder"),
    ("folder.ckpt", "--output: {}: a folder, expected a file name"),
    ("file/below", "--output: {}: cannot be written: "),
    ("file/below.ckpt", "--output: {}: cannot be written: "),
])
def test_bad_output_is_refused_and_left_as_it_is(tmp_path, reference, name, expected):
    outputs = tmp_path / "outputs"
    for folder in ("full", "folder.ckpt"):
        (outputs / folder).mkdir(parents=True)
    (outputs / "full" / "a.txt").write_text("mine")
    (outputs / "file").write_text("mine")
    before = contents(outputs)
    folder = write_source(tmp_path / "in", reference, "original")
    assert message_of(hf_to_ms, folder, outputs / name).startswith(expected.format(outputs / name))
    assert contents(outputs) == before
    if not name.endswith(".ckpt"):
        path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
        message = message_of(ms_to_hf, str(path), model_of(size_of(reference)), outputs / name)
        assert message.startswith(expected.format(outputs / name))
        assert contents(outputs) == before


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_an_output_that_is_an_input_is_refused_and_the_input_kept(tmp_path, reference, link):
    folder = write_source(tmp_path / "in", reference, "original")
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    make = os.symlink if link == "symbolic" else os.link
    weights = next(folder.glob("*.safetensors"))
    make(weights, tmp_path / "b.ckpt")
    before = contents(tmp_path)
    assert message_of(hf_to_ms, folder, tmp_path / "b.ckpt") == (
        f"--output: {tmp_path / 'b.ckpt'} is {weights}, which this run reads (--input), expected another name")
    assert message_of(ms_to_hf, str(path), model_of(size_of(reference)), path) == (
        f"--output: {path} is {path}, which this run reads (--input), expected another name")
    assert contents(tmp_path) == before


def test_an_output_that_is_a_link_stays_one_and_its_target_is_written(tmp_path, outputs, reference):
    folder = write_source(tmp_path / "in", reference, "original")
    (outputs / "far").mkdir()
    os.symlink("base.ckpt", outputs / "link.ckpt")
    os.symlink("far", outputs / "link")
    hf_to_ms(folder, outputs / "link.ckpt")
    hf_to_ms(folder, outputs / "link")
    assert [(outputs / name).is_symlink() for name in ("link.ckpt", "link")] == [True, True]
    assert (outputs / "base.ckpt").read_bytes() == (outputs / "far" / "model.ckpt").read_bytes() != b"earlier"


def test_a_fifo_is_given_the_checkpoint(tmp_path, reference):
    folder, read = write_source(tmp_path / "in", reference, "original"), []
    os.mkfifo(tmp_path / "fifo.ckpt")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo.ckpt").read_bytes()))
    reader.start()
    hf_to_ms(folder, tmp_path / "fifo.ckpt")
    reader.join(timeout=60)
    hf_to_ms(folder, tmp_path / "file.ckpt")
    assert read == [(tmp_path / "file.ckpt").read_bytes()]
    assert (tmp_path / "fifo.ckpt").is_fifo()


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch, outputs, reference):
    folder = write_source(tmp_path / "in", reference, SOURCES[0])
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    need = sum(value.nbytes for value in group(reference, "weight/").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10 ** 9, used=10 ** 9, free=need - 1))
    expected = f"needs {need / 1e6:.2f} MB, but {(need - 1) / 1e6:.2f} MB are free on the disk"
    assert refused(outputs, folder) == f"--output: {outputs / 'base.ckpt'}: {expected}"
    message = message_of(ms_to_hf, str(path), model_of(size_of(reference)), outputs / "hf")
    assert message == f"--output: {outputs / 'hf'}: {expected}"
    assert contents(outputs) == {"base.ckpt": b"earlier"}
    hf_to_ms(folder, outputs / "base.ckpt", dtype="bfloat16")  # half of it has room


def opener_of_a_full_disk(limit):
    """`open`, whose new files take `limit` bytes and no more."""
    class File(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    return lambda path, mode="r", *args, **kwargs: (File(path, mode) if "w" in mode else
                                                    builtins.open(path, mode, *args, **kwargs))


@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_full_disk_while_writing_leaves_nothing_and_keeps_the_earlier_file(tmp_path, monkeypatch, outputs, reference,
                                                                            limit):
    folder = write_source(tmp_path / "in", reference, SOURCES[0])
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    for module in (ckpt_file, safetensors_file):
        monkeypatch.setattr(module, "open", opener_of_a_full_disk(limit), raising=False)
    assert refused(outputs, folder) == f"--output: {outputs / 'base.ckpt'}: cannot be written: No space left on device"
    message = message_of(ms_to_hf, str(path), model_of(size_of(reference)), outputs / "hf")
    assert message == f"--output: {outputs / 'hf'}: cannot be written: No space left on device"
    assert contents(outputs) == {"base.ckpt": b"earlier"}


def test_a_source_that_shrinks_meanwhile_is_named_and_nothing_is_left(tmp_path, monkeypatch, outputs, reference):
    folder = write_source(tmp_path / "in", reference, SOURCES[0])
    whole = (folder / "model.safetensors").read_bytes()
    usage = shutil.disk_usage

    def shrink(path):
        (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", shrink)
    message = message_of(hf_to_ms, folder, outputs / "base.ckpt")
    assert message.startswith(f"{folder / 'model.safetensors'}: was written to while it was read")
    assert contents(outputs) == {"base.ckpt": b"earlier"}


# --- ms_to_hf --------------------------------------------------------------------------------------------------------

def test_exported_config_json_is_that_of_a_reward_model(tmp_path, load_reference):
    for case in REFERENCE_CASES:
        arrays = load_reference(case)
        size = size_of(arrays)
        path = save_checkpoint(tmp_path / case / "a.ckpt", group(arrays, "weight/"), ms.bfloat16)
        ms_to_hf(str(path), model_of(size), tmp_path / case / "out")
        config = json.loads((tmp_path / case / "out" / "config.json").read_text(encoding="utf-8"))
        expected = {**transformers_config(size), "architectures": ["GlmForSequenceClassification"],
                    "num_labels": 1, "id2label": {"0": "LABEL_0"}, "pad_token_id": size["pad_token_id"],
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 * size["rope_ratio"],
                                        "partial_rotary_factor": 0.5}}
        assert {key: config[key] for key in expected} == expected


def test_exported_language_model_says_so(tmp_path, reference):
    values = {**group(reference, "weight/"), LM_HEAD: lm_head(reference)}
    path = save_checkpoint(tmp_path / "a.ckpt", values)
    result = ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "out", language_model=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GlmForCausalLM"]
    assert not {"num_labels", "problem_type"} & set(config)
    assert set(read(tmp_path / "out")) == {*group(reference, "hf/"), "lm_head.weight"} - {"score.weight"}
    assert "architecture: GlmForCausalLM" in result.as_text()
    assert f"left out: {HEAD}" in result.as_text()


def test_optimizer_and_step_state_are_dropped_and_named(tmp_path, reference):
    values = {"step_metrics.value": np.ones(3, np.float32), **group(reference, "weight/"), LM_HEAD: lm_head(reference)}
    values.update({f"adam_{kind}.{name}": np.zeros_like(value) for kind in "mv"
                   for name, value in group(reference, "weight/").items() if "layers.0.mlp" in name})
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in values.items()], str(path),
                       append_dict={"epoch_num": 1, "step_num": 7, "global_step": 7})
    result = ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "out")
    assert read(tmp_path / "out") == raw(group(reference, "hf/"))
    weights = group(reference, "weight/")
    assert set(result.dropped) == {*values, "epoch_num", "step_num", "global_step"} - set(weights)
    line = next(line for line in result.as_text().splitlines() if line.startswith("left out: "))
    assert "step_metrics.value" in line
    assert "adam_m.transformer.encoder.layers.0.mlp.dense_h_to_4h.weight" in line
    assert line.endswith(f"and {len(result.dropped) - 4} more")
    assert (result.taken, result.written) == (len(weights), len(group(reference, "hf/")))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_caches_of_keys_and_values_are_left_out_and_named(tmp_path, reference, prefix):
    """MindFormers since 1.6 saves them with a model, in half precision by default."""
    caches = {f"transformer.encoder.layers.{layer}.self_attention.infer_attention.paged_attention_mgr.{kind}_cache":
              np.full((4, 16, 2, 8), 9, np.float16) for layer in range(2) for kind in ("key", "value")}
    values = {**group(reference, "weight/"), **caches}
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint([{"name": name.replace("transformer.", prefix, 1), "data": Tensor(value)}
                        for name, value in values.items()], str(path))
    result = ms_to_hf(str(path), model_of(size_of(reference)), tmp_path / "out")
    assert read(tmp_path / "out") == raw(group(reference, "hf/"))
    assert set(result.dropped) == set(caches)
    assert "left out: transformer.encoder.layers.0.self_attention.infer_attention." in result.as_text()


def test_a_language_model_that_mindformers_saved_is_exported(tmp_path, reference):
    """With whatever the installed release saves beside the weights."""
    base = ChatGLM2ForConditionalGeneration(ChatGLM2Config(**dimensions_of(reference)))
    ms.save_checkpoint(base, str(tmp_path / "base.ckpt"))
    result = ms_to_hf(str(tmp_path / "base.ckpt"), model_of(size_of(reference)), tmp_path / "out", language_model=True)
    weights = weights_of_mindformers(base)
    assert (result.taken, result.written) == (len(weights), len(group(reference, "hf/")))
    assert len(result.dropped) == len(list(base.get_parameters())) - len(weights)
    assert read(tmp_path / "out")["lm_head.weight"] == raw({"": weights[LM_HEAD].asnumpy()})[""]


def test_names_of_the_original_example_without_prefix_are_converted(tmp_path, reference):
    values = {name.replace("transformer.", "", 1): value for name, value in group(reference, "weight/").items()}
    assert "embedding.embedding_weight" in values
    ms_to_hf(str(save_checkpoint(tmp_path / "a.ckpt", values)), model_of(size_of(reference)), tmp_path / "out")
    assert read(tmp_path / "out") == raw(group(reference, "hf/"))


def test_last_step_of_rank_0_is_taken(tmp_path, reference):
    weights = group(reference, "weight/")
    folder = tmp_path / "checkpoint" / "rank_0"
    for age, (name, factor) in enumerate((("glm_rank_0-1_10.ckpt", 1), ("glm_rank_0-1_9.ckpt", 3))):
        path = save_checkpoint(folder / name, {key: value * np.float32(factor) for key, value in weights.items()})
        os.utime(path, (10_000 + age, 10_000 + age))
    result = ms_to_hf(str(tmp_path / "checkpoint"), model_of(size_of(reference)), tmp_path / "out")
    assert read(tmp_path / "out") == raw(group(reference, "hf/"))
    assert f"checkpoint: {folder / 'glm_rank_0-1_10.ckpt'}" in result.as_text()
    assert "`glm_rank_0-1_10.ckpt`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of the tiny YAML, which has room for the sample tokenizer's 1010 ids: size, model, tensors under
    transformers' names, folder with them, and a checkpoint of MindSpore in checkpoint_network/rank_0.
    """
    size = yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))["model"]["model_config"]
    values = random_model(size)
    folder = tmp_path_factory.mktemp("tiny")
    fused = {name: value for name, value in values.items() if "self_attn" not in name}
    names = {"model.embed_tokens.weight": "transformer.embedding.embedding_weight", "score.weight": HEAD,
             "model.norm.weight": "transformer.encoder.final_layernorm.weight"}
    for layer in range(size["num_layers"]):
        here, there = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"
        names.update({f"{here}.input_layernorm.weight": f"{there}.input_layernorm.weight",
                      f"{here}.post_attention_layernorm.weight": f"{there}.post_attention_layernorm.weight",
                      f"{here}.mlp.gate_up_proj.weight": f"{there}.mlp.dense_h_to_4h.weight",
                      f"{here}.mlp.down_proj.weight": f"{there}.mlp.dense_4h_to_h.weight"})
    weights = {names[name]: value for name, value in fused.items()}
    for layer in range(size["num_layers"]):
        here, there = f"model.layers.{layer}.self_attn", f"transformer.encoder.layers.{layer}.self_attention"
        weights[f"{there}.dense.weight"] = values[f"{here}.o_proj.weight"]
        for kind in ("weight", "bias"):
            weights[f"{there}.query_key_value.{kind}"] = np.concatenate(
                [values[f"{here}.{part}_proj.{kind}"] for part in "qkv"])
    checkpoint = save_checkpoint(folder / "checkpoint_network" / "rank_0" / "tiny_rank_0-network.ckpt", weights)
    write_model(folder / "hf", values, transformers_config(size), shards=3)
    return SimpleNamespace(size=size, model=model_of(size), values=values, folder=folder, hf=folder / "hf",
                           checkpoint=checkpoint, weights=weights)


def random_model(size):
    """A model's tensors under transformers' names."""
    rng = np.random.default_rng(9)
    hidden, ffn, channels = size["hidden_size"], size["ffn_hidden_size"], size["kv_channels"]
    shapes = {"model.embed_tokens.weight": (size["padded_vocab_size"], hidden), "model.norm.weight": (hidden,),
              "score.weight": (1, hidden)}
    for layer in range(size["num_layers"]):
        here = f"model.layers.{layer}"
        for part, heads in (("q", size["num_attention_heads"]), ("k", size["multi_query_group_num"]),
                            ("v", size["multi_query_group_num"])):
            shapes[f"{here}.self_attn.{part}_proj.weight"] = (heads * channels, hidden)
            shapes[f"{here}.self_attn.{part}_proj.bias"] = (heads * channels,)
        shapes.update({f"{here}.self_attn.o_proj.weight": (hidden, size["num_attention_heads"] * channels),
                       f"{here}.mlp.gate_up_proj.weight": (2 * ffn, hidden),
                       f"{here}.mlp.down_proj.weight": (hidden, ffn),
                       f"{here}.input_layernorm.weight": (hidden,),
                       f"{here}.post_attention_layernorm.weight": (hidden,)})
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def weights_in(path):
    """What MindSpore reads, without the notes."""
    found = ms.load_checkpoint(str(path))
    found.pop("training_notes", None)
    return found


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def trained(tmp_path, tiny):
    """A run's checkpoint_network of its own, for data_settings.json beside the checkpoint."""
    shutil.copytree(tiny.folder / "checkpoint_network", tmp_path / "checkpoint_network")
    return tmp_path / "checkpoint_network"


def test_tokenizer_files_are_those_of_the_rank_file(tmp_path, trained, tiny):
    tokenizers = pytest.importorskip("tokenizers")
    (trained / "data_settings.json").write_text(json.dumps(
        {"prompt_template": "Q {prompt} A {response}", "seq_length": 128, "padding_side": "right",
         "tokenizer": {"file": "t.model", "sha256": sha256(TOKENIZER)}}))
    result = ms_to_hf(str(trained), tiny.model, tmp_path / "out", tokenizer_path=str(TOKENIZER))
    assert sorted(contents(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors", "tokenizer.json",
                                                  "tokenizer_config.json"]
    assert read(tmp_path / "out") == raw(tiny.values)
    exported, own = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), open_tokenizer(TOKENIZER)
    texts = ["泄露朋友的隐私有什么好办法？", "Don't do  that,\n\n 12345 times!", "", " \n", "问题😀"]
    assert [exported.encode(text, add_special_tokens=False).ids for text in texts] == own.encode_batch(texts)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (settings["pad_token"], settings["model_max_length"]) == ("<|endoftext|>", 128)
    assert exported.token_to_id("<|endoftext|>") == 996
    assert "no tokenizer files" not in result.as_text()


def test_the_tokenizer_of_an_export_is_exported_as_the_rank_file_is(tmp_path, tiny):
    """Of a folder; one that says something else than a rank file is refused."""
    for name, tokenizer in (("first", TOKENIZER), ("again", tmp_path / "first")):
        ms_to_hf(str(tiny.checkpoint), tiny.model, tmp_path / name, tokenizer_path=str(tokenizer), template="glm4-chat")
    first, again = (contents(tmp_path / name) for name in ("first", "again"))
    assert {name for name in first if first[name] != again[name]} == {"README.md"}
    path = tmp_path / "again" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("{1,3}", "{1,2}"), encoding="utf-8")
    assert export_refused(tmp_path, tiny.checkpoint, tiny.model, tokenizer_path=str(path)) == (
        f"--tokenizer: {path}: found a tokenizer.json that is not GLM-4's, expected GLM-4's rank file (lines of "
        "`base64-token rank`) or tokenizer.json")


@pytest.mark.parametrize(("given", "in_settings", "used"), [
    (None, None, PROMPT_TEMPLATE), (None, "Q {prompt} A {response}", "Q {prompt} A {response}"),
    ("给 {prompt}\n{response}!", "Q {prompt} A {response}", "给 {prompt}\n{response}!"),
    ("给 {prompt}\n{response}!", None, "给 {prompt}\n{response}!"),
], ids=["default", "training data", "argument before training data", "argument"])
def test_template_is_the_argument_or_that_of_the_training_data_or_the_default(tmp_path, trained, tiny, given,
                                                                               in_settings, used):
    jinja2 = pytest.importorskip("jinja2")
    if in_settings:
        (trained / "data_settings.json").write_text(json.dumps({"prompt_template": in_settings}))
    ms_to_hf(str(trained), tiny.model, tmp_path / "out", tokenizer_path=str(TOKENIZER), template=given)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"```json\n{json.dumps(used, ensure_ascii=False)}\n```" in card
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    messages = [{"role": "user", "content": " why {response} "}, {"role": "assistant", "content": "because\n"}]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders it
    text = environment.from_string(settings["chat_template"]).render(messages=messages)
    assert text == render(used, messages[0]["content"], messages[1]["content"])


NOTES = {"prompt_template": "问 {prompt} 答 {response}", "tokenizer": {"file": "t.model", "sha256": "ab" * 32},
         "padding_side": "left", "objective": "token-wise"}


def with_notes(path, tiny, **model):
    """The tiny model's checkpoint under a name of its own, with the notes of its training."""
    stored = ckpt_file.read_ckpt(tiny.checkpoint)
    noted = {**model_notes(tiny.model.dimensions, "bfloat16", "float32"), **model}
    ckpt_file.write_ckpt(path, [tensors.OutputTensor(name, tensor.dtype, tensor.shape,
                                                     (tensors.Part(tensor, 0, tensor.values),))
                                for name, tensor in stored.items()], lambda: None, {**NOTES, "model": noted})
    return path


@pytest.mark.parametrize("shards", [1, 3])
def test_the_notes_of_training_go_to_hugging_face_and_back(tmp_path, tiny, shards):
    path = with_notes(tmp_path / "rm.ckpt", tiny)
    ms_to_hf(str(path), tiny.model, tmp_path / "hf")
    output = tmp_path / "back.ckpt" if shards == 1 else tmp_path / "back"
    limit = 10 ** 9 if shards == 1 else sum(tensor.nbytes for tensor in ckpt_file.read_ckpt(path).values()) // 2
    hf_to_ms(tmp_path / "hf", output, max_shard_bytes=limit)
    assert sum(1 for _ in output.glob("*.ckpt")) >= shards - 1
    back = read_training_notes(output)
    assert back.values == read_training_notes(path).values
    assert back.doubt is None
    assert "training_notes" not in read_checkpoint(output)


def test_the_statistics_of_the_scores_go_along_and_do_no_harm_on_the_way_back(tmp_path, tiny):
    path, figures = with_notes(tmp_path / "rm.ckpt", tiny), tmp_path / "eval.json"
    figures.write_text(json.dumps([{"checkpoint": "other.ckpt", "mean": 9, "std": 9},
                                   {"checkpoint": str(path), "mean": 0.25, "std": 2}]))
    report = ms_to_hf(str(path), tiny.model, tmp_path / "hf", score_statistics=figures).as_text()
    assert f"scores: mean 0.2500, std 2.0000, from {figures}" in report
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert [config[key] for key in ("mean", "std", "value_head_prefix")] == [0.25, 2, "score"]
    hf_to_ms(tmp_path / "hf", tmp_path / "back.ckpt")
    assert {name: value.asnumpy().tobytes() for name, value in weights_in(tmp_path / "back.ckpt").items()} == {
        name: value.asnumpy().tobytes() for name, value in weights_in(path).items()}
    figures.write_text("[]")
    with pytest.raises(UserError, match=rf"--score_statistics: {figures}: no entry of {path}, found none"):
        ms_to_hf(str(path), tiny.model, tmp_path / "not", score_statistics=figures)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(("key", "noted"), [("rope_ratio", 500), ("layernorm_epsilon", 1e-6), ("kv_channels", 32),
                                            ("multi_query_group_num", 1)])
def test_a_yaml_of_another_model_than_was_trained_is_refused_though_shapes_agree(tmp_path, tiny, key, noted):
    path = with_notes(tmp_path / "rm.ckpt", tiny, **{key: noted})
    found = getattr(tiny.model.dimensions, key)
    assert export_refused(tmp_path, path, tiny.model) == (
        f"--config: model.model_config.{key} is {found!r}, expected {noted!r}, with which the model was trained "
        f"({path})")


def test_another_template_than_that_of_training_is_warned_of(tmp_path, tiny):
    path = with_notes(tmp_path / "rm.ckpt", tiny)
    text = ms_to_hf(str(path), tiny.model, tmp_path / "a", template="Q {prompt} A {response}").as_text()
    assert (f"WARNING: --prompt_template is 'Q {{prompt}} A {{response}}', the model was trained with "
            f"'问 {{prompt}} 答 {{response}}' ({path})") in text
    assert "WARNING" not in ms_to_hf(str(path), tiny.model, tmp_path / "b").as_text()
    text = ms_to_hf(str(path), tiny.model, tmp_path / "c", template=NOTES["prompt_template"]).as_text()
    assert "WARNING" not in text
    text = ms_to_hf(str(path), tiny.model, tmp_path / "d", add_eos=True).as_text()
    assert f"WARNING: --add_eos is True, the model was trained with False ({path}): its scores" in text


def test_texts_that_end_with_the_pad_token_have_another_pad_token_in_transformers(trained, tiny, tmp_path):
    """It reads the score of a row in front of the first pad token."""
    (trained / "data_settings.json").write_text(json.dumps({"prompt_template": "glm4-chat", "add_eos": True}))
    ms_to_hf(str(trained), tiny.model, tmp_path / "out", tokenizer_path=str(TOKENIZER))
    config, tokenizer = (json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
                         for name in ("config.json", "tokenizer_config.json"))
    assert (config["eos_token_id"], config["pad_token_id"]) == (996, 997)
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|endoftext|>", "[MASK]")
    assert tokenizer["split_special_tokens"] is False
    assert "at which the score is read" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_published_weights_have_notes_of_the_model_alone_and_damaged_ones_are_named(tmp_path, tiny):
    ms_to_hf(str(with_notes(tmp_path / "rm.ckpt", tiny)), tiny.model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    for notes in (1, {"prompt_template": 1}):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "training_notes": notes}))
        with pytest.raises(UserError, match=r"config\.json: (training_notes|prompt_template) is "):
            hf_to_ms(tmp_path / "hf", tmp_path / "no.ckpt")
    del config["training_notes"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    hf_to_ms(tmp_path / "hf", tmp_path / "back.ckpt")
    assert read_training_notes(tmp_path / "back.ckpt").values == {"model": asdict(tiny.model.dimensions)}


def test_without_a_tokenizer_the_report_says_how_to_add_it(tmp_path, tiny):
    result = ms_to_hf(str(tiny.checkpoint), tiny.model, tmp_path / "out")
    assert "no tokenizer files: --tokenizer tokenizer.model adds them" in result.as_text()
    assert "architecture: GlmForSequenceClassification, one label" in result.as_text()
    assert "tokenizer: not part of this folder" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def sentencepiece_model():
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["hello world", "how are you"] * 5),
                                             model_writer=model, vocab_size=30, model_type="bpe", minloglevel=2)
    return model.getvalue()


def export_refused(tmp_path, source, model, **options):
    """The message of `ms_to_hf`, which must leave nothing."""
    (tmp_path / "out").mkdir(exist_ok=True)
    message = message_of(ms_to_hf, str(source), model, tmp_path / "out" / "hf", **options)
    assert contents(tmp_path / "out") == {}
    return message


@pytest.mark.parametrize("pad", [5, 995, 1010])
def test_pad_id_that_is_no_special_token_is_refused(tmp_path, tiny, pad):
    message = export_refused(tmp_path, tiny.checkpoint, model_of(tiny.size, pad_token_id=pad),
                             tokenizer_path=str(TOKENIZER))
    assert message == (f"model.model_config.pad_token_id is {pad}, expected a special token of {TOKENIZER} (996 to "
                       "1009): transformers finds a text's end by it")


@pytest.mark.parametrize(("pad", "token"), [(996, "<|endoftext|>"), (1000, "<sop>"), (1009, "<|end_of_video|>")])
def test_pad_token_is_the_special_token_of_the_pad_id(tmp_path, tiny, pad, token):
    ms_to_hf(str(tiny.checkpoint), model_of(tiny.size, pad_token_id=pad), tmp_path / "out",
             tokenizer_path=str(TOKENIZER))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == token
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == pad


def test_sentencepiece_tokenizer_is_refused(tmp_path, tiny):
    path = tmp_path / "sp.model"
    path.write_bytes(sentencepiece_model())
    assert export_refused(tmp_path, tiny.checkpoint, tiny.model, tokenizer_path=str(path)) == (
        f"--tokenizer: {path}: found a SentencePiece model, expected GLM-4's rank file (lines of `base64-token rank`) "
        "or tokenizer.json")


def test_tokenizer_that_is_absent_or_none_is_refused(tmp_path, tiny):
    message = export_refused(tmp_path, tiny.checkpoint, tiny.model, tokenizer_path=str(tmp_path / "absent.model"))
    assert message == f"{tmp_path / 'absent.model'}: tokenizer cannot be read: No such file or directory"
    message = export_refused(tmp_path, tiny.checkpoint, tiny.model, tokenizer_path=str(TINY_YAML))
    assert message.startswith(f"{TINY_YAML}: not a tokenizer file")


def test_another_tokenizer_than_that_of_training_is_refused(tmp_path, trained, tiny):
    (trained / "data_settings.json").write_text(json.dumps({"tokenizer": {"file": "b.model", "sha256": "ab" * 32}}))
    assert export_refused(tmp_path, trained, tiny.model, tokenizer_path=str(TOKENIZER)) == (
        f"--tokenizer: the tokenizer is tokenizer.model (sha256 {sha256(TOKENIZER)[:12]}), but the model was trained "
        f"with b.model (sha256 abababababab, {trained / 'data_settings.json'})")


def test_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, reference):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    assert export_refused(tmp_path, path, model_of(size_of(reference)), tokenizer_path=str(TOKENIZER)) == (
        f"--tokenizer: {TOKENIZER}: 1010 ids, model.model_config.padded_vocab_size is 64; expected at least as many")


def test_checkpoint_without_value_head_is_refused_with_a_hint(tmp_path, reference):
    values = group(reference, "weight/")
    del values[HEAD]
    path = save_checkpoint(tmp_path / "a.ckpt", values)
    expected = f"{path}: no value head ({HEAD}) in it, expected a trained reward model"
    assert export_refused(tmp_path, path, model_of(size_of(reference))) == expected
    path = save_checkpoint(path, {**values, LM_HEAD: lm_head(reference)})
    assert export_refused(tmp_path, path, model_of(size_of(reference))) == (
        f"{expected}; --language_model writes it as GlmForCausalLM")


def test_language_model_without_lm_head_is_refused(tmp_path, reference):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    assert export_refused(tmp_path, path, model_of(size_of(reference)), language_model=True) == (
        f"{path}: no {LM_HEAD} in it, expected one with --language_model")


LAYER = "transformer.encoder.layers"


@pytest.mark.parametrize(("changes", "expected"), [
    ({"num_layers": 3}, f"7 weights are missing: {LAYER}.2.input_layernorm.weight"),
    ({"ffn_hidden_size": 40}, f"4 weights have another shape than the YAML says: {LAYER}.0.mlp.dense_h_to_4h.weight "
                              "is [96, 32], expected [80, 32]"),
    ({"padded_vocab_size": 128}, "1 weights have another shape than the YAML says: transformer.embedding."
                                 "embedding_weight is [64, 32], expected [128, 32]"),
    ({"num_layers": 1}, f"{LAYER}.1."),
    ({"add_qkv_bias": False}, f"{LAYER}.0.self_attention.query_key_value.bias"),
], ids=["more layers", "other width", "other vocabulary", "fewer layers", "no bias"])
def test_dimensions_of_another_yaml_are_refused(tmp_path, reference, changes, expected):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    message = export_refused(tmp_path, path, model_of(size_of(reference), **changes))
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_weights_of_another_type_are_refused(tmp_path, reference):
    values = {name: Tensor(np.ascontiguousarray(value)) for name, value in group(reference, "weight/").items()}
    values["transformer.encoder.final_layernorm.weight"] = Tensor(np.ones(32, np.int8))
    ms.save_checkpoint([{"name": name, "data": value} for name, value in values.items()], str(tmp_path / "a.ckpt"))
    assert export_refused(tmp_path, tmp_path / "a.ckpt", model_of(size_of(reference))) == (
        f"{tmp_path / 'a.ckpt'}: 1 weights are not of type float32, bfloat16, float16: "
        "transformer.encoder.final_layernorm.weight is Int8")


@pytest.mark.parametrize("damaged", [
    lambda content: b"", lambda content: content[:1], lambda content: content[:40],
    lambda content: content[:len(content) // 3], lambda content: content[:-1], lambda content: content + b"\0",
    lambda content: b"not a checkpoint", lambda content: bytes(1000),
], ids=["empty", "one byte", "40 bytes", "a third", "one byte short", "one byte too many", "text", "zeros"])
def test_damaged_checkpoint_is_refused(tmp_path, reference, damaged):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    path.write_bytes(damaged(path.read_bytes()))
    message = export_refused(tmp_path, path, model_of(size_of(reference)))
    assert message.startswith(f"{path}: not readable as a checkpoint")


def test_a_flipped_bit_of_a_value_is_found_by_the_checksum(tmp_path, reference):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"), crc_check=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = export_refused(tmp_path, path, model_of(size_of(reference)))
    assert message.startswith(f"{path}: damaged: the checksum of its content is ")


def test_no_single_flipped_byte_of_a_checkpoints_structure_ends_in_a_traceback(tmp_path, reference):
    """Bytes around each name, where lengths, dimensions and types are: refused in one line, or converted."""
    path = save_checkpoint(tmp_path / "a.ckpt", {name: value for name, value in group(reference, "weight/").items()
                                                 if "layers.1" not in name})
    content, model = path.read_bytes(), model_of(size_of(reference), num_layers=1)
    for name in (b"embedding_weight", b"final_layernorm.weight"):
        begin = content.index(name)
        for position in range(max(0, begin - 30), begin + len(name) + 24):
            write_anew(path, content[:position] + bytes([content[position] ^ 0x91]) + content[position + 1:])
            try:
                ms_to_hf(str(path), model, tmp_path / "out")
            except UserError:
                assert not (tmp_path / "out").exists()
            else:
                shutil.rmtree(tmp_path / "out")


def test_a_missing_shard_of_a_checkpoint_is_refused(tmp_path, reference):
    hf_to_ms(write_source(tmp_path / "in", reference, SOURCES[0]), tmp_path / "shards", max_shard_bytes=20_000)
    first = min((tmp_path / "shards").iterdir())
    total = int(first.stem[-5:])
    first.unlink()
    assert export_refused(tmp_path, tmp_path / "shards", model_of(size_of(reference))) == (
        f"{tmp_path / 'shards'}: model-00001-of-{total:05d}.ckpt is missing")


def test_sliced_checkpoint_is_refused_without_a_strategy(tmp_path, reference):
    name = "transformer.encoder.layers.0.self_attention.dense.weight"
    for rank in (0, 1):
        values = group(reference, "weight/")
        values[name] = values[name][rank * 16:(rank + 1) * 16]
        save_checkpoint(tmp_path / "checkpoint" / f"rank_{rank}" / f"a_rank_{rank}-1_1.ckpt", values)
    message = export_refused(tmp_path, tmp_path / "checkpoint", model_of(size_of(reference)))
    assert message.startswith(f"{tmp_path / 'checkpoint'}: sliced over 2 ranks ({name} of rank_0 is [16, 32], the "
                              "whole one [32, 32]): give --src_strategy")


def test_strategy_without_ranks_is_refused(tmp_path, reference):
    path = save_checkpoint(tmp_path / "a.ckpt", group(reference, "weight/"))
    message = export_refused(tmp_path, path, model_of(size_of(reference)), src_strategy="strategy")
    assert message == (f"--src_strategy is 'strategy', but {path} has no folders rank_0, rank_1, ... of a sliced "
                       "checkpoint; expected none")


def test_checkpoint_that_is_absent_is_refused_under_the_scripts_flag(tmp_path, reference):
    assert export_refused(tmp_path, tmp_path / "absent", model_of(size_of(reference))) == (
        f"--input: {tmp_path / 'absent'}: no such file or folder, expected a checkpoint (.ckpt) or a folder of them")


# --- the script ------------------------------------------------------------------------------------------------------

def run_script(folder, *args, before=()):
    """convert_weight.py in a process of its own; the progress bar's line is taken off its standard error."""
    done = subprocess.run([*before, sys.executable, str(SCRIPT), *map(str, args)], cwd=folder, capture_output=True,
                          check=False, timeout=300, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    lines = [line for line in done.stderr.decode("utf-8").split("\n") if line and not line.startswith("\rwrite ")]
    assert "Traceback" not in "".join(lines)
    return SimpleNamespace(code=done.returncode, stdout=done.stdout.decode("utf-8"), errors=lines)


@pytest.mark.process
def test_script_converts_in_both_directions(tmp_path, tiny):
    done = run_script(tmp_path, "hf_to_ms", "--input", tiny.hf, "--output", "base.ckpt", "--config", TINY_YAML)
    assert (done.code, done.errors) == (0, [])
    size = f"{sum(value.nbytes for value in tiny.values.values()) / 1e6:.2f} MB"
    assert done.stdout.splitlines()[0] == (f"mapped {len(tiny.values)} tensors ({size}) of the transformers layout to "
                                           f"{len(tiny.weights)} ({size}): backbone, value head")
    assert done.stdout.splitlines()[1:] == ["the YAML's model.model_config has the same dimensions", "wrote base.ckpt"]
    done = run_script(tmp_path, "ms_to_hf", "--input", "base.ckpt", "--output", "back", "--config", TINY_YAML,
                      "--tokenizer", TOKENIZER, "--prompt_template", r"{prompt}\n{response}")
    assert (done.code, done.errors) == (0, [])
    assert done.stdout.splitlines()[-1] == "wrote back"
    assert read(tmp_path / "back") == raw(tiny.values)
    assert sorted(contents(tmp_path)) == ["back", "back/README.md", "back/config.json", "back/model.safetensors",
                                          "back/tokenizer.json", "back/tokenizer_config.json", "base.ckpt"]
    assert r'"{prompt}\n{response}"' in (tmp_path / "back" / "README.md").read_text(encoding="utf-8")


@pytest.mark.process
def test_script_casts_and_writes_a_language_model(tmp_path, reference):
    size = size_of(reference)
    config = yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))
    config["model"]["model_config"].update(size)
    for block in ("train_dataset", "eval_dataset", "train_dataset_task.dataset_config",
                  "eval_dataset_task.dataset_config"):
        section = config
        for key in block.split("."):
            section = section[key]
        section["pad_token_id"] = size["pad_token_id"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    write_source(tmp_path / "in", reference, "original")
    done = run_script(tmp_path, "hf_to_ms", "--input", "in", "--output", "shards", "--dtype", "bfloat16")
    assert (done.code, done.errors) == (0, [])
    done = run_script(tmp_path, "ms_to_hf", "--input", "shards", "--output", "back", "--config", "run.yaml",
                      "--dtype", "float32", "--language_model")
    assert (done.code, done.errors) == (0, [])
    found = read(tmp_path / "back")
    expected = transformers_tensors(reference, "lm_head.weight")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == ("F32", value.shape, cast(np.ascontiguousarray(value), "bfloat16").tobytes()), name


@pytest.mark.process
@pytest.mark.parametrize("args", [[], ["hf_to_ms"], ["ms_to_hf"]], ids=["script", "hf_to_ms", "ms_to_hf"])
def test_script_has_a_help_text(tmp_path, args):
    done = run_script(tmp_path, *args, "--help")
    assert (done.code, done.errors) == (0, [])
    assert done.stdout.startswith("usage: convert_weight.py")
    assert not args or "--output" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(("args", "message"), [
    ([], "convert_weight.py: error: the following arguments are required: hf_to_ms|ms_to_hf"),
    (["hf2ms"], "convert_weight.py: error: argument hf_to_ms|ms_to_hf: invalid choice: 'hf2ms'"),
    (["hf_to_ms", "--input", "in"], "convert_weight.py hf_to_ms: error: the following arguments are required: "
                                    "--output"),
    (["ms_to_hf", "--input", "in", "--output", "out"],
     "convert_weight.py ms_to_hf: error: the following arguments are required: --config"),
    (["hf_to_ms", "--input", "in", "--output", "out", "--dtype", "int8"],
     "convert_weight.py hf_to_ms: error: argument --dtype: invalid choice: 'int8'"),
    (["hf_to_ms", "--inp", "in", "--output", "out"], "convert_weight.py hf_to_ms: error: the following arguments"),
    (["ms_to_hf", "--input", "in", "--output", "out", "--config", "c", "--prompt_template", "{prompt}"],
     "convert_weight.py ms_to_hf: error: argument --prompt_template: {response} occurs 0 times, expected once"),
    (["hf_to_ms", "--input", "in", "--output", "out", "--language_model"],
     "convert_weight.py: error: unrecognized arguments: --language_model"),
    (["ms_to_hf", "--input", "in", "--output", "out", "--config", "c", "--language_model", "--score_statistics", "e"],
     "convert_weight.py ms_to_hf: error: argument --score_statistics: has no effect with --language_model"),
], ids=["nothing", "direction", "no output", "no config", "type", "abbreviated", "template", "other direction's",
        "no scores"])
def test_script_refuses_a_bad_command_line_with_2(tmp_path, args, message):
    done = run_script(tmp_path, *args)
    assert done.code == 2
    assert done.errors[-1].startswith(message)
    assert contents(tmp_path) == {}


@pytest.mark.process
@pytest.mark.parametrize(("args", "message"), [
    (["hf_to_ms", "--input", "absent", "--output", "out"], "absent: no such folder, expected a folder with"),
    (["hf_to_ms", "--input", "absent", "--output", "out", "--config", "absent.yaml"],
     "--config: absent.yaml: cannot be read: No such file or directory"),
    (["ms_to_hf", "--input", "absent", "--output", "out", "--config", TINY_YAML], "--input: absent: no such file or"),
    (["ms_to_hf", "--input", "{tiny}", "--output", "out", "--config", TINY_YAML, "--tokenizer", "absent"],
     "absent: tokenizer cannot be read: No such file or directory"),
    (["ms_to_hf", "--input", "{tiny}", "--output", SAMPLE, "--config", TINY_YAML],
     f"--output: {SAMPLE}: not empty, expected a new or empty folder"),
    (["ms_to_hf", "--input", "{tiny}", "--output", TOKENIZER, "--config", TINY_YAML],
     f"--output: {TOKENIZER}: a file, expected a new or empty folder"),
], ids=["no model", "no YAML", "no checkpoint", "no tokenizer", "output not empty", "output a file"])
def test_script_refuses_bad_values_with_1_and_one_line(tmp_path, tiny, args, message):
    done = run_script(tmp_path, *(str(tiny.checkpoint) if arg == "{tiny}" else arg for arg in args))
    assert done.code == 1
    assert len(done.errors) == 1
    assert done.errors[0].startswith(f"convert_weight.py: error: {message}")
    assert contents(tmp_path) == {}


@pytest.mark.process
@pytest.mark.parametrize("direction", ["hf_to_ms", "ms_to_hf"])
def test_a_file_size_limit_of_the_system_ends_in_one_line_and_leaves_nothing(tmp_path, outputs, tiny, direction):
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash"]  # KB; Python ignores SIGXFSZ, so that write fails
    target = outputs / ("base.ckpt" if direction == "hf_to_ms" else "hf")
    source = tiny.hf if direction == "hf_to_ms" else tiny.checkpoint
    done = run_script(tmp_path, direction, "--input", source, "--output", target, "--config", TINY_YAML, before=limited)
    assert done.code == 1
    assert done.errors == [f"convert_weight.py: error: --output: {target}: cannot be written: File too large"]
    assert contents(outputs) == {"base.ckpt": b"earlier"}


def in_process(code, *args):
    """Standard output of Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_neither_mindspore_nor_torch_is_imported(tmp_path, tiny):
    code = """
import json, runpy, sys
from pathlib import Path
from mindrlhf.config.check import load_config
from mindrlhf.huggingface.convert import hf_to_ms, ms_to_hf
runpy.run_path(sys.argv[1])
source, output, config, tokenizer = sys.argv[2:]
model = load_config(config).model
hf_to_ms(Path(source), Path(output) / "a.ckpt", model=model)
ms_to_hf(str(Path(output) / "a.ckpt"), model, Path(output) / "hf", tokenizer_path=tokenizer)
print(json.dumps([name for name in ("mindspore", "mindformers", "torch", "safetensors") if name in sys.modules]))
"""
    assert json.loads(in_process(code, SCRIPT, tiny.hf, tmp_path, TINY_YAML, TOKENIZER)) == []
    assert read(tmp_path / "hf") == raw(tiny.values)


# --- memory ----------------------------------------------------------------------------------------------------------

LARGE = {"num_layers": 5, "hidden_size": 1024, "ffn_hidden_size": 5440, "num_attention_heads": 8,
         "multi_query_group_num": 2, "kv_channels": 128, "padded_vocab_size": 19_000, "seq_length": 16,
         "layernorm_epsilon": 1e-5, "rope_ratio": 1, "pad_token_id": 0}

# ru_maxrss would do, but Linux carries that of the parent, which has MindSpore, over into a child.
CONVERT_LARGE = """
import json, sys
from pathlib import Path
from mindrlhf.huggingface.convert import hf_to_ms, ms_to_hf
from mindrlhf.models.glm4.dimensions import Dimensions
from mindrlhf.config.run_config import Model
source, there, back, dtype, limit, size = sys.argv[1:]
dtype = dtype or None
model = Model(Dimensions.from_yaml(json.loads(size), ""), "float32", "float32", False, False, 0)
hf_to_ms(Path(source), Path(there), dtype, max_shard_bytes=int(limit))
ms_to_hf(there, model, Path(back), dtype, max_shard_bytes=int(limit))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def write_large_model(folder):
    """About 480 MB in 6 shards: the embedding, and a layer each. Values are one random block over and over."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(transformers_config(LARGE)))
    block = np.random.default_rng(2).normal(size=1 << 16).astype("<f4").tobytes()
    width, size = LARGE["hidden_size"], dict.fromkeys("qkv", 256)
    size["q"] = 1024
    groups = [{"model.embed_tokens.weight": (LARGE["padded_vocab_size"], width), "model.norm.weight": (width,),
               "score.weight": (1, width)}]
    for layer in range(LARGE["num_layers"]):
        here = f"model.layers.{layer}"
        shapes = {f"{here}.self_attn.{part}_proj.weight": (size[part], width) for part in "qkv"}
        shapes.update({f"{here}.self_attn.{part}_proj.bias": (size[part],) for part in "qkv"})
        groups.append({**shapes, f"{here}.self_attn.o_proj.weight": (width, width),
                       f"{here}.mlp.gate_up_proj.weight": (2 * LARGE["ffn_hidden_size"], width),
                       f"{here}.mlp.down_proj.weight": (width, LARGE["ffn_hidden_size"]),
                       f"{here}.input_layernorm.weight": (width,), f"{here}.post_attention_layernorm.weight": (width,)})
    for number, shapes in enumerate(groups, start=1):
        header, end = {}, 0
        for name, shape in shapes.items():
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * int(np.prod(shape))]}
            end = header[name]["data_offsets"][1]
        text = json.dumps(header).encode()
        with open(folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for begin in range(0, end, len(block)):
                file.write(block[:end - begin])


@pytest.mark.process
@pytest.mark.further
def test_memory_stays_below_a_shard(tmp_path):
    source, there, back = (tmp_path / name for name in ("in", "there", "back"))
    try:
        write_large_model(source)
        shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
        assert 75e6 < shard < 85e6
        peak = int(in_process(CONVERT_LARGE, source, there, back, "", shard, json.dumps(LARGE)))
        assert len(list(there.iterdir())) == len(list(back.glob("*.safetensors"))) == 6
        assert peak < 1.25 * shard, f"{peak / 1e6:.0f} MB, shards of {shard / 1e6:.0f} MB"
    finally:
        for folder in (source, there, back):
            shutil.rmtree(folder, ignore_errors=True)
