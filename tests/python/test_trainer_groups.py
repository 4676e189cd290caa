"""What lemo changes of a trainer whose processes share out rows, and changes back.

The trainers are stand-ins; test_context_trainers.py trains with real ones.
"""

import sys
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from lemo.models import trainer_groups
from lemo.models.trainer_groups import check_alone, share_out

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    """Groups are lists of ranks here."""
    monkeypatch.setattr(trainer_groups.dist, "get_process_group_ranks", lambda group: group)


def trainer_of(ranks):
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(cp_size=len(ranks)),
        torch_device_mesh={"cp": SimpleNamespace(get_group=lambda: ranks)},
    )
    args = SimpleNamespace(average_tokens_across_devices=True)
    return SimpleNamespace(accelerator=accelerator, args=args, _tp_size=3)


def context_of(ranks):
    context = SimpleNamespace(size=len(ranks), averages_gradients=True, group=ranks, stopped=0)
    context.stop_averaging = lambda: setattr(context, "stopped", context.stopped + 1)
    return context


def test_all_that_is_changed_is_changed_back():
    trainer, context = trainer_of([2, 3]), context_of([3, 2])
    before = vars(trainer).copy(), vars(trainer.accelerator).copy()
    undo = share_out(trainer, context)
    assert (context.averages_gradients, context.stopped) == (False, 1)
    # By which TRL divides its tokens, which every process of the group counts.
    assert trainer._tp_size == 3 * 2
    undo()
    assert context.averages_gradients
    assert (vars(trainer), vars(trainer.accelerator)) == before


def test_what_others_have_put_in_its_place_stays():
    trainer, theirs = trainer_of([0, 1]), object()
    undo = share_out(trainer, context_of([0, 1]))
    trainer.accelerator._prepare_cp = theirs
    undo()
    assert trainer.accelerator._prepare_cp is theirs


def test_another_group_of_as_many_processes_is_refused():
    wanted = r"expected the group .* that lemo.enable was given, \[2, 3\], got \[0, 1\]"
    with pytest.raises(ValueError, match=wanted):
        share_out(trainer_of([1, 0]), context_of([2, 3]))


def test_a_group_of_which_lemo_was_not_told_is_refused(monkeypatch):
    trainer = trainer_of([0, 1])
    told = {"parallelism_config": trainer.accelerator.parallelism_config}
    monkeypatch.setattr(AcceleratorState, "_shared_state", told)
    with pytest.raises(ValueError, match="expected cp_size 1, got 2: accelerate would give"):
        share_out(trainer, None)
    monkeypatch.delitem(sys.modules, "accelerate")
    check_alone()  # nobody can have told it anything
