"""The numbers by which processes compare their batches; test_context_parallel.py has the rest."""

import pytest
import torch

from lemo.distributed.agreement import _of_values, hash_of

pytestmark = pytest.mark.cpu_only


def test_another_tensor_has_another_number():
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    half = torch.tensor([0.25, 0.5])
    different = [
        ids,
        ids.T.contiguous(),
        ids.reshape(3, 2),
        ids.flatten(),
        ids.flip(0),
        ids + 1,
        -ids,
        ids[:1],
        # Sums of values times their places are the same.
        torch.tensor([3, 1]),
        torch.tensor([1, 2]),
        half,
        half.flip(0),
        2 * half,
        torch.tensor([True, False]),
        torch.tensor([False, True]),
    ]
    numbers = {int(_of_values(tensor)) for tensor in different}
    assert len(numbers) == len(different)
    assert {int(_of_values(tensor.clone())) for tensor in different} == numbers
    # Nobody reads how wide a number is.
    assert int(_of_values(ids.int())) == int(_of_values(ids))


def test_a_text_has_the_same_number_in_all_processes():
    """Unlike Python's own hash."""
    assert hash_of("") == 0
    assert hash_of("ab") == 97 * 31 + 98
    assert hash_of("input_ids,labels") != hash_of("labels,input_ids")
    assert 0 <= hash_of("input_ids,labels" * 9) < 2**32
