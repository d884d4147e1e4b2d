"""What a conversion is asked for, checked before a row is read. Knows nothing of MindSpore."""
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from mindrlhf.data.preference import AS_THEY_ARE, Reading
from mindrlhf.data.sources import Given, check_sources, is_read_once, rereadable
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError

__all__ = ["LONGEST", "MAX_INVALID", "ConversionPlan", "plan_conversion"]

MAX_INVALID = 0.01  # share of invalid lines that `skip_invalid` leaves out unless told otherwise
LONGEST = 2 ** 21  # tokens of a sample of which a page of MindRecord (256 MB) holds five
_MOST_WORKERS = 256


@dataclass(frozen=True)
class ConversionPlan:
    """A checked conversion. The names of its output are checked by what writes to them.

    Attributes:
        given:        files of any kind that `read_rows` knows; a pipe is read once and whole
        output:       OUT.mindrecord; if it is a link, what it leads to
        encoder:      rows to ids; the processes that encode open its tokenizer's file again
        seq_length:   N, tokens a sample. None: the smallest multiple of 64 that holds all texts, found by encoding the
                      source twice and printed
        padding_side: "right" or "left"
        pad_token_id: the tokenizer's where it was None
        format_name:  a name of `FORMATS`, of all files; None: of each, that of its first row, and it is printed
        reading:      what is said of the rows
        skip_invalid: leave out lines that cannot be used and write them to OUT.mindrecord.rejected.jsonl
        max_invalid:  share of the lines, 0 to 1, that `skip_invalid` leaves out; more are an error
        num_workers:  processes that encode, beside the one that writes; pairs and (of one file) order are the same
        shard_num:    1, or the number of files OUT.mindrecord0, OUT.mindrecord1, ... over which pairs are spread
        val_split:    share of the prompts, between 0 and 1, whose pairs go to OUT.val.mindrecord, which appears along
                      with `output`; None: none

    Raises:
        UserError: a file is there twice, the tokenizer is in a pipe, a length is to be found for what is read
                   once, or a number is out of range.
    """

    given: Given
    output: Path
    encoder: TextEncoder
    seq_length: Optional[int]
    padding_side: str = "right"
    pad_token_id: Optional[int] = None
    format_name: Optional[str] = None
    reading: Reading = AS_THEY_ARE
    skip_invalid: bool = False
    max_invalid: float = MAX_INVALID
    num_workers: int = 1
    shard_num: int = 1
    val_split: Optional[float] = None

    def __post_init__(self):
        tokenizer = self.encoder.tokenizer
        if self.pad_token_id is None:
            object.__setattr__(self, "pad_token_id", tokenizer.pad_token_id)
        if not 0 <= self.pad_token_id < tokenizer.vocab_size:
            raise UserError(f"--pad_token_id: found {self.pad_token_id}, expected 0 to {tokenizer.vocab_size - 1}")
        check_sources(self.given)
        if not rereadable(tokenizer.path):
            raise UserError(f"--tokenizer: {tokenizer.path}: a pipe or a device, expected a file: each process that "
                            "encodes reads it")
        if self.seq_length is None:
            self._check_read_twice()
        else:
            _check_at_most("--seq_length", self.seq_length, LONGEST, ", of which MindRecord can hold a sample")
        _check_at_most("--num_workers", self.num_workers, _MOST_WORKERS)

    def _check_read_twice(self) -> None:
        for path, _ in self.given:
            if is_read_once(path):
                raise UserError(f"--seq_length auto: {path} is a pipe or a device, which is read once, and auto reads "
                                "the rows twice; expected a number of tokens, or a file")


def _check_at_most(flag: str, found: int, most: int, why: str = "") -> None:
    if found > most:
        raise UserError(f"{flag}: found {found}, expected at most {most}{why}")


def plan_conversion(args) -> ConversionPlan:
    """The conversion that `cvalues_comparison.py`'s arguments ask for.

    Raises:
        UserError: the tokenizer cannot be read, or lacks a control token; see `ConversionPlan`.
    """
    encoder = TextEncoder(open_tokenizer(args.tokenizer), args.prompt_template, args.add_eos, args.too_long)
    return ConversionPlan(
        tuple(args.src_file), args.dst_file, encoder, args.seq_length, args.padding_side, args.pad_token_id,
        args.format, Reading(args.columns, args.preference, args.keep, args.grades, args.margin_scale or 1.0),
        args.skip_invalid,
        MAX_INVALID if args.max_invalid is None else args.max_invalid, args.num_workers, args.shard_num,
        args.val_split)
