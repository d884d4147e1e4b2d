"""MindRecord data that is no longer what it was: refused in a line, or the rows that were written.

A data set is three files: OUT.mindrecord, its index .db, and the sidecar .json. One of them is damaged, or exchanged
for that of another conversion; then a process reads the data as a start of training does (`record_reader.py`).

| test                              | proves                                                        | judged against   |
| test_reading_of_damaged_data      | our checks stand before MindRecord's reader: no crash, no     | rows, as written |
|                                   | traceback, no other rows                                      |                  |
| test_reading_of_damaged_old_data  | without checksums (the original converter's data): a line, or | the reader's     |
|                                   | rows; what is MindRecord's to notice is counted               | exit and answer  |
| test_files_of_two_conversions_... | whichever of the three files is another's                     | message          |
"""
import json
import select
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_YAML
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DAMAGE, damaged, fuzz, outcomes_of

from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter

pytestmark = [pytest.mark.stack, pytest.mark.process]

NAME, PAIRS, SEQ, PAD = "a.mindrecord", 20, 16, 996
HEADER = 64 << 20  # where the rows begin; a hole but for its first kilobyte
_ANSWER = 120  # seconds


@pytest.fixture(scope="module")
def outcomes(request):
    yield from outcomes_of("records")


def write(folder, pairs):
    folder.mkdir()
    with RecordWriter(folder / NAME) as writer:
        for number in range(1, 1 + pairs):
            writer.write(encode_pair([number, 2, 3], [number, 4], SEQ, PAD))
        writer.finish({"seq_length": SEQ, "pad_token_id": PAD, "prompt_template": "{prompt}{response}"})
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("records") / "sound", PAIRS)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write(tmp_path_factory.mktemp("records") / "other", PAIRS + 1)


ROWS = [{name: value.tolist() for name, value in encode_pair([number, 2, 3], [number, 4], SEQ, PAD).items()}
        for number in range(1, 1 + PAIRS)]


class Reader:
    """The process that reads; a new one after one has ended."""

    def __init__(self):
        self.process = None

    def read(self, folder):
        """Its answer, or {"crash": how it ended}."""
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("record_reader.py")),
                                             str(TINY_YAML)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, text=True, cwd=folder.parent)
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answer = ""
        if select.select([self.process.stdout], [], [], _ANSWER)[0]:
            answer = self.process.stdout.readline()
        else:
            self.process.kill()
        if not answer:
            self.process.wait()
            code, self.process = self.process.returncode, None
            return {"crash": f"exit code {code} (-9: no answer for {_ANSWER} s)"}
        return json.loads(answer)

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    reader.close()


# What is damaged: a part of one of the files, or its length.
PARTS = st.sampled_from(["head", "head", "rows", "rows", "index", "index", "sidecar"])
CHANGES = st.one_of(
    st.tuples(PARTS, st.lists(DAMAGE, min_size=1, max_size=3)),
    st.tuples(st.just("size"), st.sampled_from([0, 1, 8, 100, 4096, HEADER - 1, HEADER, HEADER + 100, HEADER + 4000,
                                                HEADER + (1 << 20), 1 << 31])),
    st.tuples(st.just("length"), st.sampled_from([0, 1, 100, 1 << 20, HEADER, 1 << 40, (1 << 64) - 1])),
    st.tuples(st.just("words"), st.tuples(
        st.sampled_from([b'"header_size":67108864', b'"page_size":524288', b'"page_id":0', b'"end_row_id":20', b"int32",
                         b'"version":"3.0"', b'"shard_id":0', b'"page_size":4800', b"loss_mask", NAME.encode(), b"[-1]",
                         b'"page_type":"BLOB_DATA"', b'"offset":0']),
        st.sampled_from([b"", b"x", b'"header_size":16777216', b'"page_size":4096', b'"page_size":0', b'"page_id":9',
                         b'"end_row_id":999999', b"int64", b"float32", b'"version":"2.0"', b'"shard_id":7', b"[3]",
                         b"[]", b"-1", b'"page_type":"RAW_DATA"', b'"page_type":1', b"../x", b'"header_size":-1']))),
    st.tuples(st.just("sql"), st.sampled_from([
        "DELETE FROM INDEXES", "DELETE FROM INDEXES WHERE ROW_ID = 3", "DROP TABLE INDEXES", "DROP TABLE SHARD_NAME",
        "UPDATE SHARD_NAME SET NAME = 'b.mindrecord'", "UPDATE INDEXES SET PAGE_OFFSET_BLOB = 10 WHERE ROW_ID = 3",
        "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 1 << 40", "UPDATE INDEXES SET PAGE_ID_BLOB = 77",
        "UPDATE INDEXES SET PAGE_ID_BLOB = -1", "UPDATE INDEXES SET PAGE_OFFSET_BLOB = 'x'", "DELETE FROM SHARD_NAME",
        "UPDATE INDEXES SET ROW_GROUP_ID = 5", "UPDATE INDEXES SET PAGE_OFFSET_RAW = -5", "VACUUM",
        "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = PAGE_OFFSET_BLOB", "CREATE TABLE more (a INT)"])))


