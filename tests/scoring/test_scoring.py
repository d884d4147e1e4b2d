"""Scoring in packed rows, and what evaluation and inference make of it.

| test                                     | proves                                 | judged against           |
| test_scores_are_those_of_each_text_alone | texts of any length, one answer or two | the padded path, 1e-5    |
| test_many_answers_are_scored_ ...        | more than fit into a row               | each answer alone, 1e-5  |
| test_answers_of_a_prompt_share_it ...    | one group, or as many as have room     | lengths by hand          |
| test_scores_come_in_the_order ...        | sorting by length is undone            | the scores in one window |
| test_questions_are_read_as ...           | memory does not grow with the input    | how far it has been read |
| test_every_very_short_text ...           | rows have room for all that fit        | the score of one of them |
| test_a_text_that_is_nan_spoils_no_other  | healthy neighbours keep their scores   | the model without NaN    |
| test_row_shapes ...                      | few graphs; two whole texts fit        | property                 |
| test_an_evaluation_of_data_without_...   | damage that may go unnoticed is said   | the log                  |
| test_an_output_that_is_an_input_...      | inputs are kept; devices are outputs   | messages                 |
| test_the_batch_size_does_not_move ...    | the figures, in the data's order       | another batch size, 1e-5 |
| test_a_checkpoint_that_cannot_be_ ...    | the others are evaluated; one branch   | names, reasons by hand   |
| test_a_prompt_and_its_answers_are_ ...   | template, tokenizer and network        | token ids by hand, 1e-5  |
| test_pairs_that_are_nan_are_counted ...  | figures of the others; eval.json       | arrays by hand           |
| test_pairs_of_text_have_groups_ ...      | eval.json, eval_scores.jsonl, the log  | lengths of the texts     |
| test_pairs_of_mindrecord_have_ ...       | groups, own keys, texts, of MindRecord | rows by hand             |
| test_what_was_not_kept_ ...              | refused before anything is loaded      | messages                 |
| test_what_becomes_of_pairs_that_are_ ... | pairs cut and left out, for the log    | rows by hand             |
| test_a_picture_that_cannot_be_drawn ...  | the figures are there, no earlier one  | eval.json, files         |
| test_a_copied_checkpoint_is_scored_ ...  | template, dimensions, number of a run  | what was noted           |
| test_inference_writes_the_rows ...       | rows, scores, answers belong together  | lengths of the texts     |
"""
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import yaml
from conftest import EXAMPLE, PRODUCTION_YAML, SAMPLE, TINY_YAML, dimensions_of
from helpers import convert_file
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor

from mindrlhf.config.check import typed_config
from mindrlhf.config.read import read_config
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.preference import AS_THEY_ARE
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.sources import open_sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.models import row_scores
from mindrlhf.models.row_scores import row_shapes
from mindrlhf.pair_figures import PairScores
from mindrlhf.scoring import eval_report, text_scorer
from mindrlhf.scoring import evaluate as evaluation
from mindrlhf.scoring import scorer as scoring
from mindrlhf.scoring.eval_report import EvalResult
from mindrlhf.scoring.evaluate import evaluate
from mindrlhf.scoring.infer import infer
from mindrlhf.scoring.pair_lines import WrongPairs
from mindrlhf.scoring.plan import EvaluationPlan, InferencePlan, TextScoringPlan, plan_evaluation, plan_inference
from mindrlhf.scoring.report import NotFiniteScores
from mindrlhf.scoring.scorer import Checkpoint, Scorer
from mindrlhf.scoring.text_pairs import TextPairs
from mindrlhf.scoring.text_scorer import TextScorer
from mindrlhf.weights.ckpt_file import notes_as_bytes

pytestmark = pytest.mark.stack

SEQ = 512
PAD = 63


@pytest.fixture(scope="module")
def configure(reference):
    """A function that gives the tiny YAML's configuration with the reference's dimensions."""
    def make(seq_length=SEQ, batch_size=1):
        mapping = read_config(TINY_YAML, {"runner_config.batch_size": batch_size})
        mapping["model"]["model_config"].update(dimensions_of(reference), seq_length=seq_length)
        return typed_config("run.yaml", mapping)
    return make


@pytest.fixture(scope="module")
def checkpoint(scoring_model, tmp_path_factory):
    """The reference's weights as a file."""
    path = tmp_path_factory.mktemp("checkpoint") / "reference.ckpt"
    ms.save_checkpoint(scoring_model, str(path))
    return path


@pytest.fixture(scope="module")
def scorer(configure, checkpoint):
    scorer = Scorer(configure(), MindFormerConfig(**configure().mapping))
    scorer.load(Checkpoint(checkpoint))
    return scorer


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def make_texts(*lengths, seed=0):
    """Texts of so many tokens, the longer of which begin as the shorter ones do."""
    tokens = np.random.default_rng(seed).integers(0, 60, max(lengths) + len(lengths))
    return [np.concatenate([tokens[:length - 1], tokens[-1 - number:][:1]]) for number, length in enumerate(lengths)]


def two_whole_texts(beyond):
    """Nothing in common, one exactly as long as the model reads, one longer: the longest row is full."""
    return [make_texts(SEQ, seed=2)[0], np.concatenate([make_texts(SEQ, seed=3)[0], np.arange(beyond)])]


@pytest.fixture(scope="module")
def questions():
    """One answer or two, from a single token on; rows of two lengths."""
    return [make_texts(40, 60), make_texts(1), make_texts(17), two_whole_texts(30), make_texts(1, 30, seed=1),
            make_texts(2, 3), make_texts(100, 99, seed=5), [*make_texts(50), *make_texts(50)], make_texts(5, 250)]


@pytest.mark.further
def test_scores_are_those_of_each_text_alone(scorer, questions, build_model, load_reference_weights):
    found = list(scorer.score(iter(questions)))
    assert [len(scores) for scores in found] == [len(texts) for texts in questions]
    model = load_reference_weights(build_model(seq_length=SEQ)).set_train(False)
    texts = [text[:SEQ] for texts in questions for text in texts]
    rows = np.stack([np.pad(text, (0, SEQ - len(text)), constant_values=PAD) for text in texts]).astype(np.int32)
    ends = np.array([len(text) for text in texts], np.int32)
    mask = (np.arange(SEQ) < ends[:, None]).astype(np.int32)
    expected = model(Tensor(rows), None, Tensor(mask), None, Tensor(ends)).asnumpy()[:, 0]
    np.testing.assert_allclose(sum(found, []), expected, rtol=1e-5, atol=1e-5)
    assert len({round(value, 3) for value in expected.tolist()}) > 10


@pytest.mark.further
def test_many_answers_are_scored_however_long_or_short_they_are(scorer):
    """More tokens, or more texts, than a row has room for."""
    many = [*make_texts(*[500] * 3, 1, 499), *make_texts(*[500] * 4, seed=9)]
    short = make_texts(*[3] * 9)
    expected = [next(scorer.score([[text]]))[0] for text in (*many, *short)]
    first, *others = scorer.score([many, *[short] * 60])
    np.testing.assert_allclose([*first, *others[-1]], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(others, [others[0]] * 60, rtol=1e-5, atol=1e-5)


def test_answers_of_a_prompt_share_it_as_far_as_a_row_has_room(scorer):
    """All of them in one group, or as many as there is room for; of very short or equal ones two at a time."""
    random = np.random.default_rng(4)
    prompt, longest = random.integers(0, 90, 100), scorer.shapes[-1][1]

    def sizes(count, tokens):
        texts = [np.append(prompt, random.integers(0, 90, tokens)).astype(np.int32) for _ in range(count)]
        found = scorer.groups(texts)
        assert all(len(group) <= longest for group in found)
        return [len(group.ends) for group in found]

    assert sizes(5, 20) == [5]
    assert sizes(1, 20) == [1]
    fits = (longest - len(prompt)) // 50
    assert sizes(2 * fits + 1, 50) == [fits, fits, 1]
    assert sum(sizes(40, 1)) == 40
    assert max(sizes(40, 1)) <= 2 + longest // 16
    assert [len(group.ends) for group in scorer.groups([np.int32([1, 2])] * 5)] == [2, 2, 1]


@pytest.mark.further
def test_what_is_beyond_the_sequence_length_does_not_count(scorer):
    cut, whole = scorer.score([two_whole_texts(40), two_whole_texts(0)])
    assert cut == pytest.approx(whole, rel=1e-5)


def short_questions(count):
    """Questions of 20 to 49 tokens, no two alike, with one answer or two in turn."""
    for number in range(count):
        yield make_texts(*[20 + number % 30, 21 + number % 17][:1 + number % 2], seed=number)


@pytest.mark.further
def test_scores_come_in_the_order_of_the_questions(scorer, monkeypatch):
    expected = list(scorer.score(short_questions(30)))
    monkeypatch.setattr(row_scores, "_WINDOW", 7)
    found = list(scorer.score(short_questions(30)))
    assert [len(scores) for scores in found] == [1, 2] * 15
    np.testing.assert_allclose(sum(found, []), sum(expected, []), rtol=1e-5, atol=1e-5)
    assert len({round(value, 4) for value in sum(expected, [])}) == 45


@pytest.mark.further
def test_questions_are_read_as_they_are_needed(scorer, monkeypatch):
    monkeypatch.setattr(row_scores, "_WINDOW", 5)
    read = 0

    def counted():
        nonlocal read
        for question in short_questions(13):
            read += 1
            yield question

    scores = scorer.score(counted())
    assert read == 0
    seen = []
    for _ in scores:
        seen.append(read)
    assert seen == [5] * 5 + [10] * 5 + [13] * 3


def test_no_question_is_no_score(scorer):
    assert list(scorer.score([])) == []


@pytest.mark.parametrize("answers", [1, 2])
def test_every_very_short_text_gets_a_score(scorer, answers):
    """Hundreds of them find room in a row."""
    question = [np.array([7 + answer], np.int32) for answer in range(answers)]
    expected = next(scorer.score([question]))
    found = list(scorer.score([question] * 300))
    assert [len(scores) for scores in found] == [answers] * 300
    np.testing.assert_allclose(found, [expected] * 300, rtol=1e-5, atol=1e-5)


@pytest.fixture
def nan_of_token_61(scorer):
    """The scorer's model with a token that is NaN, which `make_texts` never uses."""
    embedding = next(parameter for parameter in scorer.network.get_parameters()
                     if parameter.name == "transformer.embedding.embedding_weight")
    whole = embedding.asnumpy().copy()
    damaged = whole.copy()
    damaged[61] = np.nan
    embedding.set_data(Tensor(damaged))
    yield
    embedding.set_data(Tensor(whole))


def with_token_61(texts, *numbers):
    """The texts of a question, some of them with the token behind their common beginning."""
    return [np.concatenate([text[:-1], [61]]) if number in numbers else text for number, text in enumerate(texts)]


@pytest.mark.further
def test_a_text_that_is_nan_spoils_no_other(scorer, questions, request):
    expected = list(scorer.score(questions))
    request.getfixturevalue("nan_of_token_61")
    changed = [with_token_61(texts, 0) if number in (2, 5) else texts for number, texts in enumerate(questions)]
    found = list(scorer.score(changed))
    for number, (scores, healthy) in enumerate(zip(found, expected)):
        nan = [number in (2, 5) and answer == 0 for answer in range(len(scores))]
        assert np.isnan(scores).tolist() == nan
        np.testing.assert_allclose(np.array(scores)[~np.array(nan)], np.array(healthy)[~np.array(nan)], rtol=1e-5,
                                   atol=1e-5)


def test_a_window_of_nothing_but_nan_is_nan(scorer, nan_of_token_61):
    found = list(scorer.score([with_token_61(make_texts(5, 9), 0, 1)] * 3))
    assert np.isnan(found).all()
    assert np.shape(found) == (3, 2)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("seq_length", [1, 12, 100, 128, 129, 1000, 1024, 8192])
def test_row_shapes_hold_two_whole_texts_in_at_most_five_lengths(seq_length, split):
    for tokens in (seq_length, 4096, 8192):
        shapes = row_shapes(seq_length, tokens, split)
        lengths = [length for _, length in shapes]
        assert 1 <= len(lengths) <= 5
        assert lengths == sorted(set(lengths))
        assert 2 * seq_length <= lengths[-1] < 2 * seq_length + 16
        assert all(length % 16 == 0 for length in lengths)
        for rows, length in shapes:
            assert rows % split == 0
            assert rows - split < max(tokens // length, 1) <= rows


# --- evaluation -----------------------------------------------------------------------------------------------------

@pytest.fixture
def start(monkeypatch):
    """Let a run go on in this process, whose device is set up."""
    for module in (evaluation, text_scorer):
        monkeypatch.setattr(module, "set_up_mindspore",
                            lambda config, verbose: MindFormerConfig(**config.mapping))


@pytest.fixture
def pairs(tmp_path):
    """(a MindRecord file of 20 pairs with padding in front, their texts)."""
    texts = [make_texts(10 + number % 9, 5 + number, seed=number) for number in range(20)]
    with RecordWriter(tmp_path / "eval.mindrecord") as writer:
        for chosen, rejected in texts:
            writer.write(encode_pair(chosen, rejected, 28, PAD, "left"))
        writer.finish({"seq_length": 28, "pad_token_id": PAD})
    return tmp_path / "eval.mindrecord", texts


@pytest.mark.further
def test_an_evaluation_of_data_without_checksums_warns(configure, checkpoint, pairs, in_tmp_path, monkeypatch):
    path, _ = pairs
    warnings = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: warnings.append(text % values))
    for sidecar, expected in [("", 0), ("{}", 1)]:
        if sidecar:
            path.with_name("eval.mindrecord.json").write_text(sidecar)
        records = RecordSet.open(str(path))
        evaluate(EvaluationPlan(configure(64), str(checkpoint), {}, records, False))
        assert sum(f"{path}: no checksums of it, damage may go unnoticed" in text for text in warnings) == expected
    assert (in_tmp_path / "output").is_dir()


@pytest.mark.usefixtures("start")
@pytest.mark.further
def test_the_batch_size_does_not_move_an_evaluation(configure, checkpoint, scorer, pairs, in_tmp_path,
                                                     monkeypatch):
    """Data of a smaller sequence length than the model's; the last batch is a smaller one."""
    path, texts = pairs
    log = []
    monkeypatch.setattr(logger, "info", lambda text, *values, **_: log.append(text % values))
    results = []
    for size in (1, 6):
        log.clear()
        results += evaluate(EvaluationPlan(configure(64, size), str(checkpoint), {}, RecordSet.open(str(path)), False))
        lines = [line for line in log if line.startswith("acc: [")]
        assert len(lines) == -(-20 // size)
        assert lines[-1].endswith(f"avg acc: [{results[-1].figures['accuracy']}]")
    one, other = results
    expected = np.array(list(scorer.score(texts)))
    for result in results:
        np.testing.assert_allclose(result.scores.chosen, expected[:, 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.scores.rejected, expected[:, 1], rtol=1e-5, atol=1e-5)
        assert result.scores.chosen_tokens.tolist() == [len(chosen) for chosen, _ in texts]
        assert result.scores.rejected_tokens.tolist() == [len(rejected) for _, rejected in texts]
    assert one.figures["accuracy"] == other.figures["accuracy"] == np.mean(expected[:, 0] > expected[:, 1])
    assert one.figures["margin"] == pytest.approx(np.mean(expected[:, 0] - expected[:, 1]), abs=1e-5)
    assert 0 < one.figures["accuracy"] < 1
    assert (in_tmp_path / "output" / "eval_scores.png").is_file()
    entry, = json.loads((in_tmp_path / "output" / "eval.json").read_text(encoding="utf-8"))
    assert entry == {"checkpoint": str(checkpoint), "data": [str(path)], **other.figures}
    assert set(entry) == {
        "checkpoint", "data", "pairs", "not_finite", "ties", "loss", "accuracy", "accuracy_interval", "margin", "mean",
        "std", "calibration_error", "chosen_longer", "chosen_shorter", "length_correlation", "groups"}
    assert read_lines("output/eval_scores.jsonl") == [
        {"pair": number, "chosen_score": chosen, "rejected_score": rejected} for number, (chosen, rejected)
        in enumerate(zip(other.scores.chosen.tolist(), other.scores.rejected.tolist()))]


@pytest.mark.usefixtures("start")
def test_pairs_that_are_nan_are_counted_apart(configure, checkpoint, pairs, in_tmp_path, monkeypatch):
    path, _ = pairs
    scores = np.random.default_rng(0).normal(0, 1, (20, 2)).astype(np.float32)
    scores[3, 0], scores[7, 1], scores[11] = np.nan, np.inf, -np.inf
    monkeypatch.setattr(Scorer, "score", lambda _self, questions: iter([row.tolist() for row, _ in
                                                                        zip(scores, questions)]))
    with pytest.raises(NotFiniteScores) as caught:
        evaluate(EvaluationPlan(configure(64, 6), str(checkpoint), {}, RecordSet.open(str(path)), False))
    assert caught.value.code == 3
    assert str(caught.value) == ("3 rows have a score that is NaN or infinite, not counted in accuracy and margin: " +
                                 ", ".join(f"{path}: pair {number} ({checkpoint})" for number in (3, 7, 11)))
    content = (in_tmp_path / "output" / "eval.json").read_text(encoding="utf-8")
    result, = json.loads(content, parse_constant=pytest.fail)
    finite = np.delete(scores, [3, 7, 11], axis=0)
    assert (result["pairs"], result["not_finite"]) == (20, 3)
    assert result["accuracy"] == pytest.approx(np.mean(finite[:, 0] > finite[:, 1]))
    assert result["margin"] == pytest.approx(np.mean(finite[:, 0] - finite[:, 1]), abs=1e-6)
    assert result["mean"] == pytest.approx(np.mean(finite), abs=1e-6)
    written = read_lines("output/eval_scores.jsonl")
    assert [row["pair"] for row in written if None in row.values()] == [3, 7, 11]
    assert (written[3]["chosen_score"], written[3]["rejected_score"]) == (None, scores[3, 1])
    assert (in_tmp_path / "output" / "eval_scores.png").is_file()


@pytest.mark.further
@pytest.mark.usefixtures("start")
def test_pairs_of_text_have_groups_and_their_own_keys(configure, checkpoint, in_tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Scorer", CountingScorer)  # the longer answer is the better one
    lengths = [(2, 1, "拒绝"), (1, 9, "拒绝"), (4, 1, "风险"), (2, 3, 7)]
    rows = [{"prompt": "问" * 200, "pos_resp": "b" * chosen, "neg_resp": "c" * rejected, "pos_type": kind, "n": [1]}
            for chosen, rejected, kind in lengths]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = open_sources([(Path("rows.jsonl"), None)], Path(), None, AS_THEY_ARE._replace(keep=("pos_type",)))
    log = []
    monkeypatch.setattr(logger, "info", lambda text, *values, **_: log.append(text % values))
    texts = TextPairs(sources, TextEncoder(CharacterTokenizer(), "{prompt}:{response}"), 512)
    evaluate(EvaluationPlan(configure(), str(checkpoint), {}, texts, False))
    entry, = json.loads(Path("output/eval.json").read_text(encoding="utf-8"))
    assert {group: (figures["pairs"], figures["accuracy"]) for group, figures in entry["groups"].items()} == {
        "拒绝": (2, 0.5), "风险": (1, 1), "7": (1, 0)}
    assert (entry["chosen_longer"], entry["length_correlation"]) == ({"pairs": 2, "accuracy": 1}, pytest.approx(1))
    assert read_lines("output/eval_scores.jsonl") == [
        {**row, "chosen_score": 201 + len(row["pos_resp"]), "rejected_score": 201 + len(row["neg_resp"])}
        for row in rows]
    table, wrong = ("\n".join(line for line in log if line.startswith(begin)) for begin in ("accuracy by", "most"))
    assert "\n1   拒绝      2    0.5000  0.0945 to 0.9055  -3.5000" in table
    assert wrong.splitlines()[1:3] == ["1. rows.jsonl:2 (拒绝): chosen 202.0000, rejected 210.0000",
                                       f"   prompt: {'问' * 200}"]
    assert len(wrong.splitlines()) == 9


@pytest.fixture
def kept(tmp_path):
    """MindRecord files of two pairs whose rows' key "kind" is kept, and of one without."""
    tokenizer = open_tokenizer(SAMPLE / "tokenizer.model")
    paths = []
    for name, kinds, keep in (("a", ["好 > 坏", 7], ("kind",)), ("b", ["x"], ())):
        rows = [{"prompt": f"p{kind}", "pos_resp": "xy", "neg_resp": "xyz", "kind": kind} for kind in kinds]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        convert_file(tmp_path / "rows.jsonl", tmp_path / f"{name}.mindrecord", tokenizer, 64, "{prompt}:{response}",
                     reading=AS_THEY_ARE._replace(keep=keep))
        paths.append(str(tmp_path / f"{name}.mindrecord"))
    return tokenizer, paths


@pytest.mark.further
@pytest.mark.usefixtures("start", "in_tmp_path")
def test_pairs_of_mindrecord_have_the_groups_that_were_kept(configure, checkpoint, kept, monkeypatch):
    monkeypatch.setattr(evaluation, "Scorer", CountingScorer)
    tokenizer, (with_kind, without) = kept
    log = []
    monkeypatch.setattr(logger, "info", lambda text, *values, **_: log.append(text % values))
    records = RecordSet.open([with_kind])
    evaluate(EvaluationPlan(configure(), str(checkpoint), {}, records, False, "score", ("kind",), tokenizer))
    entry, = json.loads(Path("output/eval.json").read_text(encoding="utf-8"))
    assert {group: figures["pairs"] for group, figures in entry["groups"].items()} == {"好 > 坏": 1, "7": 1}
    assert [row["kind"] for row in read_lines("output/eval_scores.jsonl")] == ["好 > 坏", 7]
    wrong = next(line for line in log if line.startswith("most confidently wrong"))
    assert f"1. {with_kind}: pair 0 (好 > 坏): chosen" in wrong
    assert "   prompt: p7:xy\n   chosen: \n   rejected: z" in wrong
    evaluate(EvaluationPlan(configure(), str(checkpoint), {}, RecordSet.open([with_kind, without]), False))
    assert [list(row)[0] for row in read_lines("output/eval_scores.jsonl")] == ["kind", "kind", "pair"]


def test_what_was_not_kept_is_no_group(kept, in_tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from reward_eval import parse_args
    _, (with_kind, without) = kept
    ms.save_checkpoint([{"name": "a", "data": Tensor([1.0])}], "a.ckpt")

    def plan(*flags):
        return plan_evaluation(parse_args(["--config", str(TINY_YAML), "--distributed_ckpt_path", "a.ckpt",
                                           "--set", "train_dataset.pad_token_id=996", *flags]))

    for flags, message in [
        (["--eval_dataset", without, "--group_by", "kind"],
         f"--group_by: {without} has no key 'kind', expected it among those that were kept (none): convert with --keep "
         "kind, or evaluate on the text with --data_file"),
        (["--eval_dataset", with_kind, "--group_by", "kind,type"],
         "has no key 'type', expected it among those that were kept (kind): convert with --keep kind,type"),
        (["--data_file", "rows.jsonl", "--group_by", "type", "--tokenizer", str(SAMPLE / "tokenizer.model")],
         "rows.jsonl:1: key 'type' missing, which --keep or --group_by names; found prompt, pos_resp, neg_resp, kind"),
        (["--eval_dataset", with_kind, "--tokenizer", __file__], "not a tokenizer file"),
    ]:
        with pytest.raises(UserError) as error:
            plan(*flags)
        assert message in str(error.value)
    assert plan("--eval_dataset", with_kind, "--group_by", "kind").group_by == ("kind",)


def test_an_evaluation_without_a_finite_pair_has_no_figures():
    result = EvalResult("a.ckpt", PairScores(np.array([np.nan, 1], np.float32), np.array([0, np.inf], np.float32),
                                             np.array([3, 4]), np.array([5, 4])), [None, None], WrongPairs())
    assert result.as_line() == ("a.ckpt: 2 pairs, accuracy -, mean margin - (of the 0 pairs whose scores are finite; "
                                "of 2 they are NaN or infinite)")


@pytest.mark.further
@pytest.mark.usefixtures("start")
def test_a_picture_that_cannot_be_drawn_is_a_warning(configure, checkpoint, pairs, in_tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no display")

    warned = []
    (in_tmp_path / "output").mkdir()
    for name in ("scores", "steps"):  # of an earlier evaluation, of several checkpoints
        (in_tmp_path / "output" / f"eval_{name}.png").write_bytes(b"earlier")
    monkeypatch.setattr(eval_report, "plot_score_histogram", fails)
    monkeypatch.setattr(logger, "warning", lambda text, *values: warned.append(text % values))
    evaluate(EvaluationPlan(configure(64, 6), str(checkpoint), {}, RecordSet.open(str(pairs[0])), False))
    assert warned[-1] == "output/eval_scores.png cannot be drawn: no display"
    assert sorted(path.name for path in (in_tmp_path / "output").glob("eval*")) == [
        "eval.json", "eval_groups.png", "eval_scores.jsonl"]


def save_step(folder, scoring_model, step, number=0, branch=0, left=(), **model):
    """The reference's weights as a step of a run's branch."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"a_rank_0_{number}-1_{step}.ckpt" if number else f"a_rank_0-1_{step}.ckpt")
    run = {"number": number, "identity": "ab", "branch": branch, "left": list(left), "step": step}
    notes = np.frombuffer(notes_as_bytes({"run": run, "model": model}), np.uint8)
    ms.save_checkpoint(scoring_model, str(path), append_dict={"training_notes": Tensor(notes)})
    path.chmod(0o600)
    return path


@pytest.mark.further
@pytest.mark.usefixtures("start", "in_tmp_path")
def test_a_checkpoint_that_cannot_be_evaluated_has_its_reason_in_the_table_and_the_others_their_figures(
        configure, scoring_model, pairs, tmp_path, monkeypatch):
    """Of the last run, without the step that it left: step 4 is damaged, 5 of another model, 6 removed meanwhile."""
    folder = tmp_path / "checkpoint"
    save_step(folder, scoring_model, 1)
    save_step(folder, scoring_model, 9, number=1)  # left
    whole, damaged, other, removed, last = (
        save_step(folder, scoring_model, step, 1, int(step > 3), [(0, 3)] * (step > 3), **model)
        for step, model in ((3, {}), (4, {}), (5, {"rope_ratio": 500}), (6, {}), (7, {})))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    found = Scorer.checkpoints
    monkeypatch.setattr(Scorer, "checkpoints", lambda self, path: (found(self, path), removed.unlink())[0])
    log = []
    monkeypatch.setattr(logger, "info", lambda text, *values, **_: log.append(text % values))
    drawn, plot = [], eval_report.plot_accuracy_over_steps
    monkeypatch.setattr(eval_report, "plot_accuracy_over_steps",
                        lambda steps, *figures: (drawn.append((steps, figures[-2])), plot(steps, *figures)))
    plan = EvaluationPlan(configure(64), str(folder), {}, RecordSet.open(str(pairs[0])), True)
    with pytest.raises(UserError, match=rf"{folder}: 3 of 5 checkpoints could not be evaluated: .*; .*; "):
        evaluate(plan)
    heading, _, *rows = next(line for line in log if line.startswith("all checkpoints:")).splitlines()[1:]
    assert heading.endswith("not evaluated")
    assert [row.split()[0] for row in rows] == list(map(str, (whole, damaged, other, removed, last)))
    assert [row.split()[1] for row in rows] == ["20", "-", "-", "-", "20"]
    for row, reason in zip(rows, (None, "not readable as a checkpoint, damaged or cut short",
                                  "model.model_config.rope_ratio is 1, expected 500, with which the model was trained",
                                  "no such file or folder", None)):
        assert reason is None or reason in row
    for name in ("scores", "groups", "steps"):
        assert (tmp_path / "output" / f"eval_{name}_1.png").is_file()
    assert drawn == [([3, 7], "step")]
    figures = json.loads((tmp_path / "output" / "eval_1.json").read_text(encoding="utf-8"))
    assert [entry["checkpoint"] for entry in figures] == list(map(str, (whole, damaged, other, removed, last)))
    assert ["not_evaluated" in entry for entry in figures] == [False, True, True, True, False]
    assert "no such file or folder" in figures[3]["not_evaluated"]
    assert len(read_lines("output/eval_scores_1.jsonl")) == 20


# --- inference ------------------------------------------------------------------------------------------------------

class CountingScorer(Scorer):
    """The score of a text is its number of tokens. Notes how many questions are scored together."""

    windows = []

    def __init__(self, config, run):
        self.rank, self.processes, self._semi_auto, self.seq_length = 0, 1, False, config.model.seq_length
        self.shapes = []

    def load(self, path):
        pass

    def _score_window(self, groups):
        self.windows.append(len(groups))
        return [(group.positions[group.ends] + 1).tolist() for group in groups]


class CharacterTokenizer:
    identity = {"file": "letters"}
    control_ids = {}

    def encode_batch(self, texts):
        return [[ord(letter) % 60 for letter in text] for text in texts]


@pytest.mark.usefixtures("start")
def test_a_prompt_and_its_answers_are_scored_without_a_file(configure, checkpoint, scorer):
    texts = TextScorer(TextScoringPlan(configure(64), str(checkpoint), {},
                                       TextEncoder(CharacterTokenizer(), "{prompt}:{response}")))
    found = texts.score("what", ["this", "that, and more", "x" * 100])
    whole = CharacterTokenizer().encode_batch(["what:this", "what:that, and more", "what:" + "x" * 100])
    expected, = scorer.score([[np.array(ids[:64], np.int32) for ids in whole]])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len({round(score, 4) for score in found}) == 3
    assert (texts.texts, texts.cut) == (3, 1)
    with pytest.raises(UserError, match="a text without a token cannot be scored: prompt ''"):
        TextScorer(TextScoringPlan(configure(64), str(checkpoint), {},
                                   TextEncoder(CharacterTokenizer(), "{prompt}{response}"))).score("", [""])


@pytest.mark.usefixtures("start")
def test_inference_writes_the_rows_in_their_order(configure, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(row_scores, "_WINDOW", 4)
    monkeypatch.setattr(text_scorer, "Scorer", CountingScorer)
    monkeypatch.setattr(CountingScorer, "windows", [])
    rows = [{"prompt": "p" * number, "response": "a" * number, "key": number} if number % 3 else
            {"prompt": "p" * number, "pos_resp": "b" * 2, "neg_resp": "c" * 3} for number in range(1, 11)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    infer(InferencePlan(configure(), str(checkpoint), {}, TextEncoder(CharacterTokenizer(), "{prompt}:{response}"),
                        tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == [{**row, "score": 2 * len(row["prompt"]) + 1} if "key" in row else
                       {**row, "pos_score": len(row["prompt"]) + 3, "neg_score": len(row["prompt"]) + 4}
                       for row in rows]
    assert CountingScorer.windows == [4, 4, 2]


def test_an_output_that_is_an_input_of_inference_is_refused_and_a_device_taken(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    ms.save_checkpoint([{"name": "a", "data": Tensor([1.0])}], str(tmp_path / "a.ckpt"))
    (tmp_path / "link").symlink_to("rows.jsonl")
    (tmp_path / "run.yaml").write_text(TINY_YAML.read_text(encoding="utf-8"), encoding="utf-8")

    def plan(output):
        return plan_inference(SimpleNamespace(
            config=str(tmp_path / "run.yaml"), seq_length=None, data_file=tmp_path / "rows.jsonl", prompt_template=None,
            tokenizer=str(SAMPLE / "tokenizer.model"), distributed_ckpt_path=str(tmp_path / "a.ckpt"),
            output_file=output, score_key="score", resume=False, skip_invalid=False, format=None, columns=(),
            normalize=None))

    for name, read, flag in [("rows.jsonl", "rows.jsonl", "--data_file"), ("link", "rows.jsonl", "--data_file"),
                             ("a.ckpt", "a.ckpt", "--distributed_ckpt_path"), ("run.yaml", "run.yaml", "--config")]:
        with pytest.raises(UserError) as error:
            plan(tmp_path / name)
        assert str(error.value) == (f"--output_file: {tmp_path / name} is {tmp_path / read}, which this run reads "
                                    f"({flag}), expected another name")
    assert plan(Path("/dev/null")).output_file == Path("/dev/null")


@pytest.mark.parametrize("rope_ratio", [1, 500])
def test_a_copied_checkpoint_is_scored_as_it_was_trained_or_not_at_all(in_tmp_path, monkeypatch, rope_ratio):
    monkeypatch.syspath_prepend(EXAMPLE)
    from reward_infer import parse_args
    notes = {"prompt_template": "Q {prompt} A {response}", "add_eos": True, "too_long": "cut_prompt",
             "model": {"rope_ratio": rope_ratio, "kv_channels": 16},
             "run": {"number": 1, "identity": "ab", "branch": 0, "left": [], "step": 3}}
    ms.save_checkpoint([{"name": "a", "data": Tensor([1.0])}, {
        "name": "training_notes", "data": Tensor(np.frombuffer(notes_as_bytes(notes), np.uint8))}], "rm.ckpt")
    (in_tmp_path / "in.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    args = parse_args(["--config", str(TINY_YAML), "--data_file", "in.jsonl", "--tokenizer",
                       str(SAMPLE / "tokenizer.model"), "--distributed_ckpt_path", "rm.ckpt"])
    if rope_ratio == 1:
        plan = plan_inference(args)
        assert (plan.encoder.noted, *plan.encoder.settings[1:]) == ("Q {prompt} A {response}", True, "cut_prompt")
        assert plan.output_file.name == "scores_1.jsonl"
    else:
        with pytest.raises(UserError, match=r"rope_ratio is 1, expected 500, with which the model was trained \(rm"):
            plan_inference(args)


@pytest.mark.parametrize(("found", "trained", "warned"), [
    ({"add_eos": True}, {}, True), ({}, {"add_eos": True}, True), ({}, {}, False),
    ({"add_eos": True}, {"add_eos": True}, False)])
def test_another_end_of_texts_than_in_training_is_warned_of(monkeypatch, found, trained, warned):
    said = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    known = {"prompt_template": "{prompt}{response}"}
    scoring.warn_of_end({**known, **found}, {**known, **trained}, "a.mindrecord")
    end = bool(found.get("add_eos"))
    assert said == [f"--add_eos of a.mindrecord is {end}, the model was trained with {not end}: its scores, which are "
                    "read at a text's last token, mean little"] * warned
    scoring.warn_of_end({**known, **found}, {}, "a.mindrecord")  # not known
    assert len(said) == warned


@pytest.mark.parametrize(("flags", "message"), [
    (["--data_file", "a.jsonl"], "argument --data_file: needs --tokenizer, expected both"),
    (["--data_file", "a.jsonl", "--eval_dataset", "a.mindrecord"], "not allowed with argument"),
    (["--eval_dataset", "a.mindrecord", "--format", "explicit"], "argument --format: has an effect with --data_file"),
    (["--add_eos", "True"], "argument --add_eos: has an effect with --data_file only"),
    (["--group_by", "a,,b"], "argument --group_by: found 'a,,b', expected names of keys, each once"),
])
def test_flags_of_text_belong_together(flags, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLE)
    from reward_eval import parse_args
    with pytest.raises(SystemExit) as error:
        parse_args(["--config", "run.yaml", "--distributed_ckpt_path", "a.ckpt", *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [
    ("", "no pair in it, expected at least one"),
    ('{"prompt": "a", "pos_resp": "b"}\n', "a.jsonl:1: key 'neg_resp' missing"),
])
def test_text_without_pairs_is_refused_before_anything_is_loaded(content, message, monkeypatch, in_tmp_path):
    monkeypatch.syspath_prepend(EXAMPLE)
    from reward_eval import parse_args
    Path("a.jsonl").write_text(content, encoding="utf-8")
    ms.save_checkpoint([{"name": "a", "data": Tensor([1.0])}], "a.ckpt")
    with pytest.raises(UserError) as error:
        plan_evaluation(parse_args(["--config", str(TINY_YAML), "--distributed_ckpt_path", "a.ckpt", "--data_file",
                                    "a.jsonl", "--tokenizer", str(SAMPLE / "tokenizer.model")]))
    assert message in str(error.value)


def test_what_becomes_of_pairs_that_are_read_as_text_is_said(in_tmp_path):
    """Of seven tokens: one pair as it is, one cut, one the same after the cut, one the same before, and a tie."""
    pairs = [["a", "b"], ["a", "b" * 9], ["b" * 9, "b" * 8], ["a", "a"]]
    rows = [{"prompt": "q", "responses": answers, "scores": [1, 0]} for answers in pairs]
    rows.append({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = open_sources([(Path("rows.jsonl"), None)], Path(), None, AS_THEY_ARE)
    texts = TextPairs(sources, TextEncoder(CharacterTokenizer(), "{prompt}:{response}"), 7)
    for _ in range(2):
        counts = Counter()
        assert [list(map(len, row.ids)) for row in texts.read(counts)] == [[3, 3], [3, 7]]
        assert texts.account(counts) == (
            "rows.jsonl: format answers, 2 pairs, of which 1 are cut at 7 tokens; pairs left out: 1 for a difference "
            "that the cut took; 1 for two equal answers; 1 for equally good answers")


def test_a_pipeline_is_not_scored_in_and_all_problems_are_told_at_once(tmp_path):
    config = yaml.safe_load(PRODUCTION_YAML.read_text(encoding="utf-8"))
    config["parallel_config"].update(data_parallel=2, pipeline_stage=2, micro_batch_num=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    args = SimpleNamespace(config=str(tmp_path / "run.yaml"), seq_length=None, eval_dataset=None, data_file=None,
                           batch_size=None, distributed_ckpt_path="absent", load_all_ckpt=False)
    with pytest.raises(UserError) as error:
        plan_evaluation(args)
    first, second, third = error.value.messages
    assert first.startswith("--distributed_ckpt_path: absent: no such file or folder")
    assert second.startswith("parallel_config.pipeline_stage is 2, expected 1 to score")
    assert third.startswith("no data: give --eval_dataset, or eval_dataset.data_loader.dataset_dir in the YAML")
