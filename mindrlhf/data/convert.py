"""CValues-Comparison to MindRecord: the story of `cvalues_comparison.py`.

MindRecord's writer does not let go of Python's lock, so what reads and encodes the source are processes of their own.
Each reads the whole file and encodes every N-th chunk of it; the chunks are taken in turn, so that what is written
does not depend on their number, and a full socket holds a process back that is ahead of the writer. What can be read
only once, a pipe, is copied to a file first.
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import ContextManager, Iterable, Iterator, List, NamedTuple, Optional, Sequence, TextIO, Tuple, Union

import numpy as np
from tqdm import tqdm

from mindrlhf import __version__
from mindrlhf.atomic import check_outputs, follow_link, naming_a_full_disk, partial_folder
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.lengths import LengthCounts, check_space
from mindrlhf.data.mindrecord_files import read_sidecar
from mindrlhf.data.mindrecord_writer import LengthStatistics, RecordWriter
from mindrlhf.data.preference import InvalidRow, Preference, read_preferences
from mindrlhf.data.template import as_dialogue
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import Tokenizer, open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.tables import format_table

__all__ = ["MAX_INVALID", "ConversionReport", "convert_preferences"]

MAX_INVALID = 0.01  # share of invalid lines that `skip_invalid` leaves out unless told otherwise
_CHUNK = 128  # rows that a process encodes and sends at once: at most two chunks a process are held in memory
_ID_BYTES = 4
_LONGEST = 2 ** 21  # tokens of a sample of which a page of MindRecord (256 MB) holds five
_MOST_WORKERS = 256
_SHOWN = 3  # invalid lines in a message


@dataclass(frozen=True)
class ConversionReport:
    """What became of the rows of a file: counts of pairs, and where they are."""

    lengths: LengthStatistics
    cut: int
    empty_answers: int
    identical: int
    prefixes: int
    invalid: int
    rejected_file: Optional[Path]
    output: Path
    shard_num: int = 1
    cut_prompts: int = 0
    dropped: int = 0
    lost_by_cut: int = 0

    def as_text(self) -> str:
        """The closing lines for the user: the table of lengths, then what was cut, skipped and written."""
        row = self.lengths.as_dict()
        lines = [format_table([list(row), [str(value) for value in row.values()]]),
                 f"too long: {self.cut} with a cut answer, {self.cut_prompts} with a cut prompt, {self.dropped} "
                 f"dropped, {self.lost_by_cut} lost because the cut took their difference",
                 f"with an empty answer: {self.empty_answers}; skipped because both answers are the same: "
                 f"{self.identical}"]
        if self.prefixes:
            lines.append(f"one answer begins the other: {self.prefixes}; their loss compares padding, not answers: a "
                         "small loss says nothing of their order")
        if self.invalid:
            lines.append(f"invalid lines left out: {self.invalid}, see {self.rejected_file}")
        shards = f"{self.shard_num} shards of " if self.shard_num > 1 else ""
        lines.append(f"wrote {self.lengths.count} pairs to {shards}{self.output}")
        return "\n".join(lines)


def convert_preferences(source: Path, output: Path, tokenizer: Tokenizer, seq_length: Optional[int], template: str,
                        padding_side: str = "right", pad_token_id: Optional[int] = None, skip_invalid: bool = False,
                        num_workers: int = 1, shard_num: int = 1, max_invalid: float = MAX_INVALID,
                        add_eos: bool = False, too_long: str = "cut") -> ConversionReport:
    """Convert a file of preference pairs to `output`, its index and its sidecar.

    Args:
        source:       .jsonl (or .json array) with prompt, pos_resp, neg_resp; a pipe is read once and whole
        output:       OUT.mindrecord; if it is a link, what it leads to
        tokenizer:    text to ids; the processes that encode open its file again
        seq_length:   N, tokens a sample. None: the smallest multiple of 64 that holds all texts, found by encoding the
                      source twice and printed
        template:     as it is noted, see `mindrlhf.data.template.read_template`
        padding_side: "right" or "left"
        pad_token_id: default: the tokenizer's
        skip_invalid: leave out lines that cannot be used and write them to OUT.mindrecord.rejected.jsonl
        num_workers:  processes that encode, beside this one that writes; pairs and (of one file) order are the same
        shard_num:    1, or the number of files OUT.mindrecord0, OUT.mindrecord1, ... over which pairs are spread
        max_invalid:  share of the lines, 0 to 1, that `skip_invalid` leaves out; more are an error
        add_eos:      end texts with `<|endoftext|>`
        too_long:     what becomes of longer texts, see `TextEncoder.fit`

    Raises:
        UserError: the source cannot be read, a line is invalid (unless `skip_invalid`) or too many are, no pair is left
                   or fewer than `shard_num`, an output is one of the inputs or cannot be written, the tokenizer lacks a
                   control token, there is no space, or an encoding process was ended from outside.
    """
    pad_token_id = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
    writer = RecordWriter(output, shard_num)
    rejected = _InvalidRows(writer.path, skip_invalid)
    check_outputs({"--dst_file": [*writer.files, rejected.path]}, {"--src_file": source, "--tokenizer": tokenizer.path})
    _check_arguments(tokenizer, seq_length, num_workers)
    encoder = TextEncoder(tokenizer, template, add_eos, too_long)
    lengths, counts = LengthStatistics(), dict.fromkeys(("cut", "empty_answers", "identical", "prefixes", "invalid"), 0)
    too_long_counts = dict.fromkeys(("cut_prompts", "dropped", "lost_by_cut"), 0)
    with writer, rejected, _file_of(source, rejected.folder) as place:
        read = _Source(source, place, encoder, seq_length, num_workers)
        if seq_length is None:
            found = _lengths_of(read, skip_invalid)
            seq_length = found.fitting
            check_space(writer.path, rejected.folder, found.pairs, seq_length)
            read = read._replace(length=seq_length)
        with read.encoded() as rows, _progress("convert", read) as bar:
            writer.open()  # while the other processes start
            for row in rows:
                bar.update()
                if isinstance(row, InvalidRow):
                    rejected.add(row)
                    counts["invalid"] += 1
                    continue
                if row.dropped:
                    too_long_counts["dropped"] += 1
                    continue
                chosen_ids, reject_ids = row.ids()
                sample = encode_pair(chosen_ids, reject_ids, seq_length, pad_token_id, padding_side)
                if sample is None:
                    counts["identical"] += not row.different
                    too_long_counts["lost_by_cut"] += row.different
                    continue
                counts["cut"] += row.cut_answer
                too_long_counts["cut_prompts"] += row.cut_prompt
                counts["empty_answers"] += row.empty_answer
                shorter = min(len(chosen_ids), len(reject_ids))
                counts["prefixes"] += padding_side == "right" and np.array_equal(chosen_ids[:shorter],
                                                                                 reject_ids[:shorter])
                lengths.add(row.prompt_length, len(chosen_ids), len(reject_ids))
                writer.write(sample)
        if not lengths.count:
            others = f", {sum(too_long_counts.values())} too long" if any(too_long_counts.values()) else ""
            raise UserError(f"{source}: no usable pair ({counts['invalid']} invalid lines, {counts['identical']} with "
                            f"two equal answers{others}), expected at least one")
        rejected.check_share(source, lengths.count + counts["identical"] + too_long_counts["dropped"]
                             + too_long_counts["lost_by_cut"], max_invalid)
        earlier_rejected = rejected.of_earlier_run()
        writer.finish({
            "made_by": f"mindrlhf {__version__}", "source": source.name, "seq_length": seq_length,
            "pad_token_id": pad_token_id, "padding_side": padding_side, "prompt_template": template,
            "tokenizer": {**tokenizer.identity, "vocab_size": tokenizer.vocab_size},
            **({"add_eos": True} if add_eos else {}), **({"too_long": too_long} if too_long != "cut" else {}),
            **lengths.as_dict(), **counts, **{name: count for name, count in too_long_counts.items() if count}})
        rejected_file = rejected.finish(earlier_rejected)
    return ConversionReport(lengths, output=writer.path, rejected_file=rejected_file, shard_num=shard_num, **counts,
                            **too_long_counts)


def _check_arguments(tokenizer: Tokenizer, seq_length: Optional[int], num_workers: int) -> None:
    if not _rereadable(tokenizer.path):
        raise UserError(f"--tokenizer: {tokenizer.path}: a pipe or a device, expected a file: each process that "
                        "encodes reads it")
    if seq_length is not None and seq_length > _LONGEST:
        raise UserError(f"--seq_length: found {seq_length}, expected at most {_LONGEST}, of which MindRecord can hold "
                        "a sample")
    if num_workers > _MOST_WORKERS:
        raise UserError(f"--num_workers: found {num_workers}, expected at most {_MOST_WORKERS}")


def _rereadable(path: Path) -> Optional[Path]:
    """Where other processes find what `path` leads to (their /dev/stdin is another one); None if it is no file."""
    return Path(os.path.realpath(path)) if os.path.isfile(path) else None


@contextlib.contextmanager
def _file_of(source: Path, folder: Path) -> Iterator[Path]:
    """A file with the content of `source`: where it leads to, or for a pipe a copy in `folder`."""
    place = _rereadable(source)
    if place or os.path.isdir(source) or not os.path.exists(source):
        yield place or source
        return
    place = folder / "source"
    try:
        pipe = open(source, "rb")  # noqa: SIM115 (its errors are not those of the copy)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    with pipe, naming_a_full_disk(place), open(place, "wb") as file:
        shutil.copyfileobj(pipe, file, 1 << 20)
    yield place


def _lengths_of(source: "_Source", skip_invalid: bool) -> LengthCounts:
    """How long the pairs of the source are; the length that fits them is printed, with the longest text's."""
    lengths = LengthCounts()
    with source.encoded() as rows, _progress("count tokens of", source) as bar:
        for row in rows:
            bar.update()
            if isinstance(row, InvalidRow):
                if not skip_invalid:
                    raise row.as_error()
            elif row.different:
                lengths.add(max(row.lengths()), row.place)
    if lengths.fitting > _LONGEST:
        raise UserError(f"{source.name}: the longest text has {lengths.longest} tokens, expected at most {_LONGEST} "
                        "for --seq_length auto; give the length at which longer ones are to be cut")
    if lengths.pairs:
        tqdm.write(f"--seq_length auto: {lengths.fitting} (the longest text has {lengths.longest} tokens)")
        warning = lengths.warning()
        if warning:
            tqdm.write(warning)
    return lengths


