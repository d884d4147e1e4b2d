"""Layouts of several devices, on none: MindSpore's parallel pass over the real training step, and its strategy files.

| test | proves | judged against |
| --- | --- | --- |
| test_each_layout_is_legal_... | every operator of the step is legal; each parameter's slice | slices by hand |
| test_slices_are_cut_and_merged_... | whole, to 8, to whole; and 8 to 2 | the whole checkpoint, bit by bit |
| test_flash_attention_over_more_... | with 1.3: the check refuses what the pass would refuse | the parallel pass |
| test_a_stage_of_a_pipeline_... | resuming a pipeline: a rank's checkpoint has its stage alone | slices as above |
| test_training_starts_from_... | whole and sliced ones, `--src_strategy`, `--auto_trans_ckpt` | slices as above |
| test_evaluation_takes_... | `reward_eval` and `reward_infer` are cut as training is | slices as above |
| test_the_strategy_of_1_3_... | slices of MindFormers 1.3, made with a strategy file of its own | slices by hand |
| test_slices_of_1_3_... | cut anew by any release; refused as they are by one that cuts otherwise | slices as above |
| test_the_strategy_of_another_layout_... | it is named, and nothing is trained | the same strategy's own layout |

The production YAML's heads and groups, which decide what is legal, are as they are; widths and layers are fewer, and
collectives off Ascend do not take bfloat16. What no test here shows: numbers, kernels, memory and speed.
"""
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE
from layouts import SMALLER, devices, records, train, write_yaml
from mindformers.models.glm2.glm2_transformer import ChatGLM2SelfAttention

from mindrlhf.compat.installed import repeats_key_and_value
from mindrlhf.config.check import config_problems
from mindrlhf.config.read import read_config
from mindrlhf.models.glm4.dimensions import Dimensions, weights_of

pytestmark = [pytest.mark.stack, pytest.mark.process]

# name: data parallel, model parallel, stages, flash attention, batching
LAYOUTS = {
    "data 4 x model 2, packing": (4, 2, 1, True, "packing"),  # as shipped
    "data 4 x model 2, padded": (4, 2, 1, True, "padded"),
    "data 8 x model 1": (8, 1, 1, True, "packing"),
    "data 2 x model 4": (2, 4, 1, True, "packing"),
    "data 1 x model 8": (1, 8, 1, True, "packing"),
    "data 2 x model 4, no flash": (2, 4, 1, False, "packing"),
    "data 1 x model 8, no flash": (1, 8, 1, False, "packing"),
    "data 2 x model 2 x pipeline 2": (2, 2, 2, True, "packing"),
    "data 1 x model 2": (1, 2, 1, True, "packing"),
    "data 1 x model 2, no flash": (1, 2, 1, False, "packing"),
    "data 1 x model 4, no flash": (1, 4, 1, False, "packing"),
}

LONG = ("data 4 x model 2, padded", "data 8 x model 1", "data 1 x model 2", "data 2 x model 4",
        "data 1 x model 8", "data 2 x model 4, no flash", "data 1 x model 8, no flash", "data 1 x model 2, no flash",
        "data 1 x model 4, no flash")


@pytest.fixture(scope="module")
def strategies(train, tmp_path_factory):
    """A function from a layout's name to the folder of its strategy files. A layout is compiled where it is asked for
    first, in one process for each stage; it skips if it is refused because this release of MindFormers has the other
    rule for flash attention.
    """
    folder = tmp_path_factory.mktemp("strategies")

    def run(name, stage):
        data, model, stages, *_ = LAYOUTS[name]
        config = write_yaml(folder / name / f"stage_{stage}.yaml", *LAYOUTS[name], only_save_strategy=True)
        return train(config, data * model * stage, data * model * stages)

    @functools.cache
    def compiled(name):
        problems = config_problems(read_config(str(write_yaml(folder / "check" / f"{name}.yaml", *LAYOUTS[name]))))
        refused = [problem for problem in problems if "before 1.6" in problem and not repeats_key_and_value()]
        if not refused:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for stage, (code, output) in enumerate(pool.map(functools.partial(run, name), range(LAYOUTS[name][2]))):
                    assert code == 0, f"{name}, stage {stage}: exit code {code}: {output[-3000:]}"
        return refused

    def of(name):
        for reason in compiled(name):
            pytest.skip(reason)
        return folder / name / "output" / "strategy"

    return of


