"""What accompanies the weights of an exported model: config.json and the model card."""
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from mindrlhf import __version__
from mindrlhf.checkpoints.score_statistics import ScoreStatistics
from mindrlhf.data.mindrecord_files import check_settings
from mindrlhf.data.template import TextTemplate, read_template
from mindrlhf.errors import UserError
from mindrlhf.models.glm4.dimensions import Dimensions
from mindrlhf.weights.ckpt_file import NOTES

__all__ = ["model_card", "model_config", "notes_of_config"]

_CODE = '''```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

messages = [{"role": "user", "content": "PROMPT"}, {"role": "assistant", "content": "ANSWER"}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
with torch.no_grad():
    score = model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
```'''


def model_config(size: Dimensions, dtype: str, pad_token_id: int, reward: bool,
                 notes: Optional[Mapping[str, Any]] = None, eos_token_id: Optional[int] = None,
                 statistics: Optional[ScoreStatistics] = None) -> Dict[str, Any]:
    """The content of config.json.

    Args:
        dtype:  of most weights, which transformers loads them as
        reward: `GlmForSequenceClassification` with one label, or `GlmForCausalLM`
        notes:  of the training, which tools that do not know them leave as they are, see `notes_of_config`
        eos_token_id: None: as the pad token's
        statistics: of the scores, which OpenRLHF normalises by when it is asked to; of a reward model
    """
    config = {"architectures": ["GlmForSequenceClassification" if reward else "GlmForCausalLM"], "model_type": "glm",
              **size.as_transformers(), "attention_dropout": 0.0, "initializer_range": 0.02,
              "tie_word_embeddings": False, "use_cache": True, "pad_token_id": pad_token_id,
              "eos_token_id": pad_token_id if eos_token_id is None else eos_token_id, "torch_dtype": dtype}
    if reward:  # a regression: tools that would squeeze a score into 0..1 leave it alone
        config.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, problem_type="regression")
    if statistics:
        config.update(mean=statistics.mean, std=statistics.std, value_head_prefix="score")
    return {**config, NOTES: {**notes}} if notes else config


def notes_of_config(config: Mapping[str, Any], path: Path, size: Dimensions) -> Dict[str, Any]:
    """The notes for a checkpoint that is made of an exported or published model: those of its training, as far as its
    config.json has them, and its dimensions.

    Args:
        path: of config.json
        size: what config.json says without them, which somebody may have changed since

    Raises:
        UserError: the notes have values of another kind.
    """
    notes = config.get(NOTES) or {}
    if not isinstance(notes, dict):
        raise UserError(f"{path}: {NOTES} is {type(notes).__name__}, expected an object")
    notes = check_settings(path, {key: value for key, value in notes.items() if key != "run"})
    return {**notes, "model": {**(notes.get("model") or {}), **asdict(size)}}


def _how_texts_are_made(template: str, add_eos: bool) -> str:
    opened = read_template(template)
    how = "Prompt and answer, stripped of white space at both ends, are put into this template." \
        if isinstance(opened, TextTemplate) else "Messages are put into this template."
    tokens = "No special token is added in front or behind." if opened.splits_tokens else \
        "Its control tokens are encoded as such; the same characters in a message are text."
    if not add_eos:
        return f"{how} {tokens}"
    return f"{how} {'' if opened.splits_tokens else tokens + ' '}`<|endoftext|>` follows, at which the score is read."


def model_card(size: Dimensions, dtype: str, source: str, reward: bool, template: str,
               data: Mapping[str, Any], tokenizer: Optional[str], add_eos: bool = False) -> str:
    """README.md of the exported folder.

    Args:
        source:    name of the checkpoint
        template:  the prompt template, as it is noted
        data:      how the training data was made, as far as it is known (`data_settings.json`)
        tokenizer: name of the tokenizer file, or None where none was exported
        add_eos:   whether texts end with `<|endoftext|>`
    """
    tags = ["reward-model", "glm"] if reward else ["glm"]
    head = ["---", "library_name: transformers",
            f"pipeline_tag: {'text-classification' if reward else 'text-generation'}", "tags:",
            *(f"- {tag}" for tag in tags), "---", ""]
    facts = [f"- {size.num_layers} layers, hidden size {size.hidden_size}, {size.num_attention_heads} heads, "
             f"{size.multi_query_group_num} key-value groups, vocabulary {size.padded_vocab_size}, {dtype}",
             f"- written from `{source}` by mindrlhf {__version__}",
             f"- tokenizer: {f'from `{tokenizer}`' if tokenizer else 'not part of this folder'}"]
    if not reward:
        return "\n".join([*head, "# GLM-4", "", *facts, ""])
    if data.get("seq_length"):
        facts.append(f"- trained on texts of at most {data['seq_length']} tokens, padded on the "
                     f"{data.get('padding_side')}")
    return "\n".join([
        *head, "# GLM-4 reward model", "",
        "It reads a prompt and an answer and gives one number, the better the answer the higher: the value head's "
        "output at the text's last token. Only differences between answers to the same prompt carry meaning.", "",
        *facts, "", "## Text", "",
        _how_texts_are_made(template, add_eos), "",
        "```json", json.dumps(template, ensure_ascii=False, allow_nan=False), "```", "",
        *(["The tokenizer's chat template does the same with a message of the user and one of the assistant:", "",
           _CODE, ""] if tokenizer else [])])