class _Encoded(NamedTuple):
    """A pair as an encoding process sends it; ids are the bytes of int32 arrays, which go through a pipe fastest.

    Attributes:
        place:      its file and line
        different:  whether both texts differed before they were cut
        cut_answer: whether a text lost its end; `cut_prompt`, whether the prompt lost its beginning; `dropped`, whether
                    the pair is to be left out because it is too long
    """

    place: str
    prompt_length: int
    chosen: bytes
    reject: bytes
    empty_answer: bool
    different: bool
    cut_answer: bool
    cut_prompt: bool
    dropped: bool

    def ids(self) -> Tuple[np.ndarray, np.ndarray]:
        """Ids of the chosen and the rejected text, template and prompt included."""
        return np.frombuffer(self.chosen, np.int32), np.frombuffer(self.reject, np.int32)

    def lengths(self) -> Tuple[int, int]:
        """Tokens of both texts."""
        return len(self.chosen) // _ID_BYTES, len(self.reject) // _ID_BYTES


class _Source(NamedTuple):
    """A file of pairs, and how its rows are encoded.

    Attributes:
        name:   of the file, for messages
        path:   where it can be read again and again
        length: at which texts are cut; None where they are not
    """

    name: Path
    path: Path
    encoder: TextEncoder
    length: Optional[int]
    num_workers: int

    def encoded(self) -> ContextManager[Iterator[Union[_Encoded, InvalidRow]]]:
        """The rows, in their order, encoded by processes that are gone when the context is left."""
        return _encoded(*self)


