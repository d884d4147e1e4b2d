"""Checkpoints that are sliced over ranks, cut and merged by MindSpore's own functions.

tests/reference/strategy_data2_model2.ckpt was written by MindSpore's parallel pass on 4 ranks: the model of the
reference case "grouped" with data 2 x model 2 and the optimizer sharded. It holds how each parameter is cut, no values.
"""
import shutil

import mindspore as ms
import pytest
from conftest import REFERENCE, TINY_YAML, dimensions_of
from safetensors.numpy import load_file

from mindrlhf.config import load_config
from mindrlhf.convert_weight import ms_to_hf
from mindrlhf.errors import UserError

STRATEGY = REFERENCE / "strategy_data2_model2.ckpt"


@pytest.fixture(scope="module")
def config(reference):
    config = load_config(TINY_YAML)
    config["model"]["model_config"].update(dimensions_of(reference))
    return config


@pytest.fixture(scope="module")
def slices(reference, tmp_path_factory):
    """checkpoint_network of a run on 4 ranks: rank_0, ..., each with its slice."""
    folder = tmp_path_factory.mktemp("slices")
    (folder / "whole" / "rank_0").mkdir(parents=True)
    ms.save_checkpoint([{"name": name[len("weight/"):], "data": ms.Tensor(value)} for name, value in reference.items()
                        if name.startswith("weight/")], str(folder / "whole" / "rank_0" / "whole.ckpt"))
    ms.transform_checkpoints(str(folder / "whole"), str(folder / "sliced"), "glm4-network", None, str(STRATEGY))
    slice_of_rank_1 = ms.load_checkpoint(str(folder / "sliced" / "rank_1" / "glm4-network1.ckpt"))
    assert slice_of_rank_1["transformer.embedding.embedding_weight"].shape == (16, 32)
    return folder / "sliced"


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("as_folder", [False, True])
def test_slices_are_merged_bit_by_bit_before_the_export(slices, config, reference, tmp_path, as_folder):
    strategy = STRATEGY
    if as_folder:  # as MindFormers leaves them in output/strategy
        strategy = tmp_path / "strategy"
        strategy.mkdir()
        for rank in range(4):
            shutil.copy(STRATEGY, strategy / f"ckpt_strategy_rank_{rank}.ckpt")
    ms_to_hf(str(slices), config, tmp_path / "hf", src_strategy=str(strategy))
    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name[len("hf/"):]: value for name, value in reference.items() if name.startswith("hf/")}
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert hidden(tmp_path) == []


def test_slices_without_a_strategy_say_how_to_get_it(slices, config, tmp_path):
    with pytest.raises(UserError, match=r"sliced over 4 ranks \(transformer.embedding.embedding_weight of rank_0 is "
                                        r"\[16, 32\], the whole one \[64, 32\]\): give --src_strategy, the folder "
                                        r"output/strategy .*; without it, start the run once more with "
                                        r"only_save_strategy: True"):
        ms_to_hf(str(slices), config, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_slice_and_a_strategy_of_something_else_are_refused(slices, config, tmp_path):
    (tmp_path / "notes.txt").write_text("no strategy")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(slices, incomplete)
    shutil.rmtree(incomplete / "rank_2")
    for source, strategy, message in ((incomplete, STRATEGY, "no folder rank_2, but rank_3"),
                                      (slices, tmp_path / "notes.txt", "could not be merged with the strategy"),
                                      (slices, tmp_path / "absent", "could not be merged with the strategy")):
        with pytest.raises(UserError, match=message):
            ms_to_hf(str(source), config, tmp_path / "hf", src_strategy=str(strategy))
    assert not (tmp_path / "hf").exists()
    assert hidden(tmp_path) == []


def test_a_strategy_for_a_checkpoint_that_is_whole_is_refused(slices, config, tmp_path):
    with pytest.raises(UserError, match="has no folders rank_0, rank_1, ... of a sliced checkpoint"):
        ms_to_hf(str(slices.parent / "whole"), config, tmp_path / "hf", src_strategy=str(STRATEGY))
