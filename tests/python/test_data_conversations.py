"""Conversations in all their forms, and the windows of their examples."""

import itertools
import json

import pytest
import torch

from conversation_cases import (
    ASSISTANT,
    CALL,
    CALLS,
    RECORDS,
    TURNS,
    USER,
    answers_of,
    parsed,
    with_template,
)
from lemo.data import ExampleWindows, collate, open_training_data
from lemo.data.chat import ChatEncoder, Encoded
from lemo.data.conversations import Conversation, Prompted
from lemo.data.examples import shorten

# Files and tokenizers alone.
pytestmark = pytest.mark.cpu_only


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
    for given, first in itertools.product(("s", " s\n"), (system, system | {"role": "developer"})):
        made = parsed(system=given, messages=[first, USER, ASSISTANT])
        assert made.messages == (first, USER, ASSISTANT)
    older = parsed(functions=[{"name": "f"}], messages=[USER, ASSISTANT])
    assert older.extra == {"tools": [{"type": "function", "function": {"name": "f"}}]}
    newer = parsed(functions=[{"name": "f"}], tools=[{"name": "g"}], messages=[USER, ASSISTANT])
    assert newer.extra == {"tools": [{"name": "g"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    made = parsed(messages=[USER, call], tools=[{"name": "f"}])
    assert made.messages[1]["content"] == ""
    assert made.extra == {"tools": [{"name": "f"}]}
    texts = parsed(messages=json.dumps([USER, call]), tools=json.dumps([{"name": "f"}]))
    assert texts == made
    thinks = parsed(messages=[USER, ASSISTANT], chat_template_kwargs={"enable_thinking": False})
    assert thinks.extra == {"enable_thinking": False}
    before = parsed(instruction="u", input=None, output="a", history=[["v", "b"], ["w", "c"]])
    assert [message["content"] for message in before.messages] == list("vbwcua")
    parts = [{"type": "text", "text": "u"}, "v", {"text": "\n"}]
    joined = parsed(messages=[USER | {"content": parts}, ASSISTANT])
    assert joined.messages[0]["content"] == "uv\n"
    both = {"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"name": "g"}]}
    calls = parsed(messages=[USER, both]).messages[1]["tool_calls"]
    assert [each["function"]["name"] for each in calls] == ["f", "g"]
    assert parsed(messages=None, instruction="u", output="a").messages == (USER, ASSISTANT)


def test_messages_are_looked_for_first():
    others = [USER | {"content": "other"}, ASSISTANT]
    assert parsed(conversations=others, messages=[USER, ASSISTANT]).messages == (USER, ASSISTANT)


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("human user", "user"),
        ("gpt chatgpt bot model assistant", "assistant"),
        ("observation function tool_response tool", "tool"),
    ],
)
def test_names_of_roles(names, role):
    for name in names.split():
        made = parsed(conversations=[USER, {"from": name, "value": "x"}, USER, ASSISTANT])
        assert made.messages[1] == {"role": role, "content": "x"}


@pytest.mark.parametrize(
    "message",
    [
        CALLS,
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "tool_call", "value": '[{"name": "f", "arguments": {"a": 1}}]'},
    ],
)
def test_forms_of_one_call(message):
    made = parsed(conversations=[USER, message, {"from": "observation", "value": "7"}, ASSISTANT])
    assert made.messages == (USER, CALLS, {"role": "tool", "content": "7"}, ASSISTANT)


@pytest.mark.parametrize("nothing", [[], "[]", None])
def test_empty_lists_are_as_if_left_out(nothing):
    """Llama 3.1's template writes of tools where there is a list, and refuses a list of no call."""
    tokenizer = with_template("llama3_1")
    plain = parsed(messages=TURNS)
    messages = [m | {"tool_calls": nothing} if m["role"] == "assistant" else m for m in TURNS]
    for record in (
        {"messages": messages},
        *({"messages": TURNS, name: nothing} for name in ("tools", "functions", "documents")),
    ):
        made = parsed(**record)
        assert made == plain
        assert ChatEncoder(tokenizer).encode(made) == ChatEncoder(tokenizer).encode(plain)


@pytest.mark.parametrize("arguments", [{}, "{}", "", None])
def test_calls_without_arguments(arguments):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    made = parsed(messages=[USER, call]).messages[1]["tool_calls"]
    assert made == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_texts_that_are_json_by_chance_are_texts():
    deep = "[" * 200_000
    assert parsed(prompt=deep, completion="c").prompt == deep
    for text in ('{"a": 1}', "[1, 2]", "[]"):
        asked, answered = parsed(prompt=text, completion="c"), parsed(prompt="p", completion=text)
        assert (asked.prompt, answered.completion) == (text, text)


def test_lists_of_json_texts():
    """As tables hold objects that have not all the same keys."""
    tool, messages = {"name": "f", "parameters": {"a": 1}}, [USER, CALLS, ASSISTANT]
    plain = parsed(messages=messages, tools=[tool])
    assert parsed(messages=list(map(json.dumps, messages)), tools=[json.dumps(tool)]) == plain
    called = CALLS | {"tool_calls": [json.dumps(CALL)]}
    assert parsed(messages=[USER, called, ASSISTANT], tools=[tool]) == plain
    asked = parsed(prompt=[json.dumps(USER)], completion=[json.dumps(ASSISTANT)])
    assert asked.messages == (USER, ASSISTANT)


def test_texts_have_nothing_for_a_template():
    for nothing in (None, "", [], "[]"):
        made = parsed(prompt="p", completion="c", system=nothing, tools=nothing)
        assert made == parsed(prompt="p", completion="c")


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("qwen2_5", "a<|im_end|>"),
        ("qwen2_5_training", "a<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\na<|im_end|>"),
        ("llama3", "a<|eot_id|>"),
    ],
)
def test_answers_that_are_not_trained_on_may_be_empty(template, answer):
    tokenizer = with_template(template)
    empty = ASSISTANT | {"content": ""}
    for record in (
        {"messages": [USER, empty | {"weight": 0}, USER, ASSISTANT]},
        {"messages": [USER, empty | {"train": False}, USER, ASSISTANT], "system": "s"},
        {"prompt": [USER, empty, USER], "completion": [ASSISTANT]},
    ):
        encoded = ChatEncoder(tokenizer).encode(parsed(**record))
        assert answers_of(encoded, tokenizer) == [answer]


