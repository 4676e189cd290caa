"""Settings that every Python test shares."""

import contextlib

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "lemo", deadline=None, max_examples=25, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("lemo")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests' tensors live: cpu or cuda")


def pytest_configure(config):
    # A suite that is asked to run on a GPU and finds none has failed; it is not skipped.
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no CUDA GPU was found")


@pytest.fixture(autouse=True)
def device_and_seed(request):
    """Tensors a test makes without naming a device are on the one the suite was asked for."""
    torch.manual_seed(0)
    device = request.config.getoption("--device")
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield
