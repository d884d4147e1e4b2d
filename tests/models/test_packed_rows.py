"""Packed rows through the model: what they give is what padded rows give.

| test                                      | proves                               | judged against               |
| test_packed_rows_give_the_loss ...        | loss, figures, every gradient        | the padded path, 1e-5        |
| test_ranks_and_micro_batches ...          | what each counts in the mean         | the padded path, 1e-5        |
| test_packed_end_scores_equal_transformers | each text's score; rope ratio 1, 500 | transformers' GlmModel, 1e-4 |
| test_packed_end_scores_equal_those ...    | the same                             | the padded path, 1e-5        |
| test_a_changed_segment ..., ..._position  | the comparisons above can fail       | the row, one value changed   |
| test_what_stands_in_another_group ...     | texts do not see each other          | the row, other ids changed   |
| test_segment_mask_by_hand                 | who sees whom                        | literal arrays               |
"""
import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE_GRAPHS, dimensions_of
from helpers import loss_and_gradients
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindspore import Tensor, ops

from mindrlhf.data.dataset import batch_pairs
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.packed_steps import PackedSteps
from mindrlhf.data.pairs import Pair
from mindrlhf.data.row_packing import pack_groups, plan_steps, segment_stride, text_group
from mindrlhf.models.masks import SegmentMask

pytestmark = pytest.mark.stack

PAD = 47              # in the vocabulary of every reference case
SEQ = 32              # S; packed rows have twice as many
ROWS, LENGTH, TEXTS = 4, 64, 8
PAIRS = 6             # of each case: all of them share the graph of six padded pairs and that of four packed rows


def make_pairs(sizes, prompts="own"):
    """Pairs of (prompt, chosen, rejected) tokens, each with a prompt of its "own", or all with the "same" one."""
    random = np.random.default_rng(2)
    for prompt, chosen, rejected in sizes:
        common = np.arange(prompt) + 1 if prompts == "same" else random.integers(0, 60, prompt)
        yield tuple(np.concatenate([common, random.integers(low, low + 30, count)]).astype(np.int32)
                    for low, count in ((0, chosen), (30, rejected)))


# (prompt, chosen, rejected) tokens of six pairs, and in which of the four rows they stand
CASES = {
    # several in a row, one alone, an empty row; very different lengths, nothing in common
    "mixed": (list(make_pairs([(5, 4, 9), (0, 3, 3), (2, 29, 1), (3, 10, 10), (0, 1, 6), (1, 1, 1)])),
              ((2,), (0, 3, 1), (4, 5), ())),
    # a pair that fills its row; an answer of no token, so that one text is the beginning of the other
    "full row": (list(make_pairs([(0, 32, 31), (30, 2, 1), (7, 0, 5), (7, 6, 0), (30, 1, 0), (1, 0, 1)])),
                 ((0,), (1,), (2, 3, 5), (4,))),
    # all groups of a row begin with the same tokens
    "same prompt": (list(make_pairs([(6, 3, 5), (6, 4, 4), (6, 0, 2), (6, 5, 1), (6, 1, 1), (6, 9, 8)], "same")),
                    ((0, 1, 2), (), (3, 4, 5), ())),
}


def encoded(pairs, side):
    """(the columns of the padded batch, the pairs as training reads them)."""
    samples = [encode_pair(chosen, rejected, SEQ, PAD, side) for chosen, rejected in pairs]
    columns = batch_pairs(*(np.stack([sample[name] for sample in samples]) for name in FIELDS))
    compared = [np.flatnonzero(sample["loss_mask"]) for sample in samples]
    return columns, [Pair(*pair, (int(at[0]), int(at[-1]) + 1), SEQ if side == "left" else None)
                     for pair, at in zip(pairs, compared)]


