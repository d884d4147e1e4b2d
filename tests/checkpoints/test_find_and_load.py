"""Checkpoints: which file counts, and that a network gets all of its weights or none.

| test                                          | proves                                                          |
| test_checkpoints_are_ordered_by_step ...      | order by epoch and step, whatever the files' times say          |
| test_training_starts ..., test_all_ranks ...  | the last step that is whole, on all ranks                       |
| test_a_damaged_checkpoint ...                 | no byte can be missing, none be wrong                           |
| test_a_base_checkpoint_fits_by_name           | MindFormers' ChatGLM2 checkpoint loads, its LM head is no fault |
| test_a_file_of_an_earlier_release ...         | how the data was made, and that it was read beside the file     |
| test_the_newest_is_that_ ..., test_behind ... | what a run went back from is not newer, on any rank             |
| test_missing / test_another_shape ...         | nothing is loaded, and the message has names and both shapes    |
| test_weights_that_are_nan_or_infinite ...     | the same for values that no score survives                      |
"""
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import dimensions_of
from helpers import write_anew
from mindformers.models.glm2.glm2 import ChatGLM2ForConditionalGeneration
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindspore import Parameter, Tensor

from mindrlhf.checkpoints.find import (
    list_checkpoints,
    newest_whole_checkpoint,
    newest_whole_slices,
    of_current_branch,
)
from mindrlhf.checkpoints.load import load_strictly, read_checkpoint
from mindrlhf.checkpoints.training_notes import read_training_notes, write_data_settings
from mindrlhf.errors import UserError
from mindrlhf.weights.ckpt_file import notes_as_bytes

pytestmark = pytest.mark.stack

RESUMABLE = ("a", "step_num", "epoch_num", "global_step")
CACHES = [f"transformer.encoder.layers.{layer}.self_attention.infer_attention.paged_attention_mgr.{kind}_cache"
          for layer in range(2) for kind in ("key", "value")]


def touch(folder, *names):
    """Empty files, the first one the newest."""
    folder.mkdir(parents=True, exist_ok=True)
    for age, name in enumerate(names):
        (folder / name).touch()
        os.utime(folder / name, (10_000 - age, 10_000 - age))


def names_of(paths):
    return [path.name for path in paths]


def test_checkpoints_are_ordered_by_step_not_by_time_or_name(tmp_path):
    touch(tmp_path / "rank_0", "glm_rank_0-1_10.ckpt", "glm_rank_0-1_9.ckpt", "glm_rank_0-2_1.ckpt",
          "glm_rank_0-10_1.ckpt", "meta.json")
    assert names_of(list_checkpoints(tmp_path, 0)) == ["glm_rank_0-1_9.ckpt", "glm_rank_0-1_10.ckpt",
                                                       "glm_rank_0-2_1.ckpt", "glm_rank_0-10_1.ckpt"]


def test_each_rank_finds_its_own_folder(tmp_path):
    touch(tmp_path / "rank_0", "a_rank_0-network.ckpt")
    touch(tmp_path / "rank_1", "a_rank_1-network.ckpt")
    assert names_of(list_checkpoints(tmp_path, 1)) == ["a_rank_1-network.ckpt"]


def test_a_file_and_a_rank_folder_are_taken_as_they_are(tmp_path):
    touch(tmp_path / "rank_0", "a-1_1.ckpt")
    assert names_of(list_checkpoints(tmp_path / "rank_0" / "a-1_1.ckpt", 3)) == ["a-1_1.ckpt"]
    assert names_of(list_checkpoints(tmp_path / "rank_0", 0)) == ["a-1_1.ckpt"]


@pytest.mark.parametrize(("make", "rank", "message"), [
    (lambda folder: touch(folder / "rank_0", "a-1_1.ckpt"), 2, "no folder rank_2 for this process, found rank_0"),
    (lambda folder: touch(folder / "rank_0"), 0, "rank_0: no checkpoint in it, expected names that end in .ckpt"),
    (lambda folder: touch(folder, "notes.txt"), 0, "no checkpoint in it"),
], ids=("other rank", "empty rank", "other files"))
def test_a_folder_without_a_checkpoint_for_this_rank_is_refused(tmp_path, make, rank, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        list_checkpoints(tmp_path, rank)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="--distributed_ckpt_path: .*absent: no such file or folder"):
        list_checkpoints(tmp_path / "absent", 0)
    touch(tmp_path, "weights.bin")
    with pytest.raises(UserError, match="found a .bin file, expected .ckpt"):
        list_checkpoints(tmp_path / "weights.bin", 0)


