"""GLM-4's dimensions out of three kinds of configuration, and its weights under three names.

| test                                         | proves                                   | judged against             |
| test_shapes_of_glm4_9b                       | shapes and number of its weights         | GLM-4-9B's, by hand        |
| test_parameter_count_of_glm4_9b              | none is missing or of another size       | GLM-4-9B's 9,399,951,360   |
| test_names_and_shapes_... mindformers        | MindFormers' layout, the order too       | ChatGLM2ForConditional...  |
| test_original_names_become_mindformers_names | the original's layout                    | MindFormers' own converter |
| test_names_and_shapes_... transformers       | transformers' layout                     | tests/reference/*.npz      |
| test_rows_behind_one_another_...             | the order of query, key and value        | tests/reference/*.npz      |
| test_every_configuration_of_a_model_...      | the keys of each kind of configuration   | one model in four forms    |
| test_what_a_yaml_may_leave_out_...           | defaults                                 | ChatGLM2Config             |
| test_..._refused                             | one line with place, key and found value | messages                   |
| test_dimensions_that_no_..._are_refused      | one line, before anything is as large    | messages                   |
| test_optimizer_states_get_the_prefix_too     | parameters of the original example       | MindFormers' optimizer     |

What transformers takes for absent keys, and `type` for `rope_type`, was read off GlmConfig of its release 5.23 by hand.
"""
import importlib.util
import inspect
import json
import runpy
import sys
from dataclasses import astuple, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import PRODUCTION_YAML, REFERENCE_CASES, TINY_YAML, dimensions_of, weights_of_mindformers

from mindrlhf.errors import UserError
from mindrlhf.models.glm4.dimensions import (
    HEAD_NAME,
    LM_HEAD_NAME,
    ORIGINAL,
    TRANSFORMERS,
    Dimensions,
    backbone_weights,
    find_layout,
    head_weights,
    is_ignored,
    with_prefix,
)

pytestmark = pytest.mark.stack

PLACE = "glm/config.json"
# glm-4-9b-chat as each of them says it; YAML first.
YAML = {"type": "ChatGLM2Config", "num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 13696,
        "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128,
        "padded_vocab_size": 151552, "seq_length": 131072, "layernorm_epsilon": 1.5625e-07, "rmsnorm": True,
        "post_layer_norm": True, "add_bias_linear": False, "add_qkv_bias": True, "rope_ratio": 500,
        "param_init_type": "float32", "use_flash_attention": True, "pad_token_id": 151329}
OF_ORIGINAL = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696, "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096,
    "kv_channels": 128, "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_layers": 40, "original_rope": True, "padded_vocab_size": 151552,
    "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 500, "seq_length": 131072, "use_cache": True,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "eos_token_id": [151329, 151336, 151338]}
OF_RELEASE_4 = {
    "architectures": ["GlmForCausalLM"], "model_type": "glm", "attention_bias": True, "attention_dropout": 0.0,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 13696, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07,
    "rope_scaling": None, "rope_theta": 5000000.0, "torch_dtype": "bfloat16", "vocab_size": 151552}
OF_RELEASE_5 = {
    **{key: value for key, value in OF_RELEASE_4.items()
       if key not in ("partial_rotary_factor", "rope_scaling", "rope_theta", "torch_dtype")},
    "dtype": "bfloat16",
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "default"}}
CHAT_9B = Dimensions(num_layers=40, hidden_size=4096, ffn_hidden_size=13696, num_attention_heads=32,
                     multi_query_group_num=2, kv_channels=128, padded_vocab_size=151552, seq_length=131072,
                     layernorm_epsilon=1.5625e-07, add_qkv_bias=True, rope_ratio=500)
TINY = Dimensions(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, multi_query_group_num=2,
                  kv_channels=16, padded_vocab_size=56, seq_length=8, layernorm_epsilon=1e-5, add_qkv_bias=True,
                  rope_ratio=1)