def columns_of(rows, scale=1.0):
    """The network's inputs for `PackedRows`, with as many rows and texts as the shared graph has."""
    missing = ROWS - len(rows.input_ids)
    columns = [rows.input_ids, rows.positions, rows.segments, (rows.weights * scale).astype(np.float32),
               np.where(rows.texts, rows.ends, -1).astype(np.int32), rows.chosen, rows.rejected]
    return [np.concatenate([column, np.full((missing, column.shape[1]), empty, column.dtype)])
            for column, empty in zip(columns, (PAD, 0, 0, 0, -1, 0, 0))]


@pytest.fixture(scope="module")
def train(build_model, load_reference_weights):
    """A function from a batch's columns to (loss, gradients by name, sums of the step's metrics)."""
    model = load_reference_weights(build_model(seq_length=SEQ, track_step_metrics=True)).set_train(True)
    function = loss_and_gradients(model)
    weights = function.weights

    def run(columns):
        ops.assign(model.step_metrics.value, Tensor(np.zeros(6, np.float32)))
        loss, gradients = function(*map(Tensor, columns))
        return (float(loss), {weight.name: gradient.asnumpy() for weight, gradient in zip(weights, gradients)},
                model.step_metrics.value.asnumpy().copy())

    return run


def assert_same_gradients(found, expected):
    for name, value in expected.items():
        assert np.abs(value).max() > 0, name
        difference = np.abs(found[name] - value).max() / np.abs(value).max()
        assert difference < 1e-5, f"{name}: {difference}"


@pytest.mark.further
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_packed_rows_give_the_loss_the_gradients_and_the_figures_of_padded_rows(train, case, side):
    pairs, layout = CASES[case]
    padded, compact = encoded(pairs, side)
    groups = [pair.as_group(PAD) for pair in compact]
    rows = pack_groups([[groups[number] for number in row] for row in layout], LENGTH, TEXTS, PAD)
    loss, gradients, metrics = train(columns_of(rows, 1 / PAIRS))
    expected_loss, expected_gradients, expected_metrics = train(padded)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(gradients, expected_gradients)
    # The sum of all scores, of about 1 each and of both signs, may be close to 0.
    np.testing.assert_allclose(metrics[:5], expected_metrics[:5], rtol=1e-5, atol=1e-5)
    assert (metrics[3], metrics[5]) == (PAIRS, ROWS * LENGTH)
    assert expected_metrics[5] == 2 * PAIRS * SEQ


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_fills_its_row(side):
    """What the case of that name is about."""
    pairs, layout = CASES["full row"]
    _, compact = encoded(pairs, side)
    assert layout[0] == (0,)
    assert len(compact[0].as_group(PAD)) == LENGTH