def start_from(path, rank=0, resume=False, **keys):
    """(the checkpoint that training starts from, what was said of those that were skipped)."""
    passed_over = []
    return newest_whole_checkpoint(path, rank, resume, passed_over.append, **keys), passed_over


def save(path, *names, crc_check=True):
    """A checkpoint by MindSpore with parameters of these names, each full of its place in the list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ms.save_checkpoint([{"name": name, "data": Tensor(np.full(3, place, np.float32))}
                        for place, name in enumerate(names)], str(path), crc_check=crc_check)
    path.chmod(0o600)
    return path


def test_training_starts_from_the_last_step_of_the_last_run_whatever_the_times(tmp_path):
    last = save(tmp_path / "rank_0" / "a_rank_0_1-1_10.ckpt", "a")
    for name in ("a_rank_0_1-1_9.ckpt", "a_rank_0-2_3.ckpt"):
        save(tmp_path / "rank_0" / name, "a")
    os.utime(last, (10_000, 10_000))
    assert start_from(tmp_path) == (last, [])


@pytest.mark.parametrize("checksum", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, checksum):
    """Cut short at any byte; with a checksum, also with any bit turned over."""
    good, bad = save(tmp_path / "a-1_1.ckpt", *RESUMABLE), tmp_path / "a-1_2.ckpt"
    content = save(bad, *RESUMABLE, crc_check=checksum).read_bytes()
    damaged = [content[:size] for size in range(len(content))]
    if checksum:
        del damaged[len(content) - 17]  # without its checksum alone, all of the content is there
        damaged += [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:]
                    for at in range(len(content) - 17)]
    for content in damaged:
        write_anew(bad, content)
        found, (said,) = start_from(tmp_path, resume=True)
        assert found == good
        assert said.startswith(f"{bad}: ")


def test_a_checkpoint_without_the_state_of_its_run_is_not_resumed(tmp_path):
    save(tmp_path / "a-1_1.ckpt", "a", "epoch_num", "step_num")
    with pytest.raises(UserError, match=r"a-1_1\.ckpt: global_step missing: cut short, or not a checkpoint to resume"):
        start_from(tmp_path, resume=True)
    assert start_from(tmp_path)[0].name == "a-1_1.ckpt"


def start_together(folder, ranks):
    """The names of the checkpoints that so many ranks start from, each in a thread of its own."""
    barrier, shared = threading.Barrier(ranks, timeout=120), {}

    def start(rank):
        def gather(step):
            shared[rank] = step
            barrier.wait()
            found = [shared[each] for each in range(ranks)]
            barrier.wait()
            return found

        return start_from(folder, rank, resume=True, gather=gather)[0].name

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(start, range(ranks)))


def test_all_ranks_start_from_the_last_step_that_is_whole_on_each(tmp_path):
    """Rank 0 lacks step 3, rank 1 has it and step 2 damaged, rank 2 has all: step 1."""
    for rank in range(3):
        for step in (1, 2, 3):
            save(tmp_path / f"rank_{rank}" / f"a_rank_{rank}-1_{step}.ckpt", *RESUMABLE)
    (tmp_path / "rank_0" / "a_rank_0-1_3.ckpt").unlink()
    (tmp_path / "rank_1" / "a_rank_1-1_2.ckpt").write_bytes(b"")
    assert start_together(tmp_path, 3) == [f"a_rank_{rank}-1_1.ckpt" for rank in range(3)]


def test_ranks_without_a_common_step_are_refused(tmp_path):
    save(tmp_path / "a-1_1.ckpt", "a")
    with pytest.raises(UserError, match="no step whose checkpoint is complete on all 2 ranks"):
        start_from(tmp_path, gather=lambda step: [step, (-1, -1, -1)])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x0a\x10" + bytes(range(200))],
                         ids=("empty", "text", "bytes"))
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt: not readable as a checkpoint"):
        read_checkpoint(path)


@pytest.fixture
def network(build_model):
    return build_model().set_train(False)


def parameters_of(network):
    """Name -> new Parameter with other values."""
    return {parameter.name: Parameter(Tensor(np.full(parameter.shape, 0.5, np.float32)), name=parameter.name)
            for parameter in network.get_parameters()}


def test_everything_is_loaded_and_counted(network):
    values = parameters_of(network)
    report = load_strictly(network, values, "a.ckpt", need_head=True)
    assert report.loaded == len(values)
    assert report.as_text() == f"loaded {len(values)} parameters from a.ckpt"
    assert all((parameter.asnumpy() == 0.5).all() for parameter in network.get_parameters())


def test_a_base_checkpoint_fits_by_name_and_its_lm_head_is_no_fault(network, reference, tmp_path):
    base = ChatGLM2ForConditionalGeneration(ChatGLM2Config(**dimensions_of(reference)))
    ms.save_checkpoint(base, str(tmp_path / "base.ckpt"))
    report = load_strictly(network, read_checkpoint(tmp_path / "base.ckpt"), "base.ckpt", need_head=False)
    assert report.fresh == ("v_head0.weight",)
    assert report.left_over == ()
    weights = {parameter.name: parameter for parameter in base.get_parameters()
               if ".infer_attention." not in parameter.name}
    del weights["transformer.output_layer.weight"]
    assert report.loaded == len(weights) == 16
    assert "freshly initialised: v_head0.weight" in report.as_text()
    loaded = {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}
    for name, parameter in weights.items():
        np.testing.assert_array_equal(loaded[name], parameter.asnumpy())


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_caches_for_inference_in_a_checkpoint_are_no_fault(network, tmp_path, prefix):
    """MindFormers saves them with each layer since 1.6; here in half precision, as they are with its defaults."""
    values = {name.replace("transformer.", prefix): value for name, value in parameters_of(network).items()}
    for cache in CACHES:
        values[cache.replace("transformer.", prefix)] = Tensor(np.full((4, 16, 2, 8), 9, np.float16))
    ms.save_checkpoint([{"name": name, "data": value} for name, value in values.items()], str(tmp_path / "base.ckpt"))
    report = load_strictly(network, read_checkpoint(tmp_path / "base.ckpt"), "base.ckpt", need_head=True)
    assert report.as_text() == f"loaded {len(values) - len(CACHES)} parameters from base.ckpt"
    assert all((parameter.asnumpy() == 0.5).all() for parameter in network.get_parameters())


@pytest.mark.parametrize("name", ["infer_attention.query.weight", "infer_attention.paged_attention_mgr.key_cache.extra",
                                  "paged_attention_mgr.key_cache"])
def test_other_parts_of_an_attention_are_a_fault(network, name):
    values = parameters_of(network)
    values[f"transformer.encoder.layers.0.self_attention.{name}"] = Parameter(Tensor([1.0]))
    with pytest.raises(UserError, match=f"1 weights in it have no place in the model .*{name}"):
        load_strictly(network, values, "a.ckpt", need_head=True)


def test_a_checkpoint_without_value_head_cannot_be_scored_with(network):
    values = parameters_of(network)
    del values["v_head0.weight"]
    with pytest.raises(UserError, match="1 of the network's 18 parameters are not in this checkpoint: v_head0.weight"
                       .replace("18", str(len(values) + 1))):
        load_strictly(network, values, "a.ckpt", need_head=True)


def test_missing_backbone_parameters_are_an_error_and_nothing_is_loaded(network):
    before = {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}
    values = {name.replace("transformer.", "model."): value for name, value in parameters_of(network).items()}
    with pytest.raises(UserError, match=r"a\.ckpt: \d+ of the network's \d+ parameters are not in this checkpoint: "
                                        r"transformer\.embedding\.embedding_weight.* it has model\.embedding"):
        load_strictly(network, values, "a.ckpt", need_head=False)
    for parameter in network.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


def test_a_checkpoint_of_the_original_example_without_prefix_is_loaded(network):
    values = {name.replace("transformer.", ""): value for name, value in parameters_of(network).items()}
    assert "embedding.embedding_weight" in values
    report = load_strictly(network, values, "a.ckpt", need_head=True)
    assert report.loaded == len(values)
    assert report.left_over == ()
    assert all((parameter.asnumpy() == 0.5).all() for parameter in network.get_parameters())


def test_another_shape_is_an_error_with_the_parameter_and_both_shapes(network):
    values = parameters_of(network)
    values["transformer.encoder.final_layernorm.weight"] = Parameter(Tensor(np.ones(64, np.float32)))
    with pytest.raises(UserError, match=r"final_layernorm\.weight: checkpoint \(64,\), network \(32,\)"):
        load_strictly(network, values, "a.ckpt", need_head=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16], ids=str)
def test_weights_that_are_nan_or_infinite_are_refused_by_name(network, dtype, value):
    before = {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}
    values = parameters_of(network)
    for name in ("v_head0.weight", "transformer.encoder.final_layernorm.weight"):
        array = values[name].asnumpy().copy()
        array.flat[-1] = value
        values[name] = Parameter(Tensor(array).astype(dtype), name=name)
    values["step_metrics.value"] = Parameter(Tensor([value], ms.float32), name="step_metrics.value")  # is not loaded
    with pytest.raises(UserError) as caught:
        load_strictly(network, values, "a.ckpt", need_head=True)
    assert str(caught.value) == (
        f"a.ckpt: NaN or infinity in 2 of the {len(values) - 1} parameters to load, expected finite values: "
        "transformer.encoder.final_layernorm.weight, v_head0.weight")
    for parameter in network.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


def test_what_is_left_over_is_reported_but_optimizer_state_is_expected(network):
    values = parameters_of(network)
    for name in ("adam_m.v_head0.weight", "global_step", "epoch_num", "loss_scale", "lora.extra.weight"):
        values[name] = Parameter(Tensor([1.0]), name=name)
    assert load_strictly(network, values, "a.ckpt", need_head=True).left_over == ("lora.extra.weight",)


def test_more_layers_than_the_network_has_are_an_error(network):
    """A model cut in two would score, and nobody would notice."""
    values = parameters_of(network)
    values["transformer.encoder.layers.2.mlp.dense_4h_to_h.weight"] = Parameter(Tensor([1.0]))
    with pytest.raises(UserError, match=r"1 weights in it have no place in the model .*layers\.2\.mlp"):
        load_strictly(network, values, "a.ckpt", need_head=True)


def test_a_file_of_an_earlier_release_takes_its_notes_from_beside_it_with_a_warning(tmp_path):
    settings = {"prompt_template": "{prompt}{response}"}
    folder = tmp_path / "checkpoint_network"
    first, second = (save(folder / "rank_0" / f"a_rank_0{run}-network.ckpt", "a") for run in ("", "_1"))
    write_data_settings(folder, settings)
    write_data_settings(folder, {"prompt_template": "other"}, number=1)
    for path, file in ((folder, second), (folder / "rank_0", second), (first, first)):
        name = "data_settings_1.json" if file == second else "data_settings.json"
        notes = read_training_notes(path)
        assert (notes.place, notes.number) == (folder / name, int(file == second))
        assert notes.values == (settings if file == first else {"prompt_template": "other"})
        assert notes.doubt.startswith(f"{file}: no notes of its training in it, as in files of earlier releases; those "
                                      f"of {folder / name} are taken")
    (tmp_path / "elsewhere" / "of" / "all").mkdir(parents=True)
    copy = Path(shutil.copy(first, tmp_path / "elsewhere" / "of" / "all" / "rm.ckpt"))
    notes = read_training_notes(copy)
    assert (notes.place, notes.values) == (None, {})
    assert "no data_settings.json beside it: whether template, tokenizer and YAML" in notes.doubt


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff"])
def test_notes_that_are_no_notes_are_named(tmp_path, content):
    ms.save_checkpoint([{"name": "a", "data": Tensor([1.0])},
                        {"name": "training_notes", "data": Tensor(np.frombuffer(content, np.uint8))}],
                       str(tmp_path / "a.ckpt"))
    with pytest.raises(UserError, match=r"a\.ckpt: damaged: its training_notes, \d bytes, are no JSON object"):
        read_training_notes(tmp_path / "a.ckpt")


# --- branches -------------------------------------------------------------------------------------------------------

def save_branch(folder, name, branch, step, *left, run=0, **others):
    """A checkpoint to resume from, with the notes of a run's branch."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = {"run": {"number": run, "identity": "ab", "branch": branch, "left": list(left), "step": step}, **others}
    path = folder / name
    values = {**{known: [0.0] for known in RESUMABLE}, "training_notes": np.frombuffer(notes_as_bytes(notes), np.uint8)}
    ms.save_checkpoint([{"name": known, "data": Tensor(value)} for known, value in values.items()], str(path),
                       crc_check=True)
    path.chmod(0o600)
    return path


