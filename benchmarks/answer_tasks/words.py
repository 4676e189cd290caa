"""Words that planted facts are made of."""

from __future__ import annotations

import random
import string

__all__ = [
    "PEOPLE",
    "THINGS",
    "code_word",
    "hexadecimal_key",
    "number",
    "variable_names",
]

_ADJECTIVES = """
amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd plain quiet
rusty silent tidy upper vivid wooden yellow
"""
_NOUNS = """
anchor basket candle drawer engine ferry garden harbor island jacket kettle ladder mirror needle
orchard pencil quarry ribbon saddle tunnel urn valley window yard
"""
# Things share words, so that one has to read the whole name.
THINGS = [f"{adjective} {noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]

_FIRST_NAMES = """
Agnes Bruno Clara Dennis Edith Felix Greta Harold Irene Jonas Karla Leo Mabel Nora Oscar Paula
Quentin Rosa Simon Thelma Ursula Victor Wanda Xavier Yvonne Zachary
"""
_LAST_NAMES = """
Ashby Barlow Conway Dalton Ellery Farrow Grant Hobart Ingram Jarvis Keaton Lowell Mercer Norton
Osborn Prentice Quincy Ramsey Sutton Thorne Upton Vaughn Weller Yardley
"""
PEOPLE = [f"{first} {last}" for first in _FIRST_NAMES.split() for last in _LAST_NAMES.split()]


def number(generator: random.Random) -> str:
    """Six digits."""
    return str(generator.randrange(10**5, 10**6))


def hexadecimal_key(generator: random.Random) -> str:
    """The first three groups of a UUID: 16 hexadecimal digits."""
    digits = f"{generator.getrandbits(64):016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:]}"


def code_word(generator: random.Random) -> str:
    """Three syllables that mean nothing."""
    return "".join(generator.choice("bdfgklmnprstvz") + generator.choice("aeiou") for _ in range(3))


def variable_names(generator: random.Random, count: int) -> list[str]:
    """Different names of three capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(generator.choices(string.ascii_uppercase, k=3))] = None
    return list(names)