def strategy_file(folder):
    """The one file of a folder of strategies, of all stages together."""
    files = sorted(folder.glob("ckpt_strategy_rank_*.ckpt"))
    if len(files) == 1:
        return str(files[0])
    merged = folder.parent / "merged.ckpt"
    ms.merge_pipeline_strategys(str(folder), str(merged))
    return str(merged)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of a whole checkpoint of made-up numbers, {name: array}): weights and the optimizer's moments."""
    folder = tmp_path_factory.mktemp("whole")
    config = read_config(str(write_yaml(folder / "run.yaml", *LAYOUTS["data 8 x model 1"])))
    dimensions = Dimensions.from_yaml(config["model"]["model_config"], "model_config")
    numbers = np.random.default_rng(5)
    values = {f"{kind}{weight.name}": numbers.standard_normal(weight.shape, np.float32)
              for weight in weights_of(dimensions) for kind in ("", "adam_m.", "adam_v.")}
    save(folder / "rank_0" / "whole.ckpt", values)
    return folder, values


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in values.items()], str(path))


def read(path):
    return {name: value.asnumpy() for name, value in ms.load_checkpoint(str(path)).items()}


@pytest.fixture(scope="module")
def slices(strategies, whole, tmp_path_factory):
    """A function from a layout's name to the folder with rank_0, rank_1, ... that MindSpore cuts `whole` into."""
    made = {}

    def cut(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("slices") / "checkpoint"
            ms.transform_checkpoints(str(whole[0]), str(made[name]), "glm4-network", None,
                                     strategy_file(strategies(name)))
        return made[name]

    return cut


# The layers that shard flash attention by themselves cut the projection behind it by its inputs; those of 1.3 do not.
CUTS_INPUTS_OF_DENSE = hasattr(ChatGLM2SelfAttention, "shard_fa")


def expected_slice(name, shape, data, model, cuts_inputs_of_dense=CUTS_INPUTS_OF_DENSE):
    """By hand, from how MindFormers 1.3 and 1.9 shard each layer (glm2_transformer.py, glm2_modules.py,
    llama_layer.py), and that the optimizer divides the first dimension of what is larger than 64 KB by the number of
    its copies.
    """
    if "embedding" in name:
        return shape[0] // (data * model), shape[1]  # vocab_emb_dp: a copy on each process
    if name.endswith("query_key_value.bias"):
        return (shape[0] // model,)
    if len(shape) == 1 or "v_head0" in name:
        return shape
    if name.endswith("dense_4h_to_h.weight") or cuts_inputs_of_dense and name.endswith("attention.dense.weight"):
        return shape[0] // data, shape[1] // model  # its inputs are divided
    return shape[0] // model // data, shape[1]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name
                                  for name in LAYOUTS])
def test_each_layout_is_legal_for_every_operator_and_parameter(name, slices, whole):
    data, model, stages, *_ = LAYOUTS[name]
    _, values = whole
    found = [read(next((slices(name) / f"rank_{rank}").iterdir())) for rank in range(data * model * stages)]
    for rank, parameters in enumerate(found):
        shapes = {name: value.shape for name, value in parameters.items()}
        stage = rank // (data * model)
        expected = {name: expected_slice(name, value.shape, data, model) for name, value in values.items()
                    if stages == 1 or stage_of(name) == stage}
        assert shapes == expected, f"rank {rank}"


def stage_of(name):
    """In a pipeline of 2 stages: of 2 layers, each has one."""
    return int("layers.1." in name or "final_layernorm" in name or "v_head0" in name)


@pytest.mark.parametrize("name", ["data 4 x model 2, packing", "data 2 x model 2 x pipeline 2",
                                  pytest.param("data 1 x model 8, no flash", marks=pytest.mark.long)])
def test_slices_are_cut_and_merged_bit_by_bit(name, slices, strategies, whole, tmp_path):
    _, values = whole
    ms.transform_checkpoints(str(slices(name)), str(tmp_path / "back"), "whole", strategy_file(strategies(name)), None)
    (file,) = (tmp_path / "back" / "rank_0").iterdir()
    assert same(read(file), values)
    two = "data 1 x model 2"
    ms.transform_checkpoints(str(slices(name)), str(tmp_path / "two"), "glm4-network",
                             strategy_file(strategies(name)), strategy_file(strategies(two)))
    for rank in range(2):
        assert same(read(next((tmp_path / "two" / f"rank_{rank}").iterdir())),
                    read(next((slices(two) / f"rank_{rank}").iterdir())))


def same(found, expected):
    """Whether two mappings have the same names and bits."""
    return found.keys() == expected.keys() and all(found[name].tobytes() == expected[name].tobytes() for name in found)


