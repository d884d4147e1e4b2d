"""What tests share: where things are, the tiny model of the committed reference values, and the shared data."""
import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("GLOG_v", "3")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "glm4_reward_model_train"
SAMPLE = EXAMPLE / "sample_data"
CONFIGS = ROOT / "model_configs" / "glm_config"
TINY_YAML, PRODUCTION_YAML = CONFIGS / "run_glm4_tiny_rm_cpu.yaml", CONFIGS / "run_glm4_9b_rm.yaml"
REFERENCE = Path(__file__).parent / "reference" / "glm_reference.npz"

# The dimensions of tests/reference/make_glm_reference.py under MindFormers' names.
REFERENCE_DIMENSIONS = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "multi_query_group_num": 2, "kv_channels": 8,
    "ffn_hidden_size": 48, "padded_vocab_size": 64, "seq_length": 16, "layernorm_epsilon": 1e-5,
    "param_init_type": "float32", "compute_dtype": "float32", "pad_token_id": 63,
}


@pytest.fixture(scope="session")
def reference():
    """Name -> array of the committed PyTorch reference."""
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def build_model():
    """A function that builds a reward model of the reference's dimensions; keyword arguments override these."""
    import mindspore as ms
    from mindformers.models.glm2.glm2_config import ChatGLM2Config

    from mindrlhf.models.glm4.glm_reward import Glm4RewardModel

    ms.set_context(mode=ms.GRAPH_MODE)

    def build(**overrides):
        return Glm4RewardModel(ChatGLM2Config(**{**REFERENCE_DIMENSIONS, **overrides}))

    return build


@pytest.fixture(scope="session")
def load_reference_weights(reference):
    """A function that gives a network the reference's weights, by name."""
    from mindspore import Tensor

    def load(network):
        for parameter in network.get_parameters():
            if f"weight/{parameter.name}" in reference:
                parameter.set_data(Tensor(reference[f"weight/{parameter.name}"]))
        return network

    return load


@pytest.fixture(scope="session")
def scoring_model(build_model, load_reference_weights):
    """The reference's model in evaluation mode."""
    return load_reference_weights(build_model()).set_train(False)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Run a test inside its own folder: the frameworks write to the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
