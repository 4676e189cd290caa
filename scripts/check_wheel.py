"""Checks the lemo that is installed, where nothing can be compiled. Run by check_wheel.sh.

    python check_wheel.py [--cuda]

Looks where lemo and its libraries come from, trains a small random model for some steps, and starts
the command line. With --cuda the build has to have CUDA kernels.
"""

import argparse
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lemo
from lemo import _C

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "nvcc", "cmake", "ninja", "make")
STEPS = 30


def check_origin(cuda: bool) -> None:
    """lemo is the installed one, whole, and uses torch's threads."""
    found = list(filter(None, map(shutil.which, COMPILERS)))
    assert not found, f"expected no compiler on PATH, got {found}"
    info = _C.build_info()
    print("lemo", info, "torch", torch.__version__, "Python", sys.version.split()[0])
    assert Path(lemo.__file__).is_relative_to(sys.prefix), lemo.__file__
    assert info["version"] == lemo.__version__
    assert info["cuda"] or not cuda, "the wheel has no CUDA kernels"
    assert files("lemo.report").joinpath("page.html").is_file(), "the report's page is missing"
    # The library asks for libgomp.so.1 by name. A second one would have threads of its own.
    mapped = Path("/proc/self/maps").read_text().splitlines()
    openmp = {line.split()[-1] for line in mapped if "libgomp" in line}
    assert len(openmp) == 1, f"expected one OpenMP library, got {sorted(openmp)}"
    print("OpenMP:", *openmp)


def train() -> None:
    """The loss falls where half of the blocks are kept."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    handle = lemo.enable(model.train(), lemo.LemoConfig(keep=0.5))
    ids = (torch.arange(256) * 7 % 64)[None]
    handle.verify({"input_ids": ids, "labels": ids})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", action="store_true")
    check_origin(parser.parse_args().cuda)
    train()
    command = Path(sys.prefix) / "bin" / "lemo"
    subprocess.run([command, "finetune", "--help"], check=True, stdout=subprocess.DEVNULL)
    print("the wheel works")


if __name__ == "__main__":
    main()
