"""Settings that every Python test shares."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "lemo", deadline=None, max_examples=25, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("lemo")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
