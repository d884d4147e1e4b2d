"""What `--keep` keeps of a row, whatever it is: an evaluation reads it back, and writes it beside the scores.

| test                             | proves                                                       | judged against     |
| test_what_is_kept_comes_back_... | keys, values, groups; rows that lack a key, or have too much | json; text without |
|                                  | under it, are left out                                       | MindRecord         |
"""
import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import convert_file
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import fuzz, one_line, outcomes_of
from test_lines import TEXTS, TOKENIZER, encoding_here

from mindrlhf.data import encoding_processes
from mindrlhf.data.preference import MOST_KEPT, Reading
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.sources import open_sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.errors import UserError
from mindrlhf.scoring.eval_rows import rows_of_records
from mindrlhf.scoring.pair_lines import PairLines
from mindrlhf.scoring.text_pairs import TextPairs

pytestmark = pytest.mark.stack

TEMPLATE, SEQ = "{prompt}:{response}", 16
OURS = {"pos_resp": "a", "neg_resp": "b", "margin": 0.5}  # what the format reads, beside the prompt
SCORES = ("chosen_score", "rejected_score")
# Names of a user, of the row's texts, of MindRecord's fields and of eval_scores.jsonl.
KEYS = st.one_of(st.sampled_from(["prompt", *OURS, "类型", "", " ", "a b", "a.b", "\ud800", "a\x00", "kept",
                                  "prompt_id", "chosen_answer", "chosen_input_ids", "end_ind", "pair", "\x1b[0m",
                                  *SCORES]), st.text(max_size=4))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS,
    st.sampled_from([10 ** 400, -0.0, 2 ** 63, 1e308, 5e-324]), st.integers(65_480, 65_540).map("x".__mul__))
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                      st.dictionaries(st.text(max_size=4), inner, max_size=3)),
                      max_leaves=6)


@pytest.fixture(scope="module")
def outcomes(request):
    yield from outcomes_of("kept")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_processes, "_encoded", encoding_here)
        yield tmp_path_factory.mktemp("kept")


@st.composite
def cases(draw):
    """(keys to keep, rows, each of which may lack some)."""
    keep = draw(st.lists(KEYS, min_size=1, max_size=3, unique=True))
    rows = []
    for number in range(draw(st.integers(1, 3))):
        values = {key: draw(VALUES) for key in (*keep, *draw(st.lists(KEYS, max_size=1)))
                  if key not in ("prompt", *OURS) and draw(st.integers(0, 9))}
        rows.append({**values, **OURS, "prompt": f"q{number}"})
    return tuple(keep), rows


def strict(value):
    """As text in which 1, 1.0 and True differ, and keys have an order."""
    return json.dumps(value)


def scored(folder, rows):
    """What an evaluation writes of rows."""
    with PairLines(folder / "eval_scores.jsonl", "score") as lines:
        lines.begin()
        for row in rows:
            lines.add(row, (0.5, -1.25))
        lines.finish()
    return [json.loads(line) for line in (folder / "eval_scores.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


@example((("n",), [{"n": "\ud800", "prompt": "q", **OURS}]))
@example((("n",), [{"n": "x" * (MOST_KEPT - 9), "prompt": "q", **OURS}]))
@example((("n", "prompt"), [{"n": None, "prompt": " q ", **OURS}]))
@given(cases())
@fuzz(few=5, full=500)
def test_what_is_kept_comes_back_as_it_was(folder, outcomes, case):
    keep, rows = case
    path, record, reading = folder / "rows.jsonl", folder / "out.mindrecord", Reading((), None, keep)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    kept = [{key: row[key] for key in keep} if all(key in row for key in keep) else None for row in rows]
    usable = [values for values in kept if values is not None and len(strict(values)) <= MOST_KEPT]
    options = {"reading": reading, "skip_invalid": True, "max_invalid": 1}
    with outcomes.no_hang():
        if not usable:
            with pytest.raises(UserError, match="no usable pair") as error:
                convert_file(path, record, TOKENIZER, SEQ, TEMPLATE, **options)
            one_line(error.value)
            outcomes.count("without a usable row")
            return
        report = convert_file(path, record, TOKENIZER, SEQ, TEMPLATE, **options)
        assert report.invalid == len(rows) - len(usable)
        outcomes.count("rows refused", report.invalid)
        found = list(rows_of_records(RecordSet.open(str(record)), keep))
        assert [strict(row.values) for row in found] == list(map(strict, usable))
        if set(keep) & set(SCORES):
            with pytest.raises(UserError, match="which its score would replace, expected none: --score_key NAME"):
                scored(folder, found)
            outcomes.count("names taken")
            return
        assert list(map(strict, scored(folder, found))) == [
            strict({**values, "chosen_score": 0.5, "rejected_score": -1.25}) for values in usable]
        outcomes.count("rows kept", len(usable))
        if not report.invalid:
            sources = open_sources([(path, None)], Path(), "cvalues", reading)
            read = list(TextPairs(sources, TextEncoder(TOKENIZER, TEMPLATE, False, "cut"), SEQ).read(Counter()))
            assert [row.group for row in read] == [row.group for row in found]
            assert [strict({key: row.values[key] for key in keep}) for row in read] == list(map(strict, usable))
