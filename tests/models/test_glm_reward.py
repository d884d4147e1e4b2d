"""The reward model.

| test                                       | proves                                | judged against                |
| test_end_scores_equal_transformers_glm ... | forward pass, both padding sides      | transformers' GlmModel, 1e-4  |
| test_loss_and_gradients_equal_pytorch      | loss and gradient of every parameter  | PyTorch autograd, 1e-4        |
| test_hidden_states_equal_chatglm2_model    | the backbone is MindFormers' backbone | MindFormers' ChatGLM2Model    |
| test_no_earlier_score_moves ...            | causality                             | the row, last token changed   |
"""
import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE_GRAPHS, dimensions_of, weights_of_mindformers
from helpers import loss_and_gradients
from mindformers.models.glm2.glm2 import ChatGLM2Model
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor

from mindrlhf.compat.model import adapt_encoder
from mindrlhf.models.glm4.glm_reward import Glm4RewardModel, VHead
from mindrlhf.models.masks import CausalMask

pytestmark = pytest.mark.stack

SEQ = 12  # tokens a row of the reference


def score(model, input_ids, attention_mask=None, end_ind=None):
    """End scores (N,) of NumPy arrays."""
    rows = [None if value is None else Tensor(value, ms.int32) for value in (attention_mask, None, end_ind)]
    return model(Tensor(input_ids, ms.int32), None, *rows).asnumpy()[:, 0]


def prefix_scores(model, ids):
    """The score at every position of one row of tokens: (len(ids),)."""
    rows = np.tile(np.asarray(ids, np.int32), (len(ids), 1))
    return score(model, rows, np.ones_like(rows), np.arange(1, len(ids) + 1))


@pytest.mark.further
def test_end_scores_equal_transformers_glm(scoring_model, reference):
    scores = score(scoring_model, reference["input_ids"], reference["attention_mask"], reference["end_ind"])
    np.testing.assert_allclose(scores, reference["end_scores"], atol=1e-4)


@pytest.mark.further
def test_left_padded_end_scores_equal_transformers_glm(scoring_model, reference):
    scores = score(scoring_model, reference["left_input_ids"], reference["left_attention_mask"], reference["end_ind"])
    np.testing.assert_allclose(scores, reference["left_end_scores"], atol=1e-4)


def test_left_and_right_padding_give_the_same_scores(scoring_model, reference):
    right = score(scoring_model, reference["input_ids"], reference["attention_mask"], reference["end_ind"])
    left = score(scoring_model, reference["left_input_ids"], reference["left_attention_mask"], reference["end_ind"])
    np.testing.assert_allclose(left, right, atol=1e-4)


def test_the_score_at_every_position_equals_transformers_glm(scoring_model, reference):
    for ids, expected in zip(reference["input_ids"], reference["token_scores"]):
        np.testing.assert_allclose(prefix_scores(scoring_model, ids), expected, atol=1e-4)


@pytest.mark.further
def test_one_changed_weight_is_noticed(build_model, load_reference_weights, reference):
    """The comparisons above can fail: one bias of one layer moves the scores by more than their tolerance."""
    model = load_reference_weights(build_model()).set_train(False)
    bias = next(p for p in model.get_parameters() if p.name.endswith("layers.0.self_attention.query_key_value.bias"))
    changed = bias.asnumpy().copy()
    changed[0] += 0.5
    bias.set_data(Tensor(changed))
    scores = score(model, reference["input_ids"], reference["attention_mask"], reference["end_ind"])
    assert np.abs(scores - reference["end_scores"]).max() > 1e-3


def test_no_earlier_score_moves_when_the_last_token_changes(scoring_model, reference):
    ids = reference["input_ids"][1]
    other = ids.copy()
    other[-1] = (ids[-1] + 1) % 60
    before, after = prefix_scores(scoring_model, ids), prefix_scores(scoring_model, other)
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert before[-1] != after[-1]


def test_what_stands_in_the_padding_does_not_move_a_score(scoring_model, reference):
    ids = reference["input_ids"].copy()
    ids[reference["attention_mask"] == 0] = 5
    left_ids = reference["left_input_ids"].copy()
    left_ids[reference["left_attention_mask"] == 0] = 5
    for changed, side in ((ids, ""), (left_ids, "left_")):
        mask = reference[f"{side}attention_mask"]
        np.testing.assert_array_equal(score(scoring_model, changed, mask, reference["end_ind"]),
                                      score(scoring_model, reference[f"{side}input_ids"], mask, reference["end_ind"]))


@pytest.mark.further
def test_position_id_and_loss_mask_do_not_move_a_score(scoring_model, reference):
    ids, mask, ends = (Tensor(reference[name]) for name in ("input_ids", "attention_mask", "end_ind"))
    plain = scoring_model(ids, None, mask, None, ends).asnumpy()
    other = scoring_model(ids, ids * 0 + 7, mask, Tensor(np.ones((4, SEQ)), ms.float16), ends).asnumpy()
    np.testing.assert_array_equal(plain, other)


@pytest.mark.further
def test_lengths_are_counted_when_no_end_index_is_given(scoring_model, reference):
    given = score(scoring_model, reference["input_ids"], reference["attention_mask"], reference["end_ind"])
    counted = score(scoring_model, reference["input_ids"], reference["attention_mask"])
    np.testing.assert_array_equal(given, counted)


