"""word_relevance: against sets of words, and what an operator has to pass."""

import math
import random

import pytest
import torch

from lemo import ops
from tolerances import assert_close_fp32

# The host chooses: there is no kernel.
pytestmark = pytest.mark.cpu_only

BEFORE, PLACE, NEAR, AROUND = 8, 16, 32, (24, 8)


def by_sets(ids, answers, block_size):
    """The same from Python's sets, window by window; answers are (first row, end row)."""
    count, blocks = len(ids), -(-len(ids) // block_size)
    occupied = {row // block_size for first, end in answers for row in range(first, end)}
    of_blocks = [set(ids[b * block_size : (b + 1) * block_size]) for b in range(blocks)]
    in_blocks = {w: math.log(blocks / sum(w in each for each in of_blocks)) for w in set(ids)}
    in_tokens = {w: math.log(count / ids.count(w)) for w in set(ids)}

    def seen(token, first):
        return token <= first and token // block_size not in occupied

    def window(end, size, first):
        """The different words that count among the tokens up to `end`."""
        return {ids[t] for t in range(max(end + 1 - size, 0), end + 1) if seen(t, first)}

    def divided(scores):
        total = sum(scores)
        return [score / total for score in scores] if total > 0 else scores

    result = []
    for first, end in answers:
        own = set(ids[max(first + 1 - BEFORE, 0) : end + 1])
        shared = [
            sum(
                in_blocks[w]
                for w in own & {ids[t] for t in tokens_of(b, block_size, count) if seen(t, first)}
            )
            for b in range(blocks)
        ]
        answer = set(ids[first + 1 : end + 1])

        def weight(end, size, wanted, first=first):
            return sum(in_tokens[w] for w in window(end, size, first) & wanted)

        def weighs(t, wanted, first=first):
            return seen(t, first) and ids[t] in wanted and in_tokens[ids[t]] > 0

        places = [(weight(t, PLACE, answer), -t) for t in range(first + 1) if weighs(t, answer)]
        near = [0.0] * blocks
        if places:
            place = -max(places)[1]
            around = set(ids[max(place + 1 - AROUND[0], 0) : place + 1 + AROUND[1]])
            for b in range(blocks):
                tokens = [t for t in tokens_of(b, block_size, count) if weighs(t, around)]
                near[b] = max((weight(t, NEAR, around) ** 2 for t in tokens), default=0.0)
        result.append([max(pair) for pair in zip(divided(shared), divided(near))])
    return torch.tensor(result)


def tokens_of(block, block_size, count):
    return range(block * block_size, min((block + 1) * block_size, count))


@pytest.mark.parametrize("seed", range(12))
def test_relevance_is_that_of_sets_of_words(seed):
    draw = random.Random(seed)
    count = draw.randrange(120, 400)
    words = draw.choice([30, 200])
    ids = [draw.randrange(words) * draw.choice([1, 1, 7919]) for _ in range(count)]
    answers = [(count - 45, count - 38), (count - 20, count - 12), (count - 2, count - 1)]
    if draw.random() < 0.5:
        answers = [(count // 2, count // 2 + 5), *answers]
    # What the answers say stands somewhere before.
    for first, end in answers:
        place = draw.randrange(first - 20)
        ids[place : place + end - first] = ids[first + 1 : end + 1]
    size = draw.choice([1, 7, 16, 64])
    firsts, ends = zip(*answers)
    relevance = ops.word_relevance(torch.tensor(ids), firsts, ends, size)
    assert relevance.dtype == torch.float32
    assert_close_fp32(relevance, by_sets(ids, answers, size))


def test_words_behind_an_answer_and_beside_labels_do_not_count():
    ids = torch.arange(100, 164)
    ids[40:44] = torch.tensor([1, 2, 3, 4])  # the answer
    ids[60:64] = ids[40:44]  # said again behind it
    ids[36:39] = ids[40:43]  # and in the block with its labels
    assert ops.word_relevance(ids, [39], [43], 8)[0].count_nonzero() == 0
    ids[8:12] = ids[40:44]
    relevance = ops.word_relevance(ids, [39], [43], 8)
    assert relevance[0, 1] == 1.0
    # The words around its place stand beside it, and the second step finds them.
    assert relevance[0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_the_second_step_finds_what_the_answer_does_not_say():
    """The question names a thing, another fact its owner, a third one the owner's number."""
    ids = torch.randint(1000, 2000, (512,), generator=torch.Generator().manual_seed(0))
    thing, owner, number = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6, 7])
    ids[100:104] = torch.cat((thing, owner))
    ids[304:309] = torch.cat((owner, number))
    ids[500:502] = thing
    ids[505:508] = number
    relevance = ops.word_relevance(ids, [504], [507], 16)[0]
    assert relevance.topk(2).indices.sort().values.tolist() == [100 // 16, 304 // 16]


def test_no_answers_and_no_tokens():
    assert ops.word_relevance(torch.arange(40), [], [], 16).shape == (0, 3)
    assert ops.word_relevance(torch.arange(0), [], [], 16).shape == (0, 0)


def test_many_answers_on_several_threads():
    ids = torch.randint(0, 5000, (40000,), generator=torch.Generator().manual_seed(0))
    firsts = list(range(1000, 39000, 90))
    ends = [first + 20 for first in firsts]
    together = ops.word_relevance(ids, firsts, ends, 50)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.word_relevance(ids, firsts, ends, 50), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "word_relevance: argument 'block_size': expected at least 1, got 0"),
        ({"firsts": [-1]}, "'firsts': expected rows of at least 0, got -1"),
        ({"ends": [5]}, "'ends': expected rows behind those of firsts"),
        ({"ends": [41]}, "'ends': expected rows behind those of firsts"),
        ({"firsts": [5, 6]}, "'ends': "),
        ({"ids": torch.full((40,), -3)}, "'ids': expected at least 0, got -3"),
        ({"ids": torch.zeros(4, 10, dtype=torch.int64)}, "'ids': expected 1 dim"),
    ],
)
def test_hostile_arguments_are_named(change, message):
    arguments = {"ids": torch.arange(40), "firsts": [5], "ends": [9], "block_size": 8}
    with pytest.raises(ValueError, match=message):
        ops.word_relevance(**(arguments | change))
    with pytest.raises(TypeError, match="'ids': expected"):
        ops.word_relevance(**(arguments | {"ids": torch.ones(40)}))


def test_the_operator_passes_torchs_own_checks():
    sample = torch.arange(40) % 7, torch.tensor([20, 30]), torch.tensor([24, 39]), 8
    torch.library.opcheck(torch.ops.lemo.word_relevance.default, sample)
