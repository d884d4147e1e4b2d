"""transformers' `tokenizer.json`, through the tokenizers package: text to ids, never control tokens.

Some releases of the package leave out without a word what they do not know. Whether the installed one gives a file's
ids is found out by trying, not by its version.
"""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from mindrlhf.data.control_tokens import MARK
from mindrlhf.data.tokenizer import GLM4_PATTERN, GLM4_SPECIAL_TOKENS, Tokenizer, rank_file
from mindrlhf.errors import UserError

__all__ = ["BYTE_CHARACTERS", "MARK_REMOVER", "TransformersTokenizer"]

# What takes the marks of a chat template out of the text, see `mindrlhf.data.control_tokens`.
MARK_REMOVER = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
_KIND = "a tokenizer.json of transformers"


def _byte_characters() -> List[str]:
    """The character that stands for each byte (the byte-level alphabet of GPT-2): printable bytes for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


class TransformersTokenizer(Tokenizer):
    """A tokenizer.json.

    Attributes:
        rank_file: where it is GLM-4's rank file in this form, as `convert_weight.py ms_to_hf` writes it, the content
                   of that, of which `sha256` is then: a model may have been trained with it. None otherwise

    Raises:
        UserError: it is no tokenizer.json, has no pad token, or the installed tokenizers package gives other ids.
    """

    def __init__(self, path: Path, content: bytes):
        super().__init__(path, content)
        settings = _settings_of(path, content)
        added = settings.get("added_tokens") or []
        self.control_ids = {token["content"]: token["id"] for token in added if _is_control(token)}
        settings = {**settings, "added_tokens": [token for token in added if not _is_control(token)],
                    "truncation": None, "padding": None, "post_processor": None}
        if settings.get("normalizer") == MARK_REMOVER:  # texts here have no marks, but may have the character
            settings["normalizer"] = None
        self._tokenizer = _load(path, settings)
        _check_whole_words(path, settings["model"], self._tokenizer)
        self.vocab_size = 1 + max([*self._tokenizer.get_vocab().values(), *self.control_ids.values()])
        self.rank_file = _as_rank_file(settings, self.control_ids)
        if self.rank_file is not None:
            self.sha256 = hashlib.sha256(self.rank_file).hexdigest()
        self.pad_token_id = self._pad_token_id()

    def _pad_token_id(self) -> int:
        """Of `<|endoftext|>`, or of the `pad_token` of the tokenizer_config.json beside it."""
        name: Any = GLM4_SPECIAL_TOKENS[0]
        if name not in self.control_ids:
            try:
                name = json.loads((self.path.with_name("tokenizer_config.json")).read_bytes()).get("pad_token")
            except (OSError, ValueError, AttributeError):
                name = None
            name = name.get("content") if isinstance(name, dict) else name
        if name not in self.control_ids:
            raise UserError(f"{self.path}: no pad token: found neither <|endoftext|> among its special tokens nor one "
                            "as pad_token in tokenizer_config.json, expected one of them")
        return self.control_ids[name]

    def encode_batch(self, texts: Sequence[str]) -> List[List[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _decode(self, ids: List[int]) -> str:
        return self._tokenizer.decode(ids)


def _is_control(token: Dict[str, Any]) -> bool:
    return bool(token.get("special")) or token["content"] in GLM4_SPECIAL_TOKENS


def _settings_of(path: Path, content: bytes) -> Dict[str, Any]:
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; expected {_KIND}") from None
    model, added = settings.get("model"), settings.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise UserError(f"{path}: no model.vocab in it, expected {_KIND}")
    if not isinstance(added, list) or not all(
            isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
            for token in added):
        raise UserError(f"{path}: added_tokens is not a list of objects with id and content, expected {_KIND}")
    return settings


def _load(path: Path, settings: Dict[str, Any]):
    import tokenizers
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(settings, allow_nan=False))
    except Exception as error:  # the package raises nothing more special
        merges = settings["model"].get("merges")
        listed = isinstance(merges, list) and merges and isinstance(merges[0], list)
        reason = "its merges are lists of two tokens, expected strings" if listed else " ".join(f"{error}".split())
        raise UserError(f"{path}: the installed tokenizers {tokenizers.__version__} cannot read it: {reason}; take "
                        "GLM-4's tokenizer.model, or an environment with a newer release of MindFormers") from None


def _check_whole_words(path: Path, model: Dict[str, Any], tokenizer) -> None:
    """Raise `UserError` if the file takes whole words that are tokens without merging (`ignore_merges`), the installed
    package merges all the same, and some token is not what merging makes of its text.
    """
    if not model.get("ignore_merges") or _takes_whole_words():
        return
    import tokenizers
    names = list(tokenizer.get_vocab(with_added_tokens=False).items())
    texts = tokenizer.decode_batch([[number] for _, number in names])
    readable = [(number, text) for (_, number), text in zip(names, texts) if text and "\ufffd" not in text]
    found = tokenizer.encode_batch([text for _, text in readable], add_special_tokens=False)
    for (number, text), encoding in zip(readable, found):
        words = 1 if tokenizer.pre_tokenizer is None or encoding.ids == [number] else \
            len(tokenizer.pre_tokenizer.pre_tokenize_str(text))
        if encoding.ids != [number] and words == 1:
            raise UserError(f"{path}: the installed tokenizers {tokenizers.__version__} knows nothing of ignore_merges "
                            f"and gives {text!r} the ids {encoding.ids}, expected [{number}]; take GLM-4's "
                            "tokenizer.model, or an environment with a newer release of MindFormers")


def _takes_whole_words() -> bool:
    """Whether the installed package obeys `ignore_merges`."""
    import tokenizers
    probe = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": None, "post_processor": None, "decoder": None,
             "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                       "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                       "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}}
    return tokenizers.Tokenizer.from_str(json.dumps(probe, allow_nan=False)).encode("ab").ids == [2]


def _as_rank_file(settings: Dict[str, Any], control_ids: Dict[str, int]) -> Optional[bytes]:
    """The content of the rank file that a tokenizer.json says the same as; None where there is none."""
    model, split = settings["model"], settings.get("pre_tokenizer")
    steps = split.get("pretokenizers") if isinstance(split, dict) else None
    vocabulary = model["vocab"]
    if model.get("type") != "BPE" or settings.get("normalizer") or not isinstance(vocabulary, dict) or not (
            isinstance(steps, list) and len(steps) == 2 and steps[0].get("pattern") == {"Regex": GLM4_PATTERN}
            and steps[1].get("type") == "ByteLevel") or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return None
    if control_ids != {name: len(vocabulary) + number for number, name in enumerate(GLM4_SPECIAL_TOKENS)}:
        return None
    bytes_of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    try:
        tokens = [bytes(bytes_of[character] for character in token)
                  for token in sorted(vocabulary, key=vocabulary.get)]
    except KeyError:
        return None
    return rank_file(tokens)
