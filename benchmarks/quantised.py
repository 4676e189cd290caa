"""Losses of training on a quantised base, step by step, beside plain QLoRA on the same windows.

    python benchmarks/quantised.py --model MODEL --documents FILE --output FILE.jsonl
        [--quantize nf4] [--tokens 2048] [--steps 20] [--keep 1.0 0.5]

Measured: the loss of every step of `lemo finetune --quantize`, for each --keep. Against: the same
run without elimination, which is Transformers and PEFT alone. Model, LoRA's start and windows are
the same in all runs. With --keep 1 all losses agree up to rounding; with less they are those of the
labels that kept rows predict. One record for each --keep: the mean of the last quarter's losses,
with all losses beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

from common import records


def parse_arguments() -> argparse.Namespace:
    parser = records.parser(__doc__, records.BUILD / "quantised.jsonl")
    parser.add_argument("--model", type=records.existing, required=True)
    parser.add_argument("--documents", type=records.existing, required=True)
    parser.add_argument("--quantize", default="nf4")
    parser.add_argument("--tokens", type=int, default=2048, help="of a window")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def losses(options: argparse.Namespace, keep: float | None) -> list[float]:
    """The loss of each step; without elimination where `keep` is None."""
    from lemo import LemoConfig
    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune

    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            model=str(options.model),
            documents=str(options.documents),
            output=str(Path(folder) / "run"),
            context_length=options.tokens,
            steps=options.steps,
            save_every=options.steps,
            warmup_steps=2,
            learning_rate=1e-3,
            device=options.device,
            quantize=options.quantize,
            elimination=None if keep is None else LemoConfig(keep=keep, scorer="random"),
        )
        finetune(config, progress=lambda record: found.append(round(record["loss"], 4)))
    name = "plain" if keep is None else f"keep {keep}"
    print(f"{options.quantize} {name:<9}", *found, flush=True)
    return found


def main() -> None:
    options = parse_arguments()
    shape = {"model": options.model.resolve().name, "documents": options.documents.name}
    shape |= {"tokens": options.tokens, "steps": options.steps, "quantize": options.quantize}
    common = records.provenance(options.commit, options.device)
    last = max(1, options.steps // 4)
    plain = losses(options, None)
    for keep in options.keep:
        ours = losses(options, keep)
        row = records.figure(
            "quantised loss",
            shape | {"keep": keep},
            "nats",
            fmean(ours[-last:]),
            "Transformers + PEFT, the same base",
            fmean(plain[-last:]),
            losses=ours,
            peer_losses=plain,
            largest_difference=round(max(abs(a - b) for a, b in zip(ours, plain)), 4),
        )
        records.append(options.output, [row | common])
        records.show(row, f"keep {keep:<4} ")


if __name__ == "__main__":
    main()
