"""The comparison with other methods, as far as it goes on the CPU, and its page."""

import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import comparison
import comparison_longest
import comparison_page
from common import processes
from common.models import config_of_shape, random_llama, random_llama_in_4_bits
from contenders import CONTENDERS, POSE_WINDOW, shifted_groups

TOKENS = 256
# Transformers' offload needs pinned memory, and so a GPU.
CPU = ("plain", "checkpointing", "selective", "s2", "s2-plain", "pose")
CPU += tuple(name for name in CONTENDERS if name.startswith("lemo"))
# TRL's fused head is a Triton kernel where there is Triton.
CPU += () if importlib.util.find_spec("triton") else ("trl",)
EXACT = [name for name in CPU if CONTENDERS[name].exact]


def built(name, tokens=TOKENS):
    return CONTENDERS[name].build(config_of_shape("tiny", tokens), "cpu", tokens)


def trained(name, tokens=TOKENS, seen=None):
    """Loss and gradients of the adapters, whose second halves are not zero."""
    made = built(name, tokens)
    parameters = {n: p for n, p in made.model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).bfloat16()
    ids = torch.randint(0, 512, (1, seen or tokens), generator=generator)
    with made.around():
        loss = made.loss(ids)
        loss.backward()
    return ids, made, loss.item(), torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.fixture(scope="module")
def plain():
    return trained("plain")


class OtherRotations(nn.Module):
    """Rotary frequencies as those that Unsloth puts in the place of Transformers': on the CPU, with
    other arguments, and tables of the dtype that is the default while they are made."""

    def __init__(self, dim=None, base=10000.0, config=None):
        super().__init__()
        if config is not None:
            dim, base = config.head_dim, config.rope_parameters["rope_theta"]
        powers = torch.arange(0, dim, 2, device="cpu").float() / dim
        self.register_buffer("inv_freq", base**-powers, persistent=False)
        self.tables = torch.get_default_dtype()


@pytest.mark.cpu_only
@pytest.mark.parametrize("rotations", [LlamaRotaryEmbedding, OtherRotations])
def test_a_model_in_4_bits_has_all_but_its_linear_layers_as_the_other(rotations, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", rotations)
    config = config_of_shape("tiny", TOKENS)
    plain, made = (make(config, "cpu") for make in (random_llama, random_llama_in_4_bits))
    assert type(made.model.rotary_emb) is rotations
    tables = (getattr(model.model.rotary_emb, "tables", None) for model in (plain, made))
    assert next(tables) == next(tables)
    kept = dict((*plain.named_parameters(), *plain.named_buffers()))
    found = dict((*made.named_parameters(), *made.named_buffers()))
    assert found.keys() == kept.keys()
    for name, tensor in found.items():
        assert tensor.device.type == "cpu", name
        if "_proj" not in name:
            assert (tensor.shape, tensor.dtype) == (kept[name].shape, kept[name].dtype), name
        if "inv_freq" in name:
            assert torch.equal(tensor, kept[name])


@pytest.mark.cpu_only
def test_the_loss_is_the_mean_over_all_next_tokens(plain):
    ids, made, loss, gradient = plain
    with torch.no_grad():
        logits = made.model(input_ids=ids).logits[0, :-1].float()
    assert loss == pytest.approx(cross_entropy(logits, ids[0, 1:]).item(), rel=1e-3)
    assert gradient.abs().max() > 0


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", EXACT)
def test_exact_contenders_compute_what_dense_lora_computes(name, plain):
    _, _, loss, gradient = plain
    _, _, found, other = trained(name)
    assert found == pytest.approx(loss, rel=2e-3)
    assert (other - gradient).norm() < 0.02 * gradient.norm()


def dense_attention(q, k, v, softmax_scale, causal, return_lse):
    """As flash-attn-4 has it: [B, S, H, D], and the logarithms of the sums [B, H, S]."""
    assert causal
    assert return_lse
    q, k, v = (each.transpose(1, 2).float() for each in (q, k, v))
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    scores = (softmax_scale * q @ k.mT).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).bfloat16(), scores.logsumexp(-1)