def rolled_back(folder):
    """Epochs of 10 steps: to 13, back to 3, to 5 and 7, back to 5, to 6: {name: path}."""
    return {name: save_branch(folder, f"a_rank_0-{name}.ckpt", *where) for name, where in {
        "1_3": (0, 3), "2_3": (0, 13), "1_5": (1, 5, (0, 3)), "1_7": (1, 7, (0, 3)),
        "1_6": (2, 6, (0, 3), (1, 5))}.items()}


def test_the_newest_is_that_of_the_current_branch_after_several_rollbacks(tmp_path):
    saved = rolled_back(tmp_path)
    assert list_checkpoints(tmp_path, 0) == [saved[name] for name in ("2_3", "1_7", "1_3", "1_5", "1_6")]
    assert of_current_branch(list_checkpoints(tmp_path, 0)) == [saved[name] for name in ("1_3", "1_5", "1_6")]
    assert start_from(tmp_path, resume=True) == (saved["1_6"], [])


def test_behind_a_damaged_checkpoint_comes_the_one_before_it_on_its_branch(tmp_path):
    saved = rolled_back(tmp_path)
    content = saved["1_6"].read_bytes()
    saved["1_6"].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found, (said,) = start_from(tmp_path, resume=True)
    assert found == saved["1_5"]
    assert said.startswith(str(saved["1_6"]))