KINDS = {"yaml": YAML, "original": OF_ORIGINAL, "release 4": OF_RELEASE_4, "release 5": OF_RELEASE_5}
# What the key of a YAML is called in transformers' config.json.
IN_TRANSFORMERS = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size",
                   "multi_query_group_num": "num_key_value_heads", "kv_channels": "head_dim",
                   "padded_vocab_size": "vocab_size", "seq_length": "max_position_embeddings",
                   "layernorm_epsilon": "rms_norm_eps", "add_qkv_bias": "attention_bias"}
WHOLE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "multi_query_group_num",
         "kv_channels", "padded_vocab_size", "seq_length")


def read(kind, config):
    """The dimensions of a configuration of one of `KINDS`."""
    if kind == "yaml":
        return Dimensions.from_yaml(config, PLACE)
    return Dimensions.from_huggingface(config, ORIGINAL if kind == "original" else TRANSFORMERS, PLACE)


def changed(kind, **values):
    return read(kind, {**KINDS[kind], **values})


def without(kind, *keys):
    return read(kind, {key: value for key, value in KINDS[kind].items() if key not in keys})


def key_of(kind, key):
    return IN_TRANSFORMERS.get(key, key) if kind.startswith("release") else key


def message_of(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shapes_in(weights, layout):
    """Name -> shape; no name may come twice."""
    pairs = [pair for weight in weights for pair in weight.sources(layout)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def last_layer(shapes):
    """Name behind `layers.39.` -> shape."""
    return {name.split(".39.")[1]: shape for name, shape in shapes.items() if ".39." in name}


def shapes_of(network):
    return {parameter.name: parameter.shape for parameter in network.get_parameters()}


def size_of(arrays):
    """The dimensions of a reference case."""
    return Dimensions.from_yaml(dimensions_of(arrays), "the reference")


# --- weights --------------------------------------------------------------------------------------------------------

def test_shapes_of_glm4_9b():
    """Query and key-value rows: 32 x 128 = 4096 and 2 x 128 = 256; gate and up: 2 x 13696."""
    backbone = backbone_weights(CHAT_9B)
    assert len(backbone) == 40 * 7 + 2
    shapes = {weight.name: weight.shape for weight in backbone}
    assert shapes["transformer.embedding.embedding_weight"] == (151552, 4096)
    assert shapes["transformer.encoder.final_layernorm.weight"] == (4096,)
    assert last_layer(shapes) == {
        "input_layernorm.weight": (4096,),
        "self_attention.query_key_value.weight": (4608, 4096),
        "self_attention.query_key_value.bias": (4608,),
        "self_attention.dense.weight": (4096, 4096),
        "post_attention_layernorm.weight": (4096,),
        "mlp.dense_h_to_4h.weight": (27392, 4096),
        "mlp.dense_4h_to_h.weight": (4096, 13696),
    }


def test_tensors_of_glm4_9b_in_transformers():
    shapes = shapes_in(backbone_weights(CHAT_9B), TRANSFORMERS)
    assert len(shapes) == 40 * 11 + 2
    assert last_layer(shapes) == {
        "input_layernorm.weight": (4096,),
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.k_proj.weight": (256, 4096),
        "self_attn.v_proj.weight": (256, 4096),
        "self_attn.q_proj.bias": (4096,),
        "self_attn.k_proj.bias": (256,),
        "self_attn.v_proj.bias": (256,),
        "self_attn.o_proj.weight": (4096, 4096),
        "post_attention_layernorm.weight": (4096,),
        "mlp.gate_up_proj.weight": (27392, 4096),
        "mlp.down_proj.weight": (4096, 13696),
    }


def test_heads_of_glm4_9b():
    lm_head, value_head = head_weights(CHAT_9B)
    assert (lm_head.name, lm_head.shape) == (LM_HEAD_NAME, (151552, 4096))
    assert (value_head.name, value_head.shape) == (HEAD_NAME, (1, 4096))
    assert lm_head.sources(ORIGINAL) == [("transformer.output_layer.weight", (151552, 4096))]
    assert value_head.sources(ORIGINAL) == []
    assert lm_head.sources(TRANSFORMERS) == [("lm_head.weight", (151552, 4096))]
    assert value_head.sources(TRANSFORMERS) == [("score.weight", (1, 4096))]


def test_parameter_count_of_glm4_9b():
    """With the LM head, as the published model has it."""
    layer = 4608 * 4096 + 4608 + 4096 * 4096 + 27392 * 4096 + 4096 * 13696 + 2 * 4096
    by_hand = 40 * layer + 4096 + 2 * 151552 * 4096
    assert by_hand == 9_399_951_360
    weights = [*backbone_weights(CHAT_9B), head_weights(CHAT_9B)[0]]
    assert len(weights) == 283
    assert sum(prod(weight.shape) for weight in weights) == by_hand
    for layout in (ORIGINAL, TRANSFORMERS):
        assert sum(map(prod, shapes_in(weights, layout).values())) == by_hand


@pytest.mark.parametrize("size", [TINY, replace(TINY, add_qkv_bias=False),
                                  replace(TINY, num_layers=3, multi_query_group_num=1, kv_channels=4)],
                         ids=["tiny", "no bias", "one group"])
def test_names_and_shapes_equal_those_of_mindformers(size):
    from mindformers.models.glm2.glm2 import ChatGLM2ForConditionalGeneration
    from mindformers.models.glm2.glm2_config import ChatGLM2Config
    theirs = ChatGLM2ForConditionalGeneration(ChatGLM2Config(**vars(size)))
    weights = [*backbone_weights(size), head_weights(size)[0]]
    shapes = [(name, parameter.shape) for name, parameter in weights_of_mindformers(theirs).items()]
    assert [(weight.name, weight.shape) for weight in weights] == shapes


def test_reward_model_has_the_backbone_and_the_value_head(build_model, reference):
    weights = [*backbone_weights(size_of(reference)), head_weights(size_of(reference))[1]]
    assert {weight.name: weight.shape for weight in weights} == shapes_of(build_model())


def test_original_names_become_mindformers_names(monkeypatch):
    """MindFormers' converter is run on names alone: what it would load, cast and save is put aside.

    Since 1.6 it asks the YAML whether query, key and value are one weight, which they are unless it says no.
    """
    import mindformers.models.glm2
    import mindspore
    weights = [*backbone_weights(TINY), head_weights(TINY)[0]]
    published = SimpleNamespace(state_dict=lambda: dict.fromkeys(shapes_in(weights, ORIGINAL)))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        AutoModel=SimpleNamespace(from_pretrained=lambda *args, **kwargs: published)))
    monkeypatch.setitem(sys.modules, "mindformers.utils.convert_utils",
                        SimpleNamespace(pt2ms=lambda value, dtype: value))
    saved = []
    monkeypatch.setattr(mindspore, "save_checkpoint", lambda parameters, path: saved.extend(parameters))
    script = Path(mindformers.models.glm2.__file__).with_name("convert_weight.py")
    if importlib.util.find_spec("torch") is None:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=None))
    convert = runpy.run_path(str(script))["convert_pt_to_ms"]
    others = {"config": str(TINY_YAML)} if "config" in inspect.signature(convert).parameters else {}
    convert("model/glm", "glm.ckpt", **others)
    assert [parameter["name"] for parameter in saved] == [weight.name for weight in weights]


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_names_and_shapes_equal_those_of_transformers(load_reference, case):
    arrays = load_reference(case)
    size = size_of(arrays)
    theirs = {name[len("hf/"):]: array.shape for name, array in arrays.items() if name.startswith("hf/")}
    assert shapes_in([*backbone_weights(size), head_weights(size)[1]], TRANSFORMERS) == theirs


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_rows_behind_one_another_are_mindformers_weights(load_reference, case):
    """The arrays `weight/` are those with which the model gives transformers' scores (test_glm_reward.py)."""
    arrays = load_reference(case)
    size = size_of(arrays)
    for weight in [*backbone_weights(size), head_weights(size)[1]]:
        joined = np.concatenate([arrays[f"hf/{name}"] for name, _ in weight.sources(TRANSFORMERS)])
        np.testing.assert_array_equal(joined, arrays[f"weight/{weight.name}"], err_msg=weight.name)


