"""LoRA on long texts with Transformers' Trainer, with half of the tokens in every step.

    python examples/trainer.py MODEL TEXTS.jsonl OUTPUT

TEXTS.jsonl has an object with a "text" in each line; texts shorter than a window are left out.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lemo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("texts", help=".jsonl")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def window(row: dict) -> dict:
        ids = tokenizer(row["text"])["input_ids"][: options.tokens]
        return {"input_ids": ids, "labels": ids}

    texts = load_dataset("json", data_files=options.texts, split="train")
    windows = texts.map(window, remove_columns=texts.column_names)
    windows = windows.filter(lambda row: len(row["input_ids"]) == options.tokens)

    model = AutoModelForCausalLM.from_pretrained(options.model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=2e-4,
            bf16=not options.cpu,
            use_cpu=options.cpu,
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=windows,
    )
    handle = lemo.enable(trainer, lemo.LemoConfig(keep=options.keep))
    trainer.train()
    handle.remove()
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
