"""config.json and the model card that stand beside an exported model's weights.

| test                                        | proves                                   | judged against            |
| test_configuration_of_a_reward_model        | every key and value                      | GlmConfig's keys, by hand |
| test_configuration_of_a_language_model      | no trace of a reward                     | GlmConfig's keys, by hand |
| test_statistics_are_written_as_ ...         | mean and std of the scores               | OpenRLHF's names          |
| test_dimensions_are_read_back               | nothing is lost on the way there         | Dimensions                |
| test_card_holds_the_very_template           | the text that a score belongs to         | json.loads                |
| test_head_of_the_card_is_read_as_yaml       | what a model hub shows and searches      | yaml.safe_load            |
| test_code_of_the_card_is_python             | it can be pasted                         | compile                   |

By hand (transformers 5.23): AutoConfig takes the configuration for that of a GlmConfig with one label, and writes it
out again with the same dimensions; the weights' names and shapes are those of GlmForSequenceClassification.
"""
import json
from dataclasses import replace

import pytest
import yaml

from mindrlhf import __version__
from mindrlhf.checkpoints.score_statistics import ScoreStatistics
from mindrlhf.data.template import PROMPT_TEMPLATE
from mindrlhf.huggingface.model_files import model_card, model_config
from mindrlhf.models.glm4.dimensions import TRANSFORMERS, Dimensions

SIZE = Dimensions(num_layers=40, hidden_size=4096, ffn_hidden_size=13696, num_attention_heads=32,
                  multi_query_group_num=2, kv_channels=128, padded_vocab_size=151552, seq_length=8192,
                  layernorm_epsilon=1.5625e-07, add_qkv_bias=True, rope_ratio=500)
DATA = {"seq_length": 512, "padding_side": "left", "prompt_template": "of the data {prompt} {response}"}
REWARD_ONLY = {"num_labels", "id2label", "label2id", "problem_type"}


def config_of(reward, size=SIZE):
    """As it is in the file."""
    return json.loads(json.dumps(model_config(size, "bfloat16", 151329, reward), allow_nan=False))


def card(reward=True, template=PROMPT_TEMPLATE, data=DATA, tokenizer="tokenizer.model", size=SIZE):
    return model_card(size, "bfloat16", "glm4_9b-1_500.ckpt", reward, template, data, tokenizer)


def block(text, language):
    """The only fenced block of a language."""
    parts = text.split(f"```{language}\n")
    assert len(parts) == 2
    return parts[1].split("\n```")[0]


