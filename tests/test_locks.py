"""Locks on files.

| test                                     | proves                                           | judged against      |
| test_one_holds_it_at_a_time ...          | exclusive and shared locks; they go with a file  | a second descriptor |
| test_a_file_system_without_locks ...     | the reason is returned and the file opened       | what flock raises   |
| test_a_file_that_was_renamed ...         | the lock is on the file that has the name now    | the file system     |
"""
import errno
import fcntl
import os

import pytest

from mindrlhf import locks
from mindrlhf.locks import lock, open_locked


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def test_one_holds_it_at_a_time_or_several_share_it(path):
    first, no_locks = open_locked(path)
    assert no_locks is None
    with pytest.raises(BlockingIOError):
        open_locked(path)
    with open(path, "rb") as second, open(path, "rb") as third:
        with pytest.raises(BlockingIOError):
            lock(second.fileno(), shared=True)
        os.close(first)
        assert [lock(file.fileno(), shared=True) for file in (second, third)] == [None, None]
        with pytest.raises(BlockingIOError):
            open_locked(path)
    os.close(open_locked(path)[0])


@pytest.mark.parametrize(("number", "held"), [(errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EACCES, True)])
def test_a_file_system_without_locks_says_so(path, monkeypatch, number, held):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    if held:  # so network file systems say it
        with pytest.raises(BlockingIOError):
            open_locked(path)
    else:
        file, reason = open_locked(path)
        assert reason.errno == number
        os.close(file)


def test_a_file_that_was_renamed_meanwhile_is_made_again(path, monkeypatch):
    """By the one who had the lock, which is given in that moment."""
    taken = []

    def rename_first(file, kind, flock=fcntl.flock):
        flock(file, kind)
        if not taken:
            taken.append(path.rename(path.with_name("whole")))

    monkeypatch.setattr(locks.fcntl, "flock", rename_first)
    file, _ = open_locked(path)
    assert os.path.samestat(os.fstat(file), path.stat())
    os.close(file)
