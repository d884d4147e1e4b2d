"""Keys of MindFormers 1.3 to 2.1 that do not apply here, and blocks that a user pastes from MindFormers' YAMLs.

| test                                     | proves                                               | judged against    |
| test_what_is_not_done_here_is_refused    | key, value found, expected, and what instead         | literal messages  |
| test_a_value_that_asks_for_nothing ...   | it is accepted and taken off                         | the tables        |
| test_each_key_is_known ...               | none is taken for a misspelt one                     | yaml_keys         |
| test_optimizer_...                       | arguments of each class, and the rate that counts    | literal messages  |
| test_what_is_said_of_pipeline_stages ... | offset and recompute have a number for each stage    | literal messages  |
| test_model_parallel_...                  | slices of key and value, before 1.6 and since        | literal messages  |
| test_the_installed_release ...           | numbers are compared, not letters                    | literal versions  |
| test_a_pasted_block ...                  | accepted, or a line for each key that does not apply | MindFormers' YAML |
| test_pasted_blocks_build ...             | MindFormers' classes take what is accepted           | its classes       |
"""
import copy
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import PRODUCTION_YAML, TINY_YAML

from mindrlhf.compat import installed
from mindrlhf.config import check as config_module
from mindrlhf.config.check import config_problems, load_config
from mindrlhf.config.known_keys import BLOCKS, CALLBACKS, TYPES
from mindrlhf.config.read import get, put, read_config
from mindrlhf.config.refused import REFUSED, REFUSED_OF_CALLBACKS, refused_values, without_idle_keys
from mindrlhf.config.yaml_loader import Loader
from mindrlhf.errors import UserError


@pytest.fixture(scope="module")
def production():
    return read_config(PRODUCTION_YAML)


