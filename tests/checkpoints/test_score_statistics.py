"""Mean and std of a checkpoint's scores out of eval.json.

| test                                     | proves                                | judged against |
| test_the_entry_of_the_checkpoint_is_ ... | by its path, through links            | by hand        |
| test_what_gives_no_statistics_is_ ...    | absent, other JSON, no entry, no std  | messages       |
"""
import json

import pytest

from mindrlhf.checkpoints.score_statistics import read_score_statistics
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

ENTRIES = [{"checkpoint": "run/a-1_1.ckpt", "mean": 9, "std": 9},
           {"checkpoint": "run/a-1_2.ckpt", "mean": -1, "std": 2.5},
           {"checkpoint": "run/a-1_3.ckpt", "not_evaluated": "damaged"}]


def test_the_entry_of_the_checkpoint_is_taken(in_tmp_path):
    (in_tmp_path / "run").mkdir()
    (in_tmp_path / "link").symlink_to("run")
    (in_tmp_path / "eval.json").write_text(json.dumps(ENTRIES))
    for checkpoint in ("run/a-1_2.ckpt", in_tmp_path / "run" / "a-1_2.ckpt", "./link/a-1_2.ckpt"):
        found = read_score_statistics("--normalize", in_tmp_path / "eval.json", checkpoint)
        assert found == (-1, 2.5)
    assert [found.normalized(score) for score in (-1, 1.5, 4)] == [0, 1, 2]


@pytest.mark.parametrize(("content", "message"), [
    (None, "eval.json: cannot be read as JSON: No such file or directory"),
    ("{}", "eval.json: found dict, expected a JSON list"),
    ("[1]", "--normalize: eval.json: found a list of other things, expected the eval.json of reward_eval.py: a list of "
     "objects with a checkpoint each"),
    ("[]", "--normalize: eval.json: no entry of run/a-1_3.ckpt, found none; evaluate this checkpoint with "
     "reward_eval.py"),
    (json.dumps(ENTRIES[:2]), "--normalize: eval.json: no entry of run/a-1_3.ckpt, found run/a-1_1.ckpt, "
     "run/a-1_2.ckpt; evaluate this checkpoint with reward_eval.py"),
    (json.dumps(ENTRIES), "--normalize: eval.json: mean and std of run/a-1_3.ckpt are None and None, expected numbers, "
     "and std above 0"),
    (json.dumps([{**ENTRIES[2], "mean": 1, "std": 0}]), "--normalize: eval.json: mean and std of run/a-1_3.ckpt are 1 "
     "and 0, expected numbers, and std above 0"),
    ('[{"checkpoint": "run/a-1_3.ckpt", "mean": NaN, "std": 1}]', "--normalize: eval.json: mean and std of "
     "run/a-1_3.ckpt are nan and 1, expected numbers, and std above 0"),
])
def test_what_gives_no_statistics_is_named(in_tmp_path, content, message):
    if content:
        (in_tmp_path / "eval.json").write_text(content)
    path = (in_tmp_path / "eval.json").relative_to(in_tmp_path)
    with pytest.raises(UserError) as error:
        read_score_statistics("--normalize", path, "run/a-1_3.ckpt")
    assert str(error.value) == message
