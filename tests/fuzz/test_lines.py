"""Lines that are no longer what they were: converted or scored as JSON says, or refused with file and line.

A file is a sound row, a mutated one and a sound one. What must come of it is told by Python's own `json`, and by ids
and fields that are put together here: conversion writes exactly the rows that are pairs and names exactly the others.

| test                                  | proves                                                | judged against |
| test_conversion_of_mutated_lines      | every line is converted right or named; nothing stays | json, tiktoken |
| test_arrays_with_a_mutated_item       | the same for a .json array, by item                   | json           |
| test_reader_of_mutated_questions      | the same for what reward_infer.py scores              | json           |
| test_scored_rows_are_written_...      | a row's own keys come back, up to the first bad row   | json           |
| test_invalid_rows_are_left_out_...    | the others do, and every bad row is in a file         | json           |
| test_a_line_of_10_mb_...              | size is no reason to fail, or to fail otherwise       | tiktoken       |
| test_mutated_lines_through_the_...    | processes that encode see the same lines              | json           |
| test_damaged_tables                   | their rows or one line, and no crash                  | what they must |
| test_mutated_rows_of_every_format     | pairs as templates take them, or one line             | what they must |
"""
import contextlib
import gc
import gzip
import json
import math
import re
import types
from pathlib import Path

import mindspore.dataset as ds
import pytest
from conftest import SAMPLE
from formats_by_hand import FIXTURES
from helpers import convert_file, write_anew
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DAMAGE, FULL, damaged, fuzz, one_line, outcomes_of

from mindrlhf.data import convert as convert_module
from mindrlhf.data import encoding_processes
from mindrlhf.data.preference import InvalidRow, Preference, Skipped, read_preferences, read_rows
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.scoring import text_scorer
from mindrlhf.scoring.infer import infer
from mindrlhf.scoring.plan import InferencePlan
from mindrlhf.scoring.questions import read_questions
from mindrlhf.scoring.scorer import Checkpoint

pytestmark = pytest.mark.stack

FIRST, LAST = {"prompt": "q1", "pos_resp": "a", "neg_resp": "b"}, {"prompt": "q2", "pos_resp": "c", "neg_resp": "d"}
PAIR, SINGLE = ("prompt", "pos_resp", "neg_resp"), ("prompt", "response")
ANSWERS = {"score": "response", "pos_score": "pos_resp", "neg_score": "neg_resp"}
TEMPLATE, SEQ, PAD = "问{prompt}答{response}", 48, 996
ROWS = [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()]
TOKENIZER = open_tokenizer(SAMPLE / "tokenizer.model")
LONGEST = 10 << 20


@pytest.fixture(scope="module")
def outcomes(request):
    yield from outcomes_of("lines")


# --- what is tried --------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.sampled_from(["", " ", "\n", "\x00", "a\x00b", "a\rb", "a\u2028b", "a\u0085b", "a\x1bb", "\ufeffq", "\u3000",
                     "\ud800", "a\udc00b", "\ude00\ud83d", "😀", "{prompt}", "{response}", "\\n", "é\u0301",
                     "\U0010ffff", " " * 2000 + "x", "好" * 3000, *GLM4_SPECIAL_TOKENS]),
    st.text(max_size=40), st.sampled_from([row[key] for row in ROWS[:20] for key in PAIR]))
VALUES = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(), st.sampled_from([10 ** 400, -10 ** 30, 2 ** 63, 1e308, -0.0]),
    st.floats(allow_nan=False), st.lists(TEXTS, max_size=3), st.dictionaries(st.text(max_size=4), TEXTS, max_size=3))
RAW = st.sampled_from(["NaN", "Infinity", "1e999", "9" * 5000, "0x10", "'q'", "True", "nul", "", '"', "[", "[" * 10_000,
                       "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 900 + "]" * 900,
                       '"\\ud83d"', '"\\ud83d\\ude00"', '"\\x"', '"a\nb"', '"a\tb"'])
KEYS = st.one_of(st.sampled_from([*PAIR, "response", "Prompt", "prompt ", "", "note", "score", "pos_score", "\ud800",
                                  "pos_type", "k" * 5000, "a\x1b\u2028b"]), st.text(max_size=6))
