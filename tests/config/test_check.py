"""Configurations: YAML plus flags, and the problems that are found before a device is touched.

| test                                      | proves                                                                  |
| test_shipped_yaml_is_accepted             | both YAMLs pass the checks                                              |
| test_both_yamls_have_the_same_keys ...    | the laptop's YAML is the production one in small                        |
| test_production_dimensions_are_glm4_9b    | against the published config.json of glm-4-9b                           |
| test_the_epsilon_of_glm4_9b ...           | against the same number in float16                                      |
| test_problem_is_named ...                 | each fault: key, value found, value expected                            |
| test_empty_keys_are_as_good_as_absent     | none reaches MindFormers as None                                        |
| test_rows_that_cannot_be_packed ...       | the same of packed rows                                                 |
| test_objectives_that_mean_nothing_...     | kinds and combinations of the objective's keys                          |
| test_data_of_another_sequence_length      | what shorter and longer samples are good for                            |
"""
import contextlib
import copy
import json
import sqlite3

import pytest
import yaml
from conftest import PRODUCTION_YAML, TINY_YAML

from mindrlhf.config import check as config_module
from mindrlhf.config.check import config_problems, is_semi_auto, load_config
from mindrlhf.config.check_data import check_records, open_records
from mindrlhf.config.defaults import DEFAULTS
from mindrlhf.config.read import get, put, read_config
from mindrlhf.config.value_types import KINDS
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError
from mindrlhf.objective import DEFAULT


@pytest.fixture(scope="module")
def tiny():
    return yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def production():
    return yaml.safe_load(PRODUCTION_YAML.read_text(encoding="utf-8"))


@pytest.fixture
def write_yaml(tmp_path):
    """A function that writes a configuration with some keys changed, and returns its path."""
    def write(config, changes=None):
        config = copy.deepcopy(config)
        for key, value in (changes or {}).items():
            put(config, key, value)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        return path
    return write


def keys_of(value, prefix=""):
    """Dotted names of all keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{prefix}.{key}")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from keys_of(inner, f"{prefix}[{number}]")
    else:
        yield prefix


@pytest.mark.parametrize("path", [TINY_YAML, PRODUCTION_YAML], ids=lambda path: path.name)
def test_shipped_yaml_is_accepted(path):
    assert get(load_config(path).mapping, "model.arch.type") == "Glm4RewardModel"


def test_both_yamls_have_the_same_keys_but_for_how_ascend_compiles(tiny, production):
    assert sorted([*keys_of(tiny), ".context.jit_config.jit_level"]) == sorted(keys_of(production))
    assert get(production, "context.jit_config.jit_level") == "O1"


def test_production_dimensions_are_glm4_9b(production):
    model = get(production, "model.model_config")
    expected = {"num_layers": 40, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32,
                "multi_query_group_num": 2, "kv_channels": 128, "padded_vocab_size": 151552, "seq_length": 8192,
                "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "layernorm_epsilon": 1.5625e-07,
                "eos_token_id": 151329, "pad_token_id": 151329, "compute_dtype": "bfloat16",
                "param_init_type": "float32", "use_flash_attention": True}
    assert {key: model[key] for key in expected} == expected
    assert production["optimizer"] == {"type": "FP32StateAdamWeightDecay", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
                                       "weight_decay": 0.1}
    assert get(production, "lr_schedule.learning_rate") == 1e-5
    assert get(production, "lr_schedule.warmup_ratio") == 0.01


@pytest.mark.stack
def test_the_epsilon_of_glm4_9b_counts_in_the_type_of_the_norms(production):
    """MindFormers' norm holds it as a tensor of that type, or gives it to the fused operator as a number."""
    import mindspore as ms
    model = get(production, "model.model_config")
    kept = ms.Tensor(model["layernorm_epsilon"], getattr(ms, model["layernorm_compute_type"]))
    assert float(kept) == pytest.approx(1.5625e-07, rel=1e-6)
    assert float(ms.Tensor(1.5625e-07, ms.float16)) != pytest.approx(1.5625e-07, rel=0.1)
    assert ms.ops.operations.RmsNorm(model["layernorm_epsilon"]).epsilon == 1.5625e-07