def test_without_bias_no_layout_has_one():
    weights = backbone_weights(replace(CHAT_9B, add_qkv_bias=False))
    assert len(weights) == 40 * 6 + 2
    assert len(shapes_in(weights, TRANSFORMERS)) == 40 * 8 + 2
    names = [name for layout in (ORIGINAL, TRANSFORMERS) for name in shapes_in(weights, layout)]
    assert not [name for name in names if name.endswith("bias")]


# --- configurations -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_of_a_model_gives_equal_dimensions(kind):
    assert read(kind, KINDS[kind]) == CHAT_9B


@pytest.mark.parametrize("kind", KINDS)
def test_whole_rope_ratio_is_an_int_as_a_yaml_says_it(kind):
    assert repr(read(kind, KINDS[kind]).rope_ratio) == "500"


@pytest.mark.parametrize(("theta", "ratio"), [(10000.0, 1), (10000, 1), (5000000.0, 500), (15000.0, 1.5)])
def test_rope_theta_is_the_ratio_times_10000(theta, ratio):
    expected = replace(CHAT_9B, rope_ratio=ratio)
    assert changed("yaml", rope_ratio=ratio) == expected
    assert changed("original", rope_ratio=ratio) == expected
    assert changed("release 4", rope_theta=theta) == expected
    assert changed("release 5", rope_parameters={"rope_type": "default", "rope_theta": theta}) == expected
    assert expected.as_transformers()["rope_theta"] == theta
    assert expected.as_transformers()["rope_parameters"]["rope_theta"] == theta


