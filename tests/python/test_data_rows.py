"""Rows of every kind of file, as they are and as conversations."""

import gzip
import json
from datetime import datetime

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from conversation_cases import ASSISTANT, CALLS, RECORDS, USER
from lemo.data.conversations import parse_example
from lemo.data.reading import naming
from lemo.data.rows import read_rows

# Files alone.
pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet", "folder"])
def test_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    match name:
        case "d.jsonl":
            path.write_text(text)
        case "d.jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "d.json":
            path.write_text(json.dumps(RECORDS))
        case "d.parquet":
            datasets.Dataset.from_list(RECORDS).to_parquet(path)
        case "folder":
            datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    rows = list(read_rows(path))
    assert [len(parse_example(row).messages) for row in rows] == [2, 4]
    # Lines are counted from 1, rows of tables from 0.
    counts, place = ((1, 2), f"{path}:") if ".jsonl" in name else ((0, 1), f"{path}: row ")
    assert [row.name for row in rows] == [f"{name}:{number}" for number in counts]
    assert [row.place for row in rows] == [f"{place}{number}" for number in counts]


@pytest.mark.parametrize("kind", [None, "numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_folder_does_not_matter(tmp_path, kind):
    """Also where it leaves columns out: these would then have been read as texts."""
    records = [record | {"text": "t"} for record in RECORDS]
    table = datasets.Dataset.from_list(records)
    for columns in (None, ["text"]):
        table.with_format(kind, columns=columns).save_to_disk(tmp_path / f"{columns}")
        assert [row.record for row in read_rows(tmp_path / f"{columns}")] == records


def test_names_of_tables_are_no_patterns(tmp_path):
    for number, name in enumerate(("d[1].parquet", "d1.parquet", "d*.parquet", "d?.parquet")):
        rows = [{"text": f"{number}"}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "made")
        (tmp_path / "made").rename(tmp_path / name)
    for number, name in enumerate(("d[1].parquet", "d1.parquet", "d*.parquet", "d?.parquet")):
        assert [row.record for row in read_rows(tmp_path / name)] == [{"text": f"{number}"}]


def test_json_files(tmp_path):
    path = tmp_path / "d.json"
    parts = {"role": "user", "content": [{"type": "text", "text": "u"}]}
    records = [
        {"messages": [USER, ASSISTANT], "id": 1},
        {"messages": [parts, ASSISTANT], "id": "x"},
        {"messages": [USER, CALLS, ASSISTANT], "tools": None},
    ]
    for text in (
        json.dumps(records, indent=1),
        json.dumps({"version": 1, "data": records}),
        "\n".join(map(json.dumps, records)),
        "\ufeff" + json.dumps(records),
    ):
        path.write_text(text)
        made = [parse_example(row) for row in read_rows(path)]
        assert [example.messages for example in made[:2]] == [(USER, ASSISTANT)] * 2
        assert made[2].messages[1] == CALLS
    for more in ({}, {"tags": []}, {"turns": [{"n": 1}]}):
        path.write_text(json.dumps(records[0] | more))
        [row] = read_rows(path)
        assert parse_example(row).messages == (USER, ASSISTANT)
    # Nobody says which of two lists holds the rows.
    path.write_text(json.dumps({"train": records, "test": records[:1]}))
    [row] = read_rows(path)
    assert row.record == {"train": records, "test": records[:1]}
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"d\.json: row 0: expected a JSON object, got int"):
        list(read_rows(path))
    for name in ("d.json", "d.jsonl"):
        (tmp_path / name).write_text('{"text": "a", "text": "b"}')
        with pytest.raises(ValueError, match=rf"{name}.*an object has the key 'text' twice"):
            list(read_rows(tmp_path / name))


def test_tables_have_no_keys_of_other_rows(tmp_path):
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}}
    records = [
        {"messages": [USER, CALLS, ASSISTANT]},
        {"messages": [USER, CALLS | {"tool_calls": [other]}, ASSISTANT]},
    ]
    made = datasets.Dataset.from_list(records)
    made.to_parquet(tmp_path / "d.parquet")
    made.save_to_disk(tmp_path / "folder")
    for name in ("d.parquet", "folder"):
        rows = [row.record for row in read_rows(tmp_path / name)]
        assert rows == records


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ('\ufeffprompt,completion\n"a\nb, ""q""",c\n\n', [('a\nb, "q"', "c")]),
        ('prompt,completion\r\n"a\r\nb\rc",d\r\n', [("a\r\nb\rc", "d")]),
        ("\n\r\nprompt,completion\n\n007,2.50\nWhat?,None\nx,NA\n", None),
        ("prompt,completion\n007,2.50\nWhat?,None\nx,NA\n", None),
        ("prompt,completion\na,b,c\n", "d.csv:2: expected 2 cells, .* got 3"),
        ("prompt,completion\na\n", "d.csv:2: expected 2 cells, .* got 1"),
        ("prompt,prompt\na,b\n", "expected columns that differ, got 'prompt' twice"),
        ('prompt,completion\na,"b\n', "cannot be read as csv: unexpected end of data"),
        (b"prompt,completion\ncaf\xe9,b\n", "cannot be read as csv: not UTF-8"),
    ],
)
def test_cells_of_csv_are_texts(tmp_path, text, records):
    path = tmp_path / "d.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(records, str):
        with pytest.raises(ValueError, match=records):
            list(read_rows(path))
        return
    expected = records or [("007", "2.50"), ("What?", "None"), ("x", "NA")]
    made = [parse_example(row) for row in read_rows(path)]
    assert [(example.prompt, example.completion) for example in made] == expected