def test_production_layout_is_for_eight_npus(production):
    layout = production["parallel_config"]
    assert layout["data_parallel"] * layout["model_parallel"] * layout["pipeline_stage"] == 8
    assert is_semi_auto(production)
    assert get(production, "parallel.full_batch")
    assert get(production, "parallel.enable_parallel_optimizer")


def test_a_flag_takes_the_place_of_the_value_and_an_absent_one_leaves_it():
    config = load_config(TINY_YAML, {"model.model_config.seq_length": 64, "use_parallel": None})
    assert config.model.seq_length == get(config.mapping, "model.model_config.seq_length") == 64
    assert config.layout.parallel is False


def test_a_number_without_a_dot_is_a_number(tmp_path):
    """YAML 1.1 reads 1e-5 as text."""
    path = tmp_path / "run.yaml"
    text = TINY_YAML.read_text(encoding="utf-8").replace("learning_rate: 3.0e-4", "learning_rate: 4e-4")
    path.write_text(text, encoding="utf-8")
    assert get(load_config(path).mapping, "lr_schedule.learning_rate") == 0.0004


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_dataset_task.type": "CausalLanguageModelDataset"},
     "train_dataset_task.type is 'CausalLanguageModelDataset', expected RewardModelDataset"),
    ({"model.arch.type": "LlamaForCausalLM"}, "model.arch.type is 'LlamaForCausalLM', expected Glm4RewardModel"),
    ({"model.model_config.type": "LlamaConfig"}, "model.model_config.type is 'LlamaConfig', expected ChatGLM2Config"),
    ({"model.model_config.seq_length": "long"}, "seq_length is 'long', expected a whole number above 0"),
    ({"model.model_config.num_layers": 0}, "num_layers is 0, expected a whole number above 0"),
    ({"runner_config.batch_size": True}, "runner_config.batch_size is True, expected a whole number above 0"),
    ({"lr_schedule.learning_rate": "fast"}, "learning_rate is 'fast', expected a number above 0"),
    ({"context.device_target": "TPU"}, "context.device_target is 'TPU', expected Ascend or CPU or GPU"),
    ({"model.model_config.pad_token_id": 5000}, "pad_token_id is 5000, expected an id below padded_vocab_size (1024)"),
    ({"train_dataset.pad_token_id": 2},
     "train_dataset.pad_token_id is 2, expected model.model_config.pad_token_id (996)"),
    ({"model.model_config.num_attention_heads": 5}, "num_attention_heads is 5, expected a multiple of"),
    ({"model.model_config.apply_query_key_layer_scaling": False},
     "apply_query_key_layer_scaling is False, expected True"),
    ({"model.model_config.use_past": True}, "use_past is True, expected False"),
    ({"model.model_config.checkpoint_name_or_path": "glm4_9b"}, "checkpoint_name_or_path is 'glm4_9b', expected ''"),
    ({"model.model_config.use_flash_attention": True},
     "use_flash_attention is True, expected False on device_target CPU"),
    ({"parallel.parallel_mode": 7}, "parallel.parallel_mode is 7, expected 0 (data parallel) or 1"),
    ({"parallel.parallel_mode": 1, "use_parallel": True}, "parallel.parallel_mode is 1, expected 0 (data parallel) on"),
    ({"parallel.gradients_mean": False, "use_parallel": True}, "parallel.gradients_mean is False, expected True in"),
    ({"parallel.enable_parallel_optimizer": True, "use_parallel": True},
     "parallel.enable_parallel_optimizer is True, expected False in data-parallel mode"),
    ({"micro_batch_interleave_num": 2}, "micro_batch_interleave_num is above 1, expected 1"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_problem_is_named_with_value_and_expectation(write_yaml, tiny, changes, message):
    with pytest.raises(UserError) as error:
        load_config(write_yaml(tiny, changes))
    assert message in str(error.value)
    assert "run.yaml: " in str(error.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"parallel_config.model_parallel": 8, "parallel_config.data_parallel": 1},
     "parallel_config.model_parallel is 8, expected a divisor of multi_query_group_num (2) with flash attention"),
    ({"parallel.full_batch": False}, "parallel.full_batch is not True, expected True"),
], ids=("model_parallel", "full_batch"))
def test_an_illegal_layout_is_refused(write_yaml, production, monkeypatch, changes, message):
    monkeypatch.setattr(config_module, "repeats_key_and_value", lambda: False)
    with pytest.raises(UserError) as error:
        load_config(write_yaml(production, changes))
    assert message in str(error.value)


