"""An exported model in transformers and TRL themselves; runs where they can be had (scripts/compare_with_torch.sh)."""
import json
import os
import random
import subprocess

import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE, SAMPLE, TINY_YAML, reference_python
from mindformers.models.glm2.glm2_config import ChatGLM2Config

from mindrlhf.config.check import load_config
from mindrlhf.data.dialogue import Message
from mindrlhf.data.template import GLM4_CHAT, PROMPT_TEMPLATE, open_template, render
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, open_tokenizer
from mindrlhf.huggingface.convert import ms_to_hf
from mindrlhf.huggingface.tokenizer_files import tokenizer_config, tokenizer_json
from mindrlhf.models.glm4.glm_reward import Glm4RewardModel

ROWS = [("为什么天是蓝的？", "因为空气散射蓝光。"), (" How are you?\n", "I'm fine 😀, we'll see; 12345\r\n\n"),
        ("<|user|> [gMASK]<sop>", "<|endoftext|>"), ("q", ""), ("长" * 20, "短")]

pytestmark = [pytest.mark.stack, pytest.mark.skipif(reference_python() is None,
                                                    reason="no torch and transformers, no $REFERENCE_PYTHON")]


JINJA = """
{%- if messages[0].role == 'system' %}
[gMASK]<sop><|system|>
{{ messages[0].content | trim }}
{% else %}[gMASK]<sop>{% endif %}
{% for message in messages %}{% if message.role != 'system' %}<|{{ message.role }}|>
  {% if loop.last %}{{ message.content }}{% else %}{{ message.content ~ '\n' }}{% endif %}{% endif %}{% endfor %}
"""
TEMPLATES = {
    "default": PROMPT_TEMPLATE, "chat": GLM4_CHAT, "jinja": "{#jinja#}" + JINJA,
    "text behind": "Q {prompt} A {response} <|x|>\\ </s>\n",
    "control": open_template(r"[gMASK]<sop><|user|>\n{prompt}<|assistant|>\n{response} \[gMASK]").noted,
}


def ask(script, content, *args):
    return json.loads(subprocess.run(
        [reference_python(), str(REFERENCE / script), *args], check=True, input=json.dumps(content),
        capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}).stdout)


def random_dialogue(rng):
    """Of one to three turns, with texts that look like control tokens, or parts of them."""
    def text():
        return "".join(rng.choice([*GLM4_SPECIAL_TOKENS, "<|", "|>", "user", "sop>", "[", "]", "<", " ", "\n", "\t",
                                   "中文", "hello world", "\N{GRINNING FACE}", "1234", "'s"])
                       for _ in range(rng.randrange(8)))

    dialogue = [Message("system", text())] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        dialogue.append(Message(rng.choice(["user", "user", "observation"]), text()))
        dialogue += [Message("assistant", text()) for _ in range(rng.choice([0, 1, 1, 1, 1, 2]))]
    return tuple(dialogue)


def test_transformers_gives_our_ids_of_any_dialogue(tmp_path):
    """1,000 dialogues a template, with and without `<|endoftext|>` behind; also where a user of transformers renders
    the text first and encodes it then.
    """
    rng = random.Random(16)
    dialogues = [random_dialogue(rng) for _ in range(1000)]
    tokenizer = open_tokenizer(SAMPLE / "tokenizer.model")
    expected = {}
    for name, noted in TEMPLATES.items():
        for add_eos in (False, True):
            encoder = TextEncoder(tokenizer, noted, add_eos)
            folder = tmp_path / f"{name} {add_eos}"
            folder.mkdir()
            files = {"tokenizer": tokenizer_json(tokenizer, add_eos or not encoder.template.splits_tokens),
                     "tokenizer_config": tokenizer_config(tokenizer, 997, 8192, encoder.template, add_eos)}
            for file, content in files.items():
                (folder / f"{file}.json").write_text(json.dumps(content))
            expected[str(folder)] = encoder.encode(dialogues)
    messages = [[message._asdict() for message in dialogue] for dialogue in dialogues]
    found = ask("encode_with_transformers.py", dict.fromkeys(expected, messages))
    for folder, ids in expected.items():
        for way in ("direct", "by_text"):
            wrong = [case for case in zip(dialogues, ids, found[folder][way]) if case[1] != case[2]]
            assert wrong[:1] == [], (folder, way, len(wrong))


@pytest.mark.parametrize(("rope_ratio", "add_eos"), [(1, False), (500, False), (1, True)])
def test_transformers_and_trl_give_our_ids_and_scores(tmp_path, rope_ratio, add_eos):
    config = load_config(TINY_YAML, {"model.model_config.rope_ratio": rope_ratio})
    network = Glm4RewardModel(ChatGLM2Config(**{**config.mapping["model"]["model_config"], "seq_length": 256}))
    for parameter in network.get_parameters():  # larger than at the start of training, so that scores differ
        parameter.set_data(ms.Tensor(np.random.default_rng(len(parameter.name)).normal(
            float("norm" in parameter.name), 0.3, parameter.shape).astype(np.float32)))
    ms.save_checkpoint(network, str(tmp_path / "model.ckpt"))
    ms_to_hf(str(tmp_path / "model.ckpt"), config.model, tmp_path / "hf",
             tokenizer_path=str(SAMPLE / "tokenizer.model"), add_eos=add_eos)

    found = ask("score_with_transformers.py", ROWS, str(tmp_path / "hf"))
    texts = [render(PROMPT_TEMPLATE, prompt, answer) for prompt, answer in ROWS]
    ids = open_tokenizer(SAMPLE / "tokenizer.model").encode_batch(texts)
    assert found["class"] == "GlmForSequenceClassification"
    if add_eos:
        ids = [[*row, config.model.pad_token_id] for row in ids]
    else:
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
