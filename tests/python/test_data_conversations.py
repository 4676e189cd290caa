"""Conversations in all their forms, their labels by real chat templates, and their windows."""

import gzip
import json
from importlib import resources

import datasets
import pytest
import torch

from lemo.data import ExampleWindows, collate, open_training_data
from lemo.data.chat import ChatEncoder, Encoded
from lemo.data.conversations import Conversation, Prompted, parse_example
from lemo.data.examples import shorten
from lemo.data.rows import Row, read_rows
from tiny import tiny_tokenizer

# Files and tokenizers alone.
pytestmark = pytest.mark.cpu_only

USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("user", "assistant"))


def parsed(**record):
    return parse_example(Row(record, "d.jsonl:3", "d.jsonl:3"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "a"},
        {"instruction": "u", "output": "a"},
        {"instruction": "u", "input": "", "output": "a"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "u"}], "name": None},
                {"role": "assistant", "content": "a"},
            ]
        },
    ],
)
def test_forms_of_one_conversation(record):
    assert parsed(**record) == Conversation((USER, ASSISTANT), "d.jsonl:3", "d.jsonl:3")


def test_other_forms():
    assert parsed(text="t") is None
    assert parsed(prompt="p", completion="c") == Prompted("p", "c", "d.jsonl:3", "d.jsonl:3")
    [user, _] = parsed(instruction="i", input="j", output="o").messages
    assert user["content"] == "i\n\nj"
    system = parsed(system="s", conversations=[USER, ASSISTANT]).messages[0]
    assert system == {"role": "system", "content": "s"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    made = parsed(messages=[USER, call], tools=[{"name": "f"}])
    assert made.messages[1]["content"] == ""
    assert made.extra == {"tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "expected 'messages' .*, or 'text', got the keys question"),
        ({}, "got no key at all"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "got preference data .*prompt, chosen"),
        ({"messages": []}, "expected 'messages' to be a list of messages, got \\[\\]"),
        ({"messages": "hello"}, "expected 'messages' to be a list of messages, got 'hello'"),
        ({"messages": ["hello"]}, r"expected messages\[0\] to be an object, got 'hello'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\] .* a role .*'robot'"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] to have a role .* the keys content"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] to have a text 'content'"),
        ({"messages": [USER]}, "expected a message of the assistant, got messages of user only"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"messages\[0\] to be text, got a part 'image'",
        ),
        ({"prompt": "p", "completion": ""}, "expected 'completion' to be a text, got an empty"),
        ({"instruction": 3, "output": "o"}, "expected 'instruction' to be a text, got int"),
        ({"messages": [USER, ASSISTANT | {"content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_bad_rows_name_file_line_and_keys(record, message):
    with pytest.raises(ValueError, match=f"^d.jsonl:3: .*{message}"):
        parsed(**record)


RECORDS = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}]


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
    examples = [parse_example(row) for row in read_rows(path)]
    assert [len(example.messages) for example in examples] == [2, 4]
    assert name.split(".")[0] in examples[1].place


def test_csv(tmp_path):
    (tmp_path / "d.csv").write_text('instruction,input,output\n"u",,a\n"v","w",b\n')
    first, second = (parse_example(row) for row in read_rows(tmp_path / "d.csv"))
    assert first.messages == (USER, ASSISTANT)
    assert second.messages[0]["content"] == "v\n\nw"


@pytest.mark.parametrize("name", ["d.parquet", "d.json"])
def test_damaged_tables_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as"):
        list(read_rows(tmp_path / name))


def with_template(name):
    tokenizer = tiny_tokenizer()
    files = resources.files("trl") / "chat_templates"
    tokenizer.chat_template = (files / f"{name}.jinja").read_text()
    ends = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_header_id|>", "</s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.eos_token = "</s>"
    return tokenizer


SMOLLM = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is one."},
    {"role": "user", "content": "And now, one?"},
    {"role": "assistant", "content": "It is two."},
]


def answers_of(encoded, tokenizer):
    """The texts of the runs of labels."""
    runs, last = [], None
    for place, (token, label) in enumerate(zip(encoded.ids, encoded.labels)):
        if label == -100:
            continue
        assert label == token
        if last != place - 1:
            runs.append([])
        runs[-1].append(token)
        last = place
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("qwen2_5_training", "<|im_end|>"),
        ("qwen3_training", "<|im_end|>"),
        ("llama3_training", "<|eot_id|>"),
        ("smollm", "<|im_end|>"),
        ("mistral", "</s>"),
    ],
)
def test_labels_are_the_answers_and_their_ends(template, end):
    inline = {"smollm": SMOLLM, "mistral": MISTRAL}
    tokenizer = with_template("qwen2_5" if template in inline else template)
    if template in inline:
        tokenizer.chat_template = inline[template]
    example = Conversation(tuple(TURNS), "d:1", "d:1")
    encoded = ChatEncoder(tokenizer).encode(example)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(encoded.ids) == text
    # Marks of some templates reach over the line break behind an answer.
    first, second = (answer.strip() for answer in answers_of(encoded, tokenizer))
    assert first.endswith(f"It is one.{end}")
    assert second.endswith(f"It is two.{end}")
    # Thoughts that a template puts in front of an answer are generated, too.
    for answer, content in ((first, "It is one."), (second, "It is two.")):
        rest = answer.removesuffix(content + end).replace("<think>", "").replace("</think>", "")
        assert not rest.strip(), answer
    everything = ChatEncoder(tokenizer, everything=True).encode(example)
    assert everything.labels == everything.ids == encoded.ids