CHANGES = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES), st.tuples(st.just("set"), st.sampled_from((*PAIR, "response")), VALUES),
    st.tuples(st.just("raw"), st.sampled_from((*PAIR, "note")), RAW),
    st.tuples(st.just("remove"), st.sampled_from((*PAIR, "response")), st.none()),
    st.tuples(st.just("again"), KEYS, VALUES))
ENCODINGS = st.sampled_from([*["utf-8"] * 8, "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030",
                             "gbk", "latin-1", "utf-7"])


def as_json(row, changes, ascii_only):
    """The row as text; changes may give what is no JSON, or a key twice."""
    items = [(key, json.dumps(value, ensure_ascii=ascii_only)) for key, value in row.items()]
    for what, key, value in changes:
        there = [name for name, _ in items]
        text = value if what == "raw" else json.dumps(value, ensure_ascii=ascii_only)
        if what == "remove":
            items = [item for item in items if item[0] != key]
        elif what == "again" or key not in there:
            items.append((key, text))
        else:
            items[there.index(key)] = (key, text)
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=ascii_only)}: {text}" for key, text in items) + "}"


@st.composite
def lines(draw):
    """Bytes that stand in the place of a line."""
    row = dict(draw(st.sampled_from(ROWS)))
    if draw(st.integers(0, 3)) == 0:
        row = {"prompt": row["prompt"], "response": row["pos_resp"]}
    text = as_json(row, draw(st.lists(CHANGES, max_size=3)), draw(st.booleans()))
    encoding = draw(ENCODINGS)
    raw = text.encode(encoding, "surrogatepass" if encoding.startswith("utf-") and encoding != "utf-7" else "replace")
    for damage in draw(st.lists(DAMAGE, max_size=2)):
        raw = damaged(raw, damage)
    return raw + draw(st.sampled_from([b"", b"", b"\r", b"\n", b"\x00", b" ", b"\n\x0c", b"\xef\xbb\xbf"]))


def examples(*raws):
    """What was found so far, tried each time."""
    def decorate(test):
        for raw in raws:
            test = example(raw)(test)
        return test
    return decorate


def sound(row):
    return json.dumps(row).encode()


FOUND = examples(
    b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}",
    '{"prompt": "好", "pos_resp": "a", "neg_resp": "b"}'.encode("gbk"),
    # a key twice: Python's json takes the last one and says nothing
    b'{"prompt": "q", "pos_resp": "kind", "neg_resp": "rude", "pos_resp": "rude too"}',
    b'{"prompt": "q", "response": "a", "response": "b"}',
    # a row that cannot be written back as UTF-8
    b'{"prompt": "q", "response": "a", "note": "\\ud800"}', b'{"prompt": "q", "response": "a", "\\ud800": 1}',
    # names that a terminal would obey, or that fill it
    b'{"\\u001b[2J": 1}', b'{"' + b"k" * 100_000 + b'": 1}',
    # more white space in a row than tiktoken's pattern can take
    b'{"prompt": "q' + b" " * (1 << 20) + b'q", "pos_resp": "a", "neg_resp": "b"}',
    b'{"prompt": "q", "response": "a' + b"\\n " * (1 << 19) + b'b"}',
)


# --- what must come of it -------------------------------------------------------------------------------------------

def file_of(raw):
    return b"\n".join((sound(FIRST), raw, sound(LAST)))


def once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def no_number(name):
    raise ValueError(f"{name} is no JSON")


def finite(text):
    if math.isinf(float(text)):
        raise ValueError("an infinity")
    return float(text)


def parsed_lines(content):
    """(number, object or None) of each line that is not blank: None where it is no object with each key once and
    numbers that are finite, or is nested deep.
    """
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number,
                                 parse_float=finite)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) and is_flat(row) else None


