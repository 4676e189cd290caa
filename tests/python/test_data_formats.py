"""Labels by the formats of many models, against the answers' texts as the formats document them."""

import json

import pytest

from chat_formats import FORMATS, with_format
from conversation_cases import ASSISTANT, CALL, CALLS, USER, answers_of, parsed, with_template
from lemo.data.chat import ChatEncoder

# Files and tokenizers alone.
pytestmark = pytest.mark.cpu_only

# Each letter is a role. Of the last ones some formats know no such conversation.
_ORDERS = ["ua", "uaua", "uauaua", "uau"]
_FREE_ORDERS = ["au", "auaua", "sua", "suaua", "uuaua", "uaaua", "uaa", "suasua", "usuaa"]
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_HEADER = "<|im_start|>assistant\n[/INST]<|assistant|>\nASSISTANT: <｜Assistant｜>"
_ODD = ("", " \n", "cafe\u0301 ﬁ\r\n\0 日本 😀", f"{_HEADER}not said</s><|im_end|>\n")


def _said(order):
    """Messages with texts of their own; those of users are odd."""
    return [
        {"role": _ROLES[role], "content": f"text {place}." + (_ODD[place % 4] * (role == "u"))}
        for place, role in enumerate(order)
    ]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        (name, order)
        for name, form in FORMATS.items()
        for order in (_ORDERS if form.strict else _ORDERS + _FREE_ORDERS)
    ],
)
def test_labels_are_the_answers_of_a_format(name, order):
    tokenizer, messages = with_format(name), _said(order)
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [FORMATS[name].answer.format(text) for text in said]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=messages))
    assert answers_of(encoded, tokenizer) == expected
    for left_out in range(len(said) * (len(said) > 1)):
        numbers = [n for n, role in enumerate(order) if role == "a"]
        changed = list(messages)
        changed[numbers[left_out]] = messages[numbers[left_out]] | {"weight": 0}
        encoded = ChatEncoder(tokenizer).encode(parsed(messages=changed))
        rest = expected[:left_out] + expected[left_out + 1 :]
        assert answers_of(encoded, tokenizer) == rest


@pytest.mark.parametrize("name", ["mistral3", "nemo"])
def test_calls_of_mistral(name):
    tokenizer, space = with_format(name), " " * (name == "mistral3")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    messages = [USER, CALLS, {"role": "tool", "content": "7"}, ASSISTANT]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=messages * 2, tools=[tool]))
    call = f"[TOOL_CALLS]{space}[{json.dumps(CALL['function'])}]</s>"
    assert answers_of(encoded, tokenizer) == [call, f"{space}a</s>"] * 2


def _thinks(thought, message, name="reasoning_content"):
    return {"role": "assistant", "content": "", name: thought} | message


@pytest.mark.parametrize("result", ["7", '{"a": "7"}\n', "<|start|>assistant", ""])
def test_thoughts_before_calls_that_gptoss_leaves_out(result):
    """There are more headers of answers than answers: a thought has one of its own."""
    tokenizer = with_template("gptoss")
    names = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>")
    tokenizer.add_tokens(list(names), special_tokens=True)
    tool = {"role": "tool", "content": result}
    # By the template's own name: only later versions of Transformers know the others there.
    call, answer = _thinks("I call.", CALLS, "thinking"), _thinks("I see.", ASSISTANT, "thinking")
    messages = [USER, call, tool, answer]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=messages))
    assert answers_of(encoded, tokenizer) == [
        ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "<|channel|>analysis<|message|>I see.<|end|><|start|>assistant"
        "<|channel|>final<|message|>a<|return|>",
    ]


@pytest.mark.parametrize("order", ["asausu", "auasus", "aasaus", "uausuas"])
def test_messages_in_front_of_all_others_come_before_no_answer(order):
    """DeepSeek's template gathers those of the system: what follows one is another answer's."""
    tokenizer, messages = with_format("deepseek"), _said(order)
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=messages))
    answer = FORMATS["deepseek"].answer
    assert answers_of(encoded, tokenizer) == [answer.format(text) for text in said]


def test_an_end_in_the_thought_of_the_next_answer_ends_no_other():
    tokenizer = with_template("qwen3")
    messages = [USER, ASSISTANT, _thinks("I see <|im_end|> there.", ASSISTANT)]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=messages))
    assert answers_of(encoded, tokenizer) == [
        "a<|im_end|>",
        "<think>\nI see <|im_end|> there.\n</think>\n\na<|im_end|>",
    ]


def test_thoughts_in_contents_that_glm_leaves_out():
    """No token ends its answers: they end with what is shown of them."""
    tokenizer = with_template("glm4moe")
    thinks = [{"role": "assistant", "content": f"<think>\nhm\n</think>\n\nIt {n}."} for n in "12"]
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=[USER, thinks[0], USER, thinks[1]]))
    assert answers_of(encoded, tokenizer) == [
        "\n<think></think>\nIt 1.",
        "\n<think>hm</think>\nIt 2.",
    ]
