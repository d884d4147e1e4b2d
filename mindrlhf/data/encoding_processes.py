"""Rows of text to ids, on processes of their own.

MindRecord's writer does not let go of Python's lock, so what reads and encodes the sources are other processes. Each
reads the whole of them and encodes every N-th chunk; the chunks are taken in turn, so that what comes out does not
depend on their number, and a full socket holds a process back that is ahead of the writer.
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path
from typing import ContextManager, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from mindrlhf.data.further_fields import all_or_no_margins
from mindrlhf.data.preference import FewerRows, InvalidRow, Preference, Skipped
from mindrlhf.data.sources import Sources, rereadable
from mindrlhf.data.split import place_of_prompt
from mindrlhf.data.text_encoder import EMPTY_TEXT, TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError

__all__ = ["EncodedPair", "EncodedSources", "encode_rows"]

_CHUNK = 128  # rows that a process encodes and sends at once: at most two chunks a process are held in memory
_ID_BYTES = 4
# Bytes. The path of a socket has 107 at most (`man 7 unix`), of which 32 are what `multiprocessing` puts behind the
# folder for temporary files: the names of a folder, as /pymp-q8w1zk3_, and of the socket in it, as /listener-0f4ktx2a.
_LONGEST_FOLDER_OF_SOCKET = 107 - 32


class EncodedPair(NamedTuple):
    """A pair as an encoding process sends it; ids are the bytes of int32 arrays, which go through a pipe fastest.

    Attributes:
        place:         its file and line
        prompt_place:  see `place_of_prompt`
        prompt_length: tokens of the prompt alone
        chosen:        ids of the text, template and prompt included; `rejected` likewise
        empty_answer:  whether an answer is empty
        different:     whether both texts differed before they were cut
        cut_answer:    whether a text lost its end; `cut_prompt`, whether the prompt lost its beginning; `dropped`,
                       whether the pair is to be left out because it is too long
        margin:        see `Preference`, as for what follows
    """

    place: str
    prompt_place: float
    prompt_length: int
    chosen: bytes
    rejected: bytes
    empty_answer: bool
    different: bool
    cut_answer: bool
    cut_prompt: bool
    dropped: bool
    margin: Optional[float] = None
    prompt_id: Optional[int] = None
    chosen_answer: Optional[int] = None
    rejected_answer: Optional[int] = None
    kept: Optional[str] = None

    def ids(self) -> Tuple[np.ndarray, np.ndarray]:
        """Ids of the chosen and the rejected text; (length,) int32 each."""
        return np.frombuffer(self.chosen, np.int32), np.frombuffer(self.rejected, np.int32)

    def lengths(self) -> Tuple[int, int]:
        """Tokens of both texts."""
        return len(self.chosen) // _ID_BYTES, len(self.rejected) // _ID_BYTES


EncodedRow = Union[EncodedPair, Skipped, InvalidRow, FewerRows]


class EncodedSources(NamedTuple):
    """Files of pairs, and how their rows are encoded.

    Attributes:
        length:      at which texts are cut; None where they are not
        num_workers: processes
    """

    sources: Sources
    encoder: TextEncoder
    length: Optional[int]
    num_workers: int

    def rows(self) -> ContextManager[Iterator[EncodedRow]]:
        """The rows, in their order, encoded by processes that are gone when the context is left."""
        return _encoded(*self)


@contextlib.contextmanager
def _encoded(sources: Sources, encoder: TextEncoder, length: Optional[int],
             num_workers: int) -> Iterator[Iterator[EncodedRow]]:
    # A fork of this process would copy the locks of MindSpore's threads; the server has imported what its forks need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes, receivers = [], []
    try:
        for index in range(num_workers):
            receiver, sender = context.Pipe()  # both ways means a socket, which holds three times what a pipe does
            receivers.append(receiver)
            process = context.Process(target=_encode_chunks, daemon=True,
                                      args=(sender, sources, rereadable(encoder.tokenizer.path), encoder.settings,
                                            length, index, num_workers))
            # The process alone keeps the sender's end: its death is the end of what it sends.
            with sender, _no_interrupt(), _room_for_socket():
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
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resource_tracker.ensure_running()  # which otherwise starts along with the first process; it lets Ctrl-C in again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _room_for_socket() -> Iterator[None]:
    """Have the server's socket in /tmp where the folder of temporary files, as a cluster's scheduler names it for a
    job, has a longer name than the path of a socket may have.
    """
    chosen = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER_OF_SOCKET:
        tempfile.tempdir = "/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = chosen


def _in_turn(sources: Sources, processes: Sequence,
             receivers: Sequence) -> Iterator[EncodedRow]:
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


def _encode_chunks(sender, sources: Sources, tokenizer_path: Path, settings: Sequence, length: Optional[int],
                   index: int, step: int) -> None:
    """An encoding process: send chunks `index`, `index + step`, ... of the sources, then an empty one.

    A `UserError` is sent too, in the place of a chunk. The tokenizer's file is opened again: the first process would
    have to wait until this one has taken over the tokenizer itself, for ever if this one ends while it starts.
    """
    try:
        encoder = TextEncoder(open_tokenizer(tokenizer_path), *settings)
        rows = all_or_no_margins(sources.preferences())
        chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
        for chunk in itertools.islice(chunks, index, None, step):
            sender.send(list(encode_rows(chunk, encoder, length)))
        sender.send([])
    except UserError as error:
        sender.send(error)
    except ConnectionError:
        pass  # the first process was killed


def encode_rows(rows: Iterable[Union[Preference, Skipped, InvalidRow, FewerRows]], encoder: TextEncoder,
                length: Optional[int]) -> Iterator[EncodedRow]:
    """The rows with their pairs encoded, and cut at `length` tokens unless it is None; they are read as they are
    needed.
    """
    return (_encode_pair(row, encoder, length) if isinstance(row, Preference) else row for row in rows)


def _encode_pair(row: Preference, encoder: TextEncoder, length: Optional[int]) -> Union[EncodedPair, InvalidRow]:
    answers = (row.chosen, row.rejected)
    try:
        fitted = encoder.fit(row.prompt, answers, length)
        if not all(fitted.ids):
            raise UserError(EMPTY_TEXT)
    except UserError as error:  # the template refuses such a dialogue, or leaves everything out
        text = json.dumps({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}, ensure_ascii=False,
                          allow_nan=False)
        return InvalidRow(row.place, row.number, str(error), text)
    alone = encoder.tokenizer.encode_batch([message.content.strip() for message in row.prompt])
    chosen, rejected = (np.array(ids, np.int32).tobytes() for ids in fitted.ids)
    empty = not all("".join([message.content for message in answer]).strip() for answer in answers)
    return EncodedPair(row.place, place_of_prompt(row.prompt), sum(map(len, alone)), chosen, rejected, empty,
                       fitted.different, any(fitted.cut_answers), fitted.cut_prompt, fitted.dropped, row.margin,
                       row.prompt_id, row.chosen_answer, row.rejected_answer, row.kept)