def items_of(content):
    """The same of the items of a .json array; None if the file is none."""
    try:
        items = json.loads(content.removeprefix(b"\xef\xbb\xbf").decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return [(number, item if isinstance(item, dict) and is_finite(item) and is_flat(item) else None)
            for number, item in enumerate(items, start=1)] if isinstance(items, list) else None


def is_flat(item):
    """Whether its lists and objects are in no more than 99 others."""
    left = [(item, 1)]
    while left:
        value, depth = left.pop()
        if depth > 100:
            return False
        left += [(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)
                 if isinstance(inner, (dict, list))]
    return True


def is_finite(item):
    try:
        return bool(json.dumps(item, allow_nan=False))
    except ValueError:
        return False


def is_usable(row, fields):
    """Texts under all `fields`, a prompt that is not blank, and no white space that tiktoken fails at."""
    texts = [row.get(field) for field in fields] if row else [None]
    return all(isinstance(text, str) and not re.search("[\ud800-\udfff]", text) for text in texts) and \
        bool(row["prompt"].strip()) and not any(re.search(r"\s{500000}", text) for text in texts)


def ids_of(row, key):
    return TOKENIZER.encode_batch([f"问{row['prompt'].strip()}答{row[key].strip()}"])[0]


def expected_row(row):
    """The seven fields as lists; None if both sides are the same."""
    ids = [ids_of(row, key)[:SEQ] for key in PAIR[1:]]
    if ids[0] == ids[1]:
        return None
    (chosen, rejected), end = ids, max(map(len, ids))
    first = next(at for at in range(end) if chosen[at:at + 1] != rejected[at:at + 1])
    fill = [PAD] * SEQ
    return {"chosen_input_ids": (chosen + fill)[:SEQ],
            "chosen_attention_mask": [int(at < len(chosen)) for at in range(SEQ)],
            "rejected_input_ids": (rejected + fill)[:SEQ],
            "rejected_attention_mask": [int(at < len(rejected)) for at in range(SEQ)],
            "position_id": list(range(SEQ)), "loss_mask": [float(first <= at < end) for at in range(SEQ)],
            "end_ind": end}


def read_record(path):
    rows = ds.MindDataset(str(path), shuffle=False).create_dict_iterator(num_epochs=1, output_numpy=True)
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lines")


@contextlib.contextmanager
def encoding_here(sources, encoder, length, _workers):
    """In the place of processes that encode, which take longer to start than a file takes to convert."""
    yield iter(encoding_processes.encode_rows(sources.preferences(), encoder, length))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "pairs.jsonl")


def emptied(folder, content):
    for path in folder.iterdir():
        path.unlink()
    (folder / "pairs.jsonl").write_bytes(content)
    return folder / "pairs.jsonl"


def check_conversion(folder, content):
    """Convert a file both ways; returns whether all its lines are pairs."""
    source, target = emptied(folder, content), folder / "out.mindrecord"
    lines = list(parsed_lines(content))
    bad = [number for number, row in lines if not is_usable(row, PAIR)]
    if bad:
        with pytest.raises(UserError) as caught:
            convert_file(source, target, TOKENIZER, SEQ, TEMPLATE)
        assert one_line(caught.value).startswith(f"{source}:{bad[0]}: ")
        assert len(caught.value.messages) == 1
        assert names_in(folder) == []
    report = convert_file(source, target, TOKENIZER, SEQ, TEMPLATE, skip_invalid=True, max_invalid=1)
    expected = [expected_row(row) for number, row in lines if number not in bad]
    assert read_record(target) == [row for row in expected if row]
    assert (report.invalid, report.identical + report.lost_by_cut) == (len(bad), expected.count(None))
    if bad:
        noted = [json.loads(line) for line in report.rejected_file.read_text(encoding="utf-8").split("\n")[:-1]]
        assert [row["line"] for row in noted] == bad
        assert all(row["reason"] for row in noted)
    return not bad


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(encoding_processes, "_encoded", encoding_here)
    monkeypatch.setattr(convert_module, "_progress",
                        lambda *_: contextlib.nullcontext(types.SimpleNamespace(update=int)))


@FOUND
@given(raw=lines())
@fuzz(few=100, full=5000)
def test_conversion_of_mutated_lines(folder, in_this_process, outcomes, raw):
    with outcomes.no_hang():
        outcomes.count("converted" if check_conversion(folder, file_of(raw)) else "refused")