def test_configuration_of_a_reward_model():
    assert config_of(reward=True) == {
        "architectures": ["GlmForSequenceClassification"], "model_type": "glm",
        "num_hidden_layers": 40, "hidden_size": 4096, "intermediate_size": 13696, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "max_position_embeddings": 8192,
        "rms_norm_eps": 1.5625e-07, "attention_bias": True, "hidden_act": "silu",
        "rope_theta": 5000000.0, "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
        "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
        "pad_token_id": 151329, "eos_token_id": 151329, "torch_dtype": "bfloat16",
        "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}


def test_statistics_are_written_as_openrlhf_reads_them():
    """`getattr(config, "mean")`, "std" and "value_head_prefix" in its get_llm_for_sequence_regression."""
    found = model_config(SIZE, "bfloat16", 151329, True, statistics=ScoreStatistics(0.5, 2.0))
    assert set(found) - set(config_of(reward=True)) == {"mean", "std", "value_head_prefix"}
    assert (found["mean"], found["std"], found["value_head_prefix"]) == (0.5, 2.0, "score")
    assert Dimensions.from_huggingface(found, TRANSFORMERS, "config.json") == SIZE


def test_configuration_of_a_language_model():
    of_reward, config = config_of(reward=True), config_of(reward=False)
    assert config["architectures"] == ["GlmForCausalLM"]
    assert set(of_reward) - set(config) == REWARD_ONLY
    assert {key for key in config if config[key] != of_reward[key]} == {"architectures"}


@pytest.mark.parametrize(("dtype", "pad_token_id"), [("float32", 996), ("float16", 0)])
def test_type_and_pad_token_are_the_given_ones(dtype, pad_token_id):
    config = model_config(SIZE, dtype, pad_token_id, reward=True)
    assert (config["torch_dtype"], config["pad_token_id"]) == (dtype, pad_token_id)


@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize("size", [
    SIZE,
    replace(SIZE, rope_ratio=1, layernorm_epsilon=1e-5, seq_length=131072),
    replace(SIZE, rope_ratio=1.5, add_qkv_bias=False),
    Dimensions(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, multi_query_group_num=1,
               kv_channels=16, padded_vocab_size=56, seq_length=16, layernorm_epsilon=1e-6, add_qkv_bias=True,
               rope_ratio=0.1),
], ids=["chat", "base", "odd ratio, no bias", "tiny"])
def test_dimensions_are_read_back(size, reward):
    assert Dimensions.from_huggingface(config_of(reward, size), TRANSFORMERS, "config.json") == size


@pytest.mark.parametrize("template", [
    PROMPT_TEMPLATE, "{prompt}{response}", 'say "{prompt}"\n\\n \\"{response}\\"\n\n', "\t{prompt}\r\n{response} ",
    "```\n{prompt}\n```\n---\n{response}\n```json\n", "{{ {prompt} }} {% raw %} | {response} | <b>&amp;</b>",
    "\u2028{prompt}\N{GRINNING FACE}\x00{response}\x7f",
], ids=["default", "bare", "quotes and backslashes", "white space", "fences", "braces", "odd characters"])
@pytest.mark.parametrize("tokenizer", ["tokenizer.model", None], ids=["tokenizer", "no tokenizer"])
def test_card_holds_the_very_template(template, tokenizer):
    literal = block(card(template=template, tokenizer=tokenizer), "json")
    assert json.loads(literal) == template


def test_default_template_can_be_read_in_the_card():
    assert '"根据一下问题，写一个合适的回答。\\n\\n### 问题：\\n{prompt}\\n\\n### 回答：\\n{response}"' in card()


@pytest.mark.parametrize(("reward", "task", "tags"), [
    (True, "text-classification", ["reward-model", "glm"]), (False, "text-generation", ["glm"])])
@pytest.mark.parametrize("tokenizer", ["tokenizer.model", None], ids=["tokenizer", "no tokenizer"])
def test_head_of_the_card_is_read_as_yaml(reward, task, tags, tokenizer):
    nothing, head, body = card(reward, tokenizer=tokenizer).split("---\n", 2)
    assert nothing == ""
    assert yaml.safe_load(head) == {"library_name": "transformers", "pipeline_tag": task, "tags": tags}
    assert body.startswith("\n# GLM-4 reward model\n" if reward else "\n# GLM-4\n")


@pytest.mark.parametrize("reward", [True, False])
def test_card_says_what_the_model_is(reward):
    lines = card(reward, size=replace(SIZE, num_layers=3, padded_vocab_size=1024)).splitlines()
    assert ("- 3 layers, hidden size 4096, 32 heads, 2 key-value groups, vocabulary 1024, bfloat16") in lines
    assert f"- written from `glm4_9b-1_500.ckpt` by mindrlhf {__version__}" in lines
    assert "- tokenizer: from `tokenizer.model`" in lines


@pytest.mark.parametrize("reward", [True, False])
def test_card_says_that_there_is_no_tokenizer(reward):
    assert "- tokenizer: not part of this folder" in card(reward, tokenizer=None).splitlines()


def test_card_says_what_the_data_was():
    assert "- trained on texts of at most 512 tokens, padded on the left" in card().splitlines()


def test_card_is_silent_about_data_that_is_not_known():
    text = card(data={})
    assert "trained on" not in text
    assert "None" not in text


def test_template_of_the_card_is_the_given_one_and_not_that_of_the_data():
    text = card(template="of the model {prompt} {response}")
    assert json.loads(block(text, "json")) == "of the model {prompt} {response}"
    assert "of the data" not in text


def test_code_of_the_card_is_python():
    code = block(card(), "python")
    compile(code, "README.md", "exec")
    assert "AutoModelForSequenceClassification" in code
    assert "apply_chat_template" in code


def test_code_is_shown_only_where_its_tokenizer_is():
    assert "```python" not in card(tokenizer=None)
    assert "chat template" not in card(tokenizer=None)


def test_card_of_a_language_model_speaks_of_no_reward():
    text = card(reward=False)
    for word in ("reward", "score", "```", "template"):
        assert word not in text


@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize("tokenizer", ["tokenizer.model", None], ids=["tokenizer", "no tokenizer"])
def test_card_ends_with_one_line_break_and_has_every_fence_closed(reward, tokenizer):
    text = card(reward, tokenizer=tokenizer)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert sum(line.startswith("```") for line in text.splitlines()) % 2 == 0
