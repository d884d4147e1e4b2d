"""Values of a YAML that `--set KEY=VALUE` gives on the command line.

| test                                        | proves                                          | judged against   |
| test_a_value_is_read_as_yaml_and_put ...    | places, types, the last one of a key counts     | literal values   |
| test_what_is_set_is_checked_like_the_yaml   | messages name the flag, others the file         | literal messages |
| test_a_problem_of_a_block_names_the_flags   | all that set a part of it, the last of a key    | literal messages |
| test_a_place_that_there_is_not_is_named     | lists, values and sections                      | literal messages |
| test_a_flag_of_its_own_may_say_the_same ... | two values are an error, one twice is none      | literal messages |
| test_what_is_no_setting_is_a_bad_command_line | exit code 2, on each of the three scripts     | exit codes       |
"""
import argparse
import subprocess
import sys

import pytest
from conftest import EXAMPLE, TINY_YAML

from mindrlhf.config.check import check_config
from mindrlhf.config.read import get, read_config
from mindrlhf.config.settings import Setting, raise_located
from mindrlhf.errors import Problems, UserError

pytestmark = pytest.mark.stack


def settings(*texts):
    return [Setting.parse(text) for text in texts]


@pytest.mark.parametrize(("texts", "key", "value"), [
    (["runner_config.epochs=2"], "runner_config.epochs", 2),
    (["runner_config.epochs=2", "runner_config.epochs=3"], "runner_config.epochs", 3),
    (["lr_schedule.learning_rate=1e-5"], "lr_schedule.learning_rate", 1e-5),
    (["output_dir='a=b'"], "output_dir", "a=b"),
    (["optimizer={type: AdamW, betas: [0.9, 0.95]}"], "optimizer.betas", [0.9, 0.95]),
    (["context.jit_config.jit_level=O1"], "context.jit_config.jit_level", "O1"),
    (["runner_config.sink_mode="], "runner_config.sink_mode", False),  # left empty, the default
])
def test_a_value_is_read_as_yaml_and_put_into_its_place(texts, key, value):
    found = get(read_config(TINY_YAML, settings=settings(*texts)), key)
    assert (found, type(found)) == (value, type(value))


def test_an_entry_of_a_list_has_a_number():
    config = read_config(TINY_YAML, settings=settings("callbacks[2].save_checkpoint_steps=7"))
    assert config["callbacks"][2]["save_checkpoint_steps"] == 7


def test_what_is_set_is_checked_like_the_yaml_and_messages_name_the_flag():
    given = settings("runner_config.epochs=0", "callbacks[2].prefix=a-b", "runner_config.epoch=3",
                     "model.model_config.objective={type: x}", "optimizer={type: AdamW, beta1: 0.9}")
    problems = Problems()
    check_config("run.yaml", read_config(TINY_YAML, {"use_parallel": 3}, given), problems, given)
    for line in ("--set runner_config.epochs=0: runner_config.epochs is 0, expected a whole number above 0",
                 "--set runner_config.epoch=3: runner_config.epoch is an unknown key, which nothing reads; did you "
                 "mean epochs?",
                 "run.yaml: use_parallel is 3, expected True or False, or nothing"):
        assert line in problems.found
    problems = Problems()
    check_config("run.yaml", read_config(TINY_YAML, {}, given[1:2] + given[4:]), problems, given)
    assert any(line.startswith("--set callbacks[2].prefix=a-b: callbacks[2].prefix is 'a-b'")
               for line in problems.found)
    assert any(line.startswith("--set optimizer={type: AdamW, beta1: 0.9}: optimizer.beta1 is 0.9, expected betas")
               for line in problems.found)


@pytest.mark.parametrize(("given", "problem", "named"), [
    (["optimizer.eps=0", "optimizer.beta1=1", "optimizer.beta1=2", "seed=1"], "optimizer: refused",
     "--set optimizer.eps=0 --set optimizer.beta1=2"),
    (["optimizer={}", "optimizer.eps=0"], "optimizer.eps is 0", "--set optimizer.eps=0"),
    (["callbacks[0].type=x"], "callbacks has no CheckpointMonitor", "--set callbacks[0].type=x"),
    (["callbacks[0].type=x"], "callbacks[1].type is 'y'", "run.yaml"),
    (["optimizer.eps=0"], "optimizer.epsilon is 0", "run.yaml"),
])
def test_a_problem_of_a_block_names_the_flags_that_set_parts_of_it(given, problem, named):
    with pytest.raises(UserError) as error:
        raise_located("run.yaml", [problem], settings(*given))
    assert error.value.messages == [f"{named}: {problem}"]


@pytest.mark.parametrize(("text", "message"), [
    ("callbacks[9].prefix=a", "--set callbacks[9].prefix=a: callbacks is a list of 4, expected callbacks[0] to "
                              "callbacks[3]"),
    ("callbacks.prefix=a", "--set callbacks.prefix=a: callbacks is a list of 4, expected callbacks[0] to callbacks[3]"),
    ("seed.more=1", "--set seed.more=1: seed is 0, expected keys and values"),
    ("optimizer=3", "--set optimizer=3: section optimizer is 3, expected keys and values"),
])
def test_a_place_that_there_is_not_is_named(text, message):
    with pytest.raises(UserError) as error:
        read_config(TINY_YAML, settings=settings(text))
    assert error.value.messages == [message]


def test_a_flag_of_its_own_may_say_the_same_and_nothing_else():
    given = settings("model.model_config.seq_length=64")
    read_config(TINY_YAML, {"model.model_config.seq_length": 64}, given)
    with pytest.raises(UserError) as error:
        read_config(TINY_YAML, {"model.model_config.seq_length": 32}, given)
    assert error.value.messages == ["--set model.model_config.seq_length=64: --seq_length is 32, expected the same "
                                    "value, or one of the two flags"]


@pytest.mark.parametrize("text", ["runner_config.epochs", "=2", "a..b=1", "a[x]=1", "a={", "a={b: 1, b: 2}"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="found .*, (expected KEY=VALUE|whose value is not YAML)"):
        Setting.parse(text)


@pytest.mark.process
@pytest.mark.parametrize("script", ["reward_train.py", "reward_eval.py", "reward_infer.py"])
def test_what_is_no_setting_is_a_bad_command_line(script):
    result = subprocess.run([sys.executable, str(EXAMPLE / script), "--config", str(TINY_YAML), "--set", "epochs"],
                            capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "argument --set: found 'epochs', expected KEY=VALUE" in result.stderr