def test_a_branch_is_the_current_one_before_it_has_a_file_that_can_be_read(tmp_path):
    """The file beside the checkpoints says so: the first one is cut short, or the run was killed before it."""
    saved = rolled_back(tmp_path / "rank_0")
    settings = {"run": {"number": 0, "identity": "ab", "branch": 2, "left": [[0, 3], [1, 5]]}}
    write_data_settings(tmp_path, settings)
    saved["1_6"].write_bytes(saved["1_6"].read_bytes()[:-50])
    found, (said,) = start_from(tmp_path, resume=True)
    assert found == saved["1_5"]
    assert said.startswith(str(saved["1_6"]))
    saved["1_6"].unlink()
    assert start_from(tmp_path, resume=True) == (saved["1_5"], [])


def test_steps_are_counted_over_the_run_whether_names_count_in_epochs_or_in_sink_mode(tmp_path):
    """Nine steps with data sinking, `-<step>_1`, then epochs of four without; without notes, as in files of earlier
    releases, by their `step_num`.
    """
    steps = {"1_1": 1, "2_1": 2, "9_1": 9, "3_2": 10, "3_3": 11}
    (tmp_path / "old").mkdir()
    for name, step in steps.items():
        save_branch(tmp_path / "new", f"a-{name}.ckpt", 0, step)
        ms.save_checkpoint([{"name": "step_num", "data": Tensor(step)}], str(tmp_path / "old" / f"a-{name}.ckpt"))
    for folder in ("new", "old"):
        assert names_of(list_checkpoints(tmp_path / folder, 0)) == [f"a-{name}.ckpt" for name in steps]


