"""Settings that every Python test shares."""

import logging
import os

# Processes that share out the tests also share the cores, as do those that the tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = str(max((os.cpu_count() or 1) // int(workers), 1))
    for library in ("OMP", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", threads)

import hypothesis
import pytest
import torch

import devices

# Inherited by the processes that tests start: a name that is no folder is not looked up on the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# So is where gloo's processes meet, whatever becomes of the machine's name and its network.
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

hypothesis.settings.register_profile(
    "lemo", deadline=None, max_examples=25, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("lemo")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests' tensors live: cpu or cuda")


def pytest_configure(config):
    # A suite that is asked to run on a GPU and finds none has failed; it is not skipped.
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no CUDA GPU was found")
    devices.use(device)


def pytest_collection_modifyitems(config, items):
    # Not skipped: tests of the other device have nothing to say, so they are not in the suite.
    other = "gpu_only" if config.getoption("--device") == "cpu" else "cpu_only"
    dropped = [item for item in items if item.get_closest_marker(other)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker(other)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restore_logging():
    """A command sends lemo's messages to its own screen."""
    logger = logging.getLogger("lemo")
    state = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = state


@pytest.fixture
def script_defaults():
    """torch's default device is the CPU, as in a user's script; a run takes the GPU by itself."""
    with torch.device("cpu"):
        yield
