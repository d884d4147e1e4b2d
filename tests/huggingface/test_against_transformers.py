"""An exported model in transformers and TRL themselves; runs where they can be had (scripts/compare_with_torch.sh)."""
import json
import os
import subprocess

import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE, SAMPLE, TINY_YAML, reference_python
from mindformers.models.glm2.glm2_config import ChatGLM2Config

from mindrlhf.config.check import load_config
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.huggingface.convert import ms_to_hf
from mindrlhf.models.glm4.glm_reward import Glm4RewardModel

ROWS = [("为什么天是蓝的？", "因为空气散射蓝光。"), (" How are you?\n", "I'm fine 😀, we'll see; 12345\r\n\n"),
        ("<|user|> [gMASK]<sop>", "<|endoftext|>"), ("q", ""), ("长" * 20, "短")]

pytestmark = [pytest.mark.stack, pytest.mark.skipif(reference_python() is None,
                                                    reason="no torch and transformers, no $REFERENCE_PYTHON")]


@pytest.mark.parametrize("rope_ratio", [1, 500])
def test_transformers_and_trl_give_our_ids_and_scores(tmp_path, rope_ratio):
    config = load_config(TINY_YAML, {"model.model_config.rope_ratio": rope_ratio})
    network = Glm4RewardModel(ChatGLM2Config(**{**config.mapping["model"]["model_config"], "seq_length": 256}))
    for parameter in network.get_parameters():  # larger than at the start of training, so that scores differ
        parameter.set_data(ms.Tensor(np.random.default_rng(len(parameter.name)).normal(
            float("norm" in parameter.name), 0.3, parameter.shape).astype(np.float32)))
    ms.save_checkpoint(network, str(tmp_path / "model.ckpt"))
    ms_to_hf(str(tmp_path / "model.ckpt"), config.model, tmp_path / "hf",
             tokenizer_path=str(SAMPLE / "tokenizer.model"))

    found = json.loads(subprocess.run(
        [reference_python(), str(REFERENCE / "score_with_transformers.py"), str(tmp_path / "hf")], check=True,
        input=json.dumps(ROWS), capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}).stdout)
    texts = [render(PROMPT_TEMPLATE, prompt, answer) for prompt, answer in ROWS]
    ids = open_tokenizer(SAMPLE / "tokenizer.model").encode_batch(texts)
    assert found["class"] == "GlmForSequenceClassification"
    assert found["texts"] == texts
    assert found["ids"] == ids
    rows = np.full((len(ids), 256), config.model.pad_token_id, np.int32)
    for row, tokens in zip(rows, ids):
        row[:len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in ids], np.int32)
    mask = (np.arange(256) < lengths[:, None]).astype(np.int32)
    scores = network.set_train(False)(ms.Tensor(rows), None, ms.Tensor(mask), None, ms.Tensor(lengths)).asnumpy()[:, 0]
    assert np.ptp(scores) > 1
    for kind in ("scores", "batched", "trl"):
        if found[kind] is not None:
            np.testing.assert_allclose(found[kind], scores, atol=1e-4, err_msg=kind)
