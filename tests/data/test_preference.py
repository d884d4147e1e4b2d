"""Reading preference files: what is a row, what is not, and errors that name file, line, found and expected.

| test                                    | proves                                              | judged against  |
| test_line_that_is_no_row_says_why       | every kind of bad line: its number, reason and text | messages        |
| test_line_numbers_count_blank_lines     | numbers are those an editor shows                   | literal numbers |
| test_bad_file_is_one_error              | a file that is no list of rows at all               | messages        |
| test_array_item_that_is_no_row_says_why | the same checks in a .json array, by item           | messages        |
| test_a_file_of_another_kind_is_named    | compressed, CSV, a pointer, the other kind of JSON  | messages        |
"""
import json

import pytest

from mindrlhf.data.dialogue import Message
from mindrlhf.data.preference import InvalidRow, Preference, read_preferences, read_rows
from mindrlhf.errors import UserError

GOOD = {"prompt": "q", "pos_resp": "good", "neg_resp": "bad"}
GOOD_LINE = b'{"prompt": "q", "pos_resp": "good", "neg_resp": "bad"}'


def write(tmp_path, content, name="pairs.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def preference(place, number, *texts):
    prompt, chosen, rejected = ((Message(role, text),) for role, text in zip(("user", "assistant", "assistant"), texts))
    return Preference(place, number, prompt, chosen, rejected)


def texts_of(row):
    return tuple(message.content for message in (*row.prompt, *row.chosen, *row.rejected))


def only(rows):
    rows = list(rows)
    assert len(rows) == 1
    return rows[0]


def test_row_gives_place_and_three_texts(tmp_path):
    path = write(tmp_path, '{"neg_resp": "坏", "pos_resp": "好", "prompt": "问", "pos_type": "拒绝为主"}\n'.encode())
    assert list(read_preferences(path)) == [preference(f"{path}:1", 1, "问", "好", "坏")]


def test_texts_keep_their_white_space_and_may_be_empty(tmp_path):
    path = write(tmp_path, json.dumps({"prompt": " q\n", "pos_resp": "", "neg_resp": " \t"}).encode())
    assert only(read_preferences(path)) == preference(f"{path}:1", 1, " q\n", "", " \t")


def test_line_numbers_count_blank_lines(tmp_path):
    path = write(tmp_path, b"\n" + GOOD_LINE + b"\n  \t\n\n" + GOOD_LINE + b"\n{}\n\n" + GOOD_LINE)
    places = [row.place for row in read_preferences(path)]
    assert places == [f"{path}:2", f"{path}:5", f"{path}:6", f"{path}:8"]


@pytest.mark.parametrize("content", [
    GOOD_LINE + b"\r\n\r\n" + GOOD_LINE + b"\r\n",
    b"\xef\xbb\xbf" + GOOD_LINE + b"\n\n" + GOOD_LINE,
    b"\xef\xbb\xbf\n" + GOOD_LINE + b"\n" + GOOD_LINE,
], ids=["CRLF line ends", "byte order mark before a row", "byte order mark before a blank line"])
def test_line_ends_and_byte_order_marks_are_no_part_of_a_row(tmp_path, content):
    path = write(tmp_path, content)
    rows = list(read_preferences(path))
    assert [texts_of(row) for row in rows] == [("q", "good", "bad")] * 2
    assert (rows[-1].place, rows[-1].number) == (f"{path}:3", 3)


def test_unicode_line_separator_inside_a_text_ends_no_line(tmp_path):
    path = write(tmp_path, '{"prompt": "a\u2028b\u0085c", "pos_resp": "x", "neg_resp": "y"}\n{}'.encode())
    first, second = read_preferences(path)
    assert first == preference(f"{path}:1", 1, "a\u2028b\u0085c", "x", "y")
    assert second.place == f"{path}:2"


EXPECTED = "expected prompt, pos_resp, neg_resp"
BAD_LINES = {
    "not JSON": (b"{'prompt': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "cut short": (b'{"prompt": "q"', "not JSON: Expecting ',' delimiter at column 15"),
    "two values": (b"{} {}", "not JSON: Extra data at column 4"),
    "an array": (b'["q", "a", "b"]', "found an array, expected an object"),
    "a string": (b'"q"', "found a string, expected an object"),
    "a number": (b"1.5", "found a number, expected an object"),
    "a boolean": (b"true", "found a boolean, expected an object"),
    "null": (b"null", "found null, expected an object"),
    "no keys": (b"{}", f"key 'prompt', 'pos_resp', 'neg_resp' missing; found no keys; {EXPECTED}"),
    "one key missing": (b'{"prompt": "q", "pos_resp": "a"}',
                        f"key 'neg_resp' missing; found prompt, pos_resp; {EXPECTED}"),
    "two keys missing": (b'{"prompt": "q", "chosen": "a", "rejected": "b"}',
                         f"key 'pos_resp', 'neg_resp' missing; found prompt, chosen, rejected; {EXPECTED}"),
    "a value is null": (b'{"prompt": "q", "pos_resp": null, "neg_resp": "b"}',
                        "key 'pos_resp' is null, expected a string"),
    "a value is a number": (b'{"prompt": 12, "pos_resp": "a", "neg_resp": "b"}',
                            "key 'prompt' is a number, expected a string"),
    "a value is not a number": (b'{"prompt": "q", "pos_resp": "a", "neg_resp": "b", "note": [NaN]}',
                                "not JSON: found NaN, expected a finite number"),
    "a value is infinite": (b'{"prompt": "q", "pos_resp": "a", "neg_resp": "b", "note": -Infinity}',
                            "not JSON: found -Infinity, expected a finite number"),
    "a number becomes infinite": (b'{"prompt": "q", "pos_resp": "a", "neg_resp": "b", "note": -1e999}',
                                  "not JSON: the number -1e999 is too large, expected a finite one"),
    "a value is a boolean": (b'{"prompt": "q", "pos_resp": "a", "neg_resp": false}',
                             "key 'neg_resp' is a boolean, expected a string"),
    "a value is a list": (b'{"prompt": ["q"], "pos_resp": "a", "neg_resp": "b"}',
                          "key 'prompt' is an array, expected a string"),
    "a value is an object": (b'{"prompt": "q", "pos_resp": {"text": "a"}, "neg_resp": "b"}',
                             "key 'pos_resp' is an object, expected a string"),
    "the prompt is empty": (b'{"prompt": "", "pos_resp": "a", "neg_resp": "b"}',
                            "key 'prompt' is empty, expected text"),
    "the prompt is blank": (b'{"prompt": " \\n\\u3000", "pos_resp": "a", "neg_resp": "b"}',
                            "key 'prompt' is empty, expected text"),
    "not UTF-8": (b'{"prompt": "q\xff", "pos_resp": "a", "neg_resp": "b"}',
                  "not UTF-8: byte 0xff at position 14"),
    "another encoding": ('{"prompt": "好"}'.encode("gbk"), "not UTF-8: byte 0xba at position 13"),
    "half of a surrogate pair": (b'{"prompt": "q", "pos_resp": "a\\ud83d", "neg_resp": "b"}',
                                 "key 'pos_resp' has half of a surrogate pair, which is no text"),
    "a surrogate pair the wrong way round": (b'{"prompt": "\\ude00\\ud83d", "pos_resp": "a", "neg_resp": "b"}',
                                             "key 'prompt' has half of a surrogate pair, which is no text"),
    "a key twice": (b'{"prompt": "q", "pos_resp": "a", "neg_resp": "b", "pos_resp": "c"}',
                    "not JSON: key 'pos_resp' occurs 2 times in an object, expected once"),
    "white space that overflows tiktoken's stack": (
        b'{"prompt": "q", "pos_resp": "a' + b" " * 500_000 + b'b", "neg_resp": "b"}',
        "key 'pos_resp' has 500,000 characters of white space or more in a row, expected fewer"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_line_that_is_no_row_says_why(tmp_path, line, reason):
    path = write(tmp_path, GOOD_LINE + b"\n" + line + b"\n" + GOOD_LINE)
    first, bad, last = read_preferences(path)
    assert (first.place, last.place) == (f"{path}:1", f"{path}:3")
    assert (bad.place, bad.number, bad.reason) == (f"{path}:2", 2, reason)
    assert str(bad.as_error()) == f"{path}:2: {reason}"


def test_whole_surrogate_pair_is_a_character(tmp_path):
    path = write(tmp_path, b'{"prompt": "\\ud83d\\ude00", "pos_resp": "a", "neg_resp": "b"}')
    assert only(read_preferences(path)).prompt[0].content == "\N{GRINNING FACE}"


@pytest.mark.parametrize("line", [
    b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
], ids=["arrays", "objects", "balanced"])
def test_nesting_without_end_is_a_bad_line(tmp_path, line):
    path = write(tmp_path, line + b"\n" + GOOD_LINE)
    bad, good = read_preferences(path)
    assert bad.place == f"{path}:1"
    assert bad.reason.startswith("not JSON: maximum recursion depth exceeded")
    assert good == preference(f"{path}:2", 2, "q", "good", "bad")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(("depth", "is_read"), [(100, True), (101, False), (500, False)])
def test_what_could_not_be_written_again_is_not_read(tmp_path, name, depth, is_read):
    """A row's own keys go to scores and evaluations; the row itself is the first level."""
    nested = b"[" * (depth - 1) + b"]" * (depth - 1)
    row = GOOD_LINE.strip().replace(b"{", b'{"own": ' + nested + b", ", 1)
    path = write(tmp_path, row if name == "a.jsonl" else b"[" + row + b"]", name)
    read, = read_preferences(path)
    assert isinstance(read, InvalidRow) != is_read
    assert is_read or read.reason.endswith("lists and objects are nested more than 100 deep")


def test_integer_of_thousands_of_digits_does_not_end_the_reading(tmp_path):
    """Python from 3.9.14 on refuses to convert it; before, it is a number where text is expected."""
    path = write(tmp_path, b'{"prompt": ' + b"9" * 5000 + b', "pos_resp": "a", "neg_resp": "b"}\n' + GOOD_LINE)
    bad, good = read_preferences(path)
    assert bad.place == f"{path}:1"
    assert bad.reason.startswith(("not JSON: Exceeds the limit", "key 'prompt' is a number, expected a string"))
    assert good.place == f"{path}:2"


def test_text_of_a_bad_line_is_kept_as_far_as_it_can_be_decoded(tmp_path):
    path = write(tmp_path, b"caf\xe9 \xe5\xa5\xbd\r\n")
    assert only(read_preferences(path)).text == "caf\\xe9 好"


def test_array_items_are_rows(tmp_path):
    path = write(tmp_path, json.dumps([GOOD, {**GOOD, "prompt": "r"}], indent=1).encode(), "pairs.json")
    assert list(read_preferences(path)) == [preference(f"{path}:item 1", 1, "q", "good", "bad"),
                                            preference(f"{path}:item 2", 2, "r", "good", "bad")]


@pytest.mark.parametrize(("item", "reason"), [
    (None, "found null, expected an object"),
    (["q"], "found an array, expected an object"),
    ("\ud800", "found a string, expected an object"),
    ({"prompt": "q"}, f"key 'pos_resp', 'neg_resp' missing; found prompt; {EXPECTED}"),
    ({**GOOD, "prompt": " "}, "key 'prompt' is empty, expected text"),
    ({**GOOD, "note": float("nan")},
     "key 'note': found NaN, Infinity or a number that is too large, expected finite numbers"),
])
def test_array_item_that_is_no_row_says_why(tmp_path, item, reason):
    path = write(tmp_path, json.dumps([GOOD, item, GOOD]).encode(), "pairs.json")
    rows = list(read_preferences(path))
    assert [rows[0].place, rows[2].place] == [f"{path}:item 1", f"{path}:item 3"]
    assert str(rows[1].as_error()) == f"{path}:item 2: {reason}"


def test_empty_file_and_empty_array_have_no_rows(tmp_path):
    assert list(read_rows(write(tmp_path, b""))) == []
    assert list(read_rows(write(tmp_path, b"\xef\xbb\xbf [ ]\n", "pairs.json"))) == []


@pytest.mark.parametrize(("name", "content", "message"), [
    ("pairs.json", b'{"rows":\n[{"prompt": "q"}]}',
     ": expected a .json file with an array of objects, found an object of several lines"),
    ("pairs.json", b'"q"', ": found a string, expected an array of objects (or a .jsonl file)"),
    ("pairs.json", b"", ": not JSON: Expecting value at column 1"),
    ("pairs.json", b"[" * 100_000,
     ": not JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
    ("pairs.json", b'[{"prompt": "\xff"}]', ": not UTF-8: byte 0xff at position 14"),
], ids=["an object", "a string", "empty", "nested", "not UTF-8"])
def test_bad_file_is_one_error(tmp_path, name, content, message):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(caught.value) == f"{path}{message}"


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_byte_that_is_not_utf8_is_named_behind_a_byte_order_mark_too(tmp_path, name):
    path = write(tmp_path, b'\xef\xbb\xbf[{"prompt": "\xff"}]', name)
    with pytest.raises(UserError, match="not UTF-8: byte 0xff at position"):
        raise only(read_rows(path)).as_error()


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json"])
def test_missing_file_is_one_error(tmp_path, name):
    with pytest.raises(UserError) as caught:
        list(read_rows(tmp_path / name))
    assert str(caught.value) == f"{tmp_path / name}: cannot be read: No such file or directory"


def test_folder_is_one_error(tmp_path):
    with pytest.raises(UserError) as caught:
        list(read_rows(tmp_path))
    assert str(caught.value) == (f"{tmp_path}: a folder without state.json, expected a file, or a folder that "
                                 "datasets.save_to_disk has made")


def test_jsonl_file_is_read_as_a_stream(tmp_path):
    """The first row is there before a bad second line has been looked at."""
    rows = read_rows(write(tmp_path, GOOD_LINE + b"\n" + b"broken"))
    assert next(rows).values == GOOD
    assert isinstance(next(rows), InvalidRow)


@pytest.mark.parametrize(("name", "content", "found"), [
    ("pairs.json", b"PK\x03\x04rest",
     "found a ZIP archive (or an Excel sheet, or PyTorch's weights): unpack or export it first"),
    ("pairs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
     "found a Git LFS pointer in the file's place: git lfs pull fetches the file"),
    ("pairs.jsonl", b"\xef\xbb\xbfprompt,pos_resp,neg_resp\r\na,b,c\n",
     "found a table (CSV): name it .csv"),
    ("pairs.json", b'"Prompt";"response"\na;b\n', "found a table (CSV): name it .csv"),
    ("pairs.jsonl", '{"prompt": 1}'.encode("utf-16"), "found UTF-16 text: save it as UTF-8"),
    ("pairs.jsonl", b'[\n {"prompt": "a"}\n]\n', "found a JSON array: name it .json"),
], ids=lambda value: "" if isinstance(value, bytes) else None)
def test_a_file_of_another_kind_is_named(tmp_path, name, content, found):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError) as caught:
        list(read_preferences(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert found in str(caught.value)


def test_a_copy_has_the_name_and_the_kind_of_the_original(tmp_path):
    path = write(tmp_path, b'[{"prompt": 1, "pos_resp": "a"}]', "copy")
    row, = read_preferences(path, tmp_path / "pairs.json")
    assert row.place == f"{tmp_path / 'pairs.json'}:item 1"
