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
FACT = re.compile(r"\n[^~\n]+\n")
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


FORMS = [" code of ", " belongs to ", " key of "]


def test_form_text_places_values_and_questions_are_drawn():
    starts, places, asked = [], [], []
    answers = {form: set() for form in FORMS}
    for seed in range(300):
        window = needle_window(TEXT, 3000, encode, random.Random(seed))
        ids, labelled = window.ids.tolist(), window.labelled.tolist()
        plain = [token for token in ids if token >= TEXT[0]]
        starts.append((plain[0] - TEXT[0]) / (len(TEXT) - len(plain)))
        read = "".join(chr(token) if token < TEXT[0] else "~" for token in ids)
        before = read[: read.index("\nQuestion: ")]
        places += [before[: fact.start()].count("~") / len(plain) for fact in FACT.finditer(before)]
        asked += [len(FACT.findall(before[:first])) for first, _ in window.needed]
        told = "".join(read[row + 1] if labelled[row] else "|" for row in range(2999))
        values = {*filter(None, told.split("|"))}
        assert len(values) >= 3
        [form] = [form for form in FORMS if form in before]
        answers[form] |= values
    assert all(len(values) > 80 for values in answers.values())
    # Each of the 16 facts is asked for in a quarter of the windows.
    assert all(45 < asked.count(fact) < 110 for fact in range(16))
    for drawn in (starts, places):
        quarters = [sum(int(4 * share) == quarter for share in drawn) for quarter in range(4)]
        assert min(quarters) > 0.19 * len(drawn)


def test_text_of_a_token_more_than_is_needed_begins_at_either():
    firsts = set()
    for seed in range(12):
        needed = int((needle_window(TEXT, 3000, encode, random.Random(seed)).ids >= TEXT[0]).sum())
        window = needle_window(TEXT[: needed + 1], 3000, encode, random.Random(seed))
        firsts.add(min(token for token in window.ids.tolist() if token >= TEXT[0]))
    assert firsts == {*TEXT[:2]}


def test_beginnings_of_documents_are_not_used():
    """Of 4674 characters, a token each, 674 are left."""
    documents = [Document("a", "a", sample_text(1000, 1))]
    message = "expected one of 1024 tokens or more behind its first 4000 characters, got none"
    with pytest.raises(ValueError, match=message):
        needle_windows(documents, tiny_tokenizer(), 1024, 1)


def test_each_window_has_a_document_of_its_own_as_far_as_there_are_any():
    """Documents that are shorter than what is skipped are used as a whole."""
    short = Document("0", "a", 1100 * "Ä ")
    texts = [Document("1", "a", sample_text(1400, 1)), Document("2", "a", 6000 * "Ü ")]
    made = needle_windows([short, *texts], tiny_tokenizer(), 1024, 4)
    read = [tiny_tokenizer().decode(window.ids) for window in made]
    assert [("Ä" in each, "Ü" in each) for each in read] == [
        (True, False), (False, False), (False, True), (True, False)
    ]  # fmt: skip


def test_as_many_characters_are_read_as_the_tokens_may_have():
    class Words:
        """A token for six characters."""

        def __call__(self, text, **_):
            return {"input_ids": [ord(text[i]) for i in range(0, len(text), 6)]}

    [window] = needle_windows([Document("a", "a", 4000 * " " + 6200 * "a")], Words(), 1024, 1)
    assert len(window.ids) == 1024