@pytest.mark.skipif(repeats_key_and_value(), reason="legal with this MindFormers; both layouts are among LAYOUTS")
@pytest.mark.parametrize("model", [4, 8])
def test_flash_attention_over_more_processes_than_groups_is_refused(model, train, tmp_path):
    config = write_yaml(tmp_path / "run.yaml", 8 // model, model, 1, True, "packing", only_save_strategy=True)
    message = (f"parallel_config.model_parallel is {model}, expected a divisor of multi_query_group_num (2) with flash "
               "attention")
    assert any(message in problem for problem in config_problems(read_config(str(config))))
    if model == 4:
        code, output = train(config, 0, 8, "--unchecked")
        assert code != 0
        assert "operator FlashAttentionScore init failed" in output


@pytest.fixture(scope="module")
def left_behind(slices, tmp_path_factory):
    """Checkpoint of a run on 8 processes that was killed: the last step that all have is 7, the newest file is 6."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    for rank in range(8):
        values = read(next((slices("data 4 x model 2, packing") / f"rank_{rank}").iterdir()))
        for step in (6, 7, 8) if rank == 3 else (7, 6):
            counted = {"epoch_num": 1, "step_num": step, "global_step": step}
            save(folder / f"rank_{rank}" / f"glm4_rank_{rank}-1_{step}.ckpt",
                 {**{name: value if step == 7 else value + 1 for name, value in values.items()},
                  **{name: np.array(value, np.int32) for name, value in counted.items()}})
    return folder


@pytest.mark.long
def test_a_stage_of_a_pipeline_starts_from_its_slices(slices, train, tmp_path):
    name, rank = "data 2 x model 2 x pipeline 2", 6
    config = write_yaml(tmp_path / "run.yaml", *LAYOUTS[name])
    code, output = train(config, rank, 8, "--load_checkpoint", str(slices(name)), "--weights", "found.npz")
    assert code == 0, output[-3000:]
    expected = weights(read(next((slices(name) / f"rank_{rank}").iterdir())))
    with np.load(tmp_path / "found.npz") as found:
        assert same({name: found[name] for name in expected}, expected)


def weights(values):
    return {name: value for name, value in values.items() if not name.startswith("adam_")}


def test_training_starts_from_a_whole_checkpoint_and_evaluates(slices, whole, train, records, tmp_path):
    """Before the first step and behind it; the slices are those of training."""
    name = "data 4 x model 2, packing"
    config = write_yaml(tmp_path / "run.yaml", *LAYOUTS[name], eval_at_start=True)
    code, output = train(config, 5, 8, "--load_checkpoint", str(whole[0] / "rank_0" / "whole.ckpt"),
                         "--weights", "found.npz", "--eval_dataset", str(records))
    assert code == 0, output[-3000:]
    assert output.count("an evaluation is compiled") == 2
    expected = weights(read(next((slices(name) / "rank_5").iterdir())))
    with np.load(tmp_path / "found.npz") as found:
        assert same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("source", [pytest.param("whole", marks=pytest.mark.long), "slices, to resume"])
def test_training_starts_from_a_checkpoint_that_is_cut_anew(source, slices, strategies, whole, left_behind, train,
                                                            tmp_path):
    """The first of 2 processes, which does the cutting for both."""
    two, resume = "data 1 x model 2", source != "whole"
    config = write_yaml(tmp_path / "run.yaml", *LAYOUTS[two])
    flags = ["--load_checkpoint", str(left_behind), "--resume", "--src_strategy",
             str(strategies("data 4 x model 2, packing"))] if resume else \
        ["--load_checkpoint", str(whole[0] / "rank_0" / "whole.ckpt")]
    code, output = train(config, 0, 2, *flags, "--auto_trans_ckpt", "--weights", "found.npz")
    assert code == 0, output[-3000:]
    expected = [read(next((slices(two) / f"rank_{rank}").iterdir())) for rank in range(2)]
    (other,) = (tmp_path / "output" / ".resharding" / "cut").glob("*/rank_1/*.ckpt")
    other = read(other)
    assert same({name: other[name] for name in expected[1]}, expected[1])
    if not resume:
        expected[0] = weights(expected[0])
    with np.load(tmp_path / "found.npz") as found:
        assert same({name: found[name] for name in expected[0]}, expected[0])
        assert int(found["global_step"].item()) == 7 * resume


@pytest.mark.parametrize("sliced", [True, pytest.param(False, marks=pytest.mark.long)])
def test_evaluation_takes_the_slices_of_training_and_whole_checkpoints(sliced, slices, whole, train, tmp_path):
    name = "data 4 x model 2, packing"
    config = write_yaml(tmp_path / "run.yaml", *LAYOUTS[name])
    code, output = train(config, 5, 8, "--evaluate", str(slices(name) if sliced else whole[0]), "--weights", "5.npz")
    assert code == 0, output[-3000:]
    expected = read(next((slices(name) / "rank_5").iterdir()))
    with np.load(tmp_path / "5.npz") as found:
        assert same(dict(found), {name: expected[name] for name in found.files})


@pytest.mark.long
def test_the_strategy_of_another_layout_is_refused(strategies, left_behind, train, tmp_path):
    config = write_yaml(tmp_path / "run.yaml", *LAYOUTS["data 1 x model 2"])
    strategy = strategies("data 8 x model 1")
    flags = ["--load_checkpoint", str(left_behind), "--auto_trans_ckpt", "--src_strategy", str(strategy)]
    code, output = train(config, 0, 2, *flags, "--weights", "found.npz")
    assert code != 0
    assert (f"UserError: {left_behind}, resharded with {strategy}: {6 if CUTS_INPUTS_OF_DENSE else 4} parameters "
            "have another shape than the network's") in output
    assert list(tmp_path.glob("*.npz")) == []


# Of this file's data 2 x model 2, written by MindSpore's parallel pass with MindFormers 1.3.
OF_1_3, LAYOUT_OF_1_3 = REFERENCE / "strategy_glm2_of_1_3_data2_model2.ckpt", (2, 2, 1, True, "packing")


def slice_of_1_3(name, value, rank):
    """A rank's slice by hand: ranks 0 and 1 are the first data-parallel group."""
    data, model = rank // 2, rank % 2
    shape = expected_slice(name, value.shape, 2, 2, cuts_inputs_of_dense=False)
    if shape == value.shape:
        return value
    if "embedding" in name:
        row, column = rank, 0
    elif name.endswith("bias"):
        row, column = model, 0
    elif name.endswith("dense_4h_to_h.weight"):
        row, column = data, model
    else:
        row, column = 2 * model + data, 0  # the optimizer divides what the layer has divided
    rows = value[row * shape[0]:(row + 1) * shape[0]]
    return rows if rows.ndim == 1 else rows[:, column * shape[1]:(column + 1) * shape[1]]


@pytest.fixture(scope="module")
def slices_of_1_3(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("of_1_3")
    for rank in range(4):
        save(folder / f"rank_{rank}" / f"glm4_rank_{rank}-1_7.ckpt",
             {name: slice_of_1_3(name, value, rank) for name, value in whole[1].items()})
    return folder


def test_the_strategy_of_1_3_is_that_of_slices_by_hand(slices_of_1_3, whole, tmp_path):
    ms.transform_checkpoints(str(slices_of_1_3), str(tmp_path / "whole"), "whole", str(OF_1_3), None)
    (file,) = (tmp_path / "whole" / "rank_0").iterdir()
    assert same(read(file), whole[1])


@pytest.mark.long
def test_slices_of_1_3_are_cut_anew(slices_of_1_3, slices, train, tmp_path):
    two = "data 1 x model 2"
    config = write_yaml(tmp_path / "run.yaml", *LAYOUTS[two])
    code, output = train(config, 0, 2, "--load_checkpoint", str(slices_of_1_3), "--src_strategy", str(OF_1_3),
                         "--auto_trans_ckpt", "--weights", "found.npz")
    assert code == 0, output[-3000:]
    expected = weights(read(next((slices(two) / "rank_0").iterdir())))
    with np.load(tmp_path / "found.npz") as found:
        assert same({name: found[name] for name in expected}, expected)


@pytest.mark.long
def test_slices_of_1_3_are_refused_by_a_release_that_cuts_otherwise(slices_of_1_3, train, tmp_path):
    config = write_yaml(tmp_path / "run.yaml", *LAYOUT_OF_1_3)
    code, output = train(config, 0, 4, "--load_checkpoint", str(slices_of_1_3), "--weights", "found.npz")
    if not CUTS_INPUTS_OF_DENSE:
        assert code == 0, output[-3000:]
        return
    assert code != 0
    assert "2 parameters have another shape than the network's" in output
    assert "slices of another layout or release of MindFormers: --auto_trans_ckpt True with --src_strategy" in output
    assert list(tmp_path.glob("*.npz")) == []