@pytest.mark.further
@pytest.mark.parametrize("split", [{"ranks": 2}, {"micro_batches": 2}], ids=["ranks", "micro-batches"])
def test_ranks_and_micro_batches_average_to_the_loss_of_all_pairs(train, split):
    """Two halves of the rows with different numbers of pairs: the mean of what they give is that of one batch."""
    padded, compact = encoded(CASES["mixed"][0], "right")
    lengths = [len(pair.as_group(PAD)) for pair in compact]
    if "ranks" in split:
        parts = []
        for rank in range(2):
            columns, = PackedSteps(compact, lengths, [(4, LENGTH)], PAD, rank=rank, **split)
            parts.append(columns)
    else:
        columns, = PackedSteps(compact, lengths, [(4, LENGTH)], PAD, **split)
        parts = [[column[half] for column in columns] for half in (slice(2), slice(2, None))]
    counts = [int((part[4] >= 0).sum()) // 2 for part in parts]
    assert sum(counts) == PAIRS
    assert counts[0] != counts[1]
    empty = [np.full_like(column, value) for column, value in zip(parts[0], (PAD, 0, 0, 0, -1, 0, 0))]
    found = [train([np.concatenate(both) for both in zip(part, empty)]) for part in parts]
    loss, gradients, _ = train(padded)
    assert np.mean([part[0] for part in found]) == pytest.approx(loss, rel=1e-5)
    assert_same_gradients({name: (found[0][1][name] + found[1][1][name]) / 2 for name in gradients}, gradients)


@pytest.mark.further
def test_the_loss_of_one_rank_is_that_of_all_rows(train):
    padded, compact = encoded(CASES["same prompt"][0], "left")
    columns, = PackedSteps(compact, [len(pair.as_group(PAD)) for pair in compact], [(ROWS, LENGTH)], PAD, seed=3)
    assert train(columns)[0] == pytest.approx(train(padded)[0], rel=1e-5)


# --- scores ---------------------------------------------------------------------------------------------------------

def packed_scores(model, groups):
    """End scores of each group's texts, in packed rows of one shape."""
    scores = {}
    for step in plan_steps([len(group) for group in groups], [(ROWS, LENGTH)], TEXTS // 2, None):
        rows = pack_groups([[groups[number] for number in row] for row in step.rows], step.length, TEXTS, PAD)
        found = iter(score_rows(model, rows)[rows.texts])
        scores.update((number, [next(found) for _ in groups[number].ends]) for number in step.groups)
    return [scores[number] for number in range(len(groups))]


def score_rows(model, rows):
    ids, positions, segments, _, ends, *_ = columns_of(rows)
    return model(Tensor(ids), Tensor(positions), Tensor(segments), None, Tensor(ends)).asnumpy()


@pytest.fixture(scope="module")
def scorer(build_model, load_reference_weights):
    """The reference's model in evaluation mode, for rows of up to 64 tokens."""
    return load_reference_weights(build_model(seq_length=SEQ)).set_train(False)


@pytest.mark.parametrize("case", REFERENCE_GRAPHS)
def test_packed_end_scores_equal_transformers(build_model, load_reference_weights, load_reference, case):
    """Both answers of both questions, whole and cut after every token; what is behind the cut takes no part."""
    arrays = load_reference(case)
    model = load_reference_weights(build_model(**{**dimensions_of(arrays), "seq_length": SEQ}), arrays)
    model.set_train(False)
    ids, lengths, tokens = arrays["input_ids"].astype(np.int32), arrays["end_ind"], arrays["token_scores"]
    whole = packed_scores(model, [text_group([ids[row][:lengths[row]] for row in (pair, pair + 2)]) for pair in (0, 1)])
    np.testing.assert_allclose(np.transpose(whole).reshape(-1), arrays["end_scores"], atol=1e-4)
    cuts = [(pair, cut, ids.shape[1] + 1 - cut) for pair in (0, 1) for cut in range(1, ids.shape[1] + 1)]
    found = packed_scores(model, [text_group([ids[pair][:one], ids[pair + 2][:other]]) for pair, one, other in cuts])
    expected = [[tokens[pair][one - 1], tokens[pair + 2][other - 1]] for pair, one, other in cuts]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.further
def test_packed_end_scores_equal_those_of_each_text_alone(scorer):
    texts = [pair for pairs, _ in CASES.values() for pair in pairs]
    texts += [(chosen, chosen) for chosen, _ in texts[:3]] + [(chosen,) for chosen, _ in texts[:3]]
    found = [score for scores in packed_scores(scorer, [text_group(group) for group in texts]) for score in scores]
    alone = [text for group in texts for text in group]
    padded = np.stack([np.pad(text, (0, SEQ - len(text)), constant_values=PAD) for text in alone])
    ends = np.array([len(text) for text in alone], np.int32)
    mask = (np.arange(SEQ) < ends[:, None]).astype(np.int32)
    expected = scorer(Tensor(padded), None, Tensor(mask), None, Tensor(ends)).asnumpy()[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def full_row(scorer):
    """(rows with two questions of two answers each in the first, their scores)."""
    texts = list(make_pairs([(6, 5, 7), (4, 6, 3)]))
    rows = pack_groups([[text_group(pair) for pair in texts]], LENGTH, TEXTS, PAD)
    return rows, score_rows(scorer, rows)[0]


def changed(rows, name, place, value):
    """The scores' input with one value of one array changed."""
    array = getattr(rows, name).copy()
    array[0, place] = value
    return type(rows)(**{**vars(rows), name: array})


def test_a_changed_segment_moves_a_score(scorer, full_row):
    """A token of the first answer that counts as one of the second is seen by that one too, but not by its own."""
    rows, before = full_row
    after = score_rows(scorer, changed(rows, "segments", 7, rows.segments[0, 11]))[0]
    assert np.abs(after - before)[0] > 1e-3
    assert np.abs(after - before)[1] > 1e-3
    np.testing.assert_array_equal(after[2:4], before[2:4])


def test_a_changed_position_moves_a_score(scorer, full_row):
    rows, before = full_row
    after = score_rows(scorer, changed(rows, "positions", 7, rows.positions[0, 7] + 3))[0]
    assert np.abs(after - before)[0] > 1e-3
    np.testing.assert_array_equal(after[1:4], before[1:4])


def test_what_stands_in_another_group_or_answer_does_not_move_a_score(scorer, full_row):
    rows, before = full_row
    other = 18                                          # the first token of the second question
    assert rows.segments[0, [other - 1, other]].tolist() == [258, 512]
    for place, moves in ((other, [2, 3]), (2, [0, 1]), (7, [0]), (12, [1]), (40, [])):
        after = score_rows(scorer, changed(rows, "input_ids", place, 61))[0]
        same = [text for text in range(4) if text not in moves]
        np.testing.assert_array_equal(after[same], before[same])
        assert all(after[text] != before[text] for text in moves)


@pytest.mark.parametrize(("flash_attention", "dtype"), [(False, ms.float32), (True, ms.uint8)])
def test_segment_mask_by_hand(flash_attention, dtype):
    """A question of two tokens with two answers, one text of another, padding; and padding that is compared."""
    mask = SegmentMask(ChatGLM2Config(seq_length=3, use_flash_attention=flash_attention))
    alone = 256 * 4097
    value = mask(Tensor([[256, 256, 257, 258, 513, 0], [256, 257, 258, 258, alone, 0]], ms.int32), 0, 6)
    assert value.dtype == dtype
    assert value.asnumpy().astype(int).tolist() == [
        [[[0, 1, 1, 1, 1, 1],
          [0, 0, 1, 1, 1, 1],
          [0, 0, 0, 1, 1, 1],
          [0, 0, 1, 0, 1, 1],
          [1, 1, 1, 1, 0, 1],
          [1, 1, 1, 1, 1, 0]]],
        [[[0, 1, 1, 1, 1, 1],
          [0, 0, 1, 1, 1, 1],
          [0, 1, 0, 1, 1, 1],
          [0, 1, 0, 0, 1, 1],
          [1, 1, 1, 1, 0, 1],
          [1, 1, 1, 1, 1, 0]]],
    ]


@pytest.mark.further
def test_the_rotary_table_may_come_as_a_stack_as_in_a_pipeline(build_model, load_reference_weights):
    """Layers unpack three tensors, of a tuple or of a stack, to the same scores."""
    rows = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
    segments = np.full_like(rows, segment_stride)
    ends = np.arange(2 * TEXTS, dtype=np.int32).reshape(2, TEXTS)
    inputs = [Tensor(column) for column in (rows % PAD, rows % SEQ, segments, rows, ends)]
    scores = []
    for stack in (None, ops.Stack()):
        model = load_reference_weights(build_model(seq_length=SEQ)).set_train(False)
        model.transformer.stack = stack
        scores.append(model(*inputs).asnumpy())
    np.testing.assert_array_equal(*scores)
    assert np.abs(scores[0]).max() > 0
