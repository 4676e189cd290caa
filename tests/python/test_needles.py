"""Generated needles: facts in whole text, and answers that are asked of the right ones."""

import random
import re

import pytest

from lemo.data import Document
from lemo.preparation.heads import needle_windows
from lemo.relevance.needles import needle_window
from tiny import sample_text, tiny_tokenizer

# Token ids alone.
pytestmark = pytest.mark.cpu_only

TEXT = list(range(1000, 6000))  # in order, and none of a fact
NAME = re.compile(r"(?:of the|does the|has the|The) ([a-z]+ [a-z]+)")


def encode(text):
    return list(text.encode())


@pytest.mark.parametrize("seed", range(12))
def test_answers_stand_in_the_facts_that_are_asked_for(seed):
    window = needle_window(TEXT, 3000, encode, random.Random(seed))
    ids, labelled = window.ids.tolist(), window.labelled.tolist()
    assert len(ids) == len(labelled) == 3000
    plain = [token for token in ids if token >= TEXT[0]]
    assert plain == TEXT[TEXT.index(plain[0]) :][: len(plain)]
    read = "".join(chr(token) if token < TEXT[0] else "~" for token in ids)
    before, *asked = read.split("\nQuestion: ")
    facts = [fact for fact in re.split("[~\n]+", before) if fact]
    assert len(set(facts)) == 16
    # A row predicts the token behind it.
    answers = "".join(read[row + 1] if labelled[row] else "|" for row in range(2999)).split("|")
    answers = [answer for answer in answers if answer]
    assert len(asked) == len(answers) == len(window.needed) == 4
    for (first, end), question, answer in zip(window.needed, asked, answers):
        assert question.endswith(f"\nAnswer:{answer}")
        [fact] = read[first:end].splitlines()[1:]
        assert fact in facts
        assert answer.strip() in fact
        assert NAME.search(question)[1] in fact
    # As much text as is needed will do, and no less.
    exact = needle_window(plain, 3000, encode, random.Random(seed))
    assert [token for token in exact.ids.tolist() if token >= TEXT[0]] == plain
    with pytest.raises(ValueError, match=f"text: expected at least {len(plain)} tokens, got"):
        needle_window(plain[1:], 3000, encode, random.Random(seed))
    shortest = 3000 - len(plain)
    assert len(needle_window([], shortest, encode, random.Random(seed)).ids) == shortest
    with pytest.raises(ValueError, match=f"length: expected at least {shortest} tokens, got"):
        needle_window(TEXT, shortest - 1, encode, random.Random(seed))


def test_beginnings_of_documents_are_not_used():
    """Of 4674 characters, a token each, 674 are left."""
    documents = [Document("a", "a", sample_text(1000, 1))]
    message = "expected one of 1024 tokens or more behind its first 4000 characters, got none"
    with pytest.raises(ValueError, match=message):
        needle_windows(documents, tiny_tokenizer(), 1024, 1)
