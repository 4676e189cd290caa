"""Reading documents in every supported format, and the messages for the broken ones."""

import gzip
import json
import lzma

import datasets
import pytest

from lemo.data import Document, read_documents

# Files alone.
pytestmark = pytest.mark.cpu_only

LINES = (
    b'{"id": "a", "kind": "book", "text": "one"}\n\n{"text": "two \xc3\xa9"}\n'
    b'{"id": 0, "text": ""}\n'
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", LINES),
        ("d.jsonl.xz", lzma.compress(LINES)),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)),
    ],
)
def test_json_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(tmp_path / name)) == [
        Document("a", "book", "one"),
        Document(f"{name}:3", "text", "two é"),
        Document("0", "text", ""),
    ]


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "d.txt").write_text("one\ntwo\n")
    assert list(read_documents(tmp_path / "d.txt")) == [Document("d.txt", "text", "one\ntwo\n")]


def test_datasets_folder(tmp_path):
    rows = {"id": ["a", "b"], "kind": ["x", None], "text": ["one", "two"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    assert list(read_documents(tmp_path / "set")) == [
        Document("a", "x", "one"),
        Document("b", "text", "two"),
    ]


def test_datasets_folder_with_splits_names_them(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="several splits.*set/test.*set/train"):
        list(read_documents(tmp_path / "set"))


def test_datasets_folder_without_text_names_its_columns(tmp_path):
    datasets.Dataset.from_dict({"body": ["one"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="set: row 0: expected a string 'text', got the keys body"):
        list(read_documents(tmp_path / "set"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b"', r"d\.jsonl:2: not JSON: .* at column"),
        (b'["b"]', r"d\.jsonl:2: expected a JSON object, got list"),
        (b'{"id": "b"}', r"d\.jsonl:2: expected a string 'text', got the keys id"),
        (b'{"text": 3}', r"d\.jsonl:2: expected a string 'text', got int"),
        (b'{"text": "\xff"}', r"d\.jsonl:2: not UTF-8"),
        (rb'{"text": "\ud800"}', r"d\.jsonl:2: 'text' holds half of a surrogate pair"),
    ],
)
def test_broken_line_names_file_and_line(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress)])
def test_cut_compressed_file(tmp_path, suffix, compress):
    content = compress(b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(99)))
    path = tmp_path / f"d.jsonl.{suffix}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"d\.jsonl\.{suffix}: damaged after line \d+"):
        list(read_documents(path))


def test_file_that_is_not_what_its_name_says(tmp_path):
    (tmp_path / "d.jsonl.xz").write_bytes(LINES)
    (tmp_path / "d.jsonl.gz").write_bytes(LINES)
    for name in ("d.jsonl.xz", "d.jsonl.gz"):
        with pytest.raises(ValueError, match="damaged after line 0"):
            list(read_documents(tmp_path / name))


def test_binary_text_file(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"d\.txt: not UTF-8 text: .* at byte 2"):
        list(read_documents(tmp_path / "d.txt"))


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.jsonl' does not exist"):
        read_documents(tmp_path / "no.jsonl")


def test_unsupported_name(tmp_path):
    (tmp_path / "d.pdf").write_text("text\n")
    with pytest.raises(ValueError, match=r"expected \.jsonl.*got .*d\.pdf"):
        read_documents(tmp_path / "d.pdf")


def test_plain_folder(tmp_path):
    with pytest.raises(ValueError, match="without a state.json"):
        list(read_documents(tmp_path))


def test_no_document(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no row"):
        list(read_documents(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress)])
def test_a_compressed_file_of_no_bytes_is_damaged(tmp_path, suffix, compress):
    for number, content in enumerate([compress(HALVES[0]), b""]):
        (tmp_path / f"d-0000{number}-of-00002.jsonl.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"d-00001-of-00002\.jsonl\.{suffix}: "):
        list(read_documents(tmp_path))


HALVES = [b'{"text": "one"}\n{"text": "two"}\n', b'{"text": "three"}\n']
# Without the time, which would be in the tests' names.
XZ, GZ = [lzma.compress(half) for half in HALVES], [gzip.compress(half, mtime=0) for half in HALVES]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl.xz", XZ[0] + XZ[1]),
        ("d.jsonl.xz", XZ[0] + bytes(8) + XZ[1] + bytes(4)),
        ("d.jsonl.xz", XZ[0] + bytes(3 << 20) + XZ[1]),
        ("d.jsonl.xz", lzma.compress(b"") + XZ[0] + XZ[1]),
        # More than is decompressed at a time, of a stream that is read at once.
        ("d.jsonl.xz", lzma.compress(b" " * (3 << 20) + HALVES[0]) + XZ[1]),
        ("d.jsonl.gz", GZ[0] + GZ[1]),
        ("d.jsonl.gz", GZ[0] + bytes(5) + GZ[1]),
    ],
)
def test_every_stream_of_a_compressed_file_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    texts = [document.text for document in read_documents(tmp_path / name)]
    assert texts == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl.xz", XZ[0] + b"garbage"),
        ("d.jsonl.xz", XZ[0] + b"{}\n"),
        ("d.jsonl.xz", XZ[0] + bytes(3)),
        ("d.jsonl.xz", XZ[0] + bytes(3) + XZ[1]),
        ("d.jsonl.xz", XZ[0] + b"?" + XZ[1][1:]),
        ("d.jsonl.xz", XZ[0] + XZ[1][:8] + b"????" + XZ[1][12:]),
        ("d.jsonl.xz", XZ[0] + XZ[1][:30] + b"????" + XZ[1][34:]),
        ("d.jsonl.xz", XZ[0] + XZ[1][:4]),
        ("d.jsonl.xz", XZ[0] + XZ[1][:-1]),
        ("d.jsonl.gz", GZ[0] + b"garbage"),
        ("d.jsonl.gz", GZ[0] + b"?" + GZ[1][1:]),
        ("d.jsonl.gz", GZ[0] + GZ[1][:-4]),
    ],
)
def test_damage_behind_the_first_stream_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.jsonl\.[xg]z: damaged after line [23]: "):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("line", [b'{"x": ' + b"[" * 100000, b'{"x": ' + b"1" * 5000 + b"}"])
def test_json_that_python_refuses(tmp_path, line):
    (tmp_path / "d.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: not JSON that Python can read"):
        list(read_documents(tmp_path / "d.jsonl"))


def test_datasets_folder_without_rows(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="set' holds no row"):
        list(read_documents(tmp_path / "set"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"{}"),
        ("state.json", b"3"),
        ("dataset_info.json", b"[]"),
        ("dataset_info.json", None),
        ("data-00000-of-00001.arrow", b"garbage"),
        ("data-00000-of-00001.arrow", None),
    ],
)
def test_damaged_datasets_folder(tmp_path, name, content):
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "set")
    file = tmp_path / "set" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="documents: '.*set' cannot be read as a dataset: "):
        list(read_documents(tmp_path / "set"))
