"""linear_cross_entropy: what an operator has to pass, docs/design/testing.md."""

import contextlib
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devices import on_gpu
from lemo import ops, reference
from thread_counts import each_number_of_threads
from tolerances import assert_close_fp32, assert_close_low_precision

IGNORED = -100


def make_inputs(rows, hidden, vocabulary, ignored=0.3, bias=True, dtype=torch.float32):
    """(hidden, weight, bias, labels) with about this share of the labels ignored."""
    labels = torch.randint(vocabulary, (rows,))
    labels[torch.rand(rows) < ignored] = IGNORED
    return (
        torch.randn(rows, hidden, dtype=dtype),
        torch.randn(vocabulary, hidden, dtype=dtype) * hidden**-0.5,
        torch.randn(vocabulary, dtype=dtype) if bias else None,
        labels,
    )


def differentiate(loss, inputs, dtype):
    """(loss, dhidden, dweight[, dbias]) of `loss(hidden, weight, bias, labels)` in `dtype`."""
    *floats, labels = inputs
    leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in floats]
    value = loss(*leaves, labels)
    return value, *torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])


def of_ops(**settings):
    def loss(hidden, weight, bias, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, bias, **settings)

    return loss


def of_reference(divisor=None):
    def loss(hidden, weight, bias, labels):
        total, count = reference.linear_cross_entropy(hidden, weight, bias, labels, IGNORED)
        return total / (max(int(count), 1) if divisor is None else divisor)

    return loss


@given(
    rows=st.integers(0, 40),
    hidden=st.integers(1, 33),
    vocabulary=st.integers(2, 70),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    bias=st.booleans(),
    chunk_rows=st.sampled_from([None, 1, 7, 100]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_match_the_oracle(
    rows, hidden, vocabulary, ignored, bias, chunk_rows, seed
):
    torch.manual_seed(seed)
    inputs = make_inputs(rows, hidden, vocabulary, ignored, bias)
    results = differentiate(of_ops(chunk_rows=chunk_rows), inputs, torch.float32)
    expected = differentiate(of_reference(), inputs, torch.float64)
    for name, result, right in zip(("loss", "dhidden", "dweight", "dbias"), results, expected):
        assert_close_fp32(result, right, name)


def test_one_word_costs_nothing():
    for result in differentiate(of_ops(), make_inputs(5, 8, 1, ignored=0), torch.float32):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("bias", [True, False])
def test_several_panels(bias):
    """More words, rows and hidden units than one panel of the kernel, in two ragged segments."""
    inputs = make_inputs(430, 150, 1100, bias=bias)
    results = differentiate(of_ops(chunk_rows=270), inputs, torch.float32)
    expected = differentiate(of_reference(), inputs, torch.float64)
    for name, result, right in zip(("loss", "dhidden", "dweight", "dbias"), results, expected):
        assert_close_fp32(result, right, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    inputs = make_inputs(90, 48, 300, dtype=dtype)
    results = differentiate(of_ops(chunk_rows=32), inputs, dtype)
    plain = differentiate(of_reference(), inputs, dtype)
    expected = differentiate(of_reference(), inputs, torch.float32)
    assert results[0].dtype == torch.float32
    assert all(grad.dtype == dtype for grad in results[1:])
    for name, result, rough, right in zip(("loss", "dh", "dw", "db"), results, plain, expected):
        assert_close_low_precision(result, rough.to(result.dtype), right, name)


def test_mixed_dtypes():
    hidden, weight, bias, labels = make_inputs(20, 16, 50)
    low = (hidden.bfloat16(), weight.float(), bias.half(), labels)
    leaves = [tensor.clone().requires_grad_() for tensor in low[:3]]
    if on_gpu():
        expected = r"'weight': expected the dtype of 'hidden' \(bfloat16\) .* got float32"
        with pytest.raises(NotImplementedError, match=expected):
            ops.linear_cross_entropy(*leaves[:2], labels, leaves[2])
        return
    loss = ops.linear_cross_entropy(*leaves[:2], labels, leaves[2])
    loss.backward()
    expected = differentiate(of_reference(), low, torch.float64)
    assert_close_fp32(loss, expected[0])
    assert_close_fp32(leaves[1].grad, expected[2])
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float16]


def test_bias_of_another_dtype():
    hidden, weight, bias, labels = make_inputs(20, 16, 50)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias.half())]
    loss = ops.linear_cross_entropy(*leaves[:2], labels, leaves[2], chunk_rows=8)
    loss.backward()
    expected = differentiate(of_reference(), (*leaves, labels), torch.float64)
    for result, right in zip((loss, hidden.grad, weight.grad), expected):
        assert_close_fp32(result, right)
    plain = differentiate(of_reference(), (*leaves, labels), torch.float16)[3]
    assert_close_low_precision(leaves[2].grad, plain, expected[3])


