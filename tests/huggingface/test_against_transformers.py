"""An exported model in transformers and TRL themselves; runs where they can be had (scripts/compare_with_torch.sh)."""
import json
import os
import random
import subprocess
from itertools import product

import mindspore as ms
import numpy as np
import pytest
from conftest import REFERENCE, SAMPLE, TINY_YAML, reference_python
from helpers import convert_file
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


def random_text(rng):
    """Of what looks like control tokens, or parts of them."""
    return "".join(rng.choice([*GLM4_SPECIAL_TOKENS, "<|", "|>", "user", "sop>", "[", "]", "<", " ", "\n", "\t",
                               "中文", "hello world", "\N{GRINNING FACE}", "1234", "'s"])
                   for _ in range(rng.randrange(8)))


def random_dialogue(rng):
    """Of one to three turns."""
    dialogue = [Message("system", random_text(rng))] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        dialogue.append(Message(rng.choice(["user", "user", "observation"]), random_text(rng)))
        dialogue += [Message("assistant", random_text(rng)) for _ in range(rng.choice([0, 1, 1, 1, 1, 2]))]
    return tuple(dialogue)


def export_tokenizer(folder, encoder):
    """The tokenizer's files of an exported model, the prompt template in them."""
    folder.mkdir()
    marked = encoder.add_eos or not encoder.template.splits_tokens
    files = {"tokenizer": tokenizer_json(encoder.tokenizer, marked),
             "tokenizer_config": tokenizer_config(encoder.tokenizer, 997, 8192, encoder.template, encoder.add_eos)}
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))


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
            export_tokenizer(folder, encoder)
            expected[str(folder)] = encoder.encode(dialogues)
    messages = [[message._asdict() for message in dialogue] for dialogue in dialogues]
    found = ask("encode_with_transformers.py", dict.fromkeys(expected, messages))
    for folder, ids in expected.items():
        for way in ("direct", "by_text"):
            wrong = [case for case in zip(dialogues, ids, found[folder][way]) if case[1] != case[2]]
            assert wrong[:1] == [], (folder, way, len(wrong))


def random_pair(rng, number):
    """A row with an explicit prompt of one to three turns, and the same with an implicit one."""
    def said(role, text=""):
        return {"role": role, "content": f"{random_text(rng)}{text}"}

    prompt = [said("system")] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(3)):
        prompt += [said("user"), said("assistant")]
    prompt.append(said("user", "?"))
    chosen, rejected = [said("assistant", f"x{number}")], [said("assistant", f"y{number}")]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, {"chosen": prompt + chosen,
                                                                        "rejected": prompt + rejected}


def test_trl_makes_the_texts_of_our_samples(tmp_path):
    """200 dialogues a template, as rows with an explicit prompt; with an implicit one and `<|endoftext|>` behind."""
    rng = random.Random(20)
    tokenizer, cases, expected = open_tokenizer(SAMPLE / "tokenizer.model"), {}, {}
    explicit, implicit = map(list, zip(*(random_pair(rng, number) for number in range(200))))
    for (name, template), (rows, add_eos) in product(TEMPLATES.items(), ((explicit, False), (implicit, True))):
        folder = tmp_path / f"{name} {add_eos}"
        export_tokenizer(folder, TextEncoder(tokenizer, template, add_eos))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        convert_file(folder / "rows.jsonl", folder / "rows.mindrecord", tokenizer, 512, template, add_eos)
        cases[str(folder)], expected[str(folder)] = rows, samples(folder / "rows.mindrecord")
    found = ask("pairs_with_trl.py", cases)
    if found is None:
        pytest.skip("no TRL beside torch and transformers")
    for folder, ways in found.items():
        assert len(expected[folder]) == 200
        for way, ids in ways.items():
            wrong = [case for case in zip(cases[folder], ids, expected[folder]) if case[1] != case[2]]
            assert wrong[:1] == [], (folder, way, len(wrong))


def samples(path):
    """The ids of both texts of each sample."""
    rows = ms.dataset.MindDataset(str(path), shuffle=False).create_dict_iterator(num_epochs=1, output_numpy=True)
    return [[row[f"{side}_input_ids"][row[f"{side}_attention_mask"] > 0].tolist() for side in ("chosen", "rejected")]
            for row in rows]


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
