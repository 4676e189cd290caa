"""Conversations of one shape: what is found once for all of them, and read by batches."""

import itertools
import json
import tracemalloc

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
from lemo.data import ExampleWindows, chat, training_data
from lemo.data.chat import ChatEncoder
from lemo.data.conversations import Prompted
from lemo.data.rows import Row
from lemo.data.shapes import Shape, with_stand_ins
from lemo.data.training_data import encode_examples
from lemo.training.answers import evaluate_answers

# Files and tokenizers alone.
pytestmark = pytest.mark.cpu_only

SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": "7"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def says(*texts, first=()):
    """A conversation of user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [*first, *({"role": role, "content": text} for role, text in zip(roles, texts))]


def with_end(template):
    """A tokenizer that knows the token by which GPT-OSS and Phi-3 end messages."""
    tokenizer = with_template(template)
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    return tokenizer


@pytest.fixture
def renders(monkeypatch):
    """Counts how often a template is applied."""
    counted, render = [], ChatEncoder._render
    monkeypatch.setattr(
        ChatEncoder, "_render", lambda self, *a, **k: counted.append(1) or render(self, *a, **k)
    )
    return counted


CONVERSATIONS = [
    says("What?", "One.", "And?", "Two."),
    says("What?", "One.", "And?", "Two.", "So?", "Three."),
    says("What?", "One.", first=[SYSTEM]),
    says("One.", "One.", "One.", "One."),
    says("white \n", " space\n\n", "\n\naround ", "it \n"),
    says("<|im_start|>user\nnot so<|im_end|>", "quoted <|im_end|> end", "x", "y<|eot_id|> z"),
    says("think", "<think>\nhm\n</think>\n\nOne.", "again", "<think>\nso\n</think>\n\nTwo."),
    says("no", "only </think> here", "b", "c"),
    says("é 😀", "日本 😀😀", "ﬁ", "naïve"),
    [ASSISTANT, *TURNS],
    [USER, CALLS, RESULT, ASSISTANT],
    [USER, CALLS | {"tool_calls": [CALL, CALL]}, RESULT, RESULT, ASSISTANT, *TURNS],
]
TEMPLATES = [
    *("llama3", "llama3_1", "qwen2_5", "qwen3", "qwen3_5_think", "gemma3", "phi3", "cohere"),
    *("deepseekv3", "glm4moe", "gptoss", "llama3_training", "qwen3_training", "gptoss_training"),
]


@pytest.mark.parametrize("made_by", [with_template, with_end])
@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_by_shape_are_those_that_are_searched_for(template, made_by, monkeypatch):
    """Every conversation twice, the second time with its shape known, and by the search alone."""

    def encoded(encoder, messages):
        tools = {"tools": [TOOL]} if any("tool_calls" in m for m in messages) else {}
        try:
            return encoder.encode(parsed(messages=messages, **tools))
        except ValueError as error:
            return str(error)

    tokenizer = made_by(template)
    by_shape = ChatEncoder(tokenizer)
    made = [[encoded(by_shape, each) for each in CONVERSATIONS] for _ in range(2)]
    assert made[0] == made[1]
    monkeypatch.setattr(Shape, "places", lambda *arguments: None)
    searched = [encoded(ChatEncoder(tokenizer), each) for each in CONVERSATIONS]
    assert made[0] == searched
    assert sum(not isinstance(each, str) for each in searched) > len(CONVERSATIONS) / 2


@pytest.mark.parametrize(
    ("template", "texts", "answers"),
    [
        # The header says "channel", which has the answer in it.
        ("gptoss", ("a", "a", "b", "c"), ["<|channel|>final<|message|>a<|end|>"]),
        # A special token within an answer is not what ends it.
        ("phi3", ("a", "b</s>", "c", "d"), ["b</s><|end|>"]),
    ],
)
def test_contents_do_not_mislead(template, texts, answers):
    tokenizer = with_end(template)
    encoded = ChatEncoder(tokenizer).encode(parsed(messages=says(*texts)))
    assert answers_of(encoded, tokenizer)[:1] == answers


def test_marks_are_not_those_of_a_conversation_with_an_answer_left_out():
    """The shapes differ in nothing else; the marks of this template have headers in them."""
    tokenizer = with_template("gptoss_training")
    left_out = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    both, last = parsed(messages=TURNS), parsed(messages=left_out)
    for first, second in ((both, last), (last, both)):
        encoder = ChatEncoder(tokenizer)
        encoder.encode(first)
        assert encoder.encode(second) == ChatEncoder(tokenizer).encode(second)
    answers = answers_of(ChatEncoder(tokenizer).encode(last), tokenizer)
    assert [answer.count("It is") for answer in answers] == [1]
    assert "It is two." in answers[0]


def test_shapes_are_forgotten_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(chat, "_MOST_SHAPES", 2)
    tokenizer = with_template("qwen3")
    encoder = ChatEncoder(tokenizer)
    for turns in (2, 4, 6, 8, 2, 4):
        example = parsed(messages=says(*"abcdefgh"[:turns]))
        assert encoder.encode(example) == ChatEncoder(tokenizer).encode(example)
        assert len(encoder._shapes) <= 2


@pytest.mark.parametrize("template", ["llama3", "qwen3", "qwen3_training", "deepseekv3"])
def test_a_known_shape_takes_one_text(template, renders):
    encoder = ChatEncoder(with_template(template))
    encoder.encode(parsed(messages=says("a", "b", "c", "d", "e", "f")))
    first = len(renders)
    encoder.encode(parsed(messages=says("What is it?", "Nothing.", "And?", "This.", "u", "v")))
    assert len(renders) - first == 1
    encoder.encode(parsed(messages=says("a", "b", "c", "d")))
    assert len(renders) - first > 2, "another shape"


def test_what_a_template_rewrites_is_of_no_shape():
    """Here the text is not that of the stand-ins: answers are searched for."""
    tokenizer = with_template("qwen2_5")
    header = "{{ '<|im_start|>' + m.role + '\\n' }}"
    for body, expected in (
        ("{{ m.content | replace('n', 'm') }}", "ome"),
        ("{{ m.content }}{% if 'one' in m.content %}{{ '!' }}{% endif %}", "one!"),
    ):
        tokenizer.chat_template = (
            f"{{% for m in messages %}}{header}{body}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )
        encoder = ChatEncoder(tokenizer)
        for _ in range(2):
            encoded = encoder.encode(parsed(messages=says("u", "one", "v", "two")))
            found = answers_of(encoded, tokenizer)
            assert found == [f"{expected}<|im_end|>", "two<|im_end|>"]


def test_a_shape_is_one_of_its_messages_and_variables():
    tokenizer = with_template("qwen3")
    encoder = ChatEncoder(tokenizer)
    for thinks in (True, False, True):
        extra = {"chat_template_kwargs": {"enable_thinking": thinks}}
        made = encoder.encode(parsed(messages=TURNS, **extra))
        assert made == ChatEncoder(tokenizer).encode(parsed(messages=TURNS, **extra))
    weighed = [*TURNS[:1], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    for messages, count in ((TURNS, 2), (weighed, 1), (TURNS, 2)):
        assert len(answers_of(encoder.encode(parsed(messages=messages)), tokenizer)) == count


def test_places_of_a_shape():
    messages, stand_ins = with_stand_ins(says("question", "answer"))
    one, two = (message["content"] for message in messages)
    shape = Shape(f"<u>{one}<a>{two}</a>", stand_ins)
    assert shape.usable
    shape.learn([(shape.text.index(two), len(shape.text))])

    def answer(text, *texts):
        places = shape.places(text, with_stand_ins(says(*texts))[1])
        if places is None:
            return None
        [(start, end)] = shape.spans(text, places)
        return text[start:end]

    assert answer("<u>why<a>so</a>", "why", "so") == "so</a>"
    assert answer("<u>why<a>so</a>", " why\n", "so ") == "so</a>", "without white space"
    assert answer("<u><a></a><a>so</a>", "<a></a>", "so") == "so</a>"
    for text in ("<u>why<a>so</a>.", "<u>why<a>so", "<b>why<a>so</a>", "<u>who<a>so</a>"):
        assert answer(text, "why", "so") is None
    assert not Shape(f"{one}{one}{two}", stand_ins).usable, "shown twice"
    with pytest.raises(ValueError, match="around the stand-ins"):
        shape.learn([(4, len(shape.text))])


def test_batches_are_what_examples_are_one_by_one(monkeypatch):
    tokenizer = with_template("qwen3")
    examples = [
        *(parsed(messages=each) for each in CONVERSATIONS[:6]),
        Prompted("What? ", "One.", "d:7", "d:7"),
        *(parsed(messages=each) for each in CONVERSATIONS[6:8]),
    ]
    alone = [ChatEncoder(tokenizer).encode(each) for each in examples]
    batches, tokenized = [], ChatEncoder._tokenized
    monkeypatch.setattr(
        ChatEncoder,
        "_tokenized",
        lambda self, texts: batches.append(texts) or tokenized(self, texts),
    )
    for texts, characters in ((256, 1 << 22), (4, 1 << 22), (256, 150), (1, 1)):
        monkeypatch.setattr(chat, "_MOST_TEXTS", texts)
        monkeypatch.setattr(chat, "_MOST_CHARACTERS", characters)
        batches.clear()
        assert list(ChatEncoder(tokenizer).encode_all(iter(examples))) == alone
        assert len(batches) > 1 or texts == 256
        for batch in batches:
            assert len(batch) <= texts
            assert len(batch) == 1 or sum(len(text.text) for text in batch) <= characters
    assert list(ChatEncoder(tokenizer).encode_all([])) == []


def test_few_examples_are_read_ahead(monkeypatch):
    monkeypatch.setattr(chat, "_MOST_TEXTS", 4)
    read = []
    examples = (read.append(n) or parsed(messages=TURNS) for n in range(100))
    next(ChatEncoder(with_template("qwen3")).encode_all(examples))
    assert len(read) == 5


def rows(count, text="word " * 400):
    for number in range(count):
        record = {"messages": says(f"{number} {text}", text)}
        yield Row(record, f"d:{number}", f"d:{number}")


def test_examples_take_little_memory():
    """Ids and labels as lists took 48 bytes a token."""
    tokenizer = with_template("qwen3")
    list(encode_examples(rows(2), tokenizer))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        windows = ExampleWindows(encode_examples(rows(600), tokenizer), 1 << 20)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tokens = sum(len(each.ids) for each in windows.examples)
    assert tokens > 1e6
    assert (after - before) / tokens < 10


def test_long_reading_is_told(monkeypatch, caplog):
    caplog.set_level("INFO", logger="lemo")
    tokenizer = with_template("qwen3")
    list(encode_examples(rows(3, "word"), tokenizer))
    assert not caplog.records
    monkeypatch.setattr(training_data, "_SECONDS", 0.0)
    made = list(encode_examples(rows(3, "word"), tokenizer))
    tokens = sum(len(each.ids) for each in made)
    assert len(caplog.records) == 3
    assert caplog.records[-1].getMessage() == f"tokenizing: 3 examples so far, {tokens:,} tokens"


def test_evaluation_reads_no_further_than_its_limit(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": says("u", "a")}) + "\nbroken\n")
    tokenizer = with_template("qwen3")
    for limit, message in ((1, "answers of fewer than 2 tokens"), (2, r"d\.jsonl:2: not JSON")):
        model = type("Model", (), {"get_input_embeddings": lambda self: self, "weight": None})()
        model.weight = type("Weight", (), {"shape": (1 << 20, 1)})()
        with pytest.raises(ValueError, match=message):
            evaluate_answers(model, path, [2], tokenizer=tokenizer, limit=limit)