def test_frozen_weight_saves_its_gradient():
    hidden, weight, _, labels = make_inputs(20, 16, 50)
    hidden.requires_grad_()
    ops.linear_cross_entropy(hidden, weight, labels).backward()
    expected = differentiate(of_reference(), (hidden, weight, None, labels), torch.float64)
    assert_close_fp32(hidden.grad, expected[1])
    *_, dweight, dbias = torch.ops.lemo.linear_cross_entropy(
        hidden.detach(), weight, None, labels, IGNORED, 8, True, False
    )
    assert dweight.numel() == dbias.numel() == 0


@pytest.mark.parametrize(
    "divisor", [7, 2.5, torch.tensor(7), torch.tensor(2.5), torch.tensor([3])], ids=str
)
def test_divisor(divisor):
    inputs = make_inputs(12, 8, 20)
    results = differentiate(of_ops(divisor=divisor), inputs, torch.float32)
    expected = differentiate(of_reference(float(divisor)), inputs, torch.float64)
    for result, right in zip(results, expected):
        assert_close_fp32(result, right)


@pytest.mark.parametrize("divisor", [None, 3, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counts(rows, divisor):
    inputs = make_inputs(rows, 8, 20, ignored=1.1)
    for result in differentiate(of_ops(divisor=divisor), inputs, torch.float32):
        assert torch.equal(result, torch.zeros_like(result))


def test_ignored_rows_get_no_gradient_and_their_hidden_states_do_not_matter():
    hidden, weight, bias, labels = make_inputs(30, 8, 20)
    ignored = labels == IGNORED
    hidden[ignored] = float("nan")
    loss, dhidden, dweight, dbias = differentiate(
        of_ops(), (hidden, weight, bias, labels), torch.float32
    )
    assert torch.equal(dhidden[ignored], torch.zeros_like(dhidden[ignored]))
    expected = differentiate(
        of_reference(), (hidden[~ignored], weight, bias, labels[~ignored]), torch.float64
    )
    for result, right in zip((loss, dhidden[~ignored], dweight, dbias), expected):
        assert_close_fp32(result, right)


def test_another_ignore_index_and_label_zero():
    hidden, weight, bias, labels = make_inputs(15, 8, 20, ignored=0)
    labels[:3] = 19
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, ignore_index=19)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels, ignore_index=19)
    assert_close_fp32(loss, expected)


def test_large_logits_do_not_overflow():
    hidden, weight, bias, labels = make_inputs(15, 8, 20)
    inputs = (hidden * 100, weight, bias, labels)
    loss = of_ops()(*inputs)
    assert_close_fp32(loss, of_reference()(*(t.double() for t in inputs[:3]), labels))


def test_backward_twice():
    hidden, weight, _, labels = make_inputs(15, 8, 20)
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels) * 3
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


def test_opcheck():
    hidden, weight, bias, labels = make_inputs(9, 6, 11)
    frozen = (hidden, weight, bias, labels, IGNORED, 4, True, False)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    samples = [
        frozen,
        (leaves[0], *frozen[1:]),
        (*frozen[:-2], False, False),
        (*leaves, labels, IGNORED, 4, True, True),
        (*leaves[:2], None, labels, IGNORED, 4, True, True),
        (hidden, *leaves[1:], labels, IGNORED, 4, False, True),
    ]
    for sample in samples:
        torch.library.opcheck(torch.ops.lemo.linear_cross_entropy.default, sample)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck asks for fp64
def test_gradcheck_by_central_differences():
    """The op runs in fp32: steps of 1e-2 leave differences good to about 1e-3."""
    hidden, weight, bias, labels = make_inputs(5, 3, 7)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *floats: of_ops(chunk_rows=2)(*floats, labels),
        leaves,
        eps=1e-2,
        atol=2e-3,
        rtol=1e-2,
        nondet_tol=0.0,
    )