def test_model_parallel_8_is_accepted_without_flash_attention(write_yaml, production):
    load_config(write_yaml(production, {"parallel_config.model_parallel": 8, "parallel_config.data_parallel": 1,
                                        "model.model_config.use_flash_attention": False}))


def test_all_problems_are_listed_at_once(write_yaml, tiny):
    with pytest.raises(UserError) as error:
        load_config(write_yaml(tiny, {"model.model_config.num_layers": -1, "context.device_target": "TPU"}))
    assert "num_layers is -1" in str(error.value)
    assert "device_target is 'TPU'" in str(error.value)


@pytest.mark.parametrize("section", ["runner_config", "callbacks", "train_dataset", "model", "parallel", "lr_schedule"])
def test_a_missing_section_is_named(write_yaml, tiny, section):
    config = {key: value for key, value in tiny.items() if key != section}
    with pytest.raises(UserError, match=f"section {section}.* is missing"):
        load_config(write_yaml(config))


def test_a_dash_in_the_checkpoint_prefix_is_refused(write_yaml, tiny):
    callbacks = [{"type": "CheckpointMonitor", "prefix": "glm4-9b"}]
    with pytest.raises(UserError, match=r"callbacks\[0\].prefix is 'glm4-9b', expected no dash"):
        load_config(write_yaml(tiny, {"callbacks": callbacks}))


@pytest.mark.parametrize(("content", "message"), [
    (b"a: [1, 2", r"run\.yaml:\d+: not YAML"),
    (b"- 1\n- 2\n", "found list, expected sections"),
    (b"", "found NoneType, expected sections"),
    (b"a: \xff\xfe", r"run\.yaml: cannot be read: not UTF-8"),
], ids=("syntax", "list", "empty", "encoding"))
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config: .*absent\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.fixture
def data(tmp_path):
    """A function that makes what stands for a MindRecord file with a sidecar; returns its path."""
    def make(name="train.mindrecord", **settings):
        path = tmp_path / name
        head = json.dumps({"header_size": 64, "page_size": 64, "page": [], "schema": [],
                           "shard_addresses": []}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head)
        path.with_name(f"{name}.db").unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path.with_name(f"{name}.db"))) as index:
            index.execute("CREATE TABLE INDEXES (ROW_ID INT)")
        sidecar = {"seq_length": 128, "pad_token_id": 996, "padding_side": "right", "prompt_template": "{prompt}",
                   "tokenizer": {"file": "t", "sha256": "aa", "vocab_size": 1010}, **settings}
        path.with_name(f"{name}.json").write_text(json.dumps(sidecar), encoding="utf-8")
        return str(path)
    return make


def test_data_that_was_made_for_this_model_is_accepted(data):
    path = data()
    config = load_config(TINY_YAML, {"train_dataset.data_loader.dataset_dir": [path]})
    records = open_records(config.mapping, "train_dataset")
    check_records(records, config.model, exact=True)
    assert records.files == (path,)
    assert records.settings["prompt_template"] == "{prompt}"
    assert records.unverifiable == (path,)