def test_rope_parameters_count_more_than_the_key_of_release_4():
    assert changed("release 5", rope_theta=10000.0) == CHAT_9B
    assert changed("release 4", rope_parameters={"rope_type": "default"}) == CHAT_9B


@pytest.mark.parametrize("size", [CHAT_9B, TINY, replace(TINY, rope_ratio=1.5, add_qkv_bias=False)],
                         ids=["9b", "tiny", "odd ratio, no bias"])
def test_what_is_written_for_transformers_is_read_back(size):
    written = json.loads(json.dumps(size.as_transformers()))
    assert Dimensions.from_huggingface(written, TRANSFORMERS, PLACE) == size
    release_4 = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert Dimensions.from_huggingface(release_4, TRANSFORMERS, PLACE) == size
    release_5 = {key: value for key, value in written.items() if key not in ("rope_theta", "partial_rotary_factor")}
    assert Dimensions.from_huggingface(release_5, TRANSFORMERS, PLACE) == size


def test_written_keys_are_those_of_transformers():
    written = CHAT_9B.as_transformers()
    assert written == {**{key: OF_RELEASE_4[key] for key in written if key in OF_RELEASE_4},
                       "rope_parameters": OF_RELEASE_5["rope_parameters"]}


@pytest.mark.parametrize("path", [PRODUCTION_YAML, TINY_YAML], ids=lambda path: path.stem)
def test_bundled_yaml_is_read(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["model_config"]
    size = Dimensions.from_yaml(config, path.name)
    assert vars(size) == {key: config[key] for key in vars(size)}


@pytest.mark.parametrize("kind", ["yaml", "original"])
@pytest.mark.parametrize(("key", "value"), [("rope_ratio", 1), ("layernorm_epsilon", 1e-5), ("add_qkv_bias", True)])
def test_absent_key_has_the_default(kind, key, value):
    assert without(kind, key) == replace(CHAT_9B, **{key: value})


def test_what_a_yaml_may_leave_out_is_mindformers_default():
    from mindformers.models.glm2.glm2_config import ChatGLM2Config
    theirs = ChatGLM2Config()
    required = {key: YAML[key] for key in WHOLE}
    size = Dimensions.from_yaml(required, PLACE)
    for key in ("rope_ratio", "layernorm_epsilon", "add_qkv_bias"):
        assert getattr(size, key) == getattr(theirs, key)
    fixed = {key: getattr(theirs, key) for key in (
        "rmsnorm", "post_layer_norm", "add_bias_linear", "multi_query_attention",
        "apply_residual_connection_post_layernorm")}
    assert Dimensions.from_yaml({**required, **fixed}, PLACE) == size


@pytest.mark.parametrize(("kind", "keys", "size"), [
    ("release 4", ["attention_bias"], CHAT_9B),
    ("release 4", ["num_key_value_heads"], CHAT_9B),
    ("release 4", ["rope_theta"], replace(CHAT_9B, rope_ratio=1)),
    ("release 4", ["partial_rotary_factor", "rope_scaling", "hidden_act"], CHAT_9B),
    ("release 5", ["rope_parameters"], replace(CHAT_9B, rope_ratio=1)),
], ids=lambda value: value[0] if isinstance(value, list) else None)
def test_absent_key_has_transformers_default(kind, keys, size):
    """GlmConfig's own: attention_bias True, num_key_value_heads 2, rope_theta 10000 and half of a head rotated."""
    assert without(kind, *keys) == size


@pytest.mark.parametrize(("kind", "values"), [
    ("yaml", {"rope_ratio": None}), ("original", {"rope_ratio": None}),
    ("release 5", {"rope_parameters": None}), ("release 4", {"rope_scaling": None, "rope_theta": 10000.0}),
    ("release 4", {"rope_scaling": {}, "rope_theta": 10000.0}),
])
def test_null_rope_is_no_rope_setting(kind, values):
    assert changed(kind, **values) == replace(CHAT_9B, rope_ratio=1)


# --- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_missing_key_is_refused(kind):
    for name in {key_of(kind, key) for key in WHOLE} - {"num_key_value_heads"}:
        assert message_of(without, kind, name) == f"{PLACE}: {name} is None, expected a whole number above 0"


@pytest.mark.parametrize("kind", ["release 4", "release 5"])
def test_missing_epsilon_is_refused(kind):
    """The default of transformers, 1.5625e-07, is not that of MindFormers."""
    assert message_of(without, kind, "rms_norm_eps") == f"{PLACE}: rms_norm_eps is None, expected a number above 0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, "2", True, False, None, [2], float("nan")], ids=repr)
def test_bad_whole_number_is_refused(kind, value):
    for name in (key_of(kind, key) for key in WHOLE):
        message = message_of(changed, kind, **{name: value})
        assert message == f"{PLACE}: {name} is {value!r}, expected a whole number above 0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "value", "most"), [("num_layers", 10 ** 9, "10,000"), ("hidden_size", 10 ** 400, None),
                                                    ("seq_length", 2 ** 31, "4,194,304"),
                                                    ("padded_vocab_size", 2 ** 31, "2,147,483,647")])
