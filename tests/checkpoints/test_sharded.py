"""Checkpoints that are sliced over ranks, cut and merged by MindSpore's own functions.

tests/reference/strategy_data2_model2.ckpt was written by MindSpore's parallel pass on 4 ranks: the model of the
reference case "grouped" with data 2 x model 2 and the optimizer sharded. It holds how each parameter is cut, no values.
"""
import os
import shutil
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from conftest import LFS_POINTER, LFS_TEXT, REFERENCE, TINY_YAML, dimensions_of
from safetensors.numpy import load_file

from mindrlhf.checkpoints.find import TO_RESUME, newest_whole_slices
from mindrlhf.checkpoints.sharded import check_cut
from mindrlhf.config.check import load_config, typed_config
from mindrlhf.config.read import read_config
from mindrlhf.config.run_config import Start
from mindrlhf.errors import UserError
from mindrlhf.huggingface.convert import ms_to_hf
from mindrlhf.training.start_from import (
    StartingPoint,
    choose_starting_point,
    put_strategies_away,
    strategies_of_cutting,
)

pytestmark = pytest.mark.stack

STRATEGY = REFERENCE / "strategy_data2_model2.ckpt"


@pytest.fixture(scope="module")
def model(reference):
    mapping = read_config(TINY_YAML)
    mapping["model"]["model_config"].update(dimensions_of(reference))
    return typed_config("run.yaml", mapping).model


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
def test_slices_are_merged_bit_by_bit_before_the_export(slices, model, reference, tmp_path, as_folder):
    strategy = STRATEGY
    if as_folder:  # as MindFormers leaves them in output/strategy
        strategy = tmp_path / "strategy"
        strategy.mkdir()
        for rank in range(4):
            shutil.copy(STRATEGY, strategy / f"ckpt_strategy_rank_{rank}.ckpt")
    ms_to_hf(str(slices), model, tmp_path / "hf", src_strategy=str(strategy))
    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name[len("hf/"):]: value for name, value in reference.items() if name.startswith("hf/")}
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert hidden(tmp_path) == []


def test_slices_without_a_strategy_say_how_to_get_it(slices, model, tmp_path):
    with pytest.raises(UserError, match=r"sliced over 4 ranks \(transformer.embedding.embedding_weight of rank_0 is "
                                        r"\[16, 32\], the whole one \[64, 32\]\): give --src_strategy, the folder "
                                        r"output/strategy .*; without it, start the run once more with "
                                        r"only_save_strategy: True"):
        ms_to_hf(str(slices), model, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_slice_and_a_strategy_of_something_else_are_refused(slices, model, tmp_path):
    (tmp_path / "notes.txt").write_text("no strategy")
    (tmp_path / "pointer.ckpt").write_bytes(LFS_POINTER)
    incomplete = tmp_path / "incomplete"
    shutil.copytree(slices, incomplete)
    shutil.rmtree(incomplete / "rank_2")
    cut_off = tmp_path / "cut_off"
    shutil.copytree(slices, cut_off)
    shutil.rmtree(cut_off / "rank_3")
    for source, strategy, message in ((incomplete, STRATEGY, "no folder rank_2, but rank_3"),
                                      (cut_off, STRATEGY, "the strategy of 4 ranks, expected that of the 3 ranks"),
                                      (slices, tmp_path / "notes.txt", "notes.txt: not readable as the strategy"),
                                      (slices, tmp_path / "pointer.ckpt", LFS_TEXT),
                                      (slices, tmp_path / "absent", "absent: not readable as the strategy")):
        with pytest.raises(UserError, match=message):
            ms_to_hf(str(source), model, tmp_path / "hf", src_strategy=str(strategy))
    assert not (tmp_path / "hf").exists()
    assert hidden(tmp_path) == []


def test_a_strategy_for_a_checkpoint_that_is_whole_is_refused(slices, model, tmp_path):
    with pytest.raises(UserError, match="has no folders rank_0, rank_1, ... of a sliced checkpoint"):
        ms_to_hf(str(slices.parent / "whole"), model, tmp_path / "hf", src_strategy=str(STRATEGY))


@pytest.mark.parametrize("resume", [True, False])
def test_training_takes_the_last_whole_step_of_the_slices_whatever_the_times(tmp_path, resume):
    """Step 3 is damaged, step 1 is the newest by time and the one that meta.json names."""
    folder = tmp_path / "rank_0"
    folder.mkdir()
    (tmp_path / "rank_1").mkdir()
    for step in (1, 2, 3):
        file = folder / f"glm4-9b_rank_0-1_{step}.ckpt"
        ms.save_checkpoint([{"name": name, "data": ms.Tensor(step)}
                            for name in ("epoch_num", "step_num", "global_step")], str(file))
        file.chmod(0o600)
        os.utime(file, (10_000 - step, 10_000 - step))
    file.write_bytes(file.read_bytes()[:-1])
    (folder / "meta.json").write_text('{"last_epoch": 1, "last_step": 1, "last_ckpt_file": "glm4-9b_rank_0-1_1.ckpt"}')
    config, said = load_config(TINY_YAML), []
    config = replace(config, start=Start(str(tmp_path), resume, reshard=False, strategy=None),
                     layout=replace(config.layout, semi_auto=True))
    start = choose_starting_point(config, 0, 1, said.append)
    assert len(said) == 1
    second = folder / "glm4-9b_rank_0-1_2.ckpt"
    assert start == StartingPoint(second, str(second), second if resume else None, slices=True)


def write_step(folder, rank, run, step):
    file = folder / f"rank_{rank}" / f"glm4_rank_{rank}{run}-1_{step}.ckpt"
    file.parent.mkdir(exist_ok=True)
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(step)} for name in TO_RESUME], str(file))
    file.chmod(0o600)
    return file


