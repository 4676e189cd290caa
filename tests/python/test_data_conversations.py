"""Conversations in all their forms, their labels by real chat templates, and their windows."""

import itertools
import json
from datetime import datetime
from importlib import resources

import pytest
import torch

from conversation_cases import ASSISTANT, CALL, CALLS, RECORDS, USER
from lemo.data import ExampleWindows, collate, open_training_data
from lemo.data.chat import ChatEncoder, Encoded
from lemo.data.conversations import Conversation, Prompted, parse_example
from lemo.data.examples import shorten
from lemo.data.rows import Row
from tiny import tiny_tokenizer

# Files and tokenizers alone.
pytestmark = pytest.mark.cpu_only


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
    assert parsed(system="s", messages=[system, USER, ASSISTANT]).messages[0] == system
    older = parsed(functions=[{"name": "f"}], messages=[USER, ASSISTANT])
    assert older.extra == {"tools": [{"type": "function", "function": {"name": "f"}}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    made = parsed(messages=[USER, call], tools=[{"name": "f"}])
    assert made.messages[1]["content"] == ""
    assert made.extra == {"tools": [{"name": "f"}]}
    texts = parsed(messages=json.dumps([USER, call]), tools=json.dumps([{"name": "f"}]))
    assert texts == made
    thinks = parsed(messages=[USER, ASSISTANT], chat_template_kwargs={"enable_thinking": False})
    assert thinks.extra == {"enable_thinking": False}
    before = parsed(instruction="u", input=None, output="a", history=[["u", "a"]])
    assert before.messages == (USER, ASSISTANT) * 2
    assert parsed(messages=None, instruction="u", output="a").messages == (USER, ASSISTANT)


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


def test_answers_that_are_not_trained_on():
    system = {"role": "system", "content": "s"}
    turns = [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"train": False}, USER, ASSISTANT]
    made = parsed(messages=turns)
    assert (made.messages, made.context) == ((USER, ASSISTANT) * 3, {1, 3})
    assert parsed(messages=turns, system="s").context == {2, 4}
    made = parsed(prompt=[system, USER, ASSISTANT, USER], completion=[ASSISTANT])
    assert (len(made.messages), made.context) == (5, {2})
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
        ({"messages": [USER, ASSISTANT | {"content": ""}]}, r"messages\[1\] to have an answer"),
        ({"prompt": 3, "completion": "a"}, "expected 'prompt' to be a text or a list of messages"),
        ({"prompt": "p", "completion": "c", "label": False}, "got preference data .*'label'"),
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


def with_template(name):
    tokenizer = tiny_tokenizer()
    files = resources.files("trl") / "chat_templates"
    tokenizer.chat_template = (files / f"{name}.jinja").read_text()
    ends = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_header_id|>", "</s>"]
    ends += ["<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
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
# As some of Mistral's: tools stand before the last question, a system message in the last message
# where that is the user's, and nothing says that an answer comes.
TOOLS_LAST = """{{ bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}{% if m['role'] == 'user' %}
{%- if tools and m == users[-1] %}{{ '[TOOLS] ' + tools | tojson + ' [/TOOLS]' }}{% endif %}
{%- if loop.last and messages[0]['role'] == 'system' %}
{{- '[INST] ' + messages[0]['content'] + ' ' + m['content'] + ' [/INST]' }}
{%- else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
{%- endif %}{% endfor %}"""
ENDLESS = """{% for m in messages %}{{ ' ' + m.role + ': ' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ ' assistant: ' }}{% endif %}"""
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


def thinks(number, thought=True):
    return {"role": "assistant", "content": "<think>\nhm\n</think>\n\n" * thought + f"It {number}."}


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
RESULT = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("template", "messages", "answers"),
    [
        # Earlier answers are shown without their thoughts, the last one with it.
        (
            "qwen3",
            [USER, thinks(1), USER, thinks(2)],
            ["It 1.<|im_end|>", "<think>\nhm\n</think>\n\nIt 2.<|im_end|>"],
        ),
        # The header of an answer begins a thought, which earlier answers do not have.
        (
            "qwen3_5_think",
            [USER, thinks(1), USER, thinks(2)],
            ["It 1.<|im_end|>", "hm\n</think>\n\nIt 2.<|im_end|>"],
        ),
        (
            "deepseekv3",
            [USER, thinks(1, False), USER, thinks(2, False)],
            [f"It {n}.<｜end▁of▁sentence｜>" for n in (1, 2)],
        ),
        *(
            (
                template,
                [USER, CALLS, RESULT, thinks(1, False), USER, thinks(2, False)],
                [f"{call}{end}", f"It 1.{end}", f"{thought}It 2.{end}"],
            )
            for template, call, thought, end in (
                (
                    "qwen3",
                    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
                    "<think>\n\n</think>\n\n",
                    "<|im_end|>",
                ),
                (
                    "qwen2_5",
                    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
                    "",
                    "<|im_end|>",
                ),
                ("llama3_1", '{"name": "f", "parameters": {"a": 1}}', "", "<|eot_id|>"),
            )
        ),
    ],
)
@pytest.mark.parametrize("arguments", ["object", "text"])
def test_labels_of_calls_and_of_answers_written_otherwise(template, messages, answers, arguments):
    tokenizer = with_template(template)
    if arguments == "text":
        text = CALL | {"function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [m | {"tool_calls": [text]} if "tool_calls" in m else m for m in messages]
    tools = {"tools": [TOOL]} if any("tool_calls" in message for message in messages) else {}
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=messages, **tools))
    found = [answer.strip() for answer in answers_of(encoded, tokenizer)]
    assert found == answers


