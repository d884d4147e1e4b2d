"""MindRecord's writer, spared what it needs not do, writes what it writes otherwise.

| test                               | proves                                            | judged against             |
| test_files_are_those_of_...        | layout, schema and index are MindRecord's own     | FileWriter, byte by byte   |
| test_spared_writer_asks_for_its... | the C++ side is not asked again for each field    | calls counted              |
| test_writer_of_another_release_... | attributes that are not there change nothing      | attributes before          |
"""
import numpy as np
import pytest

from mindrlhf.compat.records import spare_writer
from mindrlhf.data.encode import encode_pair

pytestmark = pytest.mark.stack

SCHEMA = {"chosen_input_ids": {"type": "int32", "shape": [-1]}, "loss_mask": {"type": "float32", "shape": [-1]},
          "end_ind": {"type": "int64"}}


def open_writer(folder):
    from mindspore.mindrecord import FileWriter
    folder.mkdir()
    writer = FileWriter(str(folder / "out.mindrecord"), shard_num=1, overwrite=True)
    writer.add_schema(SCHEMA, "pairs")
    return writer


def sample(length):
    row = encode_pair(np.arange(1, length, dtype=np.int32), [7, 8], length + 3, 0)
    return {**{name: row[name] for name in SCHEMA}, "end_ind": length}


def test_files_are_those_of_the_unspared_writer(tmp_path):
    """Rows of several lengths, more than one call. One file: MindRecord deals rows out to shards as its threads run."""
    files = []
    for name, spare in (("own", lambda writer: None), ("spared", spare_writer)):
        writer = open_writer(tmp_path / name)
        spare(writer)
        for start in (3, 40):
            writer.write_raw_data([sample(length) for length in range(start, start + 30)])
        writer.commit()
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_spared_writer_asks_for_its_schema_once(tmp_path, monkeypatch):
    writer = open_writer(tmp_path / "spared")
    header, asked = type(writer._header), []
    monkeypatch.setattr(header, "_get_meta", lambda self, get=header._get_meta: asked.append(1) or get(self))
    spare_writer(writer)
    before = len(asked)
    writer.write_raw_data([sample(length) for length in range(3, 30)])
    assert (before, len(asked)) == (2, 2)


class Header:
    schema = blob_fields = ()


class Writer:
    """The attributes of a release; `_writer` stands for that of the shards."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize("attributes", [
    {}, {"_header": object()}, {"_header": Header(), "_writer": object(), "_verify_based_on_schema": 1},
    {"_header": Header(), "_writer": Writer(_merge_blob=1)},
], ids=["nothing", "another header", "blobs merged elsewhere", "no check of rows"])
def test_writer_of_another_release_is_left_alone(attributes):
    writer = Writer(**attributes)
    header_type = type(attributes.get("_header"))
    spare_writer(writer)
    assert vars(writer) == attributes
    assert type(attributes.get("_header")) is header_type