@pytest.mark.parametrize(("settings", "message"), [
    ({"seq_length": 256}, "the data's seq_length is 256, model.model_config.seq_length (or --seq_length) is 128"),
    ({"pad_token_id": 2}, "the data's pad_token_id is 2, model.model_config.pad_token_id is 996"),
    ({"tokenizer": {"vocab_size": 151343}},
     "the data's tokenizer has 151343 ids, model.model_config.padded_vocab_size is 1024"),
], ids=("seq_length", "pad_token_id", "vocabulary"))
def test_data_that_was_made_for_another_model_is_refused_with_both_values(data, settings, message):
    record = data(**settings)
    with pytest.raises(UserError) as error:
        check_records(RecordSet.open(record), load_config(TINY_YAML).model, exact=True)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{record}.json: ")


def test_no_data_says_where_to_name_it():
    with pytest.raises(UserError, match="give --train_dataset, or train_dataset.data_loader.dataset_dir"):
        open_records(load_config(TINY_YAML).mapping, "train_dataset")


def test_files_of_one_set_that_were_made_differently_are_refused(data):
    paths = [data("a.mindrecord"), data("b.mindrecord", prompt_template="Q {prompt}")]
    with pytest.raises(UserError, match=r"b\.mindrecord\.json: prompt_template is 'Q {prompt}', but .*a\.mindrecord"):
        RecordSet.open(paths)


# --- packed rows ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "message"), [
    ({"batching": "bucket"}, "train_dataset.batching is 'bucket', expected padded, buckets or packing"),
    ({"batching": "buckets", "runner_config.sink_mode": True},
     "runner_config.sink_mode is True, expected False with train_dataset.batching buckets, whose steps have several "
     "shapes; packing has one"),
    ({"batching": "buckets", "parallel_config.pipeline_stage": 2},
     "parallel_config.pipeline_stage is 2, expected 1 with train_dataset.batching buckets"),
    ({"batching": "buckets", "runner_config.gradient_accumulation_steps": 4},
     "runner_config.gradient_accumulation_steps is 4, expected 1 outside semi-auto parallel"),
    ({"batching": "packing", "row_length": 0},
     "train_dataset.row_length is 0, expected a whole number up to twice model.model_config.seq_length (256)"),
    ({"batching": "packing", "row_length": "long"}, "train_dataset.row_length is 'long', expected a whole number up"),
    ({"batching": "packing", "row_length": 64.5}, "train_dataset.row_length is 64.5, expected a whole number up"),
    ({"batching": "packing", "row_length": True}, "train_dataset.row_length is True, expected a whole number up"),
    ({"batching": "packing", "row_length": 257}, "train_dataset.row_length is 257, expected a whole number up to"),
    ({"batching": "buckets", "repeat": 2}, "train_dataset.repeat is 2, expected 1 with batching buckets"),
    ({"batching": "packing", "repeat": 2}, "train_dataset.repeat is 2, expected 1 with batching packing"),
    ({"batching": "buckets", "pad_token_id": None},
     "train_dataset.pad_token_id is missing, which train_dataset.batching buckets fills up rows with"),
    ({"batching": "packing", "pad_token_id": None},
     "train_dataset.pad_token_id is missing, which train_dataset.batching packing fills up rows with"),
    ({"batching": "padded", "probabilities": [0.5, 0.5], "repeat": 2},
     "train_dataset.repeat is 2, expected 1 with train_dataset.probabilities"),
    ({"batching": "padded", "probabilities": [0.5, 0.5], "pad_token_id": None},
     "train_dataset.pad_token_id is missing, which train_dataset.probabilities fills up rows with"),
    ({"interleave": "over"}, "train_dataset.interleave is 'over', which has an effect with train_dataset.probabilities "
     "only; expected nothing"),
], ids=lambda value: "-".join(f"{key.split('.')[-1]}={found}" for key, found in value.items())
                     if isinstance(value, dict) else "")
def test_rows_that_cannot_be_packed_are_refused(write_yaml, tiny, changes, message):
    changes = {key if "." in key else f"train_dataset.{key}": value for key, value in changes.items()}
    with pytest.raises(UserError) as error:
        load_config(write_yaml(tiny, changes))
    assert message in str(error.value)
    assert str(error.value).count(" expected ") <= 1  # this is the only problem


