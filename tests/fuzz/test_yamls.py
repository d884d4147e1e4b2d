"""YAMLs that are no longer what they were: refused with file and place, or a configuration of values of the right kind.

The YAMLs are the two that the project ships. Their text is mutated, or one of their values is replaced. What is checked
is what every start checks, in this process and without a device: `plan_training`, `load_config`.

| test                              | proves                                                    | judged against    |
| test_check_of_mutated_text        | refused or accepted, with nothing of another kind in it   | the shipped YAMLs |
| test_check_of_a_replaced_value    | the same, and the key that was changed is named           | the shipped YAMLs |
| test_a_tag_of_python_runs_nothing | !!python/object/apply and others are refused, never run   | a file            |
| test_a_yaml_that_grows_...        | aliases without end, and nesting, are answered soon       | 30 seconds        |
| test_the_check_needs_no_mindspore | a wrong YAML is answered at once                          | sys.modules       |
"""
import contextlib
import copy
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import PRODUCTION_YAML, TINY_YAML
from helpers import write_anew
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DAMAGE, damaged, fuzz, one_line, outcomes_of

from mindrlhf.config.check import load_config
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.errors import UserError
from mindrlhf.training.plan import plan_training

pytestmark = pytest.mark.stack

SHIPPED = (TINY_YAML, PRODUCTION_YAML)
TEXTS = [path.read_bytes() for path in SHIPPED]
SOUND = [yaml.safe_load(text) for text in TEXTS]
LAUGHS = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (letter, letter, *[letter - 1] * 9)
    for letter in b"bcdefghij")


@pytest.fixture(scope="module")
def outcomes(request):
    yield from outcomes_of("yamls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs start: with a YAML to be written, and 20 pairs of either model's length and pad id."""
    folder = tmp_path_factory.mktemp("yamls")
    for number, config in enumerate(SOUND):
        model = config["model"]["model_config"]
        with RecordWriter(folder / f"{number}.mindrecord") as writer:
            for first in range(20):
                writer.write(encode_pair([first, 2, 3], [first, 4], 128, model["pad_token_id"]))
            writer.finish({"seq_length": 128, "pad_token_id": model["pad_token_id"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 ** 16))  # GLM-4-9B's checkpoints fit
        yield folder


def leaves(value, place=()):
    """Places of all values that are no sections, a place being keys and numbers."""
    if isinstance(value, (dict, list)) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*place, key))
    else:
        yield place


def sections(value, place=()):
    if isinstance(value, (dict, list)):
        yield place
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from sections(inner, (*place, key))


def at(config, place):
    for key in place:
        config = config[key]
    return config


def kind_of(value):
    return "number" if type(value) in (int, float) else type(value).__name__


def check_accepted(config, sound):
    """Every leaf of the shipped YAML that is still there is of its kind, and no number is NaN or out of bounds."""
    for place in leaves(sound):
        if place[0].endswith("_task") and len(place) > 1 and place[1] == "dataset_config":
            continue  # never read: MindFormers puts the data set's own block there
        try:
            found = at(config, place)
        except (KeyError, IndexError, TypeError):
            continue
        allowed = {kind_of(at(sound, place))}
        if place[-1] in ("recompute", "select_recompute"):
            allowed |= {"list", "dict", "number"}
        if place[-1] in ("dataset_dir", "eos_token_id") or place[-2:-1] in (("input_columns",), ("output_columns",)):
            allowed |= {"list"}
        if place[-1] in ("parallel_mode", "mode"):
            allowed |= {"str"}
        if place[-1] == "row_length" and at(config, place[:-1]).get("batching") != "packing":
            continue
        if found is not None:
            assert kind_of(found) in allowed, f"{place}: {found!r}"
        if kind_of(found) == "number":
            assert not math.isnan(found)
            assert abs(found) < (2 ** 31 if type(found) is int else math.inf), f"{place}: {found!r}"


def check(folder, number, content):
    """Both checks of a YAML; returns the `UserError` of the one before training, or None."""
    path = folder / "run.yaml"
    write_anew(path, content)
    data = [str(folder / f"{number}.mindrecord")]
    arguments = SimpleNamespace(config=str(path), train_dataset=data, task="", **dict.fromkeys(
        ("seq_length", "use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt", "resume", "tokenizer")))
    for own_data in (True, False):
        error = None
        try:
            config = plan_training(arguments if not own_data else SimpleNamespace(
                **{**vars(arguments), "train_dataset": None})).config.mapping
        except UserError as found:
            error = found
            one_line(found)
    with contextlib.suppress(UserError):
        check_accepted(load_config(path).mapping, SOUND[number])
    if error is None:
        check_accepted(config, SOUND[number])
    else:
        assert all(str(path) in message or "train_dataset" in message or message.startswith("--")
                   or any(key in message for key in SOUND[number]) for message in error.messages), str(error)
    return error