def test_answers_that_are_not_trained_on():
    system = {"role": "system", "content": "s"}
    turns = [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"train": False}, USER, ASSISTANT]
    made = parsed(messages=turns)
    assert (made.messages, made.context) == ((USER, ASSISTANT) * 3, {1, 3})
    assert parsed(messages=turns, system="s").context == {2, 4}
    made = parsed(prompt=[system, USER, ASSISTANT, USER], completion=[ASSISTANT])
    assert (len(made.messages), made.context) == (5, {2})
    made = parsed(prompt=[USER, ASSISTANT, USER], completion=[ASSISTANT], system="s")
    assert (len(made.messages), made.context) == (5, {2})
    # Nobody trains on what the user says, whatever its weight.
    asked = USER | {"weight": 0, "train": False}
    assert parsed(messages=[asked, ASSISTANT]) == parsed(messages=[USER, ASSISTANT])
    marked = with_template("qwen2_5_training")
    for tokenizer in (with_template("qwen2_5"), marked):
        example = Conversation(tuple(TURNS), "d:1", "d:1", context=frozenset({1}))
        assert answers_of(ChatEncoder(tokenizer).encode(example), tokenizer) == [
            "It is two.<|im_end|>"
        ]


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
        ({"instruction": "i", "output": None}, r"got the keys instruction, output \(null\)"),
        ({"instruction": "i", "output": " "}, "expected 'output' to be a text, got an empty one"),
        (
            {"messages": [USER, ASSISTANT | {"content": ""}]},
            r"message 1 \(assistant\) to have an a",
        ),
        (
            {"messages": [USER, ASSISTANT | {"content": ""}], "system": "s"},
            "message 1 .* an answer",
        ),
        (
            {"prompt": "p", "completion": "c", "system": "s", "tools": '[{"name": "f"}]'},
            "expected nothing for a chat template beside .* texts, .* got 'system', 'tools'; put",
        ),
        ({"prompt": 3, "completion": "a"}, "expected 'prompt' to be a text or a list of messages"),
        ({"prompt": "p", "completion": "c", "label": False}, "got preference data .*'label'"),
        ({"prompt": "p", "completion": "c", "label": "True"}, "got preference data .*'label'"),
        (
            {"instruction": "u", "output": "a", "history": [["u", "a", "b"]]},
            "'history' to be a list of pairs of texts, got",
        ),
        (
            {"messages": [USER, ASSISTANT | {"weight": 0}]},
            "expected an answer to train on, got non",
        ),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "a 'weight' of 0 or 1 .* got 0.5"),
        (
            {"conversations": [USER, {"from": "function_call", "value": "f(1)"}, ASSISTANT]},
            r"conversations\[1\] to call functions by 'name' and 'arguments', got 'f\(1\)'",
        ),
        *(
            (
                {"messages": [USER, ASSISTANT], name: value},
                f"expected '{name}' to be a list of objects, got ",
            )
            for name, value in (
                ("tools", "calculator"),
                ("tools", {"name": "f"}),
                ("functions", "[1]"),
                ("documents", ["d"]),
            )
        ),
        ({"messages": [USER, ASSISTANT], "system": ["s"]}, "expected 'system' to be a text, got l"),
        ({"messages": [USER, ASSISTANT], "system": "\ud800"}, "system holds half of a surrogate"),
        (
            {"messages": [{"role": "system", "content": "t"}, USER, ASSISTANT], "system": "s"},
            "expected one system message, got 'system' and another one",
        ),
        ({"instruction": "i", "output": "o", "history": ["x"]}, "'history' to be a list of pairs"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": 3},
            "'chat_template_kwargs' to be an object, got 3",
        ),
    ],
)
def test_bad_rows_name_file_line_and_keys(record, message):
    with pytest.raises(ValueError, match=f"^d.jsonl:3: .*{message}"):
        parsed(**record)