def test_evaluation_computes_no_gradient(monkeypatch):
    inputs = make_inputs(20, 16, 50)
    results = []

    def keep(op, *arguments):
        results.append(op(*arguments))
        return results[-1]

    module = importlib.import_module("lemo.ops.linear_cross_entropy")  # the name is the function's
    monkeypatch.setattr(module, "call", keep)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    with torch.no_grad():
        loss = of_ops(chunk_rows=8)(*leaves, inputs[3])
    assert [gradient.numel() for gradient in results[0][2:]] == [0, 0, 0]
    assert_close_fp32(loss, of_reference()(*(t.double() for t in leaves), inputs[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_repeats_are_bit_equal(dtype):
    inputs = make_inputs(50, 24, 130)
    first, *others = (differentiate(of_ops(chunk_rows=16), inputs, dtype) for _ in range(100))
    for run in others:
        assert all(torch.equal(a, b) for a, b in zip(run, first))


def test_repeats_are_bit_equal_whatever_the_threads():
    inputs = make_inputs(300, 140, 1100)
    runs = [
        differentiate(of_ops(chunk_rows=128), inputs, torch.float32)
        for _ in each_number_of_threads(1, 2, 2, 3, 1)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"hidden": torch.randn(6)}, ValueError, "'hidden': expected 2 dimension"),
        (
            {"hidden": torch.ones(6, 4).long()},
            TypeError,
            "'hidden': expected float32, .* got int64",
        ),
        ({"weight": torch.randn(9)}, ValueError, "'weight': expected 2 dimension"),
        ({"weight": torch.randn(9, 5)}, ValueError, "'weight': expected size 4 in dimension 1"),
        (
            {"weight": torch.randn(0, 4)},
            ValueError,
            "'weight': expected a vocabulary of at least 1",
        ),
        ({"bias": torch.randn(8)}, ValueError, "'bias': expected size 9 in dimension 0"),
        ({"bias": torch.randn(9, 1)}, ValueError, "'bias': expected 1 dimension"),
        ({"labels": torch.zeros(5).long()}, ValueError, "'labels': expected size 6 in dimension 0"),
        ({"labels": torch.zeros(6).int()}, TypeError, "'labels': expected int64, got int32"),
        ({"chunk_rows": 0}, ValueError, "'chunk_rows': expected at least 1, got 0"),
        ({"divisor": 0}, ValueError, "'divisor': expected a positive number, .* got 0"),
        ({"divisor": torch.ones(2)}, ValueError, r"'divisor': expected one number, got .*\[2\]"),
        (
            {"divisor": float("nan")},
            ValueError,
            "'divisor': expected a positive number, .* got nan",
        ),
    ],
)
def test_bad_inputs_name_the_argument(change, exception, message):
    arguments = {
        "hidden": torch.randn(6, 4),
        "weight": torch.randn(9, 4),
        "labels": torch.tensor([0, 1, 8, IGNORED, 3, 4]),
    }
    with pytest.raises(exception, match=message):
        ops.linear_cross_entropy(**(arguments | change))


@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_a_label_that_is_no_word(label):
    """It raises where labels can be read; a GPU's cannot, and the loss is NaN there."""
    hidden, weight, bias, labels = make_inputs(6, 4, 9, ignored=0)
    labels[2] = label
    if not on_gpu():
        expected = rf"expected labels in \[0, 9\) or ignore_index -100, got {label} at index 2"
        with pytest.raises(ValueError, match=expected):
            ops.linear_cross_entropy(hidden, weight, labels, bias)
        return
    loss, dhidden, *others = differentiate(
        of_ops(divisor=1), (hidden, weight, bias, labels), torch.float32
    )
    assert all(result.isnan().all() for result in (loss, dhidden[2], *others))
    used = torch.arange(6) != 2
    right = differentiate(
        of_reference(1), (hidden[used], weight, bias, labels[used]), torch.float64
    )
    assert_close_fp32(dhidden[used], right[1])


@contextlib.contextmanager
def no_synchronisation():
    """An error where torch waits for the GPU; on the CPU there is nothing to wait for."""
    if not on_gpu():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_never_waits():
    hidden, weight, bias, labels = make_inputs(30, 16, 50)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    with no_synchronisation():
        ops.linear_cross_entropy(*leaves[:2], labels, bias, chunk_rows=8).backward()
    expected = differentiate(of_reference(), (*leaves, labels), torch.float64)
    for leaf, right in zip(leaves, expected[1:]):
        assert_close_fp32(leaf.grad, right)


@pytest.mark.parametrize("missing", ["hidden", "weight"])
def test_gradient_that_was_not_asked_for(missing):
    hidden, weight, _, labels = make_inputs(6, 4, 9)
    {"hidden": hidden, "weight": weight}[missing].requires_grad_()
    loss, *_ = torch.ops.lemo.linear_cross_entropy(
        hidden, weight, None, labels, IGNORED, 4, missing != "hidden", missing != "weight"
    )
    with pytest.raises(ValueError, match=f"argument '{missing}_grad': expected True"):
        loss.backward()


@pytest.mark.gpu_only
def test_a_chunk_of_more_than_2_to_the_31_logits():
    rows, hidden, vocabulary = 20000, 64, 128256
    states, weight, _, labels = make_inputs(
        rows, hidden, vocabulary, ignored=0.0, bias=False, dtype=torch.bfloat16
    )
    states.requires_grad_()
    loss = ops.linear_cross_entropy(states, weight, labels, chunk_rows=rows, divisor=1)
    (gradient,) = torch.autograd.grad(loss, states)
    total = torch.zeros(())
    for part in torch.arange(rows).split(1000):
        leaf = states[part].detach().float().requires_grad_()
        right, _ = reference.linear_cross_entropy(leaf, weight.float(), None, labels[part], IGNORED)
        (truth,) = torch.autograd.grad(right, leaf)
        apart = (gradient[part].float() - truth).norm() / truth.norm()
        assert apart < 1e-2, f"rows from {part[0].item()}"
        total += right.detach()
    assert abs(loss.detach() - total) < 1e-4 * total