def change_part(path, begin, end, change):
    """Replace bytes begin..end of a file by what `change` makes of them; the hole in a header stays one."""
    with open(path, "r+b") as file:
        file.seek(begin)
        content = file.read(end - begin)
        rest = file.read() if end >= HEADER or path.suffix != ".mindrecord" else None
        changed = change(content)
        if rest is None:
            changed = changed[:end - begin].ljust(end - begin, b"\0")  # the rows stay where they are
        file.seek(begin)
        file.write(changed + (rest or b""))
        if rest is not None:
            file.truncate()


def apply(folder, what, how):
    record, index, sidecar = (folder / f"{NAME}{end}" for end in ("", ".db", ".json"))
    if what == "size":
        with open(record, "r+b") as file:
            file.truncate(how)
    elif what == "length":
        change_part(record, 0, 8, lambda _: how.to_bytes(8, "little"))
    elif what == "words":
        change_part(record, 0, 4096, lambda content: content.replace(how[0], how[1], 1))
    elif what == "sql":
        connection = sqlite3.connect(index)
        with connection:
            connection.execute(how)
        connection.close()
    else:
        path, begin, end = {"head": (record, 0, 1200), "rows": (record, HEADER, record.stat().st_size),
                            "index": (index, 0, 1 << 20), "sidecar": (sidecar, 0, 1 << 20)}[what]

        def change(content):
            for damage in how:
                content = damaged(content, damage)
            return content
        change_part(path, begin, end, change)


def copy_of(sound, name):
    folder = sound.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sound.iterdir():
        if path.name == NAME:
            with open(path, "rb") as source, open(folder / NAME, "wb") as target:
                target.write(source.read(4096))
                source.seek(HEADER)
                target.seek(HEADER)
                target.write(source.read())
        else:
            shutil.copy(path, folder)
    return folder


def check_refused(answer, folder):
    for message in answer["refused"]:
        assert message.isprintable()
        assert len(message) < 3000
        assert NAME in message
    assert str(folder) in answer["refused"][0]


@example(("sql", "UPDATE INDEXES SET PAGE_OFFSET_BLOB = 10 WHERE ROW_ID = 3"))
@example(("words", (b'"page_id":0', b'"page_id":9')))
@example(("rows", [("flip", 0.5, 0)]))
@example(("rows", [("zero", 0.0, 16)]))
@given(CHANGES)
@fuzz(few=25, full=500)
def test_reading_of_damaged_data(sound, reader, outcomes, change):
    folder = copy_of(sound, "copy")
    apply(folder, *change)
    answer = reader.read(folder)
    if "refused" in answer:
        check_refused(answer, folder)
        outcomes.count("refused")
        return
    assert list(answer) == ["pairs", "rows"], answer
    assert answer["pairs"] == PAIRS
    assert [{name: row[name] for name in FIELDS} for row in answer["rows"]] == ROWS
    outcomes.count("read")


@example(("words", (b"[-1]", b"[]")))
@example(("words", (b'"header_size":67108864', b'"page_size":0')))
@given(CHANGES)
@fuzz(few=15, full=500)
def test_reading_of_damaged_old_data(sound, reader, outcomes, change):
    folder = copy_of(sound, "old")
    (folder / f"{NAME}.json").write_text('{"seq_length": 16}')
    apply(folder, *change)
    answer = reader.read(folder)
    if "refused" in answer:
        check_refused(answer, folder)
        outcomes.count("old data refused")
    elif "crash" in answer:
        outcomes.count(f"old data that ended MindRecord's reader, {answer['crash']}")
    else:
        assert list(answer) == ["pairs", "rows"], answer["fault"]
        same = [{name: row[name] for name in FIELDS} for row in answer["rows"]] == ROWS
        outcomes.count("old data read" if same else "old data read with other values")


@pytest.mark.parametrize("name", [NAME, f"{NAME}.db", f"{NAME}.json"])
def test_files_of_two_conversions_are_refused(sound, other, reader, name):
    folder = copy_of(sound, "mixed")
    shutil.copy(other / name, folder)
    answer = reader.read(folder)
    assert list(answer) == ["refused"], answer
    assert "damaged, or not the file that was written: its " in answer["refused"][0]