def texts_of(pair):
    return tuple(message.content for message in (*pair.prompt, *pair.chosen, *pair.rejected))


@contextlib.contextmanager
def no_collection():
    """900 lists use up Python's stack. A garbage collection at its end may fail in what it calls, Hypothesis' clock or
    finalizers of other tests' objects, and pytest counts that against the test.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@FOUND
@example(b"[" * 900 + b"]" * 900)
@given(raw=lines())
@fuzz(few=100, full=1000)
def test_arrays_with_a_mutated_item(folder, outcomes, raw):
    content = b"[" + b",".join((sound(FIRST), raw, sound(LAST))) + b"]"
    source = folder / "pairs.json"
    write_anew(source, content)
    with outcomes.no_hang(), no_collection():
        expected = items_of(content)
        if expected is None:
            with pytest.raises(UserError) as caught:
                list(read_preferences(source))
            assert one_line(caught.value).startswith(f"{source}: ")
            outcomes.count("arrays refused")
            return
        found = list(read_preferences(source))
    assert [None if isinstance(row, InvalidRow) else texts_of(row) for row in found] == [
        tuple(row[key] for key in PAIR) if is_usable(row, PAIR) else None for _, row in expected]
    assert [row.place for row in found] == [
        f"{source}:item {number}" for number, _ in expected]
    outcomes.count("arrays read")


# --- other formats --------------------------------------------------------------------------------------------------

FIELDS = sorted({key for rows in FIXTURES.values() for row, _ in rows for key in row} | {"role", "content", "from",
                                                                                        "value", "rank", "completion"})
SHAPES = st.recursive(
    VALUES, lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": inner}),
        st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3)), max_leaves=6)


def places_in(value, path=()):
    """The path of each value in a row, from the outside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places_in(item, (*path, key))


def changed(draw, row):
    """A row with a value replaced, removed, doubled or moved to another key."""
    row = json.loads(json.dumps(row))
    *path, key = draw(st.sampled_from(list(places_in(row))))
    inner = row
    for step in path:
        inner = inner[step]
    what = draw(st.sampled_from(["set", "set", "remove", "again", "other key"]))
    if what == "set":
        inner[key] = draw(SHAPES)
    elif what == "remove":
        del inner[key]
    elif isinstance(inner, list):
        inner.insert(key, json.loads(json.dumps(inner[key])))
    else:
        inner[draw(st.sampled_from(FIELDS))] = inner[key]
    return row


def check_pair(pair):
    """What templates rely on."""
    *before, last = pair.prompt
    assert last.role in ("user", "observation")
    assert last.content.strip()
    assert [message.role for message in before[1:]].count("system") == 0
    for answer in (pair.chosen, pair.rejected):
        assert answer[0].role == "assistant"
        assert {message.role for message in answer} <= {"user", "assistant", "observation"}
    assert {message.role for message in before} <= {"system", "user", "assistant", "observation"}
    assert "".join(texts_of(pair)).encode("utf-8") is not None
    assert pair.margin is None or math.isfinite(pair.margin)
    numbers = (pair.prompt_id, pair.chosen_answer, pair.rejected_answer)
    assert numbers == (None,) * 3 or (min(numbers) >= 0 and numbers[1] != numbers[2])


@pytest.mark.parametrize("name", FIXTURES)
@given(data=st.data())
@fuzz(few=10, full=1000)
def test_mutated_rows_of_every_format(folder, outcomes, name, data):
    rows = [row for row, _ in FIXTURES[name]]
    row = data.draw(st.sampled_from(rows))
    for _ in range(data.draw(st.integers(1, 3))):
        row = changed(data.draw, row) if row else row
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (rows[0], row, rows[0]))))
    with outcomes.no_hang():
        found = list(read_preferences(path))
    assert {item.place for item in found} == {f"{path}:{line}" for line in (1, 2, 3)}
    for item in found:
        if isinstance(item, Preference):
            check_pair(item)
        elif isinstance(item, InvalidRow):
            assert item.number == 2
            assert one_line(item.as_error()).startswith(f"{path}:2: ")
        else:
            assert isinstance(item, Skipped)
            assert item.pairs > 0
        outcomes.count(f"{type(item).__name__} of a format")
    first, last = ([(item.prompt, item.chosen, item.rejected) for item in found if item.number == number]
                   for number in (1, 3))
    assert first == last


