"""Groups of processes by themselves; test_context_parallel.py tests what they compute."""

import pytest

import group_cases
import lemo
from processes import run

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize(
    "check",
    [
        group_cases.processes_without_this_one_are_refused,
        group_cases.arguments_are_compared_by_name_and_in_any_order,
        group_cases.weights_that_differ_little_are_named,
        group_cases.packed_weights_are_compared_by_their_bytes,
        group_cases.values_are_handed_round_and_stay_as_they_are,
        group_cases.one_context_serves_two_models,
        group_cases.a_copied_model_goes_on_behind_the_end_of_its_original,
        group_cases.the_mean_of_a_gradient_is_taken_once,
        group_cases.a_parameter_without_a_gradient_has_no_mean,
        group_cases.sharded_weights_are_refused_where_lemo_takes_the_mean,
    ],
    ids=lambda check: check.__name__,
)
def test_group(check, tmp_path):
    run(2, check, tmp_path)


def test_a_process_alone_has_no_group():
    with pytest.raises(RuntimeError, match="expected torch.distributed to be initialised, got no"):
        lemo.ContextParallel()