def test_dimensions_that_no_model_has_are_refused(kind, key, value, most):
    name = key_of(kind, key)
    expected = f"at most {most}" if most else "a whole number above 0"
    assert message_of(changed, kind, **{name: value}) == f"{PLACE}: {name} is {value!r}, expected {expected}"


@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_that_no_file_holds_are_refused(kind):
    message = message_of(changed, kind, **{key_of(kind, key): 2 ** 31 - 1 for key in ("hidden_size",
                                                                                      "padded_vocab_size")})
    assert message.startswith(f"{PLACE}: Dimensions(num_layers=")
    assert message.endswith("weights, expected at most 1e+13: no file holds them")


@pytest.mark.parametrize("value", [10 ** 400, 1e300])
def test_a_rope_theta_beyond_float32_is_refused(value):
    assert message_of(changed, "release 4", rope_theta=value).startswith(f"{PLACE}: ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 0.0, -1e-5, "1e-5", True, None, [1e-5], float("nan")], ids=repr)
def test_bad_epsilon_is_refused(kind, value):
    name = key_of(kind, "layernorm_epsilon")
    assert message_of(changed, kind, **{name: value}) == f"{PLACE}: {name} is {value!r}, expected a number above 0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 1, "true", None], ids=repr)
def test_bad_bias_is_refused(kind, value):
    name = key_of(kind, "add_qkv_bias")
    assert message_of(changed, kind, **{name: value}) == f"{PLACE}: {name} is {value!r}, expected true or false"


@pytest.mark.parametrize("kind", ["yaml", "original"])
@pytest.mark.parametrize("value", [0, 0.0, -1, "500", True, False, [500], float("nan")], ids=repr)
def test_bad_rope_ratio_is_refused(kind, value):
    message = message_of(changed, kind, rope_ratio=value)
    assert message == f"{PLACE}: rope_ratio is {value!r}, expected a number above 0"


@pytest.mark.parametrize("kind", ["release 4", "release 5"])
@pytest.mark.parametrize("value", [0, -10000.0, "10000", True, None, [10000.0]], ids=repr)
def test_bad_rope_theta_is_refused_under_its_own_name(kind, value):
    if kind == "release 4":
        message = message_of(changed, kind, rope_theta=value)
    else:
        message = message_of(changed, kind, rope_parameters={"rope_type": "default", "rope_theta": value})
    assert message.startswith(f"{PLACE}: ")
    assert f"rope_theta is {value!r}, expected " in message


@pytest.mark.parametrize("kind", ["yaml", "original"])
def test_infinite_rope_ratio_is_refused(kind):
    """`.inf` in a YAML; JSON, as Python reads it, may say Infinity or 1e999."""
    message = message_of(changed, kind, rope_ratio=float("inf"))
    assert message.startswith(f"{PLACE}: rope_ratio is inf, expected ")


def test_infinite_rope_theta_is_refused():
    assert message_of(changed, "release 4", rope_theta=json.loads("1e999")).startswith(f"{PLACE}: ")


@pytest.mark.parametrize("value", ["yarn", ["default"], 5000000.0, True], ids=repr)
@pytest.mark.parametrize(("kind", "key"), [("release 5", "rope_parameters"), ("release 4", "rope_scaling")])
def test_rope_settings_that_are_no_object_are_refused(kind, key, value):
    message = message_of(changed, kind, **{key: value})
    assert message.startswith(f"{PLACE}: {key} is {value!r}, expected ")


@pytest.mark.parametrize("kind", ["yaml", "original"])
@pytest.mark.parametrize(("key", "value"), [
    ("rmsnorm", False), ("post_layer_norm", False), ("add_bias_linear", True), ("multi_query_attention", False),
    ("apply_residual_connection_post_layernorm", True), ("original_rope", False), ("interleaved_qkv", True),
])
def test_other_architecture_is_refused(kind, key, value):
    assert message_of(changed, kind, **{key: value}) == f"{PLACE}: {key} is {value!r}, expected {not value!r}"


@pytest.mark.parametrize(("values", "message"), [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0, expected 0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', expected 'default'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn', expected 'default'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
     "partial_rotary_factor is 1.0, expected 0.5"),
])
def test_other_architecture_is_refused_in_transformers_configuration(values, message):
    assert message_of(changed, "release 4", **values) == f"{PLACE}: {message}"


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize(("kind", "key"), [("release 4", "rope_scaling"), ("release 5", "rope_parameters")])
def test_scaled_rope_is_refused_under_its_old_key_too(kind, key, name):
    """The key of older releases, `type`, which transformers takes for `rope_type`."""
    message = message_of(changed, kind, **{key: {"type": name, "factor": 2.0}})
    assert message.startswith(f"{PLACE}: ")
    assert f"type is {name!r}, expected 'default'" in message


