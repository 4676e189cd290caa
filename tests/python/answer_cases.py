"""Documents and sizes of windows of answers.py, shared by its tests."""

import random
import string

from lemo.data import Document
from tiny import tiny_tokenizer

TOKENS = 1280
FACTS, ASKED = 12, 3
TOKENIZER = tiny_tokenizer()


def text(sentences, seed):
    """Sentences of random words."""
    generator = random.Random(seed)

    def word():
        return "".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 8)))

    lines = (" ".join(word() for _ in range(generator.randint(5, 14))) for _ in range(sentences))
    return " ".join(f"{line.capitalize()}." for line in lines)


def documents(count=3):
    return [Document(f"{i}", "book", text(400, i)) for i in range(count)]