@pytest.mark.further
def test_without_a_mask_a_row_is_all_text(scoring_model, reference):
    scores = score(scoring_model, reference["input_ids"])
    np.testing.assert_allclose(scores, reference["token_scores"][:, -1], atol=1e-4)


@pytest.mark.further
def test_evaluation_gives_a_float32_column(scoring_model, reference):
    output = scoring_model(Tensor(reference["input_ids"]))
    assert output.shape == (4, 1)
    assert output.dtype == ms.float32


@pytest.mark.parametrize("case", REFERENCE_GRAPHS)
def test_loss_and_gradients_equal_pytorch(build_model, load_reference_weights, load_reference, case):
    reference = load_reference(case)
    network = build_model(**dimensions_of(reference), track_step_metrics=True)
    model = load_reference_weights(network, reference).set_train(True)
    both = loss_and_gradients(model)
    inputs = [Tensor(reference[name]) for name in ("input_ids", "input_ids", "attention_mask", "loss_mask", "end_ind")]
    loss, gradients = both(*inputs)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(reference["loss"]), rel=1e-4)
    expected_names = {name.split("/", 1)[1] for name in reference if name.startswith("gradient/")}
    assert {weight.name for weight in both.weights} == expected_names
    for weight, gradient in zip(both.weights, gradients):
        expected = reference[f"gradient/{weight.name}"]
        difference = np.abs(gradient.asnumpy() - expected).max() / np.abs(expected).max()
        assert difference < 1e-4, f"{weight.name}: {difference}"

    chosen, rejected = reference["end_scores"][:2], reference["end_scores"][2:]
    right, margin, reward, pairs, text_tokens, computed_tokens = model.step_metrics.value.asnumpy()
    assert (pairs, text_tokens, computed_tokens) == (2, reference["end_ind"].sum(), 4 * SEQ)
    assert right == np.sum(chosen > rejected)
    assert margin == pytest.approx(np.sum(chosen - rejected), abs=1e-4)
    assert reward == pytest.approx(reference["end_scores"].sum() / 2, abs=1e-4)


@pytest.mark.further
def test_hidden_states_equal_chatglm2_model_with_a_float_mask(scoring_model, reference):
    dimensions = scoring_model.config
    backbone = ChatGLM2Model(ChatGLM2Config(
        num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4,
        multi_query_group_num=2, seq_length=SEQ, layernorm_epsilon=dimensions.layernorm_epsilon,
        param_init_type="float32", compute_dtype="float32")).set_train(False)
    adapt_encoder(backbone.encoder)
    for parameter in backbone.get_parameters():
        if f"weight/transformer.{parameter.name}" in reference:
            parameter.set_data(Tensor(reference[f"weight/transformer.{parameter.name}"]))
    ids = Tensor(reference["input_ids"])
    mask = Tensor(np.triu(np.ones((4, 1, SEQ, SEQ), np.float32), 1))
    expected = backbone(ids, full_attention_mask=mask).asnumpy()
    found = scoring_model.transformer(ids, Tensor(np.zeros((4, 1)), ms.int32)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("flash_attention", "dtype"), [(False, ms.float32), (True, ms.uint8)])
def test_mask_by_hand(flash_attention, dtype):
    """Rows of 4: text from the start, and two tokens of padding in front of two of text."""
    mask = CausalMask(ChatGLM2Config(seq_length=6, use_flash_attention=flash_attention))
    value = mask(Tensor([[0], [2]], ms.int32), 0, 4)
    assert value.dtype == dtype
    assert value.asnumpy().astype(int).tolist() == [
        [[[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]],
        [[[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 0, 0]]],
    ]


def test_backbone_parameters_have_the_names_of_mindformers_checkpoints(scoring_model):
    names = {parameter.name for parameter in scoring_model.get_parameters()}
    backbone = {f"transformer.{name}" for name in weights_of_mindformers(
        ChatGLM2Model(ChatGLM2Config(num_layers=2, hidden_size=32, num_attention_heads=4, kv_channels=8,
                                     ffn_hidden_size=48, padded_vocab_size=64, seq_length=8)))}
    assert names == backbone - {"transformer.output_layer.weight"} | {"v_head0.weight"}


def test_the_yaml_name_finds_the_model():
    assert MindFormerRegister.get_cls(MindFormerModuleType.MODELS, "Glm4RewardModel") is Glm4RewardModel


def test_value_head_computes_in_float32_from_half_precision():
    head = VHead(ChatGLM2Config(hidden_size=4))
    head.weight.set_data(Tensor([[1.0, 1.0, 1.0, 1.0]], ms.float32))
    hidden = Tensor([[[2048.0, 1.0, 1.0, 1.0]]], ms.float16)  # 2049 and 2050 have no float16 between them and 2052
    assert head(hidden).asnumpy().tolist() == [[2051.0]]


def test_value_head_starts_from_the_documented_distribution():
    weight = VHead(ChatGLM2Config(hidden_size=4096)).weight.asnumpy()
    assert weight.shape == (1, 4096)
    assert weight.mean() == pytest.approx(0, abs=0.002)
    assert weight.std() == pytest.approx(0.02, rel=0.1)
