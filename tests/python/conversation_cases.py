"""Messages and rows of conversations that several tests share."""

from importlib import resources

from lemo.data.conversations import parse_example
from lemo.data.rows import Row
from tiny import tiny_tokenizer

USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("user", "assistant"))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RECORDS = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}]

TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is one."},
    {"role": "user", "content": "And now, one?"},
    {"role": "assistant", "content": "It is two."},
]


def parsed(**record):
    return parse_example(Row(record, "d.jsonl:3", "d.jsonl:3"))


def with_template(name):
    tokenizer = tiny_tokenizer()
    files = resources.files("trl") / "chat_templates"
    tokenizer.chat_template = (files / f"{name}.jinja").read_text()
    ends = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_header_id|>", "</s>"]
    ends += ["<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.eos_token = "</s>"
    return tokenizer


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