def test_errors_show_the_beginning_of_long_values():
    for record in ({"messages": "[{'role': 'user'}]" * 9999}, {"messages": [["u"] * 9999]}):
        with pytest.raises(ValueError, match=r"^d.jsonl:3: .*\.\.\.$") as caught:
            parsed(**record)
        assert len(str(caught.value)) < 400


def example(prompt, answer, name="x"):
    ids = list(range(prompt + answer))
    return Encoded(ids, [-100] * prompt + ids[prompt:], name)


def test_long_prompts_lose_their_middle_and_no_label():
    made = shorten(example(1000, 20), 300)
    assert made.cut == 720
    assert len(made.example.ids) == 300
    assert list(made.example.ids[:100]) == list(range(100))
    assert list(made.example.ids[-20:]) == list(range(1000, 1020))
    assert sum(label != -100 for label in made.example.labels) == 20
    [gap] = [a for a, b in zip(made.example.ids, made.example.ids[1:]) if b != a + 1]
    assert 120 < gap < 160
    assert shorten(example(1000, 300), 300) is None
    assert shorten(example(10, 20), 30).cut == 0
    turns = Encoded(list(range(600)), [-100] * 300 + [1] * 10 + [-100] * 280 + [1] * 10, "t")
    both = shorten(turns, 300)
    assert both.cut == 300
    assert sum(label != -100 for label in both.example.labels) == 20


@pytest.mark.parametrize(
    ("length", "left"),
    [
        # The longest prompt alone, then the next one as well, and no end of 64 tokens before that.
        (700, [270, 100, 300]),
        (559, [129, 100, 300]),
        (558, [129, 100, 299]),
        (387, [129, 100, 128]),
        # Then the shortest, which is all ends.
        (386, [129, 99, 128]),
    ],
)
def test_the_longest_prompt_is_cut_first_and_ends_last(length, left):
    """The first token of all is in no prompt: it begins the text."""
    turns = [400, 100, 300]
    labels = [label for turn in turns for label in [-100] * turn + [7] * 10]
    made = shorten(Encoded(list(range(830)), labels, "turns"), length).example
    found, first = [], 0
    for turn in turns:
        found.append([token for token in made.ids if first <= token < first + turn])
        first += turn + 10
    assert [len(tokens) for tokens in found] == left
    for tokens, turn in zip(found, turns):
        # What is left are the two ends.
        gaps = [b - a for a, b in itertools.pairwise(tokens) if b != a + 1]
        assert len(gaps) == (len(tokens) < turn)
    assert sum(label == 7 for label in made.labels) == 30


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
    everything = Encoded([1, 2, 3], [1, 2, 3], "all")
    labels = ExampleWindows([everything, everything], 6).window(0).labels
    assert labels.tolist() == [-100, 2, 3, -100, 2, 3]
    whole = ExampleWindows([example(20, 5, "a"), example(20, 5, "b")], 40)
    rows = collate([whole.window(0), whole.window(1)])
    assert rows.input_ids.shape == (2, 25)
    assert rows.position_ids is None