TABLE = [{"prompt": f"问 {number}", "chosen": "a", "rejected": "b", "scores": [0.5, number]} for number in range(40)]


def tables():
    """Name -> content of a file of TABLE."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    table, contents = pa.Table.from_pylist(TABLE), {}
    for name, write in (
            ("rows.parquet", lambda sink: pq.write_table(table, sink)),
            ("stream.arrow", lambda sink: pa.ipc.new_stream(sink, table.schema)),
            ("file.arrow", lambda sink: pa.ipc.new_file(sink, table.schema))):
        sink = pa.BufferOutputStream()
        writer = write(sink)
        if writer is not None:
            writer.write_table(table, max_chunksize=8)
            writer.close()
        contents[name] = sink.getvalue().to_pybytes()
    return {**contents, "rows.parquet.gz": gzip.compress(contents["rows.parquet"])}


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow", "rows.parquet.gz"])
@given(damages=st.lists(DAMAGE, min_size=1, max_size=2))
@fuzz(few=20, full=1000)
def test_damaged_tables(folder, outcomes, name, damages):
    content = tables()[name]
    for damage in damages:
        content = damaged(content, damage)
    write_anew(folder / name, content)
    found, refused = [], None
    with outcomes.no_hang():
        try:
            found += read_rows(folder / name)
        except UserError as error:
            refused = error
    outcomes.count("tables refused" if refused else "tables read")
    if refused:
        assert one_line(refused).startswith(f"{folder / name}:")
    else:
        assert "arrow" in name or len(found) == len(TABLE)


# --- reward_infer.py ------------------------------------------------------------------------------------------------

def expected_questions(content):
    """(number, row or None where it cannot be scored, names of its scores) of each line up to the first row that has a
    key of such a name itself; the number of that one.
    """
    rows = []
    for number, row in parsed_lines(content):
        single = bool(row) and "response" in row and "pos_resp" not in row
        names = ["score"] if single else ["pos_score", "neg_score"]
        usable = is_usable(row, SINGLE if single else PAIR)
        if usable and {*names, "cut"} & set(row):
            return rows, number
        rows.append((number, row if usable else None, names))
    return rows, None


def same(found, expected):
    """Equality by the text."""
    return json.dumps(found) == json.dumps(expected)


@FOUND
@given(raw=lines())
@fuzz(few=200, full=5000)
def test_reader_of_mutated_questions(folder, outcomes, raw):
    source = emptied(folder, file_of(raw))
    expected, clash = expected_questions(file_of(raw))
    found = []
    with outcomes.no_hang():
        if clash is None:
            found += read_questions(source)
        else:
            with pytest.raises(UserError) as caught:
                found.extend(read_questions(source))
            assert one_line(caught.value).startswith(f"{source}:{clash}: the row has a key ")
    outcomes.count("questions read" if clash is None else "questions refused")
    assert [row.place for row in found] == [f"{source}:{number}" for number, _, _ in expected]
    assert same([None if isinstance(row, InvalidRow) else [row.values, list(row.names)] for row in found],
                [row and [row, names] for _, row, names in expected])


class LengthScorer:
    """In the place of a model: a text's score is its number of tokens."""

    rank, processes, seq_length, shapes, window = 0, 1, SEQ, (), 2048

    def __init__(self, *_):
        pass

    def checkpoints(self, path):
        return [Checkpoint(Path(path))]

    def load(self, path):
        pass

    def score(self, questions):
        for texts in questions:
            yield [float(len(ids)) for ids in texts]


CONFIG = types.SimpleNamespace(model=types.SimpleNamespace(seq_length=SEQ), mapping={})


@pytest.fixture
def without_a_model(monkeypatch):
    monkeypatch.setattr(text_scorer, "set_up_mindspore", lambda *_: None)
    monkeypatch.setattr(text_scorer, "Scorer", LengthScorer)
    from mindformers.tools.logger import logger
    monkeypatch.setattr(logger, "info", lambda *_, **__: None)
    monkeypatch.setattr(logger, "warning", lambda *_: None)