@pytest.mark.parametrize("changes", [
    {"batching": "buckets"},
    {"batching": "buckets", "row_length": 1000},  # says nothing there
    {"batching": "packing", "row_length": 1},
    {"batching": "packing", "row_length": 256},
    {"batching": "packing", "row_length": None},
    {"batching": "packing", "runner_config.sink_mode": True},
    {"batching": "padded", "repeat": 2, "row_length": 0, "pad_token_id": None},
    {"batching": "padded", "probabilities": [0.333, 0.333, 0.333], "interleave": "over"},
], ids=lambda value: "-".join(f"{key.split('.')[-1]}={found}" for key, found in value.items()))
def test_rows_that_can_be_made_are_accepted(write_yaml, tiny, changes):
    load_config(write_yaml(tiny, {key if "." in key else f"train_dataset.{key}": value
                                  for key, value in changes.items()}))


@pytest.mark.parametrize(("batching", "seq_length", "row_length", "wrong"), [
    ("padded", 100, 96, "model.model_config.seq_length is 100"),
    ("packing", 100, None, "model.model_config.seq_length is 100"),
    ("packing", 96, 100, "train_dataset.row_length is 100"),
    ("packing", 100, 208, None),  # two whole texts, rounded up
    ("padded", 96, 100, None),
])
def test_flash_attention_wants_rows_of_a_multiple_of_16_tokens(batching, seq_length, row_length, wrong):
    """MindFormers' FlashAttention (modules/flash_attention.py) says so of the lengths of query and key."""
    config = read_config(PRODUCTION_YAML)
    config["model"]["model_config"]["seq_length"] = seq_length
    config["train_dataset"].update(batching=batching, row_length=row_length)
    found = [problem for problem in config_problems(config) if "flash" in problem]
    assert len(found) == (wrong is not None)
    assert not wrong or found[0].startswith(f"{wrong}, expected a multiple of 16 with flash attention and ")
    config["model"]["model_config"]["use_flash_attention"] = False
    assert not [problem for problem in config_problems(config) if "multiple of 16" in problem]


@pytest.mark.parametrize(("objective", "dataset", "problem"), [
    ({"loss": "end-token"}, {}, "objective.loss is 'end-token', expected token_wise or end_token, or nothing"),
    ({"margin": "add"}, {}, "objective.margin is 'add', expected none, subtract or scale, or nothing"),
    ({"answers": 2}, {}, "objective.answers is 2, expected pairs or listwise, or nothing"),
    ({"centering": -0.01}, {}, "objective.centering is -0.01, expected a number, 0 or more, or nothing"),
    ({"label_smoothing": 0.5}, {},
     "objective.label_smoothing is 0.5, expected a number from 0 up to, not including, 0.5, or nothing"),
    ({"answers": "listwise"}, {},
     "objective.loss is 'token_wise', expected end_token with model.model_config.objective.answers listwise: position "
     "by position each answer would be filled up"),
    ({"loss": "end_token", "answers": "listwise"}, {"batching": "padded"},
     "train_dataset.batching is 'padded', expected buckets or packing with model.model_config.objective.answers"),
    ({"loss": "end_token", "answers": "listwise"}, {"probabilities": [0.5, 0.5]},
     "train_dataset.probabilities is [0.5, 0.5], expected nothing with model.model_config.objective.answers"),
    ({"loss": "end_token", "answers": "listwise", "margin": "scale", "centering": 1, "label_smoothing": 0.49}, {},
     None),
    ({"loss": None, "margin": "subtract"}, {"batching": "padded"}, None),
    (None, {}, None),
])
def test_objectives_that_mean_nothing_are_refused(tiny, write_yaml, objective, dataset, problem):
    config = copy.deepcopy(tiny)
    config["model"]["model_config"]["objective"] = objective
    config["train_dataset"].update(dataset)
    path = write_yaml(config)
    if problem is None:
        found = load_config(path).objective
        assert vars(found) == {**vars(DEFAULT), **{key: value for key, value in (objective or {}).items() if value}}
        return
    with pytest.raises(UserError) as error:
        load_config(path)
    line, = error.value.messages
    prefix = "model.model_config." * problem.startswith("objective")
    assert line.startswith(f"{path}: {prefix}{problem}"), line