def test_arguments_as_the_template_reads_them():
    """DeepSeek's template joins texts; the others write objects as JSON."""
    tokenizer = with_template("deepseekv3")
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=[USER, CALLS, RESULT, ASSISTANT]))
    assert '```json\n{"a": 1}\n```' in answers_of(encoded, tokenizer)[0]


def test_what_a_template_does_not_show_is_refused():
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = SMOLLM
    encoder = ChatEncoder(tokenizer)
    with pytest.raises(ValueError, match=r"^d\.jsonl:3: .* does not show 'tool_calls' \(of 'f'\)"):
        encoder.encode(parsed(messages=[USER, CALLS, RESULT, ASSISTANT]))
    with pytest.raises(ValueError, match=r"^d\.jsonl:3: .* does not show 'tools'"):
        encoder.encode(parsed(messages=[USER, ASSISTANT], tools=[TOOL]))
    message = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    with pytest.raises(ValueError, match="shows nothing of the answer of message 1"):
        encoder.encode(parsed(messages=[USER, message]))


def test_every_part_of_a_message_has_to_be_shown():
    """Also where its text stands elsewhere: among the tools, in another message or call."""
    called = [USER, CALLS, RESULT, ASSISTANT]
    twice = CALLS | {"tool_calls": [CALL, CALL]}
    same = [{"role": "system", "content": "u"}, *TURNS, USER, ASSISTANT]
    for template, messages, tools, missing in (
        ("lfm2_training", called, [TOOL], r"'tool_calls' \(of 'f'\)"),
        ("gptoss", [USER, twice, RESULT, ASSISTANT], [TOOL], r"'tool_calls' \(of 'f'\)"),
        ("llama3_1", [USER, CALLS | ASSISTANT, *called[2:]], [TOOL], r"message 1 \(assistant\)"),
        (TOOLS_LAST, same, None, r"message 0 \(system\)"),
    ):
        tokenizer = with_template("llama3" if template == TOOLS_LAST else template)
        if template == TOOLS_LAST:
            tokenizer.chat_template = template.replace("loop.last", "false")
        with pytest.raises(ValueError, match=rf"^d\.jsonl:3: .* does not show {missing}"):
            ChatEncoder(tokenizer).encode(parsed(messages=messages, tools=tools))
    tokenizer = with_template("qwen2_5_training")
    marks = "{%- generation %}{{ message.content }}{% endgeneration %}"
    last = f"{{%- if loop.last %}}{marks}{{% else %}}{{{{ message.content }}}}{{% endif %}}"
    tokenizer.chat_template = f"{{% for message in messages %}}{last}{{% endfor %}}"
    with pytest.raises(ValueError, match=r"does not mark message 1 \(assistant\)"):
        ChatEncoder(tokenizer).encode(parsed(messages=TURNS))


def test_conversations_that_the_assistant_begins():
    for template, end in (
        ("llama3", "<|eot_id|>"),
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("glm4moe", ""),
        (MISTRAL.replace("raise_exception('roles must alternate')", "''"), "</s>"),
    ):
        tokenizer = with_template("qwen3" if template.startswith("{{") else template)
        if template.startswith("{{"):
            tokenizer.chat_template = template
        encoded = ChatEncoder(tokenizer).encode(parsed(messages=[ASSISTANT, *TURNS]))
        thought = "\n<think></think>\n" if template == "glm4moe" else ""
        think = "<think>\n\n</think>\n\n" if template == "qwen3" else thought
        found = [answer.lstrip(" ") for answer in answers_of(encoded, tokenizer)]
        assert found == [f"{thought}{text}{end}" for text in ("a", "It is one.")] + [
            f"{think}It is two.{end}"
        ]


@pytest.mark.parametrize("template", ["llama3_2", "gptoss", "gptoss_training"])
def test_no_template_depends_on_the_day(template, monkeypatch):
    """The same data make the same windows when a run goes on another day."""
    from transformers.utils import chat_template_utils

    tokenizer = with_template(template)
    days = [datetime(2031, 5, day) for day in (4, 5)]
    made, plain = [], []
    for day in days:
        clock = type("Clock", (), {"now": staticmethod(lambda day=day: day)})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        made.append(ChatEncoder(tokenizer).encode(parsed(messages=TURNS)))
        plain.append(tokenizer.apply_chat_template(TURNS, tokenize=False))
    assert plain[0] != plain[1]
    assert made[0] == made[1]
    shown = {"llama3_2": "%d %b %Y"}.get(template, "%Y-%m-%d")
    assert tokenizer.decode(made[0].ids) == plain[0].replace(
        f"{days[0]:{shown}}", f"{datetime(2024, 7, 26):{shown}}"
    )


def test_calls_by_templates_with_marks_that_join_texts():
    tokenizer = with_template("qwen2_5")
    call = "{{ c.function.name + ' ' + c.function.arguments }}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{call}{{% endfor %}}{{{{ eos_token }}}}{{% endgeneration %}}{{% endfor %}}"
    )
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=[USER, CALLS, RESULT, ASSISTANT]))
    assert answers_of(encoded, tokenizer) == ['u</s>f {"a": 1}</s>7</s>a</s>']


def test_templates_without_headers_of_answers():
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = TOOLS_LAST
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(parsed(messages=TURNS, tools=[TOOL]))
    found = [answer.strip() for answer in answers_of(encoded, tokenizer)]
    assert found == ["It is one.</s>", "It is two.</s>"]
    calls = [USER, CALLS, RESULT, ASSISTANT, *TURNS]
    tokenizer.chat_template = TOOLS_LAST.replace(
        "m['content'] | trim +", "((m.tool_calls | tojson) if m.tool_calls else m.content) +"
    ).replace(
        "{%- elif m['role'] == 'a",
        "{%- elif m.role == 'tool' %}[{{ m.content }}]{% elif m['role'] == 'a",
    )
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=calls, tools=[TOOL]))
    found = [answer.strip() for answer in answers_of(encoded, tokenizer)]
    assert json.loads(found[0].removesuffix("</s>")) == [CALL]
    assert found[1:] == ["a</s>", "It is one.</s>", "It is two.</s>"]
    tokenizer.chat_template = TOOLS_LAST
    system = {"role": "system", "content": "Be brief."}
    message = r"^d\.jsonl:3: the chat template does not show message 0 \(system\)"
    with pytest.raises(ValueError, match=message):
        encoder.encode(parsed(messages=[system, *TURNS]))


def test_line_breaks_among_the_added_tokens_end_no_answer():
    tokenizer = with_template("qwen2_5")
    tokenizer.add_tokens(["\n"])
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=TURNS))
    assert answers_of(encoded, tokenizer) == ["It is one.<|im_end|>", "It is two.<|im_end|>"]


def test_templates_without_an_end_are_named_once(caplog):
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = ENDLESS
    encoder = ChatEncoder(tokenizer)
    for _ in range(2):
        encoded = encoder.encode(parsed(messages=[USER, ASSISTANT]))
    assert answers_of(encoded, tokenizer)[0].strip() == "a"
    [record] = caplog.records
    assert "the model will not learn where they end" in record.message


def test_thoughts_that_a_template_leaves_out_are_named_once(caplog):
    for template, message in (("deepseekv3", "message 1 of d.jsonl:3"), ("qwen3", None)):
        caplog.clear()
        encoder = ChatEncoder(with_template(template))
        for _ in range(2):
            encoder.encode(parsed(messages=[USER, thinks(1)]))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (message is not None)
        assert all("leaves out thoughts" in line and message in line for line in said)


def test_completions_end_once():
    from tokenizers import processors

    tokenizer = with_template("qwen2_5")
    plain = ChatEncoder(tokenizer).encode(Prompted("What? ", "One.", "d:1", "d:1"))
    ended = ChatEncoder(tokenizer).encode(Prompted("What? ", "One.</s>", "d:1", "d:1"))
    assert answers_of(ended, tokenizer) == ["One.</s>"]
    assert ended == plain
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[end]
    )
    both = ChatEncoder(tokenizer).encode(Prompted("What? ", "One.", "d:1", "d:1"))
    assert both.ids == [tokenizer.eos_token_id, *plain.ids]
    assert both.labels == [-100, *plain.labels]


def test_white_space_of_answers_has_labels():
    """Offsets of some tokenizers leave white space out."""
    from tokenizers import processors

    answer = "It\n\n        is\n    \n one."
    for trim, marks in itertools.product((True, False), ("", "_training")):
        tokenizer = with_template(f"qwen2_5{marks}")
        post = processors.ByteLevel(trim_offsets=trim)
        tokenizer.backend_tokenizer.post_processor = post
        encoded = ChatEncoder(tokenizer).encode(
            parsed(messages=[USER, ASSISTANT | {"content": answer}])
        )
        # Marks of this template have the line breaks around an answer in them.
        around = "\n" * bool(marks)
        assert answers_of(encoded, tokenizer) == [f"{around}{answer}<|im_end|>{around}"]


def test_what_a_template_refuses_names_the_row():
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = MISTRAL
    twice = Conversation((USER, USER, ASSISTANT), "d.jsonl:7", "n")
    with pytest.raises(ValueError, match=r"^d\.jsonl:7: the chat template refuses .* alternate"):
        ChatEncoder(tokenizer).encode(twice)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        ChatEncoder(tokenizer).encode(twice)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}"
    )
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
