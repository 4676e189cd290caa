"""Eval mode for a while: which modules were in it before stays as it was."""

import pytest
from torch import nn

from lemo.models.eval_mode import evaluating

pytestmark = pytest.mark.cpu_only


class Noting(nn.Linear):
    """Does more than a mode asks for where it is told one, as layers that merge weights do."""

    told = 0

    def train(self, mode=True):
        self.told += 1
        return super().train(mode)


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_comes_back_in_its_own_mode(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), Noting(2, 2)))
    model[1][0].eval()
    before = modes(model)
    assert {*before} == {True, False}
    try:
        with evaluating(model):
            assert not any(modes(model))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert modes(model) == before
    assert model[1][1].told == 0
