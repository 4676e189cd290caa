"""`lemo plan`: what it prints, and what it refuses."""

import pytest
from transformers import LlamaConfig, OPTConfig

from lemo.cli.main import main
from lemo.cli.plan import parse_bytes
from lemo.planner.timing import Rates
from lemo.training import calibration

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]


@pytest.fixture
def folder(tmp_path):
    """The shape of Llama-3-8B, without weights."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_a_plan(folder, capsys):
    arguments = (folder, "--tokens", "128K", "--keep", "0.25", "--gpu-memory", "80GiB")
    code, out, _ = run(capsys, *arguments, "--dtype", "bfloat16")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("model: llama, 32 layers, 8.03 billion parameters, 15.4 GiB")
    assert lines[1] == "step: 1 x 131072 tokens, of which layers keep 32768"
    assert lines[2].startswith("layers 0-")
    assert "recompute all but attention" in lines[2]
    assert lines[3].startswith("layers ")
    assert "-31: store everything, 4.26 GiB each" in lines[3]
    assert lines[4].startswith("peak memory: 7")
    assert lines[4].endswith("of 80.0 GiB")
    assert lines[5].startswith("step time: ")
    longest = int(lines[6].split()[-2])
    # What is said to fit fits, and a little more does not.
    for tokens, expected in ((longest, 0), (longest + 64, 1)):
        assert run(capsys, folder, "--tokens", tokens, *arguments[3:])[0] == expected


def test_a_plan_of_products_in_8_bits(folder, capsys):
    arguments = (folder, "--tokens", "32K", "--keep", "0.25", "--gpu-memory", "140GiB")
    _, plain, _ = run(capsys, *arguments, "--dtype", "bfloat16")
    code, out, _ = run(capsys, *arguments, "--dtype", "bfloat16", "--fp8")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("model: llama, 32 layers, 8.03 billion parameters, 21.1 GiB")
    assert lines[2].startswith("products: fp8; the first step logs layers that err too much")

    def peak(out):
        line = next(line for line in out.splitlines() if line.startswith("peak memory"))
        return float(line.split()[2])

    # A byte for each weight of 32 layers but for queries and keys, and of 31 MLPs.
    copied = 32 * (1024 + 4096) * 4096 + 31 * 3 * 4096 * 14336
    assert peak(out) - peak(plain) == pytest.approx(copied / 2**30, abs=0.2)


def test_a_plan_names_layers_whose_sizes_have_no_products_in_8_bits(tmp_path, capsys):
    """Queries and keys have none of any size."""
    LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    ).save_pretrained(tmp_path)
    arguments = (tmp_path, "--tokens", "64", "--keep", "0.5", "--gpu-memory", "1GiB", "--fp8")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert [line.split()[2] for line in out.splitlines() if line.startswith("products of")] == [
        f"{name}_proj:" for name in ("v", "o", "gate", "up", "down")
    ]


@pytest.mark.parametrize(
    ("tokens", "memory", "message"),
    [
        (
            "0",
            "1GiB",
            "--tokens: expected one length from 2 to 2147483647, such as 65536, 64K or 1M, got '0'",
        ),
        ("4K,8K", "1GiB", "--tokens: expected one length from 2"),
        ("128X", "1GiB", "--tokens: expected one length from 2"),
        ("4K", "0GiB", "--gpu-memory: expected a size above 0, got '0GiB'"),
    ],
)
def test_what_cannot_be_planned_is_named_as_it_was_given(tokens, memory, message, folder, capsys):
    code, _, error = run(capsys, folder, "--tokens", tokens, "--gpu-memory", memory)
    assert code == 1
    assert message in error


def test_lengths_and_lists_that_do_not_fit_the_model(folder, capsys):
    arguments = folder, "--tokens", "4K", "--gpu-memory"
    code, _, error = run(capsys, *arguments, "80GiB", "--recompute", "layer,none")
    assert (code, error) == (
        1,
        "lemo: error: recompute: expected 32 entries, one for each layer, got 2\n",
    )
    code, _, error = run(capsys, folder, "--tokens", 2**31, "--gpu-memory", "80GiB")
    assert code == 1
    assert "--tokens: expected one length from 2 to 2147483647" in error
    # Elsewhere such a number is in GiB (`memory_limit`, `host_memory`).
    for options in (("80",), ("80GiB", "--host-memory", "100")):
        code, _, error = run(capsys, *arguments, *options)
        assert code == 1
        assert (
            f"-memory: expected a size with its unit, such as 80GiB, got '{options[-1]}'" in error
        )


def test_less_memory_recomputes_more(folder, capsys):
    arguments = folder, "--tokens", "64K", "--keep", "0.25", "--gpu-memory"
    _, out, _ = run(capsys, *arguments, "140GiB")
    assert "layers 0-31: store everything" in out
    _, out, _ = run(capsys, *arguments, "22.5GiB")
    assert "recompute all" in out
    assert "store everything" not in out


def test_memory_and_recomputation_as_of_a_run(folder, capsys):
    arguments = folder, "--tokens", "64K", "--keep", "0.25", "--set", "memory_limit=140"
    _, out, _ = run(capsys, *arguments)
    assert "layers 0-31: store everything" in out
    assert " of 140.0 GiB" in out
    _, out, _ = run(capsys, *arguments, "--set", "gradient_checkpointing=true")
    assert "layers 0-31: recompute all" in out


def test_a_context_that_does_not_fit(folder, capsys):
    code, out, err = run(
        capsys, folder, "--tokens", "1024K", "--keep", "0.5", "--gpu-memory", "40GiB"
    )
    assert code == 1
    assert "peak memory" not in out
    assert "lemo: error: --gpu-memory: expected " in err
    for text in (" GiB or more, got 40.0 GiB; ", "at most ", "tokens", "keep 0."):
        assert text in err
    code, _, err = run(
        *(capsys, folder, "--tokens", "64K", "--gpu-memory", "40GiB", "--recompute", "none")
    )
    assert code == 1
    assert "; recompute auto; " in err


def test_rates_of_the_cpu(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(calibration, "measure", lambda *_: Rates(1e11, 2e10, 2e10, 2e10, 2e-5))
    _, out, _ = run(capsys, folder, "--tokens", "8K", "--gpu-memory", "200GiB", "--device", "cpu")
    assert " s\n" in next(line + "\n" for line in out.splitlines() if "step time" in line)


def test_what_is_refused(folder, capsys, tmp_path):
    for arguments, message in (
        (("--gpu-memory", "many"), "--gpu-memory: expected a size with its unit, such as 80GiB"),
        (("--gpu-memory", f"{10**12}GiB"), "--gpu-memory: expected a size of 1048576 TiB at most"),
        (
            ("--gpu-memory", "9" * 400 + "GB"),
            "--gpu-memory: expected a size of 1048576 TiB at most",
        ),
        (
            ("--host-memory", "9" * 400 + "GB"),
            "--host-memory: expected a size of 1048576 TiB at most",
        ),
        (("--gpus", 10**12), "--gpus: expected a number from 1 to 256, got 1000000000000"),
        (("--batch-size", 10**12), "batch_size: expected an integer in [1, 1048576]"),
        (("--recompute", "all"), "recompute: expected one of"),
        (("--lora-targets", "lm_head"), "lora_targets: expected some of"),
        (("--set", "elimination.visible_keys=computed"), "visible_keys: expected kept"),
        (("--set", "elimination.recompute=[none, layer]"), "recompute: expected 32 entries"),
        (("--set", "context_parallel=2"), "context_parallel: expected 1, since --gpus"),
        (("--set", "shard=true"), "shard: expected false, since --gpus"),
        (("--set", "memory_limit=40"), "memory_limit: expected null beside --gpu-memory, got 40"),
    ):
        given = arguments if "--gpu-memory" in arguments else (*arguments, "--gpu-memory", "80GiB")
        code, _, err = run(capsys, folder, "--tokens", "8K", *given)
        assert code == 1
        assert message in err
    OPTConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2).save_pretrained(
        tmp_path / "opt"
    )
    code, _, err = run(capsys, tmp_path / "opt", "--tokens", "2K", "--gpu-memory", "80GiB")
    assert code == 1
    assert "whose memory and time can be predicted, got 'opt'" in err


def test_sizes():
    assert parse_bytes("80GiB", "x") == 80 * 2**30
    assert parse_bytes("1.5 gb", "x") == 1_500_000_000
    assert parse_bytes("0.5MiB", "x") == 2**19


def test_a_plan_of_several_gpus(folder, capsys):
    arguments = (folder, "--tokens", "128K", "--keep", "1", "--gpus", "8", "--dtype", "bfloat16")
    code, out, _ = run(capsys, *arguments, "--gpu-memory", "133GiB")
    lines = out.splitlines()
    assert code == 0
    assert lines[2] == "8 GPUs, with 133.0 GiB of each, the most tokens a second first:"
    assert lines[3].startswith("1 window at a time, each shared out by 8 GPUs")
    assert any(line.startswith("8 windows at a time: ") for line in lines)
    assert any("--shard" in line for line in lines)
    # Which a run with either of these would refuse.
    for more in (("--dtype", "float16"), ("--host-memory", "8GiB")):
        code, out, _ = run(capsys, *arguments, *more, "--gpu-memory", "133GiB")
        assert code == 0
        assert "8 windows at a time: " in out
        assert "--shard" not in out
    code, _, error = run(capsys, *arguments, "--gpu-memory", "4GiB")
    assert code != 0
    assert "error: --gpu-memory: expected room for a step on 8 GPUs, however they are" in error
    assert " got 4.00 GiB of each; what would fit on one: " in error
    setting = "--set", "memory_limit=4"
    for more in ((), ("--gpus", 1)):
        code, _, error = run(capsys, *arguments, *setting, *more)
        assert code != 0
        assert "error: memory_limit: expected " in error
    code, _, error = run(capsys, *arguments[:5], "--gpus", "0")
    assert code != 0
    assert "--gpus: expected a number from 1 to 256, got 0" in error
