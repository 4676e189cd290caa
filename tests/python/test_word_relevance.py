"""word_relevance: against sets of words, and what an operator has to pass."""

import random

import pytest
import torch

from lemo import ops, reference
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32

# The host chooses: there is no kernel.
pytestmark = pytest.mark.cpu_only


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
    assert_close_fp32(relevance, reference.word_relevance(torch.tensor(ids), firsts, ends, size))


def test_words_behind_an_answer_and_beside_labels_do_not_count():
    ids = torch.arange(100, 164)
    ids[48:52] = torch.tensor([1, 2, 3, 4])  # the answer, its question in a block with labels
    ids[60:64] = ids[48:52]  # said again behind it
    ids[44:47] = ids[48:51]  # and in the block with its labels
    assert ops.word_relevance(ids, [47], [51], 16)[0].count_nonzero() == 0
    ids[8:12] = ids[48:52]
    relevance = ops.word_relevance(ids, [47], [51], 16)
    assert relevance[0, 0] == 1.0
    # The words around its place stand beside it, and the second step finds them.
    assert relevance[0].nonzero()[:, 0].tolist() == [0, 1]


def test_the_second_step_finds_what_the_answer_does_not_say():
    """The question names a thing, another fact its owner, a third one the owner's number."""
    ids = torch.randint(1000, 2000, (512,), generator=torch.Generator().manual_seed(0))
    ids[::16] = ids[480:500] = 999  # it weighs nothing
    thing, owner, number = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6, 7])
    ids[100:104] = torch.cat((thing, owner))
    ids[304:309] = torch.cat((owner, number))
    ids[500:502] = thing
    ids[505:508] = number
    relevance = ops.word_relevance(ids, [504], [507], 16)[0]
    assert relevance.topk(2).indices.sort().values.tolist() == [100 // 16, 304 // 16]


def test_a_question_is_read_in_front_of_the_header_of_an_answer():
    """Templates write some six tokens between them; nothing of the answer stands in the prompt."""
    ids = torch.arange(1000, 1512)
    question, header = torch.arange(1, 9), torch.arange(11, 17)
    ids[200:208] = question
    ids[:6] = header
    ids[490:498], ids[498:504] = question, header
    relevance = ops.word_relevance(ids, [503], [507], 16)[0]
    asked = relevance[: 490 // 16]
    assert asked.topk(2).indices.tolist() == [200 // 16, 0]


def test_no_answers_and_no_tokens():
    assert ops.word_relevance(torch.arange(40), [], [], 16).shape == (0, 3)
    assert ops.word_relevance(torch.arange(0), [], [], 16).shape == (0, 0)


def test_many_answers_on_several_threads():
    ids = torch.randint(0, 5000, (40000,), generator=torch.Generator().manual_seed(0))
    firsts = list(range(1000, 39000, 90))
    ends = [first + 20 for first in firsts]
    together = ops.word_relevance(ids, firsts, ends, 50)
    for _ in each_number_of_threads(1):
        assert torch.equal(ops.word_relevance(ids, firsts, ends, 50), together)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_size": 0},
            "word_relevance: argument 'block_size': expected from 1 to 2147483647, got 0",
        ),
        (
            {"block_size": 2**63 - 1},
            "word_relevance: argument 'block_size': expected from 1 to 2147483647, "
            "got 9223372036854775807",
        ),
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
