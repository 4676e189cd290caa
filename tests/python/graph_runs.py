"""Runs of a small model with CUDA graphs and without, and what came out of them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import devices
import lemo

TOKENS, VOCABULARY = 256 if devices.on_gpu() else 64, 1024
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_cache": False,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {"keep": 0.5, "scorer": "random", "block_size": 16, "recompute": "none"}


class Run:
    """A model, and what came out of its steps: `found` has a loss and gradients of each.

    Args:
        graphs: the setting cuda_graphs.
        device: where the model is.
        kind: its architecture.
        adapters: fields of LoraConfig.
        fp32: adapters in fp32 beside the base in bf16.
        settings: fields of LemoConfig.
    """

    def __init__(self, graphs, device, kind="llama", adapters=None, fp32=False, settings=None):
        torch.manual_seed(0)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(
                CONFIGS[kind](**SIZES), dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        self.lora = LORA | {"init_lora_weights": False} | (adapters or {})
        lora = LoraConfig(**self.lora)
        self.model = get_peft_model(base, lora, autocast_adapter_dtype=fp32).train()
        if not fp32:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        config = lemo.LemoConfig(**SETTINGS | (settings or {}), cuda_graphs=graphs)
        self.handle = lemo.enable(self.model, config)
        self.device, self.seed, self.found = device, 0, []

    @property
    def layers(self):
        return self.model.get_base_model().model.layers

    @property
    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def ids(self, tokens=TOKENS):
        torch.manual_seed(self.seed)
        return torch.randint(0, VOCABULARY, (2, tokens)).to(self.device)

    def forward(self, tokens=TOKENS, model=None):
        self.seed += 1
        ids = self.ids(tokens)
        torch.manual_seed(self.seed)
        return (self.model if model is None else model)(input_ids=ids, labels=ids).loss

    def note(self, loss, model=None):
        named = (self.model if model is None else model).named_parameters()
        grads = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        self.found.append((loss.detach().clone(), grads))

    def say(self, value):
        """Something else that has to be the same."""
        self.found.append((torch.as_tensor(float(value)), {}))

    def update(self, none=True):
        with torch.no_grad():
            for p in self.trained:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.01)
        self.model.zero_grad(set_to_none=none)

    def step(self, tokens=TOKENS, model=None, none=True):
        loss = self.forward(tokens, model)
        loss.backward()
        self.note(loss)
        self.update(none)

    def steps(self, count=3, **more):
        for _ in range(count):
            self.step(**more)


def difference(ours, theirs):
    """What of `Run.found` differs first from that of a run without graphs; an empty text: nothing,
    bit for bit."""
    if len(ours) != len(theirs):
        return f"{len(ours)} records, {len(theirs)} without graphs"
    for index, ((loss, grads), (loss2, grads2)) in enumerate(zip(ours, theirs)):
        if not torch.equal(loss, loss2):
            return f"record {index}: loss {loss.item():.9g}, without graphs {loss2.item():.9g}"
        if grads.keys() != grads2.keys():
            missing = sorted(grads.keys() ^ grads2.keys())
            return f"record {index}: gradients of {missing[0]} and {len(missing) - 1} more"
        for name, expected in grads2.items():
            if not torch.equal(grads[name], expected):
                error = (grads[name].float() - expected.float()).norm() / expected.float().norm()
                return f"record {index}: {name} by {error:.2g}"
    return ""
