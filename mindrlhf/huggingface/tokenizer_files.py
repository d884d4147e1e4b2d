"""GLM-4's rank file as the tokenizer files of transformers (tokenizer.json and tokenizer_config.json).

A rank file says which byte strings are tokens; merging takes the pair whose concatenation has the lowest rank. The
tokenizers library wants the merges instead: every split of a token into two tokens, in the order of the ranks. Control
tokens are given their ids, but are never read out of a user's text, as in `mindrlhf.data.tokenizer`.
"""
from typing import Any, Dict, List, Mapping, Tuple

from mindrlhf.data.template import Template
from mindrlhf.data.tokenizer import GLM4_PATTERN, GLM4_SPECIAL_TOKENS, RankTokenizer
from mindrlhf.data.transformers_tokenizer import BYTE_CHARACTERS, MARK_REMOVER

__all__ = ["tokenizer_config", "tokenizer_json"]


def tokenizer_json(tokenizer: RankTokenizer, marked: bool = False) -> Dict[str, Any]:
    """The content of tokenizer.json (format 1.0 of the tokenizers library).

    Args:
        marked: whether the chat template marks control tokens in users' texts, see `mindrlhf.data.control_tokens`
    """
    ranks = tokenizer.ranks
    text = {token: _as_text(token) for token in ranks}
    merges = [f"{text[left]} {text[right]}" for token in sorted(ranks, key=ranks.get) for left, right in
              _splits(token, ranks)]
    special = [{"id": tokenizer.first_special + number, "content": content, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True}
               for number, content in enumerate(GLM4_SPECIAL_TOKENS)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": MARK_REMOVER if marked else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": GLM4_PATTERN}, "behavior": "Isolated", "invert": False},
            byte_level]},
        "post_processor": None,  # no [gMASK]<sop> in front: the reward model has not seen them
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {text[token]: rank for token, rank in ranks.items()}, "merges": merges},
    }


def _splits(token: bytes, ranks: Mapping[bytes, int]) -> List[Tuple[bytes, bytes]]:
    pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    return sorted((pair for pair in pairs if pair[0] in ranks and pair[1] in ranks),
                  key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _as_text(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def tokenizer_config(tokenizer: RankTokenizer, pad_token_id: int, seq_length: int, template: Template,
                     add_eos: bool = False) -> Dict[str, Any]:
    """The content of tokenizer_config.json.

    Args:
        pad_token_id: id of one of the special tokens
        seq_length:   tokens that the model takes
        template:     the prompt template, which becomes the chat template
        add_eos:      whether texts end with `<|endoftext|>`
    """
    pad = GLM4_SPECIAL_TOKENS[pad_token_id - tokenizer.first_special]
    return {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": GLM4_SPECIAL_TOKENS[0],
            "padding_side": "right", "model_max_length": seq_length, "clean_up_tokenization_spaces": False,
            "split_special_tokens": template.splits_tokens and not add_eos,
            "model_input_names": ["input_ids", "attention_mask"], "chat_template": template.chat_template(add_eos)}