def test_slices_are_of_the_last_step_that_all_ranks_have_whole(tmp_path):
    """Rank 1 has no step 4; the second run has step 3 of both ranks, rank 1's is damaged."""
    for rank in (0, 1):
        for run, step in (("", 1), ("", 9), ("_1", 2), ("_1", 3)):
            damaged = write_step(tmp_path, rank, run, step)
    write_step(tmp_path, 0, "_1", 4)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = []
    slices = newest_whole_slices(tmp_path, "load_checkpoint", said.append, TO_RESUME)
    assert {rank: file.name for rank, file in slices.items()} == {0: "glm4_rank_0_1-1_2.ckpt",
                                                                  1: "glm4_rank_1_1-1_2.ckpt"}
    assert len(said) == 1
    assert said[0].startswith(f"{damaged}: ")
    with pytest.raises(UserError, match=str(damaged)):
        newest_whole_slices(tmp_path, "input")


def test_slices_that_share_no_step_are_refused(tmp_path):
    for rank in (0, 1):
        write_step(tmp_path, rank, "", rank)
    with pytest.raises(UserError, match="no step that all 2 ranks have a checkpoint of"):
        newest_whole_slices(tmp_path, "load_checkpoint")


def test_one_process_starts_from_slices_that_are_merged_for_it(slices, reference, tmp_path):
    config = replace(load_config(TINY_YAML), output=tmp_path / "output",
                     start=Start(str(slices), resume=False, reshard=True, strategy=str(STRATEGY)))
    start = choose_starting_point(config, 0, 1, pytest.fail)
    assert not start.slices
    assert not start.to_cut
    assert start.resumed is None
    found = {name: value.asnumpy() for name, value in ms.load_checkpoint(str(start.checkpoint)).items()}
    expected = {name[len("weight/"):]: value for name, value in reference.items() if name.startswith("weight/")}
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())


def test_cutting_anew_removes_nothing_that_others_have_left(slices, tmp_path):
    """Also where MindFormers itself would: slices in two folders of its own names, and their strategy in the third."""
    output = tmp_path / "output"
    for name in ("load_checkpoint", "transformed_checkpoint"):
        shutil.copytree(slices, output / name)
    (output / "strategy").mkdir()
    shutil.copy(STRATEGY, output / "strategy" / "ckpt_strategy_rank_0.ckpt")
    (tmp_path / "notes.txt").write_text("no strategy")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    strategy = str(output / "strategy" / "ckpt_strategy_rank_0.ckpt")
    for name, given, semi_auto in (("load_checkpoint", tmp_path / "notes.txt", False),
                                   ("load_checkpoint", strategy, True), ("transformed_checkpoint", strategy, False)):
        config = load_config(TINY_YAML)
        config = replace(config, output=output, layout=replace(config.layout, semi_auto=semi_auto),
                         start=Start(str(output / name), resume=False, reshard=True, strategy=str(given)))
        if given != strategy:
            with pytest.raises(UserError, match="not readable as the strategy"):
                choose_starting_point(config, 0, 1, pytest.fail)
        else:
            assert choose_starting_point(config, 0, 1, pytest.fail).to_cut == semi_auto
        assert before.items() <= {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}.items()


def test_the_strategies_of_a_new_layout_take_their_place_when_the_checkpoint_is_loaded(tmp_path):
    """Those of the layout before stay, for the slices that were cut with them."""
    place = tmp_path / "strategy"
    for content in ("one", "two", "three"):
        strategies_of_cutting(tmp_path).mkdir(parents=True)
        (strategies_of_cutting(tmp_path) / "ckpt_strategy_rank_0.ckpt").write_text(content)
        (tmp_path / ".resharding" / "cut").mkdir()
        put_strategies_away(tmp_path, place, 0, 1)
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.ckpt")}
    assert found == {f"{folder}/ckpt_strategy_rank_0.ckpt": content for folder, content in (
        ("strategy_before_1", "one"), ("strategy_before_2", "two"), ("strategy", "three"))}
    assert hidden(tmp_path) == []


def test_a_checkpoint_in_the_folder_that_cutting_empties_is_refused(slices, tmp_path):
    shutil.copytree(slices, tmp_path / ".resharding" / "slices")
    (tmp_path / "link").symlink_to(tmp_path / ".resharding" / "slices")
    for path in (tmp_path / ".resharding" / "slices", tmp_path / "link"):
        config = replace(load_config(TINY_YAML), output=tmp_path,
                         start=Start(str(path), resume=False, reshard=True, strategy=str(STRATEGY)))
        with pytest.raises(UserError, match=r"--load_checkpoint: .*: in the folder .*\.resharding, which every run "):
            choose_starting_point(config, 0, 1, pytest.fail)
    assert len(list((tmp_path / ".resharding" / "slices").rglob("*.ckpt"))) == 4


def test_weights_that_a_layout_has_emptied_are_named():
    """As MindSpore 2.5 did: shapes are right, and the cut weights are zero."""
    whole = {"a": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b": np.arange(6.0, dtype=np.float32),
             "large": np.random.default_rng(1).standard_normal((256, 96), np.float32)}
    good = {"a": whole["a"][4:, :4], "b": whole["b"], "large": whole["large"][64:128].astype(np.float16)}
    check_cut(whole, {**good, "step_metrics.value": np.zeros(6)})
    for name, cut in (("a", np.zeros((4, 4), np.float32)), ("a", whole["a"][1:5, :4]), ("b", np.zeros(6, np.float32)),
                      ("large", np.zeros((64, 96), np.float32)), ("b", whole["b"][:4])):
        with pytest.raises(UserError, match=rf"1 of 3 weights are no longer what was loaded, .* the layout: {name};"):
            check_cut(whole, {**good, name: cut})
