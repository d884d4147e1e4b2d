"""Preference data to MindRecord: the story of `cvalues_comparison.py`.

MindRecord's writer does not let go of Python's lock, so what reads and encodes the source are processes of their own.
Each reads the whole source and encodes every N-th chunk of it; the chunks are taken in turn, so that what is written
does not depend on their number, and a full socket holds a process back that is ahead of the writer. What can be read
only once, a pipe, is copied to a file first.
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import (
    Any,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    TextIO,
    Tuple,
    Union,
)

import numpy as np
from tqdm import tqdm

from mindrlhf import __version__
from mindrlhf.atomic import naming_a_full_disk, partial_folder
from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.further_fields import all_or_no_margins, further_fields
from mindrlhf.data.mindrecord_files import read_sidecar
from mindrlhf.data.mindrecord_writer import HELD_OUT, HELD_OUT_OF, LengthStatistics, RecordWriter
from mindrlhf.data.preference import AS_THEY_ARE, InvalidRow, Preference, Reading, Skipped
from mindrlhf.data.sources import Given, Sources, Tally, check_sources, open_sources, rereadable
from mindrlhf.data.split import place_of_prompt
from mindrlhf.data.template import render
from mindrlhf.data.tokenizer import Tokenizer, open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.output_paths import check_outputs, follow_link
from mindrlhf.tables import format_table

__all__ = ["MAX_INVALID", "ConversionReport", "convert_preferences"]

MAX_INVALID = 0.01  # share of invalid lines that `skip_invalid` leaves out unless told otherwise
_CHUNK = 128  # rows that a process encodes and sends at once: at most two chunks a process are held in memory
_ID_BYTES = 4
_STEP = 64  # what --seq_length auto rounds up to
_LONGEST = 2 ** 21  # tokens of a sample of which a page of MindRecord (256 MB) holds five
_MOST_WORKERS = 256
_SHOWN = 3  # invalid lines in a message


@dataclass(frozen=True)
class ConversionReport:
    """What became of the rows: counts of pairs, and where they are.

    Attributes:
        lengths:  of the pairs in `output`
        prompts:  of which there are pairs
        skipped:  pairs that say nothing of which answer is better, by the reason
        held_out: lengths of the pairs in `held_out_file`
        gone:     files of an earlier conversion's held-out pairs, which are in `output` now
    """

    lengths: LengthStatistics
    cut: int
    empty_answers: int
    identical: int
    prefixes: int
    invalid: int
    rejected_file: Optional[Path]
    output: Path
    shard_num: int = 1
    prompts: Optional[int] = None
    skipped: Dict[str, int] = field(default_factory=dict)
    held_out: Optional[LengthStatistics] = None
    held_out_file: Optional[Path] = None
    gone: Sequence[str] = ()

    def as_text(self) -> str:
        """The closing lines for the user: the table of lengths, then what was cut, skipped and written."""
        row = self.lengths.as_dict()
        lines = [format_table([list(row), [str(value) for value in row.values()]]),
                 f"cut at the sequence length: {self.cut}; with an empty answer: {self.empty_answers}; "
                 f"skipped because both answers are the same: {self.identical}"]
        if self.prefixes:
            lines.append(f"one answer begins the other: {self.prefixes}; their loss compares padding, not answers: a "
                         "small loss says nothing of their order")
        if self.skipped:
            reasons = "; ".join(f"{count} for {reason}" for reason, count in self.skipped.items())
            lines.append(f"pairs left out that say nothing of which is better: {reasons}")
        if self.invalid:
            lines.append(f"invalid lines left out: {self.invalid}, see {self.rejected_file}")
        shards = f"{self.shard_num} shards of " if self.shard_num > 1 else ""
        if self.prompts in (None, self.lengths.count):
            lines.append(f"wrote {self.lengths.count} pairs to {shards}{self.output}")
        else:
            lines.append(f"wrote {self.lengths.count} pairs of {self.prompts} prompts to {shards}{self.output}")
        if self.held_out:
            share = self.held_out.count / (self.held_out.count + self.lengths.count)
            lines.append(f"held out {self.held_out.count} pairs ({share:.2%}), whose prompts are nowhere else, in "
                         f"{self.held_out_file}")
        if self.gone:
            lines.append(f"removed {', '.join(self.gone)}: what an earlier conversion held out is not held out now")
        return "\n".join(lines)


def convert_preferences(source: Union[Path, Given], output: Path, tokenizer: Tokenizer, seq_length: Optional[int],
                        template: str, padding_side: str = "right", pad_token_id: Optional[int] = None,
                        skip_invalid: bool = False, num_workers: int = 1, shard_num: int = 1,
                        max_invalid: float = MAX_INVALID, format_name: Optional[str] = None,
                        reading: Reading = AS_THEY_ARE, val_split: Optional[float] = None) -> ConversionReport:
    """Convert preference data to `output`, its index and its sidecar.

    Args:
        source:       a file of any kind that `read_rows` knows, or several, (path, how many of its rows; None: all)
                      each; a pipe is read once and whole
        output:       OUT.mindrecord; if it is a link, what it leads to
        tokenizer:    text to ids; the processes that encode open its file again
        seq_length:   N, tokens a sample; longer texts are cut. None: the smallest multiple of 64 that cuts nothing,
                      found by encoding the source twice and printed
        template:     see `mindrlhf.data.template`
        padding_side: "right" or "left"
        pad_token_id: default: the tokenizer's
        skip_invalid: leave out lines that cannot be used and write them to OUT.mindrecord.rejected.jsonl
        num_workers:  processes that encode, beside this one that writes; pairs and (of one file) order are the same
        shard_num:    1, or the number of files OUT.mindrecord0, OUT.mindrecord1, ... over which pairs are spread
        max_invalid:  share of the lines, 0 to 1, that `skip_invalid` leaves out; more are an error
        format_name:  a name of `FORMATS`, of all files; None: of each, that of its first row, and it is printed
        reading:      what is said of the rows
        val_split:    share of the prompts, between 0 and 1, whose pairs go to OUT.val.mindrecord, which appears along
                      with `output`; None: none

    Raises:
        UserError: the source cannot be read, is there twice or has no known format, a line is invalid (unless
                   `skip_invalid`) or too many are, no pair is left or fewer than `shard_num`, an output is one of the
                   inputs or cannot be written, or an encoding process was ended from outside.
    """
    pad_token_id = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
    given = [(source, None)] if isinstance(source, Path) else source
    check_sources(given)
    writer = RecordWriter(output, shard_num)
    validation = writer.for_validation() if val_split else None
    rejected = _InvalidRows(writer.path, skip_invalid, with_place=len(given) > 1)
    check_outputs({"--dst_file": [*writer.files, *(validation.files if validation else []), rejected.path]},
                  {"--src_file": [path for path, _ in given], "--tokenizer": tokenizer.path})
    _check_arguments(tokenizer, seq_length, num_workers)
    lengths, held_out, tally = LengthStatistics(), LengthStatistics(), Tally()
    counts = dict.fromkeys(("cut", "empty_answers", "identical", "prefixes", "invalid"), 0)
    with writer, validation or contextlib.nullcontext(), rejected:
        sources = open_sources(given, rejected.folder, format_name, reading)
        for file in sources.files:
            tqdm.write(f"format: {file.format}{f' ({file.name})' if len(given) > 1 else ''}")
        read = _Source(sources, tokenizer, template, num_workers)
        if seq_length is None:
            seq_length = _fitting_length(read, skip_invalid)
        with read.encoded() as rows, _progress("convert", read) as bar:
            for part in filter(None, (writer, validation)):
                part.open()  # while the other processes start
            for row in rows:
                bar.update(tally.meet(row))
                if isinstance(row, Skipped):
                    continue
                if isinstance(row, InvalidRow):
                    rejected.add(row)
                    counts["invalid"] += 1
                    continue
                chosen_ids, reject_ids = (ids[:seq_length] for ids in row.ids())
                sample = encode_pair(chosen_ids, reject_ids, seq_length, pad_token_id, padding_side)
                if sample is None:
                    counts["identical"] += 1
                    continue
                counts["cut"] += max(row.lengths()) > seq_length
                counts["empty_answers"] += row.empty_answer
                shorter = min(len(chosen_ids), len(reject_ids))
                counts["prefixes"] += padding_side == "right" and np.array_equal(chosen_ids[:shorter],
                                                                                 reject_ids[:shorter])
                is_held_out = validation is not None and row.place < val_split
                (held_out if is_held_out else lengths).add(row.prompt_length, len(chosen_ids), len(reject_ids))
                (validation if is_held_out else writer).write(sample, further_fields(row))
                if not is_held_out:
                    tally.write(row)
        usable = lengths.count + held_out.count
        if not usable:
            skipped = "".join(f", {count} with {reason}" for reason, count in tally.skipped.items())
            raise UserError(f"{sources}: no usable pair ({counts['invalid']} invalid lines, {counts['identical']} with "
                            f"two equal answers{skipped}), expected at least one")
        rejected.check_share(sources, tally.rows - counts["invalid"], max_invalid)
        if validation and not (lengths.count and held_out.count):
            raise UserError(f"--val_split: {val_split} of the prompts of {sources} holds out {held_out.count} of "
                            f"{usable} pairs, expected some, and not all of them: too few prompts for this share")
        earlier_rejected = rejected.of_earlier_run()
        made = {
            "made_by": f"mindrlhf {__version__}", **_noted(sources), "seq_length": seq_length,
            "pad_token_id": pad_token_id, "padding_side": padding_side, "prompt_template": template,
            "tokenizer": {**tokenizer.identity, "vocab_size": tokenizer.vocab_size}}
        sidecar, beside = {**made, **lengths.as_dict(), **counts}, None
        if tally.skipped:
            sidecar["skipped"] = dict(tally.skipped)
        if validation:
            sidecar[HELD_OUT] = {"file": validation.path.name, "val_split": val_split, "count": held_out.count}
            beside = validation, {**made, HELD_OUT_OF: writer.path.name, **held_out.as_dict()}
        gone = writer.finish(sidecar, beside)
        rejected_file = rejected.finish(earlier_rejected)
    return ConversionReport(lengths, output=writer.path, rejected_file=rejected_file, shard_num=shard_num,
                            prompts=tally.prompts, skipped=dict(tally.skipped),
                            held_out=held_out if validation else None,
                            held_out_file=validation.path if validation else None, gone=gone, **counts)


def _noted(sources: Sources) -> Dict[str, Any]:
    """What a sidecar says of where the pairs are from."""
    noted: Dict[str, Any] = {"source": sources.names if len(sources.files) > 1 else sources.names[0]}
    formats = [file.format for file in sources.files]
    if set(formats) != {"cvalues"}:
        noted["format"] = formats if len(formats) > 1 else formats[0]
    if sources.reading.columns:
        noted["columns"] = dict(sources.reading.columns)
    if "pku-saferlhf" in formats:
        noted["preference"] = sources.reading.preference or "better"
    return noted


def _check_arguments(tokenizer: Tokenizer, seq_length: Optional[int], num_workers: int) -> None:
    if not rereadable(tokenizer.path):
        raise UserError(f"--tokenizer: {tokenizer.path}: a pipe or a device, expected a file: each process that "
                        "encodes reads it")
    if seq_length is not None and seq_length > _LONGEST:
        raise UserError(f"--seq_length: found {seq_length}, expected at most {_LONGEST}, of which MindRecord can hold "
                        "a sample")
    if num_workers > _MOST_WORKERS:
        raise UserError(f"--num_workers: found {num_workers}, expected at most {_MOST_WORKERS}")


def _fitting_length(source: "_Source", skip_invalid: bool) -> int:
    """The smallest multiple of 64 tokens that cuts no pair of the source; it is printed with the longest text's."""
    longest, tally = 0, Tally()
    with source.encoded() as rows, _progress("count tokens of", source) as bar:
        for row in rows:
            bar.update(tally.meet(row))
            if isinstance(row, InvalidRow):
                if not skip_invalid:
                    raise row.as_error()
            elif isinstance(row, Skipped):
                continue
            elif row.chosen != row.reject:
                longest = max(longest, *row.lengths())
    length = max(-(-longest // _STEP), 1) * _STEP
    if length > _LONGEST:
        raise UserError(f"{source.sources}: the longest text has {longest} tokens, expected at most {_LONGEST} for "
                        "--seq_length auto; give the length at which longer ones are to be cut")
    if longest:
        tqdm.write(f"--seq_length auto: {length} (the longest text has {longest} tokens)")
    return length


class _Encoded(NamedTuple):
    """A pair as an encoding process sends it; ids are the bytes of int32 arrays, which go through a pipe fastest. See
    `place_of_prompt` for `place`, `Preference` for the last four.
    """

    prompt_length: int
    chosen: bytes
    reject: bytes
    empty_answer: bool
    place: float
    margin: Optional[float] = None
    prompt_id: Optional[int] = None
    chosen_answer: Optional[int] = None
    rejected_answer: Optional[int] = None

    def ids(self) -> Tuple[np.ndarray, np.ndarray]:
        """Ids of the chosen and the rejected text, template and prompt included, not cut."""
        return np.frombuffer(self.chosen, np.int32), np.frombuffer(self.reject, np.int32)

    def lengths(self) -> Tuple[int, int]:
        """Tokens of both texts."""
        return len(self.chosen) // _ID_BYTES, len(self.reject) // _ID_BYTES


class _Source(NamedTuple):
    """Files of pairs, and how their rows are encoded."""

    sources: Sources
    tokenizer: Tokenizer
    template: str
    num_workers: int

    def encoded(self) -> ContextManager[Iterator[Union[_Encoded, Skipped, InvalidRow]]]:
        """The rows, in their order, encoded by processes that are gone when the context is left."""
        return _encoded(*self)


@contextlib.contextmanager
def _encoded(sources: Sources, tokenizer: Tokenizer, template: str,
             num_workers: int) -> Iterator[Iterator[Union[_Encoded, Skipped, InvalidRow]]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy MindSpore's threads' locks
    processes, receivers = [], []
    try:
        for index in range(num_workers):
            receiver, sender = context.Pipe()  # both ways means a socket, which holds three times what a pipe does
            receivers.append(receiver)
            process = context.Process(target=_encode_chunks, daemon=True,
                                      args=(sender, sources, rereadable(tokenizer.path), template, index, num_workers))
            with sender, _no_interrupt():  # only the process keeps its end: its death is the end of what it sends
                process.start()
            processes.append(process)
        yield _in_turn(sources, processes, receivers)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for receiver in receivers:
            receiver.close()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back from this process for a moment, and for good from processes that start here.

    Ctrl-C reaches all processes of a terminal; this one alone shall answer it, and it ends the others.
    """
    resource_tracker.ensure_running()  # which otherwise starts along with the first process and lets Ctrl-C in again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_turn(sources: Sources, processes: Sequence,
             receivers: Sequence) -> Iterator[Union[_Encoded, Skipped, InvalidRow]]:
    for process, receiver in itertools.cycle(zip(processes, receivers)):
        try:
            chunk = receiver.recv()
        except (EOFError, OSError):
            process.join()
            raise UserError(f"{sources}: a process that encodes it ended with exit code {process.exitcode} before the "
                            "end of the file (-9: killed, usually out of memory)") from None
        if isinstance(chunk, UserError):
            raise chunk
        if not chunk:
            return
        yield from chunk


def _encode_chunks(sender, sources: Sources, tokenizer_path: Path, template: str, index: int, step: int) -> None:
    """An encoding process: send chunks `index`, `index + step`, ... of the source, then an empty one.

    A `UserError` is sent too, in the place of a chunk. The tokenizer's file is opened again: the first process would
    have to wait until this one has taken over the tokenizer itself, for ever if this one ends while it starts.
    """
    try:
        tokenizer = open_tokenizer(tokenizer_path)
        rows = all_or_no_margins(sources.preferences())
        chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
        for chunk in itertools.islice(chunks, index, None, step):
            sender.send(_encode_chunk(chunk, tokenizer, template))
        sender.send([])
    except UserError as error:
        sender.send(error)
    except ConnectionError:
        pass  # the first process was killed


def _encode_chunk(rows: Iterable, tokenizer: Tokenizer, template: str) -> List[Union[_Encoded, Skipped, InvalidRow]]:
    encoded = []
    for row in rows:
        if isinstance(row, Preference):
            prompt, *answers = map(_as_text, (row.prompt, row.chosen, row.rejected))
            ids = tokenizer.encode_batch([prompt.strip(), *(render(template, prompt, answer) for answer in answers)])
            row = _Encoded(len(ids[0]), *(np.array(side, np.int32).tobytes() for side in ids[1:]),
                           not all(answer.strip() for answer in answers), place_of_prompt(row.prompt), row.margin,
                           row.prompt_id, row.chosen_answer, row.rejected_answer)
        encoded.append(row)
    return encoded


def _as_text(messages: Dialogue) -> str:
    """A question or an answer as the template takes it; of several messages all but the last with their roles."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join([*(f"{role}: {content}" for role, content in messages[:-1]), messages[-1].content])


class _InvalidRows:
    """Takes invalid rows: the first one ends the run, or with `keep` all go to OUT.mindrecord.rejected.jsonl.

    Args:
        with_place: a line alone does not say where a row is, for there are several files
    """

    def __init__(self, output: Path, keep: bool, with_place: bool = False):
        self.keep, self._with_place = keep, with_place
        self.output = output
        self.path = output.with_name(f"{output.name}.rejected.jsonl")
        if self.path.is_dir():
            raise UserError(f"--dst_file: {self.path} is a folder, in the place of the file of invalid lines")
        self.folder = Path()
        self._count = 0
        self._first: List[str] = []
        self._file: Optional[TextIO] = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_InvalidRows":
        self.folder = self._stack.enter_context(partial_folder(self.path))
        return self

    def add(self, row: InvalidRow) -> None:
        if not self.keep:
            raise row.as_error()
        self._count += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"{row.place}: {row.reason}")
        with naming_a_full_disk(self.path):
            if self._file is None:  # half of a surrogate pair becomes the JSON escape that it came from
                self._file = (self.folder / self.path.name).open("w", encoding="utf-8", errors="backslashreplace")
            record = {"place": row.place, **row.as_record()} if self._with_place else row.as_record()
            json.dump(record, self._file, ensure_ascii=False, allow_nan=False)
            self._file.write("\n")

    def check_share(self, sources: Sources, usable: int, most: float) -> None:
        """Raise `UserError` if more than a share `most` of the lines is invalid."""
        if self._count > most * (self._count + usable):
            raise UserError(f"{sources}: {self._count} of {self._count + usable} lines are invalid, expected at most "
                            f"{most:.4g} of them (--max_invalid); nothing was written; {'; '.join(self._first)}")

    def of_earlier_run(self) -> bool:
        """Whether an earlier conversion to the same output wrote the file of invalid lines that is there."""
        try:
            return bool((read_sidecar(self.output) or {}).get("invalid"))
        except UserError:
            return False

    def finish(self, earlier: bool) -> Optional[Path]:
        """Move the file to its name; that of an earlier run goes when there is nothing to say."""
        if self._file is None:
            if earlier:
                self.path.unlink(missing_ok=True)
            return None
        with naming_a_full_disk(self.path):
            self._file.close()
        os.replace(self.folder / self.path.name, follow_link(self.path))
        return self.path

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of the disk that was full before
                self._file.close()
        self._stack.close()


def _progress(what: str, source: _Source) -> tqdm:
    """A bar with rate and time left, of rows."""
    return tqdm(desc=f"{what} {source.sources.title}", total=source.sources.row_count(), unit=" rows", mininterval=0.5)