def test_a_text_file_without_its_byte_order_mark(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeffhello".encode())
    [row] = read_rows(tmp_path / "d.txt")
    assert row.record == {"text": "hello"}


def test_csv(tmp_path):
    (tmp_path / "d.csv").write_text('instruction,input,output\n"u",,a\n"v","w",b\n')
    rows = list(read_rows(tmp_path / "d.csv"))
    place = f"{tmp_path / 'd.csv'}: row"
    assert [row.place for row in rows] == [f"{place} 0", f"{place} 1"]
    assert [row.name for row in rows] == ["d.csv:0", "d.csv:1"]
    assert rows[0].record == {"instruction": "u", "output": "a"}
    first, second = map(parse_example, rows)
    assert first.messages == (USER, ASSISTANT)
    assert second.messages[0]["content"] == "v\n\nw"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("a"), "^d: KeyError: 'a'$"),
        (RuntimeError(" a\nb"), "^d: RuntimeError: a b$"),
        (OSError("a"), "^d: a$"),
        (ValueError(), "^d: ValueError: $"),
    ],
)
def test_what_libraries_raise_says_what_it_is(error, message):
    with pytest.raises(ValueError, match=message), naming("d"):
        raise error


@pytest.mark.parametrize("name", ["d.parquet", "d.json"])
def test_damaged_tables_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as"):
        list(read_rows(tmp_path / name))


def test_a_first_group_of_a_parquet_file_without_rows(tmp_path):
    """Of a table that is written in parts, the first may be empty, or all."""
    schema = pyarrow.schema([("text", pyarrow.string())])
    for name, parts in (("none", [[]]), ("some", [[], ["a", "b"], ["c"]])):
        with parquet.ParquetWriter(tmp_path / f"{name}.parquet", schema) as writer:
            for part in parts:
                writer.write_table(pyarrow.table({"text": part}, schema))
    assert [row.record["text"] for row in read_rows(tmp_path / "some.parquet")] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"none\.parquet' holds no row"):
        list(read_rows(tmp_path / "none.parquet"))


def test_columns_that_nobody_reads(tmp_path):
    """Of types that datasets does not know, and images, which it decodes by default."""
    texts = {"prompt": ["p", "q"], "completion": ["c", "d"]}
    others = {
        "tags": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "uuid": pyarrow.array([b"0" * 16, None], pyarrow.uuid()),
        "views": pyarrow.array([[1], []], pyarrow.list_view(pyarrow.int8())),
    }
    parquet.write_table(pyarrow.table(texts | others), tmp_path / "d.parquet")
    image = [{"bytes": b"no image", "path": None}] * 2
    strings = dict.fromkeys(texts, datasets.Value("string"))
    for name, feature in (("one", datasets.Image()), ("list", datasets.List(datasets.Image()))):
        made = datasets.Dataset.from_dict(
            texts | {"image": image if name == "one" else [image, []]},
            features=datasets.Features(strings | {"image": feature}),
        )
        made.to_parquet(tmp_path / f"{name}.parquet")
        made.save_to_disk(tmp_path / name)
    for name in ("d.parquet", "one.parquet", "list.parquet", "one", "list"):
        made = [parse_example(row) for row in read_rows(tmp_path / name)]
        assert [(each.prompt, each.completion) for each in made] == [("p", "c"), ("q", "d")]