def test_what_a_template_refuses_names_the_row():
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = MISTRAL
    twice = Conversation((USER, USER, ASSISTANT), "d.jsonl:7", "n")
    with pytest.raises(ValueError, match=r"^d\.jsonl:7: the chat template refuses .* alternate"):
        ChatEncoder(tokenizer).encode(twice)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        ChatEncoder(tokenizer).encode(twice)
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="the answer of message 1 is not found"):
        ChatEncoder(tokenizer).encode(Conversation((USER, ASSISTANT), "d:1", "n"))


def test_prompt_and_completion_as_texts():
    tokenizer = with_template("qwen2_5")
    encoded = ChatEncoder(tokenizer).encode(Prompted("What? ", "One.", "d:1", "d:1"))
    assert answers_of(encoded, tokenizer) == ["One.</s>"]
    assert tokenizer.decode(encoded.ids) == "What? One.</s>"


def example(prompt, answer, name="x"):
    ids = list(range(prompt + answer))
    return Encoded(ids, [-100] * prompt + ids[prompt:], name)


def test_long_prompts_lose_their_middle_and_no_label():
    made = shorten(example(1000, 20), 300)
    assert made.cut == 720
    assert len(made.example.ids) == 300
    assert made.example.ids[:100] == list(range(100))
    assert made.example.ids[-20:] == list(range(1000, 1020))
    assert sum(label != -100 for label in made.example.labels) == 20
    [gap] = [a for a, b in zip(made.example.ids, made.example.ids[1:]) if b != a + 1]
    assert 120 < gap < 160
    assert shorten(example(1000, 300), 300) is None
    assert shorten(example(10, 20), 30).cut == 0
    turns = Encoded(list(range(600)), [-100] * 300 + [1] * 10 + [-100] * 280 + [1] * 10, "t")
    both = shorten(turns, 300)
    assert both.cut == 300
    assert sum(label != -100 for label in both.example.labels) == 20


def test_windows_pack_examples_and_keep_them_apart():
    lengths = [30, 50, 20, 90, 10, 60, 40]
    windows = ExampleWindows((example(n - 5, 5, str(n)) for n in lengths), 100, seed=1)
    assert (len(windows.examples), windows.packed) == (7, True)
    epoch = [windows.window(index) for index in range(len(windows))]
    assert sorted(n for window in epoch for n in window.seqlens) == sorted(lengths)
    assert all(sum(window.seqlens) == window.ids.numel() <= 100 for window in epoch)
    assert sum(window.num_labels for window in epoch) == 5 * len(lengths)
    again = ExampleWindows((example(n - 5, 5, str(n)) for n in lengths), 100, seed=1)
    far = 3 * len(windows) + 1
    assert torch.equal(windows.window(far).ids, again.window(far).ids)
    assert again.fingerprint == windows.fingerprint
    orders = [
        [windows.window(e * len(windows) + i).seqlens for i in range(len(windows))]
        for e in range(4)
    ]
    assert len({tuple(order) for order in orders}) > 1
    batch = collate([window for window in epoch if len(window.seqlens) > 1][:1])
    starts = (batch.position_ids[0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 1
    assert all(batch.labels[0, start] == -100 for start in starts)
    whole = ExampleWindows([example(20, 5, "a"), example(20, 5, "b")], 40)
    rows = collate([whole.window(0), whole.window(1)])
    assert rows.input_ids.shape == (2, 25)
    assert rows.position_ids is None


def test_what_does_not_fit_is_counted():
    windows = ExampleWindows([example(500, 5, "long"), example(5, 400, "answer")], 100)
    assert (windows.shortened, windows.cut_tokens, windows.left_out) == (1, 405, ["answer"])
    assert any("405 tokens" in line for line in windows.remarks())
    with pytest.raises(ValueError, match="expected an example with answers of fewer than 100"):
        ExampleWindows([example(5, 400, "answer")], 100)


def test_a_file_is_of_one_kind(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"text": "t"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:2: expected .* as in the first row, got a te"):
        open_training_data(path, with_template("qwen2_5"), 100)
