"""Perplexity after training with products in 8 bits, beside the same training in bf16.

    python benchmarks/fp8_quality.py --model MODEL --train TRAIN.jsonl.xz --eval EVAL.jsonl.xz

Measured: perplexity of held-out windows, by the model's own forward pass, after --steps steps of
LoRA with half of the blocks kept (the defaults) and products "fp8" and "fp8_fast". Against:
products "dtype", with the same start, windows, kept blocks and learning rates, for each seed. Takes
about 15 seconds a seed for a model of 28M parameters on an H200. The protocol of docs/QUALITY.md
has longer windows and more steps (`quality.py`, methods fp8-0.5 and fp8-1); this one tells what
rounding does, all else equal.

One record for each seed and kind of products is appended: bench, shape, ours, peer_value, ratio,
and `before`, the perplexity without training.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import lemo
from common import records
from lemo.data import read_documents
from lemo.settings.finetune import FinetuneConfig
from lemo.training.model import add_lora, load_config, load_model, load_tokenizer

PRODUCTS = ("dtype", "fp8", "fp8_fast")
WARMUP = 10


def parse_arguments() -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "fp8_quality.jsonl")
    records.add_documents(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--windows", type=int, default=64, help="that are held out")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def windows(path: Path, tokenizer: object, count: int, tokens: int) -> torch.Tensor:
    """[count, tokens]: the beginnings of windows that lie evenly in the documents' first halves."""
    found: list[list[int]] = []
    for document in read_documents(path):
        # A token is two characters or more in the mean.
        text = document.text[: 16 * tokens * 4]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)][:16]
        if len(found) >= count:
            break
    if len(found) < count:
        raise SystemExit(f"expected {count} windows of {tokens} tokens in {path}, got {len(found)}")
    return torch.tensor(found[:count])


@torch.no_grad()
def perplexity(model: torch.nn.Module, held_out: torch.Tensor, device: str) -> float:
    model.eval()
    losses = []
    for batch in held_out.split(4):
        ids = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    model.train()
    return math.exp(sum(losses) / len(losses))


def trained(
    options: argparse.Namespace,
    seed: int,
    products: str,
    data: torch.Tensor,
    held_out: torch.Tensor,
) -> tuple[float, float, int]:
    """(perplexity before, after, layers whose products stay in bf16)."""
    config = load_config(str(options.model))
    torch.manual_seed(seed)
    base = load_model(str(options.model), config, torch.bfloat16)
    settings = FinetuneConfig(model="-", documents="-", output="-")
    model = add_lora(base, settings).to(options.device).train()
    before = perplexity(model, held_out, options.device)
    handle = lemo.enable(
        model, lemo.LemoConfig(keep=options.keep, scorer="random", seed=seed, products=products)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    for step in range(options.steps):
        handle.begin_step(step, options.steps)
        rate = min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate
        places = (step * options.batch + torch.arange(options.batch)) % len(data)
        ids = data[order[places]].to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    left = len(handle.unquantised_products())
    handle.remove()
    return before, perplexity(model, held_out, options.device), left


def main() -> None:
    options = parse_arguments()
    tokenizer = load_tokenizer(str(options.model))
    count = min(options.steps * options.batch, 1024)
    data = windows(options.train, tokenizer, count, options.tokens)
    held_out = windows(options.eval, tokenizer, options.windows, options.tokens)
    common = records.provenance(options.commit, options.device)
    for seed in options.seeds:
        found = {name: trained(options, seed, name, data, held_out) for name in PRODUCTS}
        before, peer, _ = found["dtype"]
        for name in PRODUCTS[1:]:
            _, ours, left = found[name]
            shape = {"model": options.model.resolve().name, "tokens": options.tokens}
            shape |= {"batch": options.batch, "steps": options.steps, "keep": options.keep}
            shape |= {"learning_rate": options.learning_rate, "seed": seed, "products": name}
            row = records.figure(
                *("fp8 perplexity", shape, "perplexity", ours, "products in bf16", peer),
                digits=5,
                before=round(before, 4),
                left=left,
            )
            records.append(options.output, [row | common])
            records.show(row, f"seed {seed} {name} before {before:.3f} ")


if __name__ == "__main__":
    main()
