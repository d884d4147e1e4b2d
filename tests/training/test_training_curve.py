"""50 steps of Adam from the same weights on the same pairs as PyTorch, which tests/reference holds the losses of;
those of `end_token` are TRL's.
"""
import json

import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE
from mindformers.models.glm2.glm2_config import ChatGLM2Config
from mindspore import Tensor, nn
from reference import adam_curve

from mindrlhf.models.glm4.glm_reward import Glm4RewardModel

pytestmark = pytest.mark.stack


FILES = {"token_wise": "adam_curves.json", "end_token": "objective_curves.json"}


def losses_of_50_steps(name, loss):
    """The loss of each step, before its update."""
    ms.set_context(mode=ms.GRAPH_MODE)  # operator by operator, which is MindSpore's default, a step takes a second
    model = Glm4RewardModel(ChatGLM2Config(**adam_curve.DIMENSIONS, pad_token_id=0, param_init_type="float32",
                                           compute_dtype="float32", objective={"loss": loss}))
    start = adam_curve.initial_weights()
    for parameter in model.get_parameters():
        _, parts = start.pop(parameter.name)
        parameter.set_data(Tensor(np.concatenate(list(parts.values()))))
    assert not start
    beta1, beta2 = adam_curve.BETAS
    optimizer = nn.Adam(model.trainable_params(), adam_curve.LEARNING_RATE, beta1, beta2, adam_curve.EPSILON)
    step = nn.TrainOneStepCell(model, optimizer).set_train(True)
    return [float(step(Tensor(ids), None, Tensor(mask), Tensor(loss_mask), Tensor(lengths)))
            for ids, mask, loss_mask, lengths in adam_curve.batches(name)]


@pytest.mark.further
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) if name != "sample" else name
                                  for name in adam_curve.CURVES])
@pytest.mark.parametrize("loss", ["token_wise", "end_token"])
def test_the_losses_of_50_adam_steps_equal_pytorchs(request, name, loss):
    pairs, _ = adam_curve.CURVES[name]
    if not pairs.is_file():
        pytest.skip(f"no {pairs.parent}: real pairs are not part of the project")
    folder = request.getfixturevalue("reference_folder" if loss == "token_wise" else "objective_folder")
    expected = json.loads((folder / FILES[loss]).read_text())[name]
    np.testing.assert_allclose(losses_of_50_steps(name, loss), expected, atol=1e-3)


@pytest.mark.parametrize("file", FILES.values())
def test_the_committed_curve_learns(file):
    """A curve that stayed where it began would agree with a step that changes nothing."""
    sample = json.loads((REFERENCE / file).read_text())["sample"]
    assert len(sample) == adam_curve.STEPS
    assert np.mean(sample[-10:]) < 0.5 * np.mean(sample[:10])
