"""The differences between devices and releases, each against the behaviour that it mends.

| test                                                   | proves                                                      |
| test_the_uint8_mask_of_mindformers_attends_the_future  | why the mask is a float tensor                              |
| test_keys_of_our_own_reach_the_network                 | MindFormers' configuration class passes on what we add      |
| test_overflow_is_found ...                             | a NaN or infinite gradient skips the step, on a CPU         |
"""
import mindspore as ms
import numpy as np
import pytest
from mindformers.models.build_model import build_network
from mindformers.models.glm2 import glm2_modules
from mindformers.models.glm2.glm2 import ChatGLM2Model
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindformers.models.glm2.glm2_transformer import ChatGLM2Transformer
from mindformers.tools.register import MindFormerConfig
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.compat import model as compat
from mindrlhf.models.glm4 import glm_reward  # noqa: F401 (registers)

pytestmark = pytest.mark.stack


def test_a_cpu_is_not_ascend():
    assert not compat.on_ascend()


def test_keys_of_our_own_reach_the_network():
    """A configuration class that passed over them would train another objective, without a word."""
    size = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "kv_channels": 8, "ffn_hidden_size": 16,
            "padded_vocab_size": 32, "seq_length": 8, "multi_query_attention": True, "multi_query_group_num": 1}
    config = MindFormerConfig(model_config={"type": "ChatGLM2Config", **size, "objective": {
        "loss": "end_token", "centering": 0.5}, "track_step_metrics": True}, arch={"type": "Glm4RewardModel"})
    network = build_network(config)
    assert network.end_token
    assert network.centers
    assert network.track_step_metrics


def test_mask_is_float_without_and_uint8_with_flash_attention():
    assert compat.attention_mask_dtype(use_flash_attention=False) == ms.float32
    assert compat.attention_mask_dtype(use_flash_attention=True) == ms.uint8


@pytest.mark.further
def test_the_uint8_mask_of_mindformers_attends_the_future():
    """With MindFormers' own mask on MindSpore 2.7 or later, the last token moves the first hidden state."""
    model = ChatGLM2Model(ChatGLM2Config(num_layers=1, hidden_size=32, num_attention_heads=4, kv_channels=8,
                                         ffn_hidden_size=48, padded_vocab_size=64, seq_length=8,
                                         param_init_type="float32", compute_dtype="float32")).set_train(False)
    compat.adapt_encoder(model.encoder)
    for parameter in model.get_parameters():
        if "layernorm" not in parameter.name:
            parameter.set_data(Tensor(np.random.default_rng(1).standard_normal(parameter.shape), ms.float32))
    ids = np.arange(8, dtype=np.int32)[None]
    other = ids.copy()
    other[0, -1] = 40

    def first_state_moves(mask):
        states = [model(Tensor(row), full_attention_mask=mask).asnumpy()[0, 0] for row in (ids, other)]
        return np.abs(states[0] - states[1]).max() > 1e-6

    float_mask = Tensor(np.triu(np.ones((1, 1, 8, 8), np.float32), 1))
    assert not first_state_moves(float_mask)
    assert first_state_moves(None) == multiplies_in_uint8()


def multiplies_in_uint8():
    """Whether a uint8 tensor times a negative number stays a uint8, as since MindSpore 2.7."""
    return (Tensor([1], ms.uint8) * -10000).dtype == ms.uint8


def test_fused_kernels_are_left_to_ascend():
    """Later releases of MindFormers have no other SiLU than MindSpore's operator, for which a CPU then has a kernel."""
    assert not glm2_modules.check_rmsnorm_big_kernel_valid()
    assert glm2_modules.ChatGLM2RMSNorm(8).self_define
    silu = glm2_modules.ChatGLM2SiLU()
    if hasattr(glm2_modules, "check_valid_big_kernel"):
        assert not glm2_modules.check_valid_big_kernel()
        assert silu.self_define
    x = np.linspace(-9, 9, 8, dtype=np.float32)
    np.testing.assert_allclose(silu(Tensor(x)).asnumpy(), x / (1 + np.exp(-x)), rtol=1e-5)


def test_an_encoder_gets_its_cast_and_loses_what_inference_alone_needs():
    config = ChatGLM2Config(num_layers=2, hidden_size=32, num_attention_heads=4, kv_channels=8, ffn_hidden_size=48,
                            padded_vocab_size=64, seq_length=8)
    encoder = ChatGLM2Transformer(config)
    lack = {type(cell) for _, cell in encoder.cells_and_names() if not hasattr(cell, "cast")}
    # The mend is needed as long as MindSpore has Cells without it, and one of the two does not make its own.
    assert hasattr(nn.Cell(), "cast") or lack & {ChatGLM2Transformer, glm2_modules.ChatGLM2RMSNorm}
    for layer in encoder.layers:
        if not hasattr(layer.self_attention, "infer_attention"):  # MindFormers makes it since 1.6
            layer.self_attention.infer_attention = _Net()
    compat.adapt_encoder(encoder)
    assert not [name for name, _ in encoder.cells_and_names() if "infer_attention" in name]
    assert not [parameter.name for parameter in encoder.get_parameters() if "infer_attention" in parameter.name]
    assert all(hasattr(cell, "cast") for _, cell in encoder.cells_and_names()
               if isinstance(cell, (ChatGLM2Transformer, glm2_modules.ChatGLM2RMSNorm)))


class _Net(nn.Cell):
    """loss = sum(w * x): its gradient is x."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor([1.0, 2.0], ms.float32), name="weight")

    def construct(self, x):
        return ops.reduce_sum(self.weight * x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_overflow_is_found_the_step_skipped_and_the_loss_scale_lowered(bad):
    compat.use_portable_overflow_check()
    net = _Net()
    scale = nn.DynamicLossScaleUpdateCell(loss_scale_value=1024, scale_factor=2, scale_window=1000)
    step = MFTrainOneStepCell(net, nn.SGD(net.trainable_params(), 0.5), scale_sense=scale, use_clip_grad=True)
    step.set_train()
    _, overflow, *_ = step(Tensor([bad, 1.0], ms.float32))
    assert bool(overflow.asnumpy())
    assert net.weight.asnumpy().tolist() == [1.0, 2.0]
    assert float(step.scale_sense.asnumpy()) == 512

    _, overflow, *_ = step(Tensor([0.5, 0.0], ms.float32))
    assert not bool(overflow.asnumpy())
    assert net.weight.asnumpy() == pytest.approx([0.75, 2.0], rel=1e-5)


def test_no_init_parameters_is_a_context():
    with compat.no_init_parameters():
        net = _Net()
    net.init_parameters_data()
    assert net.weight.shape == (2,)


def test_no_init_parameters_leaves_no_mark_on_later_parameters():
    """By the mark that MindSpore leaves, its 2.5 takes loaded weights for such that have no values yet."""
    with compat.no_init_parameters():
        pass
    assert not hasattr(Parameter, "init_param")