def changed(config, changes):
    """A copy with other values at dotted keys, whose sections are made; callbacks.TYPE.KEY is one of a callback."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        if sections[:1] == ["callbacks"]:
            place = next(callback for callback in config["callbacks"] if callback["type"] == sections[1])
        else:
            place = config
            for section in sections:
                place = place.setdefault(section, {})
        place[last] = value
    return config


@pytest.fixture
def problems_with(production):
    """A function from changed keys to the problems of the production configuration with them."""
    return lambda changes: list(config_problems(changed(production, changes)))


@pytest.mark.parametrize(("key", "value", "expected", "instead"), [
    ("use_legacy", False, "True", "legacy"),
    ("use_legacy_format", False, "True", "legacy"),
    ("load_ckpt_format", "safetensors", "'ckpt'", "scripts/convert_weight.py hf_to_ms --input glm-4-9b --output "),
    ("load_ckpt_async", True, "False", "checked"),
    ("remove_redundancy", True, "False", "every weight"),
    ("pretrained_model_dir", "./glm", "nothing", "load_checkpoint"),
    ("profile", True, "False", "ProfileMonitor"),
    ("data_skip_steps", 5, "0", "--resume True"),
    ("ignore_data_skip", True, "False", "--resume True"),
    ("remote_save_url", "obs://x", "nothing", "output_dir"),
    ("push_to_hub", True, "False", "ms_to_hf"),
    ("calculate_per_token_loss", True, "False", "mean over pairs"),
    ("use_skip_data_by_global_norm", True, "False", "SkippedStepMonitor"),
    ("use_checkpoint_health_monitor", True, "False", "SkippedStepMonitor"),
    ("layer_scale", True, "False", "all layers"),
    ("tensorboard.tensorboard_log_interval", 5, "1", "each step is written"),
    ("tensorboard.log_expert_load_to_tensorboard", True, "False", "no experts"),
    ("monitor_config.monitor_on", True, "False", "metrics.csv"),
    ("moe_config.expert_num", 8, "1", "no experts"),
    ("swap_config.swap", True, "False", "recompute_config.recompute"),
    ("runner_config.stop_step", 10, "0", "runner_config.epochs"),
    ("lr_schedule.warmup_epochs", 1, "0", "warmup_steps"),
    ("lr_schedule.decay_ratio", 0.5, "0", "decay_steps"),
    ("runner_wrapper.calculate_per_token_loss", True, "False", "mean over pairs"),
    ("runner_wrapper.use_skip_data_by_global_norm", True, "False", "SkippedStepMonitor"),
    ("parallel_config.seq_split_num", 2, "1", "row_length"),
    ("parallel_config.context_parallel", 2, "1", "model_parallel"),
    ("parallel_config.swap", True, "False", "recompute_config.recompute"),
    ("recompute_config.select_recompute_exclude", True, "False", "select_recompute"),
    ("recompute_config.select_comm_recompute_exclude", True, "False", "select_recompute"),
    ("context.use_graceful_exit", True, "False", "SIGTERM"),
    ("model.model_config.qkv_concat", False, "True", "query_key_value"),
    ("model.model_config.mlp_concat", False, "True", "dense_h_to_4h"),
    ("model.model_config.use_rearrange_rope", True, "False", "another order"),
    ("model.model_config.mask_generate", "inmap", "nothing", "its own mask"),
    ("model.model_config.use_ring_attention", True, "False", "packed rows"),
    ("model.model_config.enable_high_performance", True, "False", "borders"),
    ("model.model_config.fine_grain_interleave", 2, "1", "no release"),
    ("model.model_config.input_sliced_sig", True, "False", "whole"),
    ("model.model_config.post_self_attn_layernorm", True, "False", "GLM-4-0414"),
    ("model.model_config.post_mlp_layernorm", True, "False", "GLM-4-0414"),
    ("model.model_config.pre_seq_len", 64, "nothing", "prefix"),
    ("callbacks.CheckpointMonitor.checkpoint_format", "safetensors", "'ckpt'", "scripts/convert_weight.py"),
    ("callbacks.CheckpointMonitor.remove_redundancy", True, "False", "every weight"),
    ("callbacks.CheckpointMonitor.use_legacy_format", False, "True", "legacy"),
    ("callbacks.CheckpointMonitor.save_optimizer", False, "True", "checkpoint_network"),
    ("callbacks.MFLossMonitor.calculate_per_token_loss", True, "False", "mean over pairs"),
])
def test_what_is_not_done_here_is_refused(problems_with, key, value, expected, instead):
    problem, = problems_with({key: value})
    name = {"CheckpointMonitor": "callbacks[2].", "MFLossMonitor": "callbacks[0]."}.get(key.split(".")[1], "") + \
        key.split(".")[2] if key.startswith("callbacks.") else key
    assert problem.startswith(f"{name} is {value!r}, expected {expected}: ")
    assert instead in problem
    assert "\n" not in problem


def test_a_block_that_is_not_read_is_refused_key_by_key(problems_with):
    problems = problems_with({"checkpoint": {"load_path": "./glm", "save_max": 2, "async_save": False, "prefix": ""},
                              "grouped_lr_schedule": {"default": {"type": "ConstantWarmUpLR"}, "grouped": []}})
    assert [problem.split(" is ")[0] for problem in problems] == ["checkpoint.load_path", "checkpoint.save_max",
                                                                  "grouped_lr_schedule.default"]
    assert "expected nothing: load_checkpoint and resume_training say" in problems[0]


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("trainer.type", "ImageClassificationTrainer", "CausalLanguageModelingTrainer or RewardTrainer"),
    ("context.mode", 1, "0 (graph mode), for which the model and its training step are written"),
    ("context.mode", "PYNATIVE_MODE", "0 (graph mode), for which the model and its training step are written"),
])
def test_another_trainer_and_another_mode_are_refused(problems_with, key, value, expected):
    assert problems_with({key: value}) == [f"{key} is {value!r}, expected {expected}"]


@pytest.mark.parametrize("kind", ["CausalLanguageModelingTrainer", "RewardTrainer"])
def test_either_trainer_is_accepted(problems_with, kind):
    assert problems_with({"trainer.type": kind, "context.mode": "GRAPH_MODE"}) == []


IDLE = [(key, value) for key, refused in REFUSED.items() for value in refused.idle]
IDLE += [("checkpoint", {"load_path": "", "async_save": False, "save_max": None})]
IDLE += [(f"callbacks.{kind}.{key}", value) for kind, keys in REFUSED_OF_CALLBACKS.items()
         for key, refused in keys.items() for value in refused.idle]


@pytest.mark.parametrize(("key", "value"), IDLE, ids=repr)
def test_a_value_that_asks_for_nothing_is_accepted_and_taken_off(production, problems_with, key, value):
    assert problems_with({key: value}) == []
    config = changed(production, {key: value})
    without_idle_keys(config)
    left = {"tensorboard": {}} if key.startswith("tensorboard.") else {}  # a block that is there asks for its defaults
    assert config == {**production, **left}


def test_a_block_whose_switch_is_off_is_taken_off_whatever_else_it_says(production):
    config = {**copy.deepcopy(production), "moe_config": {"expert_num": 1, "capacity_factor": 1.1},
              "swap_config": {"swap": False, "layer_swap": [{"layers": [1]}]}, "monitor_config": {"step_interval": 1}}
    assert list(refused_values(config)) == []
    without_idle_keys(config)
    assert config == production


def test_what_is_refused_stays_so_that_it_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TINY_YAML.read_text(encoding="utf-8") + "use_legacy: True\nuse_legacy_format: False\n",
                    encoding="utf-8")
    config = read_config(path)
    assert "use_legacy" not in config
    assert config["use_legacy_format"] is False
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: use_legacy_format is False, expected True: ")


def test_each_key_is_known_so_that_it_is_not_taken_for_a_misspelt_one():
    for key in REFUSED:
        block, _, last = key.rpartition(".")
        if block in BLOCKS:
            assert last in BLOCKS[block], key
        elif block in ("optimizer", "lr_schedule", "runner_wrapper"):
            assert last in frozenset().union(*TYPES.values()), key
        else:
            assert block in BLOCKS[""], key
    for kind, keys in REFUSED_OF_CALLBACKS.items():
        assert set(keys) <= CALLBACKS[kind], kind


# --- the optimizer --------------------------------------------------------------------------------------------------

ADAMW = {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("changes", [
    {}, {"use_fused": False, "amsgrad": False, "maximize": False, "swap": False}, {"learning_rate": 1e-5},
    {"learning_rate": None}])
def test_optimizer_adamw_is_accepted(problems_with, changes):
    assert problems_with({"optimizer": {**ADAMW, **changes}}) == []


@pytest.mark.parametrize(("optimizer", "message"), [
    ({"type": "FP32StateAdamWeightDecay", "betas": [0.9, 0.95]},
     "optimizer.betas is [0.9, 0.95], expected beta1 and beta2, a key each, with optimizer.type "
     "FP32StateAdamWeightDecay"),
    ({**ADAMW, "beta1": 0.9}, "optimizer.beta1 is 0.9, expected betas: [beta1, beta2] with optimizer.type AdamW"),
    ({**ADAMW, "use_fused": True}, "optimizer.use_fused is True, expected False: of AdamW, the plain class is in every "
                                   "release of MindFormers"),
    ({**ADAMW, "swap": True}, "optimizer.swap is True, expected False: parallel.enable_parallel_optimizer spreads the "
                              "moments over the devices"),
    ({**ADAMW, "learning_rate": 1e-6},
     "optimizer.learning_rate is 1e-06, expected nothing: lr_schedule.learning_rate (1e-05) counts"),
    ({"type": "Muon"}, "optimizer.type is 'Muon', expected FP32StateAdamWeightDecay or SkippingAdamWeightDecay or "
                       "AdamW: it is for models that MindFormers calls mcore"),
])
def test_optimizer_arguments_that_its_class_does_not_have(problems_with, optimizer, message):
    assert problems_with({"optimizer": optimizer}) == [message]


def test_whole_numbers_become_floats_where_mindformers_takes_no_others(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TINY_YAML.read_text(encoding="utf-8").replace("warmup_ratio: 0.1", "warmup_ratio: 0").replace(
        "weight_decay: 0.1", "weight_decay: 0"), encoding="utf-8")
    config = load_config(path)
    values = config.mapping["lr_schedule"]["warmup_ratio"], config.mapping["optimizer"]["weight_decay"]
    assert repr(values) == "(0.0, 0.0)"


# --- layouts --------------------------------------------------------------------------------------------------------

PIPELINE = {"parallel_config.data_parallel": 1, "parallel_config.pipeline_stage": 4,
            "parallel_config.micro_batch_num": 4}


@pytest.mark.parametrize(("changes", "message"), [
    ({"model.model_config.offset": [-1, 0, 2, -1]},
     "model.model_config.offset is [-1, 0, 2, -1], expected 0 with one pipeline stage (parallel_config.pipeline_stage, "
     "in semi-auto parallel)"),
    ({**PIPELINE, "model.model_config.offset": [0, 0]},
     "model.model_config.offset is [0, 0], expected 4 numbers, one for each pipeline stage"),
    ({**PIPELINE, "model.model_config.offset": [-10, 0, 10, 0]},
     "model.model_config.offset is [-10, 0, 10, 0], expected at least one layer in each pipeline stage"),
    ({**PIPELINE, "model.model_config.offset": [1, 0, 0, 0]},
     "parallel_config.pipeline_stage is 4, expected a divisor of num_layers (40), or model.model_config.offset that "
     "says which stages have a layer more"),
    ({"recompute_config.recompute": [6, 3, 2, 3]},
     "recompute_config.recompute is [6, 3, 2, 3], expected True, False or a list of 1: the number of layers of each "
     "pipeline stage"),
    ({"recompute_config.select_recompute": {"mlp": [1, 2]}},
     "recompute_config.select_recompute is {'mlp': [1, 2]}, expected True, False or a list of 1: the number of layers "
     "of each pipeline stage"),
    ({**PIPELINE, "model.model_config.offset": [-1, 0, 2, -1], "recompute_config.recompute": [6, 3, 2, 3]}, None),
    ({"recompute_config.select_recompute": ["mlp", "self_attention"]}, None),
    ({"recompute_config.recompute": [6]}, None),
])
def test_what_is_said_of_pipeline_stages_fits_their_count(problems_with, changes, message):
    assert problems_with(changes) == ([message] if message else [])


@pytest.mark.parametrize(("repeats", "flash", "split", "problem"), [
    (False, True, 2, None), (False, True, 4, "expected a divisor of multi_query_group_num (2) with flash attention: "),
    (False, False, 8, None), (True, True, 2, None), (True, True, 4, None), (True, True, 8, None),
    (True, False, 8, None),
])
def test_model_parallel_and_key_value_groups(problems_with, monkeypatch, repeats, flash, split, problem):
    monkeypatch.setattr(config_module, "repeats_key_and_value", lambda: repeats)
    found = problems_with({"parallel_config.model_parallel": split, "parallel_config.data_parallel": 8 // split,
                           "model.model_config.use_flash_attention": flash})
    assert len(found) == (problem is not None)
    assert not found or found[0].startswith(f"parallel_config.model_parallel is {split}, {problem}")


@pytest.mark.parametrize(("groups", "split", "accepted"), [(4, 8, True), (4, 4, True), (8, 4, True), (2, 4, True),
                                                           (16, 8, True), (4, 6, False), (6, 4, False)])
def test_model_parallel_divides_groups_or_is_a_multiple(problems_with, monkeypatch, groups, split, accepted):
    """A slice has whole groups, or a group whole slices: the layout (kv_mp, model_parallel // kv_mp) of MindFormers."""
    monkeypatch.setattr(config_module, "repeats_key_and_value", lambda: True)
    found = problems_with({"parallel_config.model_parallel": split, "model.model_config.multi_query_group_num": groups,
                           "model.model_config.num_attention_heads": 48, "model.model_config.hidden_size": 4800,
                           "model.model_config.ffn_hidden_size": 4800})
    assert found == ([] if accepted else [f"parallel_config.model_parallel is {split}, expected a divisor or a "
                                          f"multiple of multi_query_group_num ({groups})"])


@pytest.mark.parametrize(("version", "repeats"), [
    ("1.3.0", False), ("1.3.2", False), ("1.5.0", False), ("1.6.0", True), ("1.9.0", True), ("1.10.0", True),
    ("2.0.0rc1", True), ("2.1.0", True), ("dev", True)])
def test_the_installed_release_is_compared_as_numbers(monkeypatch, version, repeats):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert installed.repeats_key_and_value() is repeats


def test_without_mindformers_the_later_rule_holds(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, "version", version)
    assert installed.repeats_key_and_value() is True


# --- pasted blocks --------------------------------------------------------------------------------------------------

# configs/glm4/finetune_glm4_9b.yaml of MindFormers 1.6 to 2.1.
LATER = """
load_ckpt_format: 'ckpt'
context: {mode: 0, device_target: "Ascend", max_call_depth: 10000, max_device_memory: "58GB", save_graphs: False,
          save_graphs_path: "./graph", device_id: 0, jit_config: {jit_level: "O1"}, memory_optimize_level: "O0"}
model:
  model_config:
    {type: ChatGLM2Config, batch_size: 1, num_layers: 40, padded_vocab_size: 151552, hidden_size: 4096,
     ffn_hidden_size: 13696, kv_channels: 128, num_attention_heads: 32, seq_length: 8192, hidden_dropout: 0.0,
     attention_dropout: 0.0, layernorm_epsilon: 1.5625e-07, rope_ratio: 1, rmsnorm: True,
     apply_residual_connection_post_layernorm: False, post_layer_norm: True, add_bias_linear: False, add_qkv_bias: True,
     bias_dropout_fusion: True, multi_query_attention: True, multi_query_group_num: 2,
     apply_query_key_layer_scaling: True, attention_softmax_in_fp32: True, fp32_residual_connection: False,
     quantization_bit: 0, pre_seq_len: None, prefix_projection: False, compute_dtype: "bfloat16",
     layernorm_compute_type: "float32", param_init_type: "float32", rotary_dtype: "float32", use_past: False,
     qkv_concat: True, mlp_concat: True, use_flash_attention: True, eos_token_id: [151329, 151336, 151338],
     pad_token_id: 151329, repetition_penalty: 1.0, max_decode_length: 512, checkpoint_name_or_path: "", top_k: 1,
     top_p: 1, do_sample: False, offset: [-1, 0, 2, -1]}
runner_config: {epochs: 5, batch_size: 1, gradient_accumulation_steps: 1, sink_mode: True, sink_size: 1}
runner_wrapper: {type: MFTrainOneStepCell, use_clip_grad: True}
lr_schedule: {type: CosineWithWarmUpLR, learning_rate: 1.e-6, lr_end: 1.e-6, warmup_ratio: 0, total_steps: -1}
optimizer: {type: AdamW, betas: [0.9, 0.999], eps: 1.e-8, learning_rate: 1.e-6, weight_decay: 0.01}
parallel: {parallel_mode: 1, gradients_mean: False, loss_repeated_mean: True, enable_alltoall: False, full_batch: True,
           search_mode: "sharding_propagation", enable_parallel_optimizer: True,
           strategy_ckpt_config: {save_file: "./ckpt_strategy.ckpt"}}
parallel_config: {data_parallel: 2, model_parallel: 1, pipeline_stage: 4, micro_batch_num: 64, vocab_emb_dp: False,
                  use_seq_parallel: True, gradient_aggregation_group: 4}
recompute_config: {recompute: [6, 3, 2, 3], select_recompute: False, parallel_optimizer_comm_recompute: False,
                   mp_comm_recompute: True, recompute_slice_activation: True}
callbacks:
  - {type: MFLossMonitor}
  - {type: CheckpointMonitor, prefix: "glm4", checkpoint_format: "ckpt", save_checkpoint_steps: 1000,
     keep_checkpoint_max: 1, integrated_save: False}
"""
PASTED = ("context", "parallel", "parallel_config", "recompute_config", "runner_config", "runner_wrapper",
          "lr_schedule", "optimizer", "callbacks", "model.model_config")
# What does not apply beside the other blocks of the production YAML: one pipeline stage, and a rate of its own.
LINES = {"recompute_config": ["recompute_config.recompute is [6, 3, 2, 3], expected True, False or a list of 1"],
         "optimizer": ["optimizer.learning_rate is 1e-06, expected nothing"],
         "model.model_config": ["model.model_config.offset is [-1, 0, "]}


@pytest.fixture(params=["later", "installed"])
def theirs(request):
    """MindFormers' own YAML: that of 1.6 to 2.1, and that of the installed release."""
    if request.param == "later":
        return yaml.load(LATER, Loader=Loader)
    mindformers = pytest.importorskip("mindformers")
    path = Path(mindformers.__file__).parent.parent / "configs" / "glm4" / "finetune_glm4_9b.yaml"
    if not path.exists():
        pytest.skip(f"MindFormers {metadata.version('mindformers')} ships no configs/glm4/finetune_glm4_9b.yaml")
    return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)