def test_what_stays_on_the_host():
    batch = collate([ExampleWindows([example(2, 2), example(3, 2)], 9).window(0)])
    placed = batch.arguments("meta", on_host=["labels"])
    assert {name: tensor.device.type for name, tensor in placed.items()} == {
        "input_ids": "meta",
        "labels": "cpu",
        "position_ids": "meta",
    }


def test_copies_are_alike_in_their_labels_too():
    same, other = Encoded([1, 2, 3], [-100, -100, 3], "a"), Encoded([1, 2, 3], [-100, 2, 3], "b")
    assert "copies" not in str(ExampleWindows([same, other], 9).remarks())
    assert "1 of 3 examples are copies" in str(ExampleWindows([same, other, same], 9).remarks())


def test_the_seed_moves_who_shares_a_window_and_the_order_of_every_epoch():
    pairs, changes = [], []
    for seed in (1, 2):
        windows = ExampleWindows([Encoded([n] * 5, [n] * 5, "x") for n in range(16)], 10, seed)
        epochs = [[windows.window(8 * epoch + n).ids[[0, 5]] for n in range(8)] for epoch in (0, 1)]
        first, second = ([tuple(pair.tolist()) for pair in epoch] for epoch in epochs)
        assert sorted(first) == sorted(second)
        assert sorted(n for pair in first for n in pair) == list(range(16))
        pairs.append(set(first))
        changes.append([first.index(pair) for pair in second])
    assert pairs[0] != pairs[1]
    assert changes[0] != changes[1]


def test_windows_are_filled_to_their_last_token_and_no_further():
    even, odd = (
        ExampleWindows([example(n - 5, 5) for n in lengths], 100)
        for lengths in ([50] * 8, [51] * 8)
    )
    assert [len(even.window(n).ids) for n in range(len(even))] == [100] * 4
    assert [len(odd.window(n).ids) for n in range(len(odd))] == [51] * 8
    mixed = ExampleWindows([example(n - 5, 5) for n in (50, 51) * 4], 100)
    assert all(len(mixed.window(n).ids) <= 100 for n in range(len(mixed)))


def test_what_does_not_fit_is_counted():
    unlabelled = [example(50, 0, "none"), Encoded([1, 2], [1, -100], "nothing before it")]
    given = [example(500, 5, "long"), *unlabelled, example(5, 400, "answer")]
    windows = ExampleWindows(given, 100)
    assert (windows.shortened, windows.cut_tokens) == (1, 405)
    assert windows.left_out == ["none", "nothing before it", "answer"]
    assert [each.name for each in windows.examples] == ["long"]
    said = "\n".join(windows.remarks())
    assert "cut out of 1 of 4 examples, 405 tokens" in said
    assert "3 of 4 examples are left out" in said
    assert said.endswith(": answer, none, nothing before it")
    with pytest.raises(ValueError, match="expected an example with answers of fewer than 100"):
        ExampleWindows([example(5, 400, "answer")], 100)


def test_every_row_is_read_also_the_one_that_tells_the_kind(tmp_path):
    path, tokenizer = tmp_path / "d.jsonl", with_template("qwen2_5")
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    names = [each.name for each in open_training_data(path, tokenizer, 200).examples]
    assert names == ["d.jsonl:1", "d.jsonl:2"]
    path.write_text("\n".join(json.dumps({"text": word * 40}) for word in ("a ", "b ", "c ")))
    assert open_training_data(path, tokenizer, 20).used == 3


@pytest.mark.parametrize("form", ['{{"prompt": "{0}", "completion": "{0}"}}', '{{"text": "{0}"}}'])
def test_the_seed_of_a_file_moves_its_windows(tmp_path, form):
    path, tokenizer = tmp_path / "d.jsonl", with_template("qwen2_5")
    path.write_text("\n".join(form.format(f"{letter} " * 6) for letter in "abcdefgh"))
    first, second, third = (
        [open_training_data(path, tokenizer, 12, seed).window(n).tolist() for n in range(8)]
        if "text" in form
        else [
            open_training_data(path, tokenizer, 30, seed).window(n).ids.tolist() for n in range(8)
        ]
        for seed in (1, 1, 2)
    )
    assert first == second != third


def test_a_file_is_of_one_kind(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + '\n{"text": "t"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:2: expected .* as in the first row, got a te"):
        open_training_data(path, with_template("qwen2_5"), 100)
