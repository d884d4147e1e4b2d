"""A run that MindFormers 1.3.0 began is gone on with, and its checkpoint evaluated, by whichever release is installed.

The files in reference/run_of_1_3 are that release's, with MindSpore 2.5.0.dev20250119: the YAML, the checkpoint of a
step of the second epoch, how the data was made, and the figures of all later steps. See reference/make_run_of_1_3.py.

| test                              | proves                                        | judged against                   |
| test_the_run_goes_on_...          | counters, weights, moments, order of pairs    | the other release's own figures  |
| test_its_checkpoint_evaluates_... | weights, data, scores                         | likewise                         |
"""
import json
import shutil

import pytest
from conftest import REFERENCE
from reference.make_run_of_1_3 import convert, evaluate, figures, run

pytestmark = [pytest.mark.stack, pytest.mark.process]

RUN = REFERENCE / "run_of_1_3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the data is, and the run's files are as if it had been trained here."""
    folder = tmp_path_factory.mktemp("run")
    convert(folder)
    ranks = folder / "output" / "checkpoint" / "rank_0"
    ranks.mkdir(parents=True)
    shutil.copy(RUN / "glm4_tiny_rank_0-2_5.ckpt", ranks)
    shutil.copy(RUN / "data_settings.json", ranks.parent)
    return folder


@pytest.fixture(scope="module")
def expected():
    return json.loads((RUN / "figures.json").read_text(encoding="utf-8"))


@pytest.mark.long
def test_its_checkpoint_evaluates_to_the_same_figures(folder, expected):
    found = evaluate(folder, str(RUN / "run.yaml"), "output/checkpoint/rank_0/glm4_tiny_rank_0-2_5.ckpt")
    assert found == expected["evaluation"]


def test_the_run_goes_on_as_if_it_had_stayed(folder, expected):
    run(folder, "reward_train.py", "--config", str(RUN / "run.yaml"), "--train_dataset", "train.mindrecord",
        "--load_checkpoint", "output/checkpoint", "--resume", "True")
    found = figures(folder / "output" / "metrics.csv")
    assert found.keys() == expected["steps"].keys()
    for step, row in expected["steps"].items():
        assert found[step] == pytest.approx(row, rel=1e-4, abs=1e-5), step
