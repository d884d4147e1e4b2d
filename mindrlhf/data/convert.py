"""CValues-Comparison to MindRecord: the story of `cvalues_comparison.py`.

MindRecord's writer does not let go of Python's lock, so what reads and encodes the source are processes of their own.
Each reads the whole file and encodes every N-th chunk of it; the chunks are taken in turn, so that what is written
does not depend on their number, and a full socket holds a process back that is ahead of the writer.
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Iterable, Iterator, List, NamedTuple, Optional, Sequence, TextIO, Tuple, Union

import numpy as np
from tqdm import tqdm

from mindrlhf import __version__
from mindrlhf.atomic import partial_folder
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.mindrecord_writer import LengthStatistics, RecordWriter
from mindrlhf.data.preference import InvalidRow, read_preferences
from mindrlhf.data.template import render
from mindrlhf.data.tokenizer import Tokenizer, open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.tables import format_table

__all__ = ["ConversionReport", "convert_preferences"]

_CHUNK = 128  # rows that a process encodes and sends at once: at most two chunks a process are held in memory
_STEP = 64  # what --seq_length auto rounds up to


@dataclass(frozen=True)
class ConversionReport:
    """What became of the rows of a file: counts of pairs, and where they are."""

    lengths: LengthStatistics
    cut: int
    empty_answers: int
    identical: int
    invalid: int
    rejected_file: Optional[Path]
    output: Path
    shard_num: int = 1

    def as_text(self) -> str:
        """The closing lines for the user: the table of lengths, then what was cut, skipped and written."""
        row = self.lengths.as_dict()
        lines = [format_table([list(row), [str(value) for value in row.values()]]),
                 f"cut at the sequence length: {self.cut}; with an empty answer: {self.empty_answers}; "
                 f"skipped because both answers are the same: {self.identical}"]
        if self.invalid:
            lines.append(f"invalid lines left out: {self.invalid}, see {self.rejected_file}")
        shards = f"{self.shard_num} shards of " if self.shard_num > 1 else ""
        lines.append(f"wrote {self.lengths.count} pairs to {shards}{self.output}")
        return "\n".join(lines)


def convert_preferences(source: Path, output: Path, tokenizer: Tokenizer, seq_length: Optional[int], template: str,
                        padding_side: str = "right", pad_token_id: Optional[int] = None, skip_invalid: bool = False,
                        num_workers: int = 1, shard_num: int = 1) -> ConversionReport:
    """Convert a file of preference pairs to `output`, its index and its sidecar.

    Args:
        source:       .jsonl (or .json array) with prompt, pos_resp, neg_resp
        output:       OUT.mindrecord
        tokenizer:    text to ids; the processes that encode open its file again
        seq_length:   N, tokens a sample; longer texts are cut. None: the smallest multiple of 64 that cuts nothing,
                      found by encoding the source twice and printed
        template:     see `mindrlhf.data.template`
        padding_side: "right" or "left"
        pad_token_id: default: the tokenizer's
        skip_invalid: leave out lines that cannot be used and write them to OUT.mindrecord.rejected.jsonl
        num_workers:  processes that encode, beside this one that writes; pairs and (of one file) order are the same
        shard_num:    1, or the number of files OUT.mindrecord0, OUT.mindrecord1, ... over which pairs are spread

    Raises:
        UserError: the source cannot be read, a line is invalid (unless `skip_invalid`), no pair is left or fewer than
                   `shard_num`, or an encoding process was ended from outside.
    """
    pad_token_id = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
    lengths, counts = LengthStatistics(), dict.fromkeys(("cut", "empty_answers", "identical", "invalid"), 0)
    writer = RecordWriter(output, shard_num)
    if seq_length is None:
        seq_length = _fitting_length(source, tokenizer, template, num_workers, skip_invalid)
    with _encoded(source, tokenizer, template, num_workers) as rows, writer, \
            _InvalidRows(output, skip_invalid) as rejected, _progress("convert", source) as bar:
        for row in rows:
            bar.update()
            if isinstance(row, InvalidRow):
                rejected.add(row)
                counts["invalid"] += 1
                continue
            chosen_ids, reject_ids = row.ids()
            sample = encode_pair(chosen_ids, reject_ids, seq_length, pad_token_id, padding_side)
            if sample is None:
                counts["identical"] += 1
                continue
            counts["cut"] += max(len(chosen_ids), len(reject_ids)) > seq_length
            counts["empty_answers"] += row.empty_answer
            lengths.add(row.prompt_length, min(len(chosen_ids), seq_length), min(len(reject_ids), seq_length))
            writer.write(sample)
        if not lengths.count:
            raise UserError(f"{source}: no usable pair ({counts['invalid']} invalid lines, {counts['identical']} with "
                            "two equal answers), expected at least one")
        writer.finish({
            "made_by": f"mindrlhf {__version__}", "source": source.name, "seq_length": seq_length,
            "pad_token_id": pad_token_id, "padding_side": padding_side, "prompt_template": template,
            "tokenizer": {**tokenizer.identity, "vocab_size": tokenizer.vocab_size},
            **lengths.as_dict(), **counts})
        rejected_file = rejected.finish()
    return ConversionReport(lengths, output=output, rejected_file=rejected_file, shard_num=shard_num, **counts)


def _fitting_length(source: Path, tokenizer: Tokenizer, template: str, num_workers: int, skip_invalid: bool) -> int:
    """The smallest multiple of 64 tokens that cuts no pair of the source; it is printed with the longest text's."""
    longest = 0
    with _encoded(source, tokenizer, template, num_workers) as rows, _progress("count tokens of", source) as bar:
        for row in rows:
            bar.update()
            if isinstance(row, InvalidRow):
                if not skip_invalid:
                    raise row.as_error()
            elif row.chosen != row.reject:
                longest = max(longest, *map(len, row.ids()))
    length = max(-(-longest // _STEP), 1) * _STEP
    if longest:
        tqdm.write(f"--seq_length auto: {length} (the longest text has {longest} tokens)")
    return length


class _Encoded(NamedTuple):
    """A pair as an encoding process sends it; ids are the bytes of int32 arrays, which go through a pipe fastest."""

    prompt_length: int
    chosen: bytes
    reject: bytes
    empty_answer: bool

    def ids(self) -> Tuple[np.ndarray, np.ndarray]:
        """Ids of the chosen and the rejected text, template and prompt included, not cut."""
        return np.frombuffer(self.chosen, np.int32), np.frombuffer(self.reject, np.int32)


@contextlib.contextmanager
def _encoded(source: Path, tokenizer: Tokenizer, template: str,
             num_workers: int) -> Iterator[Iterator[Union[_Encoded, InvalidRow]]]:
    """The rows of `source`, in its order, encoded by processes that are gone when the context is left."""
    context = multiprocessing.get_context("spawn")  # a fork would copy MindSpore's threads' locks
    processes, receivers = [], []
    try:
        for index in range(num_workers):
            receiver, sender = context.Pipe()  # both ways means a socket, which holds three times what a pipe does
            receivers.append(receiver)
            process = context.Process(target=_encode_chunks, daemon=True,
                                      args=(sender, source, tokenizer.path, template, index, num_workers))
            with sender, _no_interrupt():  # only the process keeps its end: its death is the end of what it sends
                process.start()
            processes.append(process)
        yield _in_turn(source, processes, receivers)
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


def _in_turn(source: Path, processes: Sequence, receivers: Sequence) -> Iterator[Union[_Encoded, InvalidRow]]:
    for process, receiver in itertools.cycle(zip(processes, receivers)):
        try:
            chunk = receiver.recv()
        except (EOFError, OSError):
            process.join()
            raise UserError(f"{source}: a process that encodes it ended with exit code {process.exitcode} before the "
                            "end of the file (-9: killed, usually out of memory)") from None
        if isinstance(chunk, UserError):
            raise chunk
        if not chunk:
            return
        yield from chunk


def _encode_chunks(sender, source: Path, tokenizer_path: Path, template: str, index: int, step: int) -> None:
    """An encoding process: send chunks `index`, `index + step`, ... of the source, then an empty one.

    A `UserError` is sent too, in the place of a chunk. The tokenizer's file is opened again: the first process would
    have to wait until this one has taken over the tokenizer itself, for ever if this one ends while it starts.
    """
    try:
        tokenizer = open_tokenizer(tokenizer_path)
        rows = read_preferences(source)
        chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
        for chunk in itertools.islice(chunks, index, None, step):
            sender.send(_encode_chunk(chunk, tokenizer, template))
        sender.send([])
    except UserError as error:
        sender.send(error)
    except ConnectionError:
        pass  # the first process was killed


def _encode_chunk(rows: Iterable, tokenizer: Tokenizer, template: str) -> List[Union[_Encoded, InvalidRow]]:
    encoded = []
    for row in rows:
        if not isinstance(row, InvalidRow):
            ids = tokenizer.encode_batch([row.prompt.strip(), render(template, row.prompt, row.chosen),
                                          render(template, row.prompt, row.rejected)])
            row = _Encoded(len(ids[0]), *(np.array(side, np.int32).tobytes() for side in ids[1:]),
                           not (row.chosen.strip() and row.rejected.strip()))
        encoded.append(row)
    return encoded


class _InvalidRows:
    """Takes invalid rows: the first one ends the run, or with `keep` all go to OUT.mindrecord.rejected.jsonl."""

    def __init__(self, output: Path, keep: bool):
        self.keep = keep
        self.path = output.with_name(f"{output.name}.rejected.jsonl")
        self._file: Optional[TextIO] = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_InvalidRows":
        self._hidden = self._stack.enter_context(partial_folder(self.path)) / self.path.name
        return self

    def add(self, row: InvalidRow) -> None:
        if not self.keep:
            raise row.as_error()
        if self._file is None:  # half of a surrogate pair becomes the JSON escape that it came from
            self._file = self._stack.enter_context(self._hidden.open("w", encoding="utf-8", errors="backslashreplace"))
        json.dump({"line": row.number, "reason": row.reason, "text": row.text}, self._file, ensure_ascii=False,
                  allow_nan=False)
        self._file.write("\n")

    def finish(self) -> Optional[Path]:
        """Move the file to its name; an older one goes when there is nothing to say."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return None
        self._file.close()
        os.replace(self._hidden, self.path)
        return self.path

    def __exit__(self, *_) -> None:
        self._stack.close()


def _progress(what: str, source: Path) -> tqdm:
    """A bar with rate and time left; the number of rows of a .jsonl file is that of its line breaks."""
    total = None
    try:
        with open(source, "rb") as file:
            if source.suffix != ".json":
                total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError):
        pass  # reading says so, in a moment
    return tqdm(desc=f"{what} {source.name}", total=total, unit=" pairs", mininterval=0.5)