# --- text -----------------------------------------------------------------------------------------------------------

LINES = st.sampled_from([
    b"\ttab: 1", b"%YAML 1.2", b"---", b"...", b"seed: 0", b"? [a, b]\n: c", b"1: 2", b"null: 1", b"[a]: 1",
    b"<<: *train_dataset", b"<<: 5", b"<<: [*train_dataset, *train_dataset]", b"context: &c {a: *c}", b"seed: *nothing",
    b"callbacks: &a [*a]", b"seed: !!int x", b"seed: !!int ''", b"seed: !!bool maybe", b"seed: !!timestamp x",
    b"seed: 2020-13-45", b"seed: !!float ''", b"seed: !!binary '&'", b"seed: !!set [a]", b"seed: !!omap {a: 1}",
    b"seed: !!python/name:os.system", b"seed: !!python/object/apply:os.getpid []", b"seed: !own x", b"seed: 0b_",
    b"seed: 0x" + b"f" * 5000, b"seed: " + b"9" * 5000, b"seed: 1e400", b"seed: =", b"seed: |\n  text", b"seed: @x",
    b"output_dir: 'a\\0b'", b'output_dir: "a\\0b"', b'output_dir: "\\ud800"', b"output_dir: " + b"x" * 5000,
    b'load_checkpoint: "\\e[2J"', b"load_checkpoint: " + b"y/" * 3000, b"load_checkpoint: .", b"load_checkpoint: 0",
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xc2\x85", b"[" * 10_000, b"{a: " * 2000, b"- " * 2000, LAUGHS,
    LAUGHS + b"seed: *j", b"seed: '", b"'", b"&", b"*", b"!", b"#", b":", b"-", b"a"])
TEXT_CHANGES = st.one_of(
    st.tuples(st.sampled_from(["remove", "twice", "indent", "outdent", "tab", "swap", "comment"]), st.floats(0, 0.999),
              st.none()),
    st.tuples(st.just("line"), st.floats(0, 0.999), LINES),
    st.tuples(st.just("bytes"), DAMAGE, st.none()),
    st.tuples(st.just("letters"), st.floats(0, 0.999), st.text(max_size=3)))


def changed_text(content, change):
    what, place, value = change
    if what == "bytes":
        return damaged(content, place)
    if what == "letters":
        where = int(place * len(content))
        return content[:where] + value.encode("utf-8", "surrogatepass") + content[where + len(value):]
    lines = content.split(b"\n")
    number = int(place * len(lines))
    line = lines[number]
    lines[number:number + 1] = {
        "remove": [], "twice": [line, line], "indent": [b"  " + line], "outdent": [line[1:]], "tab": [b"\t" + line],
        "swap": [*lines[number + 1:number + 2], line], "comment": [b"#" + line], "line": [line, value]}[what]
    return b"\n".join(lines)


@st.composite
def texts(draw):
    """(number of the shipped YAML, its mutated text)."""
    number = draw(st.sampled_from([0, 1]))
    content = TEXTS[number]
    for change in draw(st.lists(TEXT_CHANGES, min_size=1, max_size=3)):
        content = changed_text(content, change)
    encoding = draw(st.sampled_from([*["utf-8"] * 12, "utf-16", "utf-32-le", "gbk", "utf-8-sig"]))
    if encoding != "utf-8":
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    return number, content


def replaced(old, new):
    assert old in TEXTS[0]
    return 0, TEXTS[0].replace(old, new)


@pytest.mark.further
@example(replaced(b"learning_rate: 3.0e-4", b"learning_rate: .nan"))  # was accepted
@example(replaced(b"batch_size: 8 ", b"batch_size: 8\n  batch_size: 9"))  # the last one counted
@example(replaced(b"    - 'loss_mask'\n", b""))  # a KeyError once the data is read
@example(replaced(b"resume_training: False", b"resume_training: 'False'"))  # was as good as True
@example(replaced(b"num_layers: 2\n", b"num_layers: 2000000000\n"))  # a list of so many weights
@example(replaced(b"hidden_size: 64\n", b"hidden_size: 0x" + b"f" * 5000 + b"\n"))  # too many digits to be shown
@example(replaced(b"micro_batch_interleave_num: 1", b"micro_batch_interleave_num: 'x'"))  # a TypeError
@example(replaced(b"seed: 0", b"seed: !!int ''"))  # an IndexError
@example((0, TEXTS[0] + LAUGHS + b"seed2: *j\n"))  # no end
@example(replaced(b"batch_size: 8 ", b"batch_size: &l [*l] "))  # contains itself
@example(replaced(b"seed: 0", b"1: 2"))  # a TypeError once training starts
@given(texts())
@fuzz(few=40, full=1000)
def test_check_of_mutated_text(folder, outcomes, changed):
    with outcomes.no_hang():
        outcomes.count("refused" if check(folder, *changed) else "accepted")


# --- values ---------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([
    None, "", " ", "x", "True", "1", -1, 0, 1, 2, 3, True, False, 1.5, -0.5, 0.0, math.nan, math.inf, -math.inf, 1e308,
    10 ** 9, 2 ** 31, 2 ** 63, 10 ** 400, -10 ** 400, [], [1], ["x"], [None], [[]], {}, {"a": 1}, {"type": "x"},
    "x" * 5000, "\x00", "a\x1b[2J", "\ud800", "../..", "/dev/null", "/", ".", b"bytes", {1: 2}, "nan", "infGB",
    "1e400GB", "GB"])
