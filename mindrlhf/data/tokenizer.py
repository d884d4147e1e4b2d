"""Opening a tokenizer file of either kind, told apart by its content: text to ids, never control tokens.

- GLM-4: a rank file, one `base64-token rank` a line, encoded by tiktoken with GLM-4's split pattern. Special tokens
  are not in the file; they follow its ranks, `<|endoftext|>` (also the pad token) first: 151329 for GLM-4's 151,329.
- ChatGLM2 and ChatGLM3: a SentencePiece model.
- transformers: `tokenizer.json` (`mindrlhf.data.transformers_tokenizer`).
"""
import base64
import binascii
import hashlib
import re
from abc import ABC, abstractmethod
from itertools import groupby
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Union

from mindrlhf.errors import UserError
from mindrlhf.file_kinds import known_kind

__all__ = ["GLM4_PATTERN", "GLM4_SPECIAL_TOKENS", "RankTokenizer", "Tokenizer",
           "check_same_tokenizer", "open_tokenizer", "rank_file", "write_rank_file"]

# How GLM-4 cuts text before merging bytes (a fact of its published tokenizer).
GLM4_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GLM4_SPECIAL_TOKENS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
                       "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
                       "<|begin_of_video|>", "<|end_of_video|>")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")


class Tokenizer(ABC):
    """Text to ids.

    Attributes:
        path:         the file
        sha256:       of its content, in hexadecimal
        vocab_size:   number of ids, special tokens included
        pad_token_id: the id that fills up a sequence by default
        control_ids:  control token -> id, which no text gives
    """

    def __init__(self, path: Path, content: bytes):
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = 0
        self.pad_token_id = 0
        self.control_ids: Dict[str, int] = {}

    @property
    def identity(self) -> Dict[str, str]:
        """What a sidecar notes of it, for `check_same_tokenizer`."""
        return {"file": self.path.name, "sha256": self.sha256}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> List[List[int]]:
        """Ids of each text; text that looks like a control token is text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids as text, for people, who cannot see in it whether a control token is one."""
        names = {number: name for name, number in self.control_ids.items()}
        return "".join("".join(map(names.get, run)) if is_control else self._decode(list(run))
                       for is_control, run in groupby(map(int, ids), names.__contains__))

    @abstractmethod
    def _decode(self, ids: List[int]) -> str:
        """The text of ids that are no control tokens."""


class RankTokenizer(Tokenizer):
    """GLM-4's byte-level BPE, through tiktoken.

    Attributes:
        ranks:         token -> rank, which is its id
        first_special: id of the first of `GLM4_SPECIAL_TOKENS`
    """

    def __init__(self, path: Path, content: bytes):
        super().__init__(path, content)
        import tiktoken
        self.ranks = _parse_ranks(path, content)
        self.first_special = max(self.ranks.values()) + 1
        self.vocab_size = self.first_special + len(GLM4_SPECIAL_TOKENS)
        self.pad_token_id = self.first_special
        self.control_ids = {name: self.first_special + number for number, name in enumerate(GLM4_SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(name=path.name, pat_str=GLM4_PATTERN, mergeable_ranks=self.ranks,
                                           special_tokens={})

    def encode_batch(self, texts: Sequence[str]) -> List[List[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _decode(self, ids: List[int]) -> str:
        return self._encoding.decode(ids)  # with a replacement character for half of a letter


class _SentencePieceTokenizer(Tokenizer):
    """The SentencePiece model of ChatGLM2 and ChatGLM3, which pad with the unknown token where no pad token is."""

    def __init__(self, path: Path, content: bytes):
        super().__init__(path, content)
        import sentencepiece
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            loaded = False
        if not loaded or not self._model.GetPieceSize():
            raise UserError(f"{path}: not a tokenizer file: found {_beginning(content)}, expected a GLM-4 rank file "
                            "(lines of `base64-token rank`), a SentencePiece model, or transformers' tokenizer.json")
        self.vocab_size = self._model.GetPieceSize()
        self.pad_token_id = max(self._model.pad_id(), 0)

    def encode_batch(self, texts: Sequence[str]) -> List[List[int]]:
        return [self._model.EncodeAsIds(text) for text in texts]

    def _decode(self, ids: List[int]) -> str:
        return self._model.DecodeIds(ids)


def open_tokenizer(path: Union[str, Path]) -> Tokenizer:
    """Open a tokenizer file, or the `tokenizer.model` or else the `tokenizer.json` of a folder.

    Raises:
        UserError: missing, unreadable, or of none of the kinds; the installed tokenizers package cannot honour a
            tokenizer.json.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.model", "tokenizer.json") if (path / name).exists()]
        path = path / (names or ["tokenizer.model"])[0]
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: tokenizer cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if _RANK_LINE.fullmatch(content.split(b"\n", 1)[0].rstrip(b"\r")):
        return RankTokenizer(path, content)
    if content.lstrip()[:1] == b"{":
        from mindrlhf.data.transformers_tokenizer import TransformersTokenizer
        return TransformersTokenizer(path, content)
    return _SentencePieceTokenizer(path, content)


def check_same_tokenizer(place: str, found: Optional[Mapping[str, Any]], trained: Optional[Mapping[str, Any]],
                         settings: Optional[Path], what: str = "the model was trained") -> None:
    """Raise `UserError` when a tokenizer is not the one that a model was trained with, or data made with.

    Args:
        place:    for the message: the flag or file that brings the tokenizer in
        found:    its `file` and `sha256`; None where they are not known
        trained:  likewise of the one that training used
        settings: the file that says so
        what:     for the message: what was done with `trained`
    """
    if found and trained and found.get("sha256") != trained.get("sha256"):
        raise UserError(f"{place}: the tokenizer is {found.get('file')} (sha256 {str(found.get('sha256'))[:12]}), but "
                        f"{what} with {trained.get('file')} (sha256 {str(trained.get('sha256'))[:12]}, {settings})")


def _parse_ranks(path: Path, content: bytes) -> Dict[bytes, int]:
    """Token -> rank; every rank once, every single byte present (otherwise some text has no ids)."""
    ranks: Dict[bytes, int] = {}
    used = set()
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
            if not 0 <= rank < 2 ** 31:
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: found {_beginning(line)}, expected `base64-token rank`") from None
        if token in ranks or rank in used:
            raise UserError(f"{path}:{number}: token or rank {rank} is there twice")
        ranks[token] = rank
        used.add(rank)
    absent = sum(bytes([value]) not in ranks for value in range(256))
    if absent:
        raise UserError(f"{path}: {absent} of the 256 single bytes have no rank: not a byte-level tokenizer, or cut")
    return ranks


def write_rank_file(path: Union[str, Path], tokens: Sequence[bytes]) -> None:
    """Write `tokens`, in the order of their ranks, in GLM-4's format."""
    Path(path).write_bytes(rank_file(tokens))


def rank_file(tokens: Sequence[bytes]) -> bytes:
    """The content of such a file."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _beginning(content: bytes) -> str:
    return known_kind(content) or (repr(content[:24]) if content else "an empty file")