def test_scaled_rope_is_refused_beside_rope_parameters_too():
    """Of the two, transformers goes by rope_scaling."""
    message = message_of(changed, "release 5", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert message == f"{PLACE}: rope_type is 'yarn', expected 'default'"


def test_default_rope_under_its_old_key_is_fine():
    assert changed("release 4", rope_scaling={"type": "default"}) == CHAT_9B


@pytest.mark.parametrize("kind", ["yaml", "original"])
def test_several_problems_are_listed_together(kind):
    message = message_of(changed, kind, rmsnorm=False, hidden_size=0, num_layers="40", add_qkv_bias=1, rope_ratio=-1)
    assert message == (
        f"{PLACE}: rmsnorm is False, expected True; num_layers is '40', expected a whole number above 0; hidden_size "
        "is 0, expected a whole number above 0; add_qkv_bias is 1, expected true or false; rope_ratio is -1, expected "
        "a number above 0")


def test_several_problems_of_transformers_configuration_are_listed_together():
    message = message_of(changed, "release 4", hidden_act="gelu", hidden_size=0, head_dim=None)
    assert message == (f"{PLACE}: hidden_act is 'gelu', expected 'silu'; hidden_size is 0, expected a whole number "
                       "above 0; head_dim is None, expected a whole number above 0")


def test_problems_of_the_rope_are_listed_together():
    message = message_of(changed, "release 5", rope_parameters={"rope_type": "yarn", "partial_rotary_factor": 1.0})
    assert message == f"{PLACE}: rope_type is 'yarn', expected 'default'; partial_rotary_factor is 1.0, expected 0.5"


def test_problems_of_the_rope_are_listed_with_the_others():
    message = message_of(changed, "release 5", rope_parameters={"rope_type": "yarn"}, hidden_act="gelu", hidden_size=0)
    for problem in ("rope_type is 'yarn', expected 'default'", "hidden_act is 'gelu', expected 'silu'",
                    "hidden_size is 0, expected a whole number above 0"):
        assert problem in message


def test_a_configuration_of_the_other_layout_is_refused():
    message = message_of(Dimensions.from_huggingface, OF_ORIGINAL, TRANSFORMERS, PLACE)
    assert "num_hidden_layers is None, expected a whole number above 0" in message
    message = message_of(Dimensions.from_huggingface, OF_RELEASE_4, ORIGINAL, PLACE)
    assert "num_layers is None, expected a whole number above 0" in message


# --- comparing ------------------------------------------------------------------------------------------------------

def test_differences_name_key_and_both_values():
    in_yaml = Dimensions.from_yaml(
        yaml.safe_load(PRODUCTION_YAML.read_text(encoding="utf-8"))["model"]["model_config"], PRODUCTION_YAML.name)
    assert CHAT_9B.differences(in_yaml) == [("seq_length", 131072, 8192), ("rope_ratio", 500, 1)]
    assert in_yaml.differences(CHAT_9B) == [("seq_length", 8192, 131072), ("rope_ratio", 1, 500)]


def test_equal_dimensions_have_no_differences():
    assert CHAT_9B.differences(Dimensions(*astuple(CHAT_9B))) == []
    assert CHAT_9B.differences(replace(CHAT_9B, rope_ratio=500.0)) == []


@pytest.mark.parametrize("key", [*WHOLE, "layernorm_epsilon", "rope_ratio"])
def test_every_key_is_compared(key):
    value = getattr(TINY, key)
    assert TINY.differences(replace(TINY, **{key: 2 * value})) == [(key, value, 2 * value)]


def test_bias_is_compared():
    assert TINY.differences(replace(TINY, add_qkv_bias=False)) == [("add_qkv_bias", True, False)]


# --- names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", [ORIGINAL, TRANSFORMERS])
@pytest.mark.parametrize("size", [CHAT_9B, replace(TINY, num_layers=1)], ids=["9b", "one layer"])
def test_layout_is_found_by_names(size, layout):
    names = list(shapes_in([*backbone_weights(size), *head_weights(size)], layout))
    assert find_layout(names, Path("glm")) == layout
    assert find_layout(names[::-1], Path("glm")) == layout


def test_layout_of_mindformers_names_is_the_original():
    assert find_layout([weight.name for weight in backbone_weights(TINY)], Path("glm")) == ORIGINAL


@pytest.mark.parametrize(("names", "found"), [
    ([], "no tensors"),
    (["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight",
      "model.embed_tokens.weight"], "lm_head.weight, model.embed_tokens.weight, model.layers.0.mlp.gate_proj.weight"),
    (["transformer.layers.0.mlp.dense_h_to_4h.weight"], "transformer.layers.0.mlp.dense_h_to_4h.weight"),
    (["encoder.layers.0.mlp.dense_h_to_4h.weight", "base_model.model.layers.0.mlp.gate_up_proj.weight"],
     "base_model.model.layers.0.mlp.gate_up_proj.weight, encoder.layers.0.mlp.dense_h_to_4h.weight"),
], ids=["nothing", "llama", "chatglm-6b", "names with other beginnings"])
def test_other_models_are_refused(names, found):
    assert message_of(find_layout, names, Path("some/folder")) == (
        f"some/folder: not a GLM-4 model: found {found}; expected names as "
        "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight (THUDM/glm-4-9b) or "
        "model.layers.0.mlp.gate_up_proj.weight (glm-4-9b-hf)")


@pytest.mark.parametrize("name", ["transformer.rotary_pos_emb.inv_freq", "model.rotary_emb.inv_freq",
                                  "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_rotary_frequencies_are_no_weight(name):
    assert is_ignored(name)


def test_no_weight_is_ignored():
    weights = [*backbone_weights(TINY), *head_weights(TINY)]
    names = [name for layout in (ORIGINAL, TRANSFORMERS) for name in shapes_in(weights, layout)]
    names += [weight.name for weight in weights]
    names += ["inv_freq", "transformer.rotary_pos_emb.inv_freq.weight", "transformer.rotary_pos_emb.weight"]
    assert not [name for name in names if is_ignored(name)]


def test_prefix_is_put_in_front_of_every_backbone_weight():
    for weight in [*backbone_weights(TINY), head_weights(TINY)[0]]:
        bare = weight.name[len("transformer."):]
        for state in ("", "adam_m.", "adam_v.", "accu_grads."):
            assert with_prefix(state + bare) == state + weight.name
            assert with_prefix(state + weight.name) == state + weight.name


def test_optimizer_states_get_the_prefix_too():
    """A backbone alone against one inside a model: MindSpore's optimizer names the states of both."""
    from mindspore import Parameter, Tensor, nn
    names = {}
    for prefix in ("", "transformer."):
        weights = [Parameter(Tensor(np.ones(2, np.float32)), name=name) for name in (
            f"{prefix}embedding.embedding_weight", f"{prefix}encoder.final_layernorm.weight", "v_head0.weight")]
        names[prefix] = [parameter.name for parameter in nn.AdamWeightDecay(weights).get_parameters()]
    assert [with_prefix(name) for name in names[""]] == names["transformer."]
    assert len(names[""]) > 3 * 3 > len(set(names[""]) & set(names["transformer."]))


@pytest.mark.parametrize("name", [
    "v_head0.weight", "adam_m.v_head0.weight", "accu_grads.v_head0.weight", "step_metrics.value", "step_metrics",
    "global_step", "learning_rate", "beta1_power", "scale_sense", "epoch_num", "embedding", "encoders.0.weight",
    "model.encoder.layers.0.weight", "transformer.encoder.final_layernorm.weight", ""])
def test_other_names_stay_as_they_are(name):
    assert with_prefix(name) == name