def test_ranks_start_from_no_mixture_of_branches(tmp_path):
    """Killed while rank 0 had written step 13 of the new branch and rank 1 still had that of the one that was left."""
    for rank in (0, 1):
        for name, step in (("1_3", 3), ("1_8", 8), ("2_3", 13)):
            save_branch(tmp_path / f"rank_{rank}", f"a_rank_{rank}-{name}.ckpt", 0, step)
    save_branch(tmp_path / "rank_0", "a_rank_0-2_3.ckpt", 1, 13, (0, 3))
    assert start_together(tmp_path, 2) == [f"a_rank_{rank}-1_3.ckpt" for rank in range(2)]
    found = newest_whole_slices(tmp_path, "load_checkpoint")
    assert {rank: file.name for rank, file in found.items()} == {rank: f"a_rank_{rank}-1_3.ckpt" for rank in range(2)}


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16], ids=str)
def test_a_half_precision_checkpoint_is_widened_to_the_networks_type(network, dtype):
    values = {name: Parameter(value.astype(dtype), name=name) for name, value in parameters_of(network).items()}
    load_strictly(network, values, "a.ckpt", need_head=True)
    for parameter in network.get_parameters():
        assert parameter.dtype == ms.float32
        assert (parameter.asnumpy() == 0.5).all()


