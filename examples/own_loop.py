"""LoRA on long texts in a training loop of one's own, with half of the tokens in every step.

    python examples/own_loop.py MODEL TEXTS.jsonl ADAPTER

TEXTS.jsonl has an object with a "text" in each line; texts shorter than a window are left out.
"""

import argparse
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("texts", help=".jsonl")
    parser.add_argument("adapter", help="folder to write")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--keep", type=float, default=0.5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.texts, encoding="utf-8") as file:
        texts = [tokenizer(json.loads(line)["text"])["input_ids"] for line in file]
    windows = [torch.tensor(ids[: options.tokens]) for ids in texts if len(ids) >= options.tokens]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()

    handle = lemo.enable(model, lemo.LemoConfig(keep=options.keep))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for step in range(options.steps):
        handle.begin_step(step, options.steps)
        batch = windows[step % len(windows)][None].to(device)
        if step == 0:
            handle.verify({"input_ids": batch})  # once: lemo computes what the model computes
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = handle.statistics()[0]
        print(f"step {step}: loss {loss:.4f}, {kept.attention_rows} of {kept.tokens} tokens")
    handle.remove()
    model.save_pretrained(options.adapter)


if __name__ == "__main__":
    main()
