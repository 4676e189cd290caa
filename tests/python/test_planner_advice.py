"""What is said to make a step fit, against a search of all shares and of the host's memory."""

import re
from dataclasses import replace

import pytest

import lemo
from lemo.planner.plan import NOMINAL
from lemo.planner.request import Request
from lemo.planner.shape import Adapters, ModelShape

pytestmark = pytest.mark.cpu_only

SHAPE = ModelShape(16, 2048, 8192, 32, 8, 64, 128256)


def request(**settings):
    more = {name: settings.pop(name) for name in ("batch", "cuda") if name in settings}
    elimination = lemo.LemoConfig(**settings).resolved(answers=False)
    return Request(SHAPE, Adapters(), elimination, NOMINAL, **more)


def changed(asked, **settings):
    return replace(asked, elimination=asked.elimination.model_copy(update=settings))


@pytest.mark.parametrize("tokens", [65536, 200000])
@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 1.0},
        {"keep": 0.5, "recompute": "none"},
        {"keep": 0.5, "recompute": "none", "host_memory": 6.0},
        {"keep": 0.25, "host_memory": 3.0},
        {"keep": 0.75, "recompute": "none", "offload": 0.5, "host_memory": 512.0},
        {"keep": 0.75, "recompute": "none", "cuda": False},
    ],
    ids=str,
)
def test_no_less_would_do(settings, tokens):
    asked = request(**settings)
    planner = asked.planner(tokens)
    limit = round(0.75 * planner.least(asked.modes))

    def fits(one):
        return one.planner(tokens).fits(limit, one.modes)

    assert not fits(asked)
    said = asked.advice(tokens, limit)
    shares = [part / 32 for part in range(1, 32) if part / 32 < asked.elimination.keep]
    fitting = [keep for keep in shares if fits(changed(asked, keep=keep, block_size=64))]
    found = re.search(r"keep ([\d.]+) or less", said)
    assert (found and float(found[1])) == (pytest.approx(max(fitting)) if fitting else None)
    found, least = re.search(r"\(host_memory (\d+)\)", said), asked.elimination.host_memory
    if asked.elimination.offload != "auto" or not asked.cuda:
        assert found is None
    elif found is None:
        assert not fits(changed(asked, host_memory=1024.0))
    else:
        host = int(found[1])
        assert host > least
        assert fits(changed(asked, host_memory=float(host)))
        assert host - 1 <= least or not fits(changed(asked, host_memory=host - 1.0))
    assert f"; at most {asked.longest(limit)} tokens" in said
    assert ("recompute auto" in said) == (asked.modes is not None and planner.fits(limit))
