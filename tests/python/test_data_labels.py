"""Labels of conversations by real chat templates: answers and their ends, and nothing else."""

import itertools
import json
from datetime import datetime
from types import SimpleNamespace

import pytest

from conversation_cases import (
    ASSISTANT,
    CALL,
    CALLS,
    TURNS,
    USER,
    answers_of,
    parsed,
    with_template,
)
from lemo.data.chat import ChatEncoder
from lemo.data.conversations import Conversation, Prompted

# Files and tokenizers alone.
pytestmark = pytest.mark.cpu_only


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
        "{% for m in messages %}|{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{call}{{% endfor %}}{{{{ eos_token }}}}{{% endgeneration %}}{{% endfor %}}"
    )
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=[USER, CALLS, RESULT, ASSISTANT]))
    assert answers_of(encoded, tokenizer) == ["u</s>", 'f {"a": 1}</s>', "7</s>", "a</s>"]


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


def test_marks_without_an_end_are_named_once(caplog):
    tokenizer = with_template("qwen2_5")
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{%generation -%}{{ m.content }}X{%- "
    text += "endgeneration%}Y{% endfor %}"
    for end, behind, said in (("", "<|im_end|>", 1), ("<|im_end|>", "", 0)):
        caplog.clear()
        tokenizer.chat_template = text.replace("X", end).replace("Y", behind)
        encoder = ChatEncoder(tokenizer)
        for _ in range(2):
            encoded = encoder.encode(parsed(messages=TURNS))
        # Marks are marks without a space in front, too: the headers are outside.
        assert answers_of(encoded, tokenizer)[1::2] == [f"It is {n}.{end}" for n in ("one", "two")]
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == said
        assert all("generation marks: no label behind answers" in line for line in lines)


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
    for single in ("</s> $A </s>", "</s> $A </s> </s>"):
        post = processors.TemplateProcessing(single=single, special_tokens=[end])
        tokenizer.backend_tokenizer.post_processor = post
        both = ChatEncoder(tokenizer).encode(Prompted("What? ", "One.", "d:1", "d:1"))
        assert list(both.ids) == [tokenizer.eos_token_id, *plain.ids]
        assert list(both.labels) == [-100, *plain.labels]


def test_prompts_begin_once():
    """Prompts that a chat template has made have the begin already."""
    from tokenizers import processors

    tokenizer = with_template("qwen2_5")
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[begin]
    )
    encoder = ChatEncoder(tokenizer)
    plain = encoder.encode(Prompted("What? ", "One.", "d:1", "d:1"))
    assert tokenizer.decode(plain.ids) == "<s>What? One.</s>"
    assert encoder.encode(Prompted("<s>What? ", "One.", "d:1", "d:1")) == plain


def test_tokens_that_take_white_space_are_not_of_the_answer_behind():
    """Phi-3's headers take the white space in front of an answer with them."""
    from tokenizers import AddedToken

    tokenizer = with_template("phi3")
    words = ["<|user|>", "<|assistant|>", "<|end|>"]
    added = [AddedToken(word, rstrip=True, normalized=False) for word in words]
    tokenizer.add_tokens([*added, AddedToken("<|next|>", lstrip=True)], special_tokens=True)
    texts = (USER, ASSISTANT | {"content": "  One. \n"})
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(parsed(messages=[*texts, *texts]))
    found = answers_of(encoded, tokenizer)
    assert [answer.removesuffix("</s>") for answer in found] == ["One. \n<|end|>"] * 2
    encoded = encoder.encode(Prompted("<|user|> u<|end|> <|assistant|>", "  One.", "d:1", "d:1"))
    assert answers_of(encoded, tokenizer) == ["One.</s>"]
    # The other way round: the token behind an answer takes the white space that ends it.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|next|>{{ m.content }}<|user|>"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=[*texts, *texts]))
    assert answers_of(encoded, tokenizer) == ["One.", "One. \n"]


def test_halves_of_surrogate_pairs_name_the_row():
    tokenizer = with_template("qwen3")
    half = "\ud83d"
    call = CALL | {"function": {"name": "f", "arguments": {"a": half}}}
    tool = TOOL | {"function": TOOL["function"] | {"description": half}}
    for messages, tools in (
        ([USER, CALLS | {"tool_calls": [call]}, RESULT, ASSISTANT], [TOOL]),
        ([USER, ASSISTANT | {"reasoning_content": half}], None),
        ([USER, ASSISTANT], [tool]),
    ):
        with pytest.raises(ValueError, match=r"^d\.jsonl:3: .* half of a surrogate pair"):
            ChatEncoder(tokenizer).encode(parsed(messages=messages, tools=tools))


def test_a_token_across_the_border_of_an_answer_is_the_answers():
    tokenizer = with_template("qwen2_5")
    tokenizer.add_tokens(["? O", "e[n"])
    encoded = ChatEncoder(tokenizer).encode(Prompted("What? ", "One.", "d:1", "d:1"))
    assert answers_of(encoded, tokenizer) == ["? One.</s>"]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[next]{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    turns = [USER, ASSISTANT | {"content": "One"}]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=[*turns, *turns]))
    assert answers_of(encoded, tokenizer) == ["One[n", "One"]


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


@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training"])
@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message", "tokenize"])
def test_variables_of_a_template_do_not_change_what_it_is_asked_for(template, name):
    tokenizer = with_template(template)
    plain = ChatEncoder(tokenizer).encode(parsed(messages=TURNS))
    example = parsed(messages=TURNS, chat_template_kwargs={name: True})
    assert ChatEncoder(tokenizer).encode(example) == plain


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


def test_tokens_behind_one_that_has_no_place_begin_where_they_stand():
    text = SimpleNamespace(text="ask yes end", spans=[(4, 7)], name="a")
    offsets = [(0, 3), (4, 7), (0, 0), (8, 11)]
    encoder = SimpleNamespace(_everything=False, _greedy={})
    labels = ChatEncoder._labelled(encoder, text, [5, 6, 7, 8], offsets).labels
    assert list(labels) == [-100, 6, -100, -100]