PLACES = [(number, place) for number, config in enumerate(SOUND) for places in (leaves, sections)
          for place in places(config) if place and "dataset_config" not in place]


def with_value(number, place, value):
    config = copy.deepcopy(SOUND[number])
    at(config, place[:-1])[place[-1]] = value
    return config


@example((0, ("runner_config", "batch_size"), 10 ** 400))
@example((0, ("callbacks", 2, "save_checkpoint_steps"), "x"))
@example((0, ("callbacks", 2, "keep_checkpoint_max"), [1]))
@example((0, ("parallel_config", "data_parallel"), "x"))
@example((0, ("train_dataset", "data_loader", "dataset_dir"), 5))
@example((0, ("output_dir",), 5))
@example((0, ("load_checkpoint",), [1]))
@example((1, ("context", "max_device_memory"), "infGB"))
@given(st.tuples(st.sampled_from(PLACES), VALUES).map(lambda found: (*found[0], found[1])))
@fuzz(few=40, full=1000)
def test_check_of_a_replaced_value(folder, outcomes, changed):
    number, place, value = changed
    config = with_value(number, place, value)
    text = yaml.safe_dump(config).encode()
    with outcomes.no_hang():
        error = check(folder, number, text)
    outcomes.count("refused" if error else "accepted")
    if error and not isinstance(value, (dict, list)):
        names = [str(key) for key in place if isinstance(key, str)]
        assert any(name in str(error) for name in [*names, "checkpoints with optimizer state"]), str(error)


# --- what a YAML could do -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag", [
    "!!python/object/apply:os.system ['touch ran']", "!!python/object/new:os.system ['touch ran']",
    "!!python/object/apply:subprocess.check_call [[touch, ran]]", "!!python/module:os", "!!python/name:os.system",
    "!!python/object:pathlib.Path {}", "!!python/tuple [1]"])
def test_a_tag_of_python_runs_nothing(folder, tag):
    error = check(folder, *replaced(b"seed: 0", f"seed: {tag}".encode()))
    assert str(error).startswith(f"{folder / 'run.yaml'}:9: not YAML: could not determine a constructor for the tag")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", [
    LAUGHS + TEXTS[0] + b"seed2: *j\n", b"[" * 400, b"a: " * 10_000, b"? " * 10_000,
    TEXTS[0] + b"seed2: " + b"[" * 500 + b"]" * 500],
    ids=["aliases", "lists", "keys", "keys of keys", "balanced lists"])
def test_a_yaml_that_grows_or_nests_without_end_is_answered_soon(folder, content):
    begin = time.process_time()
    assert check(folder, 0, content) is not None
    assert time.process_time() - begin < 30  # three readings


def test_the_check_needs_no_mindspore():
    """3 seconds of every wrong start."""
    code = "import sys, mindrlhf.training.train; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