@FOUND
@given(raw=lines())
@fuzz(few=50, full=1000)
def test_scored_rows_are_written_as_they_came(folder, without_a_model, outcomes, raw):
    source, target = emptied(folder, file_of(raw)), folder / "scores.jsonl"
    plan = InferencePlan(CONFIG, str(folder), {}, TextEncoder(TOKENIZER, TEMPLATE), source, target)
    expected, clash = expected_questions(file_of(raw))
    bad = next((number for number, row, _ in expected if row is None), clash)
    with outcomes.no_hang():
        if bad is None:
            infer(plan)
        else:
            with pytest.raises(UserError) as caught:
                infer(plan)
            assert one_line(caught.value).startswith(f"{source}:{bad}: ")
            assert names_in(folder) == ["scores.jsonl.partial", "scores.jsonl.partial.json"]
    written = rows_in(target if bad is None else folder / "scores.jsonl.partial")
    assert same(written, with_scores([entry for entry in expected if bad is None or entry[0] < bad]))
    outcomes.count("rows scored", len(written))


@FOUND
@given(raw=lines())
@fuzz(few=50, full=1000)
def test_invalid_rows_are_left_out_and_named(folder, without_a_model, outcomes, raw):
    source, target, noted = emptied(folder, file_of(raw)), folder / "scores.jsonl", folder / "invalid.jsonl"
    expected, clash = expected_questions(file_of(raw))
    plan = InferencePlan(CONFIG, str(folder), {}, TextEncoder(TOKENIZER, TEMPLATE), source, target, skip_invalid=True,
                         invalid_file=noted)
    with outcomes.no_hang(), contextlib.nullcontext() if clash is None else pytest.raises(UserError):
        infer(plan)
    if clash is None:
        assert same(rows_in(target), with_scores([entry for entry in expected if entry[1] is not None]))
        assert [row["line"] for row in rows_in(noted)] == [number for number, row, _ in expected if row is None]
        outcomes.count("rows left out", len(rows_in(noted)))


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def with_scores(entries):
    rows = []
    for _, row, names in entries:
        lengths = [len(ids_of(row, ANSWERS[name])) for name in names]
        cut = {"cut": True} if max(lengths) > SEQ else {}
        rows.append({**row, **{name: float(min(length, SEQ)) for name, length in zip(names, lengths)}, **cut})
    return rows


# --- size, and processes --------------------------------------------------------------------------------------------

BIG = {"letters": "a", "digits": "7", "Chinese": "好", "words": "ab ", "line breaks": "\n", "spaces": " ",
       "punctuation": "!?", "mixed": "a1 好\n", "surrogate pairs": "😀"}


@pytest.mark.parametrize("name", BIG if FULL else ["spaces"])
def test_a_line_of_10_mb_is_converted_or_named(folder, in_this_process, outcomes, name):
    piece = BIG[name]
    text = "x" + piece * (LONGEST // len(piece.encode())) + "y"
    raw = json.dumps({"prompt": "q", "pos_resp": text, "neg_resp": "b"}, ensure_ascii=False).encode()
    with outcomes.no_hang():
        outcomes.count("converted" if check_conversion(folder, file_of(raw)) else "refused")
        check_conversion(folder, file_of(raw[:-1]))


@given(raws=st.lists(lines(), min_size=200, max_size=200))
@fuzz(few=1, full=5)
def test_mutated_lines_through_the_processes_that_encode(folder, outcomes, raws):
    content = b"\n".join((sound(FIRST), *raws, sound(LAST)))
    source = emptied(folder, content)
    lines = list(parsed_lines(content))
    with outcomes.no_hang():
        report = convert_file(source, folder / "out.mindrecord", TOKENIZER, SEQ, TEMPLATE, skip_invalid=True,
                              num_workers=2, max_invalid=1)
    rows = [expected_row(row) for _, row in lines if is_usable(row, PAIR)]
    assert read_record(folder / "out.mindrecord") == [row for row in rows if row]
    assert report.invalid == len(lines) - len(rows)
