"""Tasks whose facts are made up and planted in the text.

Each function draws a plan: which facts, in which order, and what is asked. Things and people come
from the same lists in training and evaluation (but for paraphrases); values are random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from answer_tasks.paraphrases import HELD_OUT_PAIRS, TRAIN_PAIRS
from answer_tasks.windows import Plan, Question
from answer_tasks.words import (
    PEOPLE,
    THINGS,
    code_word,
    hexadecimal_key,
    number,
    variable_names,
)

__all__ = ["NOT_STATED", "PLANTED"]

NOT_STATED = "not stated"

# Facts of one thing, things of one question, variables of a chain.
_VALUES, _KEYS, _CHAIN = 3, 3, 3
# Variables of a long chain: the answer and the question name its two ends alone.
_LONG_CHAIN = 5
# Of the task "frequent": how often the words of a list are planted, and how many lists there are.
_OCCURRENCES, _LISTS = (4, 1, 1), ("red", "green")

_ASKING = (
    "which digits open the {}?",
    "what has to be typed in for the {}?",
    "how does the combination of the {} read?",
)


def _single(facts: int, asked: int, generator: random.Random, kind: str) -> Plan:
    """Many facts of one kind with one value each."""
    noun, word, value = {
        "number": ("code", "what", number),
        "name": ("keeper", "who", lambda generator: generator.choice(PEOPLE)),
        "key": ("key", "what", hexadecimal_key),
    }[kind]
    things = generator.sample(THINGS, facts)
    values = [value(generator) for _ in things]
    return Plan(
        [f"The {noun} of the {thing} is {value}." for thing, value in zip(things, values)],
        [
            Question(f"{word} is the {noun} of the {things[i]}?", values[i], (i,))
            for i in generator.sample(range(facts), asked)
        ],
    )


def _number(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    return _single(facts, asked, generator, "number")


def _name(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    return _single(facts, asked, generator, "name")


def _key(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    return _single(facts, asked, generator, "key")


def _values(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """Several values of one thing, all asked for in the order of the text."""
    things = generator.sample(THINGS, max(facts // _VALUES, 1))
    owners = _shuffled(_VALUES * list(range(len(things))), generator)
    values = [number(generator) for _ in owners]
    questions = []
    for chosen in generator.sample(range(len(things)), _fewer(asked, _VALUES, things)):
        needs = tuple(i for i, owner in enumerate(owners) if owner == chosen)
        text = f"what are all codes of the {things[chosen]}, in the order of the text?"
        questions.append(Question(text, ", ".join(values[i] for i in needs), needs))
    return Plan(
        [f"One code of the {things[owner]} is {value}." for owner, value in zip(owners, values)],
        questions,
    )


def _query(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """One question that asks for several things."""
    plan = _number(facts, 0, generator, held_out)
    things = [fact.removeprefix("The code of the ").split(" is ")[0] for fact in plan.facts]
    values = [fact.removesuffix(".").split(" is ")[1] for fact in plan.facts]
    chosen = generator.sample(range(facts), _KEYS * _fewer(asked, _KEYS, plan.facts[::_KEYS]))
    for first in range(0, len(chosen), _KEYS):
        needs = tuple(chosen[first : first + _KEYS])
        *most, last = (f"the {things[i]}" for i in needs)
        text = f"what are the codes of {', '.join(most)} and {last}?"
        plan.questions.append(Question(text, ", ".join(values[i] for i in needs), needs))
    return plan


def _paraphrase(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """The question calls the thing, and what is asked for, by other words than the fact.

    Where there are more facts than pairs, the others are decoys: facts of the same form about
    things that nobody asks for.
    """
    table = HELD_OUT_PAIRS if held_out else TRAIN_PAIRS
    pairs = generator.sample(table, min(facts, len(table)))
    values = [number(generator) for _ in pairs]
    texts = [f"The code of the {thing} is {value}." for (thing, _), value in zip(pairs, values)]
    decoys = generator.sample(THINGS, facts - len(pairs))
    texts += [f"The code of the {thing} is {number(generator)}." for thing in decoys]
    order = list(range(len(pairs))) if not decoys else generator.sample(range(facts), facts)
    return Plan(
        [texts[i] for i in order],
        [
            Question(generator.choice(_ASKING).format(pairs[i][1]), values[i], (order.index(i),))
            for i in generator.sample(range(len(pairs)), min(asked, len(pairs)))
        ],
    )


_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _reworded(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """As "paraphrase", and the answer has digits where the fact has words: nothing is copied."""
    plan = _paraphrase(facts, asked, generator, held_out)
    spoken = []
    for fact in plan.facts:
        start, value = fact.removesuffix(".").rsplit(" ", 1)
        spoken.append(f"{start} {' '.join(_DIGITS[int(digit)] for digit in value)}.")
    return Plan(spoken, plan.questions)


def _hops(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """Who owns a thing says one fact; what is asked of the owner says another one."""
    things = generator.sample(THINGS, max(facts // 2, 1))
    people = generator.sample(PEOPLE, len(things))
    values = [number(generator) for _ in things]
    order = _shuffled(range(2 * len(things)), generator)
    texts = [
        *(f"The {thing} belongs to {person}." for thing, person in zip(things, people)),
        *(f"The secret number of {who} is {value}." for who, value in zip(people, values)),
    ]
    return Plan(
        [texts[i] for i in order],
        [
            Question(
                f"what is the secret number of the owner of the {things[i]}?",
                values[i],
                (order.index(i), order.index(i + len(things))),
            )
            for i in generator.sample(range(len(things)), _fewer(asked, 2, things))
        ],
    )


def _tracking(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """Chains of variables, each set to the one before; asked is the value of any of a chain."""
    return _chains(facts, asked, generator, _CHAIN)


def _chain(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """Longer chains, of which the last variable is asked: the value is four steps away."""
    return _chains(facts, asked, generator, _LONG_CHAIN, last=True)


def _chains(
    facts: int, asked: int, generator: random.Random, length: int, last: bool = False
) -> Plan:
    chains = max(facts // length, 1)
    names = variable_names(generator, chains * length)
    values = [number(generator) for _ in range(chains)]
    # Each chain in its order, the chains mixed.
    owners = _shuffled(length * list(range(chains)), generator)
    texts: list[str] = []
    places: list[list[int]] = [[] for _ in range(chains)]
    for chain in owners:
        of_chain, link = names[chain * length : (chain + 1) * length], len(places[chain])
        source = values[chain] if link == 0 else f"VAR {of_chain[link - 1]}"
        texts.append(f"VAR {of_chain[link]} = {source}.")
        places[chain].append(len(texts) - 1)
    questions = []
    for chain in generator.sample(range(chains), _fewer(asked, 2, values)):
        link = length - 1 if last else generator.randrange(length)
        text = f"what is the value of VAR {names[chain * length + link]}?"
        questions.append(Question(text, values[chain], tuple(places[chain][: link + 1])))
    return Plan(texts, questions)


def _frequent(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """The word that a list has most often; needed are the places where it stands."""
    entries = []
    best = {}
    for of_list in _LISTS:
        words: dict[str, None] = {}
        while len(words) < len(_OCCURRENCES):
            words[code_word(generator)] = None
        best[of_list] = next(iter(words))
        for word, times in zip(words, _OCCURRENCES):
            entries += times * [(of_list, word)]
    entries = _shuffled(entries, generator)
    return Plan(
        [f"An entry of the {of_list} list is {word}." for of_list, word in entries],
        [
            Question(
                f"which entry does the {of_list} list have most often?",
                best[of_list],
                tuple(i for i, entry in enumerate(entries) if entry == (of_list, best[of_list])),
            )
            for of_list in _shuffled(_LISTS, generator)
        ],
    )


def _absent(facts: int, asked: int, generator: random.Random, held_out: bool) -> Plan:
    """As "number", but half of the questions are about things of which nothing is said."""
    plan = _single(facts, asked, generator, "number")
    said = {fact.removeprefix("The code of the ").split(" is ")[0] for fact in plan.facts}
    for i in generator.sample(range(asked), (asked + 1) // 2):
        # Each of its two words occurs with another one, as in questions that have an answer.
        thing = generator.choice(THINGS)
        while thing in said:
            thing = generator.choice(THINGS)
        said.add(thing)
        plan.questions[i] = Question(f"what is the code of the {thing}?", NOT_STATED, ())
    return plan


def _shuffled(values: Sequence, generator: random.Random) -> list:
    return generator.sample(list(values), len(values))


def _fewer(asked: int, each: int, of: Sequence) -> int:
    """Questions that each need so many facts, of which there are not more than `of`."""
    return max(min(asked // each, len(of)), 1)


# Name of the task -> (facts, questions, generator, held out) -> plan. "paraphrase" and "reworded"
# have other things where they are held out.
PLANTED: dict[str, Callable[[int, int, random.Random, bool], Plan]] = {
    "number": _number,
    "name": _name,
    "key": _key,
    "values": _values,
    "query": _query,
    "paraphrase": _paraphrase,
    "reworded": _reworded,
    "hops": _hops,
    "tracking": _tracking,
    "chain": _chain,
    "frequent": _frequent,
    "absent": _absent,
}
