"""Which evaluation is the best, and when a run ends for want of a better one.

| test                            | proves                               | judged against                         |
| test_patience_and_threshold_... | improvement, waiting, the end, NaN   | transformers' rule, worked out by hand |
| test_a_run_that_goes_on_...     | the notes of a checkpoint are enough | a run that was left alone              |
| test_another_metric_...         | begins anew, with a warning          | by hand                                |
"""
import json

import pytest

from mindrlhf.config.run_config import Evaluation
from mindrlhf.training.best import Watch

NAN = float("nan")


def see_all(watch, values, begin=0):
    """Which of the values are the best so far, and how long was waited after each; up to the end of the run."""
    seen = []
    for step, value in enumerate(values, start=begin):
        if watch.over:
            break
        seen.append((watch.see(step, value), watch.waited))
    return seen


@pytest.mark.parametrize(("metric", "patience", "threshold", "values", "expected"), [
    ("eval.accuracy", None, 0, [0.5, 0.6, 0.6, 0.7], [(True, 0), (True, 0), (False, 1), (True, 0)]),
    ("eval.loss", None, 0, [0.7, 0.6, 0.65, 0.5], [(True, 0), (True, 0), (False, 1), (True, 0)]),
    # a small gain is the best, but no improvement, and the next one is compared with it
    ("eval.margin", None, 0.1, [0.5, 0.55, 0.6, 0.8], [(True, 0), (True, 1), (True, 2), (True, 0)]),
    ("eval.loss", None, 0.1, [0.5, 0.45, 0.3], [(True, 0), (True, 1), (True, 0)]),
    ("eval.accuracy", 2, 0, [0.5, 0.5, 0.4, 0.9], [(True, 0), (False, 1), (False, 2)]),
    ("eval.accuracy", None, 0, [NAN, 0.5, NAN], [(False, 1), (True, 0), (False, 1)]),
    ("eval.loss", None, 0, [NAN, 0.5, NAN, 0.6], [(False, 1), (True, 0), (False, 1), (False, 2)]),
])
def test_patience_and_threshold_mean_what_they_mean_to_transformers(metric, patience, threshold, values, expected):
    watch = Watch(metric, patience, threshold)
    assert see_all(watch, values) == expected
    assert watch.over == (patience is not None)


@pytest.mark.parametrize("at", range(6))
def test_a_run_that_goes_on_finds_what_one_that_was_left_alone_finds(at):
    values = [0.5, 0.1 + 0.2, 0.7, 0.7, 0.6, 0.65]
    alone, before, after = (Watch("zh.margin", 3, 0.05) for _ in range(3))
    expected = see_all(alone, values)
    found = see_all(before, values[:at])
    assert after.go_on(json.loads(json.dumps(before.as_notes()))) is None
    assert found + see_all(after, values[at:], at) == expected
    assert after == alone
    assert alone.over


def test_another_metric_begins_anew():
    evaluation = Evaluation(4, 0, False, True, "loss", "zh", 3, 0.5)
    watch = Watch.of(evaluation, "eval")
    assert watch == Watch("zh.loss", 3, 0.5)
    assert "best_metric is zh.loss, the run to resume has watched eval.loss" in watch.go_on(
        Watch("eval.loss", best=0.5, best_step=3, step=4).as_notes())
    assert watch == Watch("zh.loss", 3, 0.5)
    assert "has watched none" in watch.go_on(None)
    nothing = Watch.of(Evaluation(4, 0, False, True, None, None, None, 0.0), "eval")
    assert nothing.go_on(None) is None
    assert nothing.go_on({**nothing.as_notes(), "step": 8}) is None
    assert nothing.step == 8