def dense_attention_backward(q, k, v, out, dout, lse, softmax_scale, causal):
    assert causal
    key_heads = k.shape[2]
    q, k, v, out, dout = (each.transpose(1, 2).float() for each in (q, k, v, out, dout))
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    weights = (softmax_scale * q @ k.mT - lse[..., None]).exp().tril()
    slopes = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * softmax_scale
    dk, dv = (
        each.unflatten(1, (key_heads, -1)).sum(2) for each in (slopes.mT @ q, weights.mT @ dout)
    )
    return tuple(each.transpose(1, 2).bfloat16() for each in (slopes @ k, dk, dv))


@pytest.mark.cpu_only
def test_attention_of_another_package_is_called_and_differentiated(plain, monkeypatch):
    """flash-attn-4 itself needs a GPU."""
    interface = SimpleNamespace(
        _flash_attn_fwd=dense_attention, _flash_attn_bwd=dense_attention_backward
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(interface=interface))
    _, _, loss, gradient = plain
    _, _, found, other = trained("fa4")
    assert found == pytest.approx(loss, rel=2e-3)
    assert (other - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", [name for name in CPU if name not in EXACT])
def test_the_others_train_something_else(name, plain):
    _, _, _, gradient = plain
    _, _, found, other = trained(name, TOKENS * 2, seen=TOKENS if name == "pose" else None)
    assert 5 < found < 8
    assert other.norm() > 0.1 * gradient.norm()


@pytest.mark.cpu_only
def test_positions_of_pose_end_where_the_long_context_ends():
    made = built("pose", 4 * TOKENS)
    rotary = made.model.get_base_model().model.rotary_emb
    x, ids = torch.zeros(1, TOKENS, 4), torch.arange(TOKENS)[None]
    found = torch.stack(rotary(x, ids))
    far = torch.cat((ids[:, : TOKENS // 2], ids[:, TOKENS // 2 :] + 3 * TOKENS), 1)
    expected = torch.stack(
        built("plain", 4 * TOKENS).model.get_base_model().model.rotary_emb(x, far)
    )
    assert torch.equal(found, expected)


@pytest.mark.cpu_only
def test_shifted_groups_are_those_of_lemos_reference():
    from lemo.reference import segment_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 32, 8) for heads in (4, 2, 2))
    cu = torch.tensor([0, 32], dtype=torch.int32)
    rows = [each[0].transpose(0, 1).contiguous() for each in (q, k, v)]
    expected = segment_attention(*rows, cu, cu, None, None, 8**-0.5, 0, 8)[0]
    found = shifted_groups(q, k, v, 4, None)[0].transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- the process that drives them


class FakeWorker:
    """Answers at once: `seconds` a step for 256 tokens, by the square of the length."""

    started: ClassVar[list] = []
    failures: ClassVar[dict] = {}

    def __init__(self, _script, settings, _environment, _log):
        self.settings = settings
        self.started.append((settings["contender"], settings["tokens"]))

    def ask(self, _question, _seconds):
        job = self.settings["contender"], self.settings["tokens"]
        if job in self.failures:
            return {"failed": self.failures[job]}
        step = (self.settings["tokens"] / 256) ** 2
        memory = {"peak_gib": 1.0, "host_gib": 2.0, "pinned_gib": 0.0}
        return {"step_s": step, "range": [step] * 2, "loss": 6.0, **memory}

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def run(monkeypatch, output, *arguments, failures=None):
    """(measured jobs, rows) of a run with workers that answer at once."""
    monkeypatch.setattr(comparison, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "started", [])
    monkeypatch.setattr(FakeWorker, "failures", failures or {})
    given = ["--device", "cpu", "--shape", "tiny", "--commit", "abc", "--output", str(output)]
    given += ["--logs", str(output.parent / "logs"), *arguments]
    comparison.Comparison(comparison.parse_arguments(given)).run()
    return FakeWorker.started, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.cpu_only
def test_rows_are_appended_and_not_measured_again(monkeypatch, tmp_path):
    output = tmp_path / "rows.jsonl"
    arguments = ("--only", "plain", "lemo-0.5", "--lengths", "256", "512")
    started, rows = run(monkeypatch, output, *arguments)
    assert [(row["contender"], row["tokens"]) for row in rows] == started
    assert started == [("plain", 256), ("lemo-0.5", 256), ("plain", 512), ("lemo-0.5", 512)]
    fields = {"bench", "contender", "tokens", "step_s", "range", "peak_gib", "host_gib", "keep"}
    fields |= {"gpu", "torch", "commit", "date"}
    assert all(fields <= set(row) for row in rows)
    assert [row["keep"] for row in rows[:2]] == [1.0, 0.5]
    assert rows[1]["settings"] == {"keep": 0.5, "recompute": "layer"}
    started, rows = run(monkeypatch, output, *arguments, "--lengths", "512", "1024")
    assert started == [("plain", 1024), ("lemo-0.5", 1024)]
    started, rows = run(monkeypatch, output, *arguments[:-1], "--again")
    assert len(rows) == 8


@pytest.mark.cpu_only
def test_a_contender_may_be_bound_to_a_length(monkeypatch, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = ("--only", "lemo-0.5@512", "plain", "--lengths", "256", "512")
    started, _ = run(monkeypatch, output, *arguments)
    assert started == [("plain", 256), ("lemo-0.5", 512), ("plain", 512)]
    for wrong in ("plain@128", "nobody"):
        given = ["--only", wrong, "--lengths", "256"]
        with pytest.raises(SystemExit):
            comparison.parse_arguments(given)
        assert f"got {wrong}" in capsys.readouterr().err


@pytest.mark.cpu_only
def test_longer_windows_are_left_out_after_a_failure_and_beyond_the_limit(
    monkeypatch, tmp_path, capsys
):
    _, rows = run(
        monkeypatch,
        tmp_path / "rows.jsonl",
        *("--only", "plain", "offload", "sparselora", "pose", "liger"),
        *("--lengths", "256", "512", "1024", "--step-limit", "5"),
        failures={("plain", 512): "out of memory", ("liger", 256): "ImportError: no liger"},
    )
    measured = [(row["contender"], row["tokens"], row.get("failed")) for row in rows]
    assert measured == [
        ("plain", 256, None),
        ("offload", 256, None),
        ("pose", 256, None),
        ("liger", 256, "ImportError: no liger"),
        ("plain", 512, "out of memory"),
        ("offload", 512, None),
        ("pose", 512, None),
        ("pose", 1024, None),
    ]
    text = capsys.readouterr().out
    assert "out of memory at 512" in text
    assert "a step would take up to 16 s" in text
    assert "is in no package index" in text


@pytest.mark.cpu_only
def test_nothing_is_begun_after_the_deadline(monkeypatch, tmp_path):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(comparison, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    output = tmp_path / "rows.jsonl"
    output.touch()
    arguments = ("--only", "plain", "--lengths", "256", "512", "--deadline", "15", "--ahead", "0")
    assert [row["tokens"] for row in run(monkeypatch, output, *arguments)[1]] == [256]


@pytest.mark.cpu_only
def test_steps_of_a_length_and_options(capsys):
    assert [comparison.steps_of(n) for n in (8192, 32768, 65536, 131072)] == [3, 2, 2, 1]
    with pytest.raises(SystemExit):
        comparison.parse_arguments(["--device", "cpu", "--memory", "80"])
    assert "--memory" in capsys.readouterr().err


@pytest.mark.cpu_only
@pytest.mark.parametrize("script", [comparison, comparison_longest])
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("layers", "0", "an integer from 1 on"),
        ("ahead", "-1", "an integer from 0 on"),
        ("ahead", "two", "an integer from 0 on"),
        ("memory", "0", "a number above 0"),
        ("timeout", "-1", "a number above 0"),
        ("step-limit", "nan", "a number above 0"),
        ("deadline", "-1", "a number of 0 or more"),
        ("device", "gpu", "cpu, cuda or cuda:NUMBER"),
        ("output", ".", "a file, got the folder"),
    ],
)
def test_options_that_nothing_can_be_measured_with(script, option, value, expected, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments([f"--{option}", value])
    error = capsys.readouterr().err
    assert f"argument --{option}: expected {expected}" in error
    assert error.endswith(f"'{value}'\n")


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (comparison, ["--lengths", "1"], "--lengths: expected an integer from 2 on, got '1'"),
        (comparison, ["--steps", "0"], "--steps: expected an integer from 1 on, got '0'"),
        (comparison, ["--long-step", "x"], "--long-step: expected a number of 0 or more, got 'x'"),
        (comparison_longest, ["--short", "8"], "--short: expected an integer from 1024 on"),
        (comparison_longest, ["--most", "8"], "--most: expected an integer from 1024 on"),
        (comparison_longest, ["--trials", "0"], "--trials: expected an integer from 1 on"),
        (comparison_longest, ["--memory", ".5"], "more than the 0.75 GiB of --context, got 0.5"),
    ],
)
def test_options_of_one_script(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.cpu_only
@pytest.mark.parametrize("script", [comparison, comparison_longest])
def test_without_a_gpu_no_rows_are_written(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        sys, "argv", [script.__name__, "--output", str(output), "--only", "liger", "--commit", "a"]
    )
    with pytest.raises(SystemExit, match="--device: expected a GPU that nvidia-smi lists"):
        script.main()
    assert not output.exists()


@pytest.mark.cpu_only
def test_reasons():
    assert comparison.reason(torch.OutOfMemoryError("CUDA out of memory. x")) == "out of memory"
    assert comparison.reason(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in x")) == "out of memory"
    assert comparison.reason(ImportError("no liger\nmore")) == "ImportError: no liger"


@pytest.mark.cpu_only
def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import time\ninput()\ntime.sleep(60)\n")
    with (
        processes.Worker(str(script), {}) as worker,
        pytest.raises(processes.WorkerError, match=r"no answer in 0.5 s"),
    ):
        worker.ask("measure", 0.5)


@pytest.mark.cpu_only
def test_a_contender_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    answer = comparison.worker({"contender": "liger"})
    assert "liger_kernel" in answer("measure")["failed"]


# --- the page


def row(contender, tokens, step, peak=10.0, failed=None, **more):
    return {
        "bench": "comparison",
        "contender": contender,
        "tokens": tokens,
        "step_s": step,
        "peak_gib": peak,
        "host_gib": 4.0,
        "memory": None,
        "shape": {"model": "M"},
        "versions": {"torch": "2"},
        "gpu": "NVIDIA G",
        "date": "d",
        "commit": "c",
        "steps": 1,
        **({"failed": failed} if failed else {}),
        **more,
    }


ROWS = [
    row("plain", 8192, 9.0),
    row("plain", 8192, 2.0),
    row("plain", 65536, None, failed="out of memory"),
    row("s2", 8192, 0.5),
    row("liger", 65536, 16.0, 40.0, pinned_gib=1.0, versions={"liger-kernel": "0.8"}),
    row("unsloth", 8192, None, failed="ImportError: no unsloth"),
    row("lemo-0.5", 8192, 1.0),
    row("lemo-0.5", 65536, 4.0, 30.0),
]


@pytest.mark.cpu_only
def test_tables_show_the_last_row_of_each():
    (rows,) = comparison_page.groups_of(ROWS).values()
    lines = comparison_page.table(rows).splitlines()
    assert lines[0] == "|  | 8192 tokens | 65536 tokens |"
    assert lines[2:] == [
        "| Transformers + PEFT, nothing recomputed | 2.00 s, 10.0 GiB | out of memory |",
        "| Liger kernels, checkpointing |  | 16.00 s, 40.0 GiB |",
        "| LongLoRA's S2-Attn, checkpointing | 0.50 s, 10.0 GiB |  |",
        "| lemo, keep 0.5, layers recomputed | 1.00 s, 10.0 GiB | 4.00 s, 30.0 GiB |",
    ]
    # What is not exact is no measure.
    assert comparison_page.shares(rows).splitlines()[2:] == [
        "| fastest exact method | Transformers + PEFT, nothing recomputed, 2.00 s | "
        "Liger kernels, checkpointing, 16.00 s |",
        "| lemo, keep 0.5, layers recomputed | 0.500 | 0.250 |",
    ]
    text = comparison_page.figures(ROWS)
    assert "- Unsloth: ImportError: no unsloth (at 8192 tokens)." in text
    assert "| Liger kernels, checkpointing | 65536 | 4.0 | 1.0 |" in text
    assert "| liger-kernel | 0.8 |" in text
    assert "M, G; measured steps: 1; d, commit c" in comparison_page.short_figures(ROWS)
    assert "- Not measured yet: Transformers + PEFT, checkpointing;" in text
    # One length makes no line.
    assert "images/" in text
    assert "images/" not in comparison_page.figures(ROWS[:2])


@pytest.mark.cpu_only
def test_a_failure_is_named_until_the_contender_runs_at_another_commit():
    later = row("unsloth", 65536, 9.0, commit="later", date="e", warmed=False)
    assert "- Unsloth: ImportError" not in comparison_page.figures([*ROWS, later])
    assert "- Unsloth: ImportError" in comparison_page.figures([*ROWS, later | {"date": "a"}])
    assert "- Unsloth: ImportError" in comparison_page.figures([*ROWS, later | {"commit": "c"}])
    # A first step of its length is said to be one.
    text = comparison_page.short_figures([*ROWS, later])
    assert "measured steps: 1 (the first of their length in 1 of 6 figures); d, e, commit" in text
    assert "*" not in text
    # With memory that it pinned, it is longer than others.
    text = comparison_page.short_figures([*ROWS, later | {"pinned_gib": 5.0}])
    assert "in 1 of 6 figures); *: pinning memory of the host" in text
    assert "9.00* s" in text


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("short", "pinned", "times"), [(4, 0.0, [9.0]), (4, 3.0, [4.0]), (8, 0.0, [4.0])]
)
def test_a_long_first_step_counts_unless_it_compiles_or_pins_memory(
    monkeypatch, short, pinned, times
):
    class Steps:
        device, trained_tokens, weights = "cpu", 8, 0
        losses: ClassVar = [torch.tensor(1.0), torch.tensor(2.0)]

        def __init__(self, settings, tokens):
            self._seconds = iter((9.0, 4.0))

        def seconds(self, tokens=None):
            return 20.0 if tokens == 4 else next(self._seconds)

    monkeypatch.setattr(comparison, "Steps", Steps)
    monkeypatch.setattr(comparison, "held", lambda device: {"pinned_gib": pinned})
    settings = {"tokens": 8, "warm_up_tokens": short, "long_step": 5.0, "steps": 1}
    found = comparison.measured(settings)
    assert [found["step_s"]] == times
    assert found["warmed"] is (times != [9.0])


@pytest.mark.cpu_only
def test_short_steps_in_which_graphs_are_captured_do_not_count(monkeypatch):
    """The second pass of a shape captures, and takes longer than all others."""

    class Steps:
        device, trained_tokens, weights = "cpu", 8, 0
        losses: ClassVar = [torch.tensor(1.0), torch.tensor(2.0)]

        def __init__(self, settings, tokens):
            self._seconds = iter((0.5, 0.9, 0.1, 0.2))

        def seconds(self, tokens=None):
            return 20.0 if tokens == 4 else next(self._seconds)

    monkeypatch.setattr(comparison, "Steps", Steps)
    monkeypatch.setattr(comparison, "held", lambda device: {})
    settings = {"tokens": 8, "warm_up_tokens": 4, "long_step": 5.0, "steps": 2}
    assert comparison.measured(settings)["range"] == [0.1, 0.2]


@pytest.mark.cpu_only
def test_plots_are_of_their_rows(tmp_path):
    for value, name in comparison_page.PLOTS.items():
        comparison_page.plot(ROWS, value, tmp_path / name)
    stale = set(comparison_page.PLOTS.values())
    assert not stale & set(comparison_page.out_of_date(ROWS, tmp_path))
    assert stale <= set(comparison_page.out_of_date(ROWS[:-1], tmp_path))


@pytest.mark.cpu_only
def test_without_rows_the_page_says_so():
    assert comparison_page.figures([]).startswith("Nothing has been measured yet.")
    assert "is in no package index" in comparison_page.figures([])
    assert "Nothing has been measured yet." in comparison_page.short_figures([])


@pytest.mark.cpu_only
def test_page_readme_and_plots_follow_from_the_results():
    rows = comparison_page.records.read(comparison_page.RESULTS, "comparison")
    assert comparison_page.out_of_date(rows) == []


@pytest.mark.cpu_only
def test_the_page_names_every_contender():
    page = comparison_page.PAGE.read_text(encoding="utf-8")
    for name, contender in CONTENDERS.items():
        assert f"`{name}`" in page or contender.why_not is not None
    assert f"{POSE_WINDOW} tokens" in page
