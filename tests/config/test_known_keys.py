"""Known keys of a YAML, and the misspelt ones.

| test                                     | proves                                          | judged against |
| test_a_misspelt_key_is_reported ...      | place and resembled key, in every kind of block | literal values |
| test_an_evaluation_has_no_mixture        | keys of training alone                          | literal values |
| test_a_block_that_nothing_reads_is ...   | a key that resembles none is an error, too      | literal values |
| test_keys_of_mindformers_that_nothing_...| they are listed for the user                    | literal values |
| test_keys_are_those_of_the_classes       | no argument is missing                          | signatures     |
| test_no_key_of_mindformers_own_yamls ... | what MindFormers reads is not taken for a slip  | its YAMLs      |
| test_the_shipped_yamls_have_known_keys   | all keys that this project names are known      | both YAMLs     |
"""
import copy
import inspect
from pathlib import Path

import pytest
import yaml
from conftest import PRODUCTION_YAML, TINY_YAML

from mindrlhf.config.check import config_problems, load_config
from mindrlhf.config.known_keys import BLOCKS, CALLBACKS, IGNORED, TYPES, ignored_keys, unknown_keys
from mindrlhf.config.read import get, put
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def tiny():
    return yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("key", "resembles"), [
    ("resume_trainig", "resume_training"),
    ("runner_config.batchsize", "batch_size"),
    ("parallel_config.model_paralell", "model_parallel"),
    ("parallel.full_batches", "full_batch"),
    ("parallel.parallel_optimizer_config.parallel_optimizer_treshold", "parallel_optimizer_threshold"),
    ("model.model_config.seq_len", "seq_length"),
    ("model.model_config.num_layer", "num_layers"),
    ("model.model_config.objective.centring", "centering"),
    ("train_dataset.row_lenght", "row_length"),
    ("eval_dataset.data_loader.shufle", "shuffle"),
    ("optimizer.beta_1", "beta1"),
    ("lr_schedule.warm_up_ratio", "warmup_ratio"),
    ("runner_wrapper.use_clip_grads", "use_clip_grad"),
    ("recompute_config.recompute_slice_activations", "recompute_slice_activation"),
    ("context.max_device_mem", "max_device_memory"),
    ("context.jit_config.jit_levels", "jit_level"),
])
def test_a_misspelt_key_is_reported_with_the_one_that_it_resembles(tiny, key, resembles):
    config = copy.deepcopy(tiny)
    config["context"]["jit_config"] = {}
    put(config, key, 1)
    assert list(unknown_keys(config)) == [(key, resembles)]


def test_an_evaluation_has_no_mixture(tiny):
    config = copy.deepcopy(tiny)
    for block in ("train_dataset", "eval_dataset"):
        config[block].update(probabilities=[0.5, 0.5], interleave="over")
    assert [key for key, _ in unknown_keys(config)] == ["eval_dataset.probabilities", "eval_dataset.interleave"]


def test_a_misspelt_key_of_a_callback_is_reported_with_its_place(tiny):
    config = copy.deepcopy(tiny)
    config["callbacks"][2]["keep_checkpoints_max"] = 3
    assert list(unknown_keys(config)) == [("callbacks[2].keep_checkpoints_max", "keep_checkpoint_max")]


def test_a_run_with_a_misspelt_key_is_refused(tiny, tmp_path):
    config = copy.deepcopy(tiny)
    config["runner_config"]["epoch"] = 1
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == (f"{path}: runner_config.epoch is an unknown key, which nothing reads; did you mean "
                                "epochs?")


def test_a_block_that_nothing_reads_is_reported_too_and_unknown_classes_are_left_to_their_signatures(tiny):
    config = copy.deepcopy(tiny)
    config["own_notes"] = config["model"]["model_config"]["aims"] = {"type": "x"}
    config["optimizer"] = {"type": "Came", "beta_1": 1}
    config["callbacks"].append({"type": "ProfileMonitor", "prefix_": 1})
    assert list(unknown_keys(config)) == [("own_notes", None), ("model.model_config.aims", None)]
    assert next(iter(config_problems(config))) == "own_notes is an unknown key, which nothing reads; remove it"


def test_keys_of_mindformers_that_nothing_reads_are_said_to_have_no_effect(tiny):
    config = copy.deepcopy(tiny)
    assert ignored_keys(config) == []
    config.update(eval_callbacks=[{"type": "ObsMonitor"}], metric=None)
    config["model"]["model_config"]["top_k"] = 1
    assert ignored_keys(config) == ["eval_callbacks", "model.model_config.top_k"]
    assert all(keys <= BLOCKS[block] for block, keys in IGNORED.items())


@pytest.mark.parametrize("path", [TINY_YAML, PRODUCTION_YAML], ids=lambda path: path.name)
def test_the_shipped_yamls_have_known_keys_only(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for block, known in BLOCKS.items():
        assert set((get(config, block) or {}) if block else config) <= known, block
    for block in ("optimizer", "lr_schedule", "runner_wrapper"):
        assert set(config[block]) <= TYPES[config[block]["type"]], block
    for callback in config["callbacks"]:
        assert set(callback) <= CALLBACKS[callback["type"]]


def test_no_key_of_mindformers_own_yamls_is_taken_for_a_misspelt_one():
    import mindformers
    paths = sorted((Path(mindformers.__file__).parent.parent / "configs").glob("glm[234]/*.yaml"))
    assert paths
    for path in paths:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if config.get("use_legacy", True):  # others are of models with keys of their own
            others = ("train_dataset.data_loader.", "eval_dataset.data_loader.", "model.model_config.pet_config")
            assert [key for key, _ in unknown_keys(config) if not key.startswith(others)] == [], path


def arguments_of(kind):
    return {name for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)}


def test_keys_are_those_of_the_classes():
    from mindformers.core.callback.callback import CheckpointMonitor, MFLossMonitor
    from mindformers.core.lr.lr_schedule import CosineWithWarmUpLR
    from mindformers.models.glm2.glm2_config import ChatGLM2Config
    from mindformers.modules.transformer import TransformerOpParallelConfig, TransformerRecomputeConfig
    from mindformers.wrapper import MFTrainOneStepCell

    from mindrlhf.checkpoints.save import WholeCheckpointMonitor
    from mindrlhf.training.monitor import RewardMonitor
    from mindrlhf.training.step import Float32StateAdamWeightDecay
    from mindrlhf.training.stopping import SkippedStepMonitor
    for kind, known in ((ChatGLM2Config, BLOCKS["model.model_config"]),
                        (TransformerOpParallelConfig, BLOCKS["parallel_config"]),
                        (TransformerRecomputeConfig, BLOCKS["recompute_config"]),
                        (Float32StateAdamWeightDecay, TYPES["FP32StateAdamWeightDecay"]),
                        (CosineWithWarmUpLR, TYPES["CosineWithWarmUpLR"]),
                        (MFTrainOneStepCell, TYPES["MFTrainOneStepCell"]),
                        (CheckpointMonitor, CALLBACKS["CheckpointMonitor"]),
                        (WholeCheckpointMonitor, CALLBACKS["CheckpointMonitor"]),
                        (MFLossMonitor, CALLBACKS["MFLossMonitor"]),
                        (RewardMonitor, CALLBACKS["RewardMonitor"]),
                        (SkippedStepMonitor, CALLBACKS["SkippedStepMonitor"])):
        assert arguments_of(kind) <= known, kind
