"""The objectives in layouts of several devices, on none: MindSpore's parallel pass over the training step, as in
test_layouts.py, whose layouts train the default.

| test | proves | judged against |
| --- | --- | --- |
| test_every_operator_of_an_... | columns, comparisons, margins and centering are cut | the parallel pass |
"""
import numpy as np
import pytest
import yaml
from layouts import SMALLER, devices, train, write_yaml

from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter

pytestmark = [pytest.mark.stack, pytest.mark.process]

ALL = {"margin": "subtract", "centering": 0.01, "label_smoothing": 0.1}
# name: data parallel, model parallel, stages, flash attention, batching; the objective
CASES = {
    "listwise": ((4, 2, 1, True, "packing"), {"loss": "end_token", "answers": "listwise", **ALL}),
    "listwise, pipeline": ((2, 2, 2, True, "packing"), {"loss": "end_token", "answers": "listwise", **ALL}),
    "token_wise": ((4, 2, 1, True, "packing"), {**ALL, "margin": "scale"}),
    "token_wise, padded": ((4, 2, 1, True, "padded"), ALL),
    "end_token, padded": ((4, 2, 1, True, "padded"), {"loss": "end_token", **ALL, "margin": "scale"}),
    "end_token, padded, pipeline": ((2, 2, 2, True, "padded"), {"loss": "end_token", **ALL}),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """20 prompts of three answers, each of whose pairs has a margin."""
    path, random = tmp_path_factory.mktemp("records") / "train.mindrecord", np.random.default_rng(3)
    with RecordWriter(path) as writer:
        for prompt in range(20):
            common = random.integers(0, 900, 20)
            texts = [[*common, *random.integers(0, 900, random.integers(5, 20))] for _ in range(3)]
            for better, worse in ((0, 1), (0, 2), (1, 2)):
                writer.write(encode_pair(texts[better], texts[worse], SMALLER["seq_length"], SMALLER["pad_token_id"]), {
                    "margin": 0.5, "prompt_id": prompt, "chosen_answer": better, "rejected_answer": worse})
        writer.finish({"seq_length": SMALLER["seq_length"], "pad_token_id": SMALLER["pad_token_id"]})
    return path


@pytest.mark.parametrize("name", [name if name == "listwise" else pytest.param(name, marks=pytest.mark.long)
                                  for name in CASES])
def test_every_operator_of_an_objective_is_legal_in_a_layout(name, train, tmp_path):
    layout, objective = CASES[name]
    config = write_yaml(tmp_path / "run.yaml", *layout, only_save_strategy=True)
    mapping = yaml.safe_load(config.read_text(encoding="utf-8"))
    mapping["model"]["model_config"]["objective"] = objective
    config.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    for stage in range(layout[2]):
        code, output = train(config, 8 // layout[2] * stage, 8)
        assert code == 0, output[-3000:]
        assert "the strategy is" in output