def test_values_that_python_does_not_have(tmp_path):
    """In columns that nobody reads they hinder nobody; in others the message names their type."""
    late = pyarrow.array([2**50, 0], pyarrow.timestamp("ms"))
    others = {
        "late": late,
        "day": pyarrow.array([2**31 - 1, 0], pyarrow.date32()),
        "long": pyarrow.array([2**60, 0], pyarrow.duration("ms")),
        "nowhere": pyarrow.array([0, 0], pyarrow.timestamp("ms", "No/Where")),
        "nested": pyarrow.StructArray.from_arrays([late], ["at"]),
    }
    texts = {"prompt": ["p", "q"], "completion": ["c", "d"]}
    parquet.write_table(pyarrow.table(texts | others), tmp_path / "d.parquet")
    rows = list(read_rows(tmp_path / "d.parquet"))
    made = [parse_example(row) for row in rows]
    assert [(each.prompt, each.completion) for each in made] == [("p", "c"), ("q", "d")]
    assert rows[1].record["nested"] == {"at": datetime(1970, 1, 1)}

    parquet.write_table(pyarrow.table({"messages": others["nested"]}), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=r"row 0: expected 'messages' .*got .*timestamp\[ms\]"):
        parse_example(next(read_rows(tmp_path / "m.parquet")))


def test_messages_of_every_type_of_arrow(tmp_path):
    text, large = pyarrow.string(), pyarrow.large_string()
    fields = [pyarrow.struct([("role", kind), ("content", kind)]) for kind in (text, large)]
    code = pyarrow.dictionary(pyarrow.int8(), text)
    kinds = [
        pyarrow.list_(fields[0]),
        pyarrow.large_list(fields[1]),
        pyarrow.list_(fields[0], 2),
        pyarrow.list_view(fields[0]),
        pyarrow.list_(pyarrow.map_(text, text)),
        pyarrow.list_(pyarrow.struct([("role", code), ("content", pyarrow.string_view())])),
    ]
    for number, kind in enumerate(kinds):
        said = [USER, ASSISTANT]
        if pyarrow.types.is_map(kind.value_type):
            said = [list(message.items()) for message in said]
        column = pyarrow.array([said], kind)
        parquet.write_table(pyarrow.table({"messages": column}), tmp_path / f"{number}.parquet")
        [row] = read_rows(tmp_path / f"{number}.parquet")
        assert parse_example(row).messages == (USER, ASSISTANT), kind


def test_json_in_tables_is_as_it_was_written(tmp_path):
    """What is null in it is no empty cell."""
    tool = {"name": "f", "parameters": {"default": None}}
    record = {"messages": [USER, CALLS, ASSISTANT], "tools": [tool]}
    features = datasets.Features({name: datasets.List(datasets.Json()) for name in record})
    made = datasets.Dataset.from_list([record], features=features)
    made.to_parquet(tmp_path / "d.parquet")
    made.save_to_disk(tmp_path / "folder")
    for name in ("d.parquet", "folder"):
        [row] = read_rows(tmp_path / name)
        assert row.record == record


def test_columns_of_parquet_differ(tmp_path):
    columns = [pyarrow.array([text]) for text in "pqc"]
    table = pyarrow.table(columns, names=["prompt", "prompt", "completion"])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"expected columns that differ, got 'prompt' twice"):
        list(read_rows(tmp_path / "d.parquet"))


def write_shards(folder, split, count, of=None):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        text = "".join(json.dumps({"text": f"{split} {number} {row}"}) + "\n" for row in range(2))
        (folder / f"{split}-{number:05}-of-{of or count:05}.jsonl").write_text(text)


def test_shards_are_one_file(tmp_path):
    """Of a folder, or of one of its splits."""
    write_shards(tmp_path / "one", "train", 3)
    (tmp_path / "one" / "README.md").write_text("about it")
    expected = [f"train {number} {row}" for number in range(3) for row in range(2)]
    for path in (tmp_path / "one", tmp_path / "one" / "train"):
        assert [row.record["text"] for row in read_rows(path)] == expected
    assert [row.place for row in read_rows(tmp_path / "one")][2].endswith("00001-of-00003.jsonl:1")
    write_shards(tmp_path / "one", "test", 1)
    assert [row.record["text"] for row in read_rows(tmp_path / "one" / "train")] == expected
    with pytest.raises(
        ValueError, match="holds several splits, name one of them: .*/test, .*/train"
    ):
        read_rows(tmp_path / "one")


def test_tables_in_shards_are_read_too(tmp_path):
    for number, text in enumerate("ab"):
        table = pyarrow.table({"text": [text]})
        parquet.write_table(table, tmp_path / f"train-{number:05}-of-00002-0a1b2c.parquet")
    assert [row.record["text"] for row in read_rows(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(("count", "of"), [(2, 3), (3, 2)])
def test_every_shard_has_to_be_there(tmp_path, count, of):
    write_shards(tmp_path, "train", count, of)
    with pytest.raises(ValueError, match=rf"expected {of} shards in .*, each of them once, got "):
        read_rows(tmp_path)