def test_an_objective_that_is_no_block_is_named(tiny, write_yaml):
    with pytest.raises(UserError, match="section model.model_config.objective is 'end_token', expected keys and val"):
        load_config(write_yaml(tiny, {"model.model_config.objective": "end_token"}))


def test_a_yaml_without_batching_trains_padded_rows(write_yaml, tiny):
    config = copy.deepcopy(tiny)
    for key in ("batching", "row_length", "pad_token_id"):
        config["train_dataset"].pop(key, None)
    assert load_config(write_yaml(config, {"train_dataset.repeat": 2})).batching.padded


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_key_that_is_absent_or_empty_has_its_default(write_yaml, tiny, key):
    *sections, last = key.split(".")
    config = copy.deepcopy(tiny)
    section = get(config, ".".join(sections)) if sections else config
    section.pop(last, None)
    assert get(read_config(write_yaml(config)), key) == DEFAULTS[key]
    section[last] = None
    empty = read_config(write_yaml(config))
    if KINDS.get(key) is None or KINDS[key].fits(None):
        assert get(empty, key) == DEFAULTS[key]
    else:
        assert any(problem.startswith(f"{key} is None, expected ") for problem in config_problems(empty))


def test_empty_keys_are_as_good_as_absent(write_yaml, tiny):
    """MindFormers ends with a TypeError where some of them are None."""
    optional = [key for key, kind in KINDS.items() if kind.fits(None) and get(tiny, key) is not None]
    absent, empty = copy.deepcopy(tiny), copy.deepcopy(tiny)
    for key in optional:
        put(empty, key, None)
        section, _, last = key.rpartition(".")
        del (get(absent, section) if section else absent)[last]
    assert len(optional) > 40
    for config in (absent, empty):
        config["train_dataset_task"]["dataset_config"] = config["eval_dataset_task"]["dataset_config"] = None
    assert read_config(write_yaml(empty)) == read_config(write_yaml(absent))


def test_the_step_of_a_cpu_needs_its_optimizer(write_yaml, tiny):
    changes = {"runner_wrapper.type": "RewardTrainOneStepCell", "optimizer.type": "FP32StateAdamWeightDecay"}
    with pytest.raises(UserError, match="optimizer.type is 'FP32StateAdamWeightDecay', expected "
                                        "SkippingAdamWeightDecay with runner_wrapper.type RewardTrainOneStepCell"):
        load_config(write_yaml(tiny, changes))
    load_config(write_yaml(tiny, {**changes, "runner_wrapper.type": "MFTrainOneStepCell"}))


@pytest.mark.parametrize(("exact", "found", "problem"), [
    (True, 128, None),
    (True, 64, "they must be equal"),
    (True, 256, "they must be equal"),
    (False, 64, None),
    (False, 129, "it must not be larger"),
])
def test_data_of_another_sequence_length(data, exact, found, problem):
    """Padding is taken off before rows are packed, so that shorter samples fit; a padded row has one length."""
    records, model = RecordSet.open(data(seq_length=found)), load_config(TINY_YAML).model
    if problem is None:
        check_records(records, model, exact)
        return
    with pytest.raises(UserError) as error:
        check_records(records, model, exact)
    assert str(error.value).endswith(f"the data's seq_length is {found}, model.model_config.seq_length "
                                     f"(or --seq_length) is 128; {problem}")


@pytest.mark.parametrize("exact", [True, False])
def test_the_pad_ids_of_data_and_model_must_be_equal_in_any_rows(data, exact):
    with pytest.raises(UserError, match="pad_token_id is 2, model.model_config.pad_token_id is 996; they must be"):
        check_records(RecordSet.open(data(pad_token_id=2)), load_config(TINY_YAML).model, exact)