@pytest.mark.parametrize("folder", ["shards", "shards/rank_0"])
def test_numbered_shards_are_one_checkpoint(tmp_path, folder):
    """The folder stands for it: all of its files are read, and MindFormers is given the folder."""
    place = tmp_path / folder
    save(place / "model-00001-of-00002.ckpt", "a", "b")
    save(place / "model-00002-of-00002.ckpt", "c", "d")
    assert list_checkpoints(tmp_path / "shards", 0) == [place]
    assert start_from(tmp_path / "shards") == (place, [])
    found = read_checkpoint(place)
    assert {name: value.asnumpy().tolist() for name, value in found.items()} == {
        "a": [0, 0, 0], "b": [1, 1, 1], "c": [0, 0, 0], "d": [1, 1, 1]}


@pytest.mark.parametrize(("present", "absent"), [(1, 2), (2, 1)])
def test_a_missing_shard_is_named(tmp_path, present, absent):
    save(tmp_path / f"model-{present:05d}-of-00002.ckpt", "a")
    for function in (list_checkpoints, start_from):
        with pytest.raises(UserError) as caught:
            function(tmp_path, 0)
        assert str(caught.value) == f"{tmp_path}: model-{absent:05d}-of-00002.ckpt is missing"


def test_a_damaged_shard_is_named(tmp_path):
    save(tmp_path / "model-00001-of-00002.ckpt", "a")
    (tmp_path / "model-00002-of-00002.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.ckpt: not readable as a checkpoint"):
        read_checkpoint(tmp_path)


def test_files_without_steps_that_share_no_parameter_are_one_model(tmp_path):
    save(tmp_path / "embedding.ckpt", "a")
    save(tmp_path / "layers.ckpt", "b", "c")
    assert list_checkpoints(tmp_path, 0) == [tmp_path]
    assert start_from(tmp_path) == (tmp_path, [])
    assert set(read_checkpoint(tmp_path)) == {"a", "b", "c"}


def test_files_without_steps_that_share_parameters_are_separate_and_the_last_by_name_counts(tmp_path):
    """A run leaves the second one beside an earlier run's."""
    last = save(tmp_path / "rank_0" / "x_rank_0_1-network.ckpt", "a", "b")
    first = save(tmp_path / "rank_0" / "x_rank_0-network.ckpt", "b", "a")
    os.utime(last, (10_000, 10_000))
    assert list_checkpoints(tmp_path, 0) == [first, last]
    assert start_from(tmp_path) == (last, [])
    assert read_checkpoint(last)["b"].asnumpy().tolist() == [1, 1, 1]


def test_files_with_steps_are_separate_even_if_they_share_no_parameter(tmp_path):
    save(tmp_path / "x-1_1.ckpt", "a")
    save(tmp_path / "x-1_2.ckpt", "b")
    assert names_of(list_checkpoints(tmp_path, 0)) == ["x-1_1.ckpt", "x-1_2.ckpt"]


@pytest.mark.parametrize("names", [
    ("model-00001-of-00002.ckpt", "model-00002-of-00002.ckpt", "other.ckpt"),
    ("model-00001-of-00002.ckpt", "other-00002-of-00002.ckpt")], ids=["a file beside them", "shards of two models"])
def test_shards_are_not_mixed_with_the_parameters_of_another_model(tmp_path, names):
    for place, name in enumerate(names):
        save(tmp_path / name, "a", *(["b"] if place else []))
    with pytest.raises(UserError, match="other"):
        read_checkpoint(list_checkpoints(tmp_path, 0)[-1])