@contextlib.contextmanager
def _encoded(source: Path, path: Path, encoder: TextEncoder, length: Optional[int],
             num_workers: int) -> Iterator[Iterator[Union[_Encoded, InvalidRow]]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy MindSpore's threads' locks
    processes, receivers = [], []
    try:
        for index in range(num_workers):
            receiver, sender = context.Pipe()  # both ways means a socket, which holds three times what a pipe does
            receivers.append(receiver)
            process = context.Process(target=_encode_chunks, daemon=True,
                                      args=(sender, source, path, _rereadable(encoder.tokenizer.path), encoder.settings,
                                            length, index, num_workers))
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


def _encode_chunks(sender, source: Path, path: Path, tokenizer_path: Path, settings: Sequence,
                   length: Optional[int], index: int, step: int) -> None:
    """An encoding process: send chunks `index`, `index + step`, ... of the source, then an empty one.

    A `UserError` is sent too, in the place of a chunk. The tokenizer's file is opened again: the first process would
    have to wait until this one has taken over the tokenizer itself, for ever if this one ends while it starts.
    """
    try:
        encoder = TextEncoder(open_tokenizer(tokenizer_path), *settings)
        rows = read_preferences(path, source)
        chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
        for chunk in itertools.islice(chunks, index, None, step):
            sender.send(_encode_chunk(chunk, encoder, length))
        sender.send([])
    except UserError as error:
        sender.send(error)
    except ConnectionError:
        pass  # the first process was killed


def _encode_chunk(rows: Iterable, encoder: TextEncoder, length: Optional[int]) -> List[Union[_Encoded, InvalidRow]]:
    return [row if isinstance(row, InvalidRow) else _encode_row(row, encoder, length) for row in rows]


def _encode_row(row: Preference, encoder: TextEncoder, length: Optional[int]) -> Union[_Encoded, InvalidRow]:
    prompt = as_dialogue(row.prompt)
    answers = [as_dialogue(answer, "assistant") for answer in (row.chosen, row.rejected)]
    try:
        fitted = encoder.fit(prompt, answers, length)
    except UserError as error:  # the template refuses such a dialogue
        text = json.dumps({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}, ensure_ascii=False,
                          allow_nan=False)
        return InvalidRow(row.place, row.number, str(error), text)
    alone = encoder.tokenizer.encode_batch([message.content.strip() for message in prompt])
    chosen, rejected = (np.array(ids, np.int32).tobytes() for ids in fitted.ids)
    empty = not all("".join([message.content for message in answer]).strip() for answer in answers)
    return _Encoded(row.place, sum(map(len, alone)), chosen, rejected, empty, fitted.different,
                    any(fitted.cut_answers), fitted.cut_prompt, fitted.dropped)


class _InvalidRows:
    """Takes invalid rows: the first one ends the run, or with `keep` all go to OUT.mindrecord.rejected.jsonl."""

    def __init__(self, output: Path, keep: bool):
        self.keep = keep
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
            json.dump(row.as_record(), self._file, ensure_ascii=False, allow_nan=False)
            self._file.write("\n")

    def check_share(self, source: Path, usable: int, most: float) -> None:
        """Raise `UserError` if more than a share `most` of the lines is invalid."""
        if self._count > most * (self._count + usable):
            raise UserError(f"{source}: {self._count} of {self._count + usable} lines are invalid, expected at most "
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
    """A bar with rate and time left; the number of rows of a .jsonl file is that of its line breaks."""
    total = None
    try:
        with open(source.path, "rb") as file:
            if source.name.suffix != ".json":
                total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError):
        pass  # reading says so, in a moment
    return tqdm(desc=f"{what} {source.name.name}", total=total, unit=" pairs", mininterval=0.5)