def read_with(folder, theirs, blocks):
    """The production configuration as it is read with some of their blocks in it."""
    config = yaml.load(PRODUCTION_YAML.read_text(encoding="utf-8"), Loader=Loader)
    for block in blocks:
        put(config, block, copy.deepcopy(get(theirs, block)))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return read_config(path)


@pytest.mark.stack
@pytest.mark.parametrize("block", PASTED)
def test_a_pasted_block_is_accepted_or_each_key_that_does_not_apply_is_named(tmp_path, theirs, block):
    problems = list(config_problems(read_with(tmp_path, theirs, [block])))
    expected = LINES.get(block, [])
    assert len(problems) == len(expected), problems
    assert all(problem.startswith(line) for problem, line in zip(problems, expected)), problems


@pytest.mark.stack
def test_all_blocks_together_are_accepted(tmp_path, theirs):
    assert list(config_problems(read_with(tmp_path, theirs, PASTED))) == []


@pytest.mark.stack
def test_pasted_blocks_build_what_mindformers_builds_of_them(tmp_path, theirs):
    """No key that the installed release does not have is left; what it adds to the keys is its own business."""
    import mindspore as ms
    from mindformers import MindFormerConfig
    from mindformers.core import build_lr
    from mindformers.core.optim import build_optim
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.glm2.glm2_config import ChatGLM2Config

    from mindrlhf.checkpoints.save import WholeCheckpointMonitor
    from mindrlhf.training.step import Float32StateAdamWeightDecay
    theirs = {**theirs, "swap_config": {"swap": False}, "moe_config": {"expert_num": 1, "npu_nums_per_device": 1}}
    theirs["parallel_config"] = {**theirs["parallel_config"], "seq_split_num": 1}
    theirs["recompute_config"] = {**theirs["recompute_config"], "select_recompute_exclude": False}
    config = MindFormerConfig(**read_with(tmp_path, theirs, [*PASTED, "swap_config", "moe_config"]))
    build_parallel_config(config)
    assert config.parallel_config.pipeline_stage == 4
    assert config.parallel_config.recompute.recompute == [6, 3, 2, 3]
    model = {key: value for key, value in config.model.model_config.items() if key != "type"}
    assert ChatGLM2Config(**model).offset == get(theirs, "model.model_config.offset")
    config.lr_schedule.total_steps = 10
    schedule, weight = build_lr(config.lr_schedule), ms.Parameter(ms.Tensor([1.0]), name="weight")
    optimizer = build_optim(config.optimizer, default_args={"params": [{"params": [weight]}],
                                                            "learning_rate": schedule})
    assert {state.name for state in optimizer.get_parameters()} >= {"adam_m.weight", "adam_v.weight"}
    assert not isinstance(optimizer, Float32StateAdamWeightDecay)
    callback, = (callback for callback in config.callbacks if callback["type"] == "CheckpointMonitor")
    WholeCheckpointMonitor(**{key: value for key, value in callback.items() if key != "type"})
