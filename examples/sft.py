"""Answers to long prompts with TRL's SFTTrainer: blocks that have labels take part in every step.

    python examples/sft.py MODEL ANSWERS.jsonl OUTPUT

ANSWERS.jsonl has an object with a "prompt" and a "completion" in each line.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import lemo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("answers", help=".jsonl")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--tokens", type=int, default=8192, help="longest prompt and completion")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    trainer = SFTTrainer(
        options.model,
        args=SFTConfig(
            options.output,
            max_length=options.tokens,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            learning_rate=2e-4,
            bf16=not options.cpu,
            use_cpu=options.cpu,
            logging_steps=1,
            report_to=[],
            model_init_kwargs={"dtype": "float32" if options.cpu else "bfloat16"},
        ),
        train_dataset=load_dataset("json", data_files=options.answers, split="train"),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    handle = lemo.enable(trainer, lemo.LemoConfig(keep=options.keep))
    trainer.train()
    handle.remove()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
