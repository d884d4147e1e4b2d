"""Scoring on two processes, as the launcher starts them: all of them agree whatever happens.

| test                                      | proves                                             | judged against      |
| test_two_processes_agree_on_what_is_wrong | --resume: the same bytes; a damaged checkpoint has | a run at once, the  |
|                                           | its reason; NaN texts are null, others keep scores | undamaged model     |
"""
import json

import mindspore as ms
import numpy as np
import pytest
from conftest import EXAMPLE, SAMPLE, write_numbered_pairs
from helpers import launch, write_tiny_yaml

from mindrlhf.config.check import load_config
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.models.glm4.dimensions import backbone_weights, head_weights

pytestmark = [pytest.mark.stack, pytest.mark.process]

NAN = "\x7f"  # the text of the token whose embedding is NaN
JOB = """
import json, sys
import numpy as np
sys.path.insert(0, {example!r})
import reward_eval, reward_infer
from mindrlhf.errors import UserError
from mindrlhf.models import row_scores
from mindrlhf.scoring import scorer
from mindrlhf.scoring.evaluate import evaluate
from mindrlhf.scoring.infer import infer
from mindrlhf.scoring.plan import plan_evaluation, plan_inference

row_scores._WINDOW = 8
build, load, score_window = scorer.Scorer._build, scorer.Scorer.load, scorer.Scorer._score_window
run, built = dict(spoilt=True, windows=99), dict()

def build_once(self):  # and so compile once
    if not built:
        build(self)
        built.update(network=self.network, _model=self._model, _laid_out=False)
    vars(self).update(built)

def load_spoilt(self, checkpoint):
    load(self, checkpoint)
    if run["spoilt"]:
        for parameter in self.network.get_parameters():
            if "embedding" in parameter.name:
                values = parameter.asnumpy().copy()
                values[{token}] = np.nan
                parameter.set_data(type(parameter)(values))

def score_some(self, groups):
    run["windows"] -= 1
    if run["windows"] < 0:
        raise KeyboardInterrupt
    return score_window(self, groups)

scorer.Scorer._build, scorer.Scorer.load, scorer.Scorer._score_window = build_once, load_spoilt, score_some

def outcome(work, **changed):
    run.update(changed)
    try:
        work()
    except (UserError, KeyboardInterrupt) as error:
        return [getattr(error, "code", 130), str(error)]
    return [0, ""]

def score(name, *flags):
    infer(plan_inference(reward_infer.parse_args([
        "--config", "run.yaml", "--tokenizer", {tokenizer!r},
        "--distributed_ckpt_path", "list/rank_0/rm_rank_0-1_1.ckpt", "--data_file", "in.jsonl",
        "--output_file", name, *flags])))

def compare():
    evaluate(plan_evaluation(reward_eval.parse_args([
        "--config", "run.yaml", "--eval_dataset", "pairs.mindrecord", "--distributed_ckpt_path", "list",
        "--load_all_ckpt", "True"])))

found = dict(
    at_once=outcome(lambda: score("at_once.jsonl")),
    cut_short=outcome(lambda: score("out.jsonl"), windows=2),
    resumed=outcome(lambda: score("out.jsonl", "--resume"), windows=99),
    undamaged=outcome(lambda: score("undamaged.jsonl"), spoilt=False),
    evaluated=outcome(compare))
from mindformers.tools.utils import get_real_rank
with open(f"found_{{get_real_rank()}}.json", "w") as file:
    json.dump(found, file)
"""


def save_list(folder):
    """Three checkpoints of a run with random weights, the second of which is cut short."""
    size = load_config(folder / "run.yaml").model.dimensions
    random = np.random.default_rng(0)
    (folder / "list" / "rank_0").mkdir(parents=True)
    for step in (1, 2, 3):
        path = folder / "list" / "rank_0" / f"rm_rank_0-1_{step}.ckpt"
        ms.save_checkpoint([{"name": weight.name, "data": ms.Tensor(random.normal(0, 0.1, weight.shape), ms.float32)}
                            for weight in (*backbone_weights(size), *head_weights(size))], str(path))
        if step == 2:
            path.write_bytes(path.read_bytes()[:100_000])


def test_two_processes_agree_on_what_is_wrong(in_tmp_path):
    config = load_config(write_tiny_yaml(in_tmp_path / "run.yaml", 2))
    save_list(in_tmp_path)
    write_numbered_pairs(in_tmp_path / "pairs.mindrecord", 8, config.model.seq_length, config.model.pad_token_id)
    rows = [json.loads(line) for line in (SAMPLE / "test.jsonl").read_text(encoding="utf-8").splitlines()[:24]]
    nan = {(3, "pos_resp"), (19, "pos_resp"), (19, "neg_resp")}
    for number, name in nan:
        rows[number][name] += NAN
    (in_tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (token,), = open_tokenizer(SAMPLE / "tokenizer.model").encode_batch([NAN])
    (in_tmp_path / "job.py").write_text(JOB.format(example=str(EXAMPLE), tokenizer=str(SAMPLE / "tokenizer.model"),
                                                   token=token), encoding="utf-8")
    launch(in_tmp_path, in_tmp_path / "job.py", "", 2)

    first, second = (json.loads((in_tmp_path / f"found_{rank}.json").read_text()) for rank in (0, 1))
    for name in ("at_once", "resumed"):
        assert first[name][0] == 3
        assert "2 rows have a score that is NaN or infinite" in first[name][1]
        assert "in.jsonl:4, in.jsonl:20" in first[name][1]
    assert first["cut_short"][0] == second["cut_short"][0] == 130
    assert (in_tmp_path / "out.jsonl").read_bytes() == (in_tmp_path / "at_once.jsonl").read_bytes()
    read, undamaged = ([json.loads(line) for line in (in_tmp_path / name).read_text(encoding="utf-8").splitlines()]
                       for name in ("out.jsonl", "undamaged.jsonl"))
    for number, (row, expected) in enumerate(zip(read, undamaged)):
        for side in ("pos", "neg"):
            score = row[f"{side}_score"]
            assert (score is None) == ((number, f"{side}_resp") in nan)
            assert score is None or score == pytest.approx(expected[f"{side}_score"], abs=1e-5)

    assert first["evaluated"] == second["evaluated"]
    assert first["evaluated"][0] == 1
    assert "list: 1 of 3 checkpoints could not be evaluated: list/rank_0/rm_rank_0-1_2.ckpt" in first["evaluated"][1]
    entries = json.loads((in_tmp_path / "output" / "eval.json").read_text())
    assert [(entry["checkpoint"][-9:], entry.get("pairs")) for entry in entries] == [
        ("-1_1.ckpt", 8), ("-1_2.ckpt", None), ("-1_3.ckpt", 8)]
    assert len((in_tmp_path / "output" / "eval_scores.jsonl").read_text().splitlines()) == 8
