"""LoRA as users put it on a model, and such models, for tests of the planner."""

import weakref

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lemo.planner.shape import LINEAR, Adapters
from lemo.training.model import leave_casts_to_autocast
from tiny_models import make_model

TOKENS, RANK = 256, 4
NORMS = ["input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"]
CASES = {
    "no MLP": (Adapters(RANK, frozenset(LINEAR[:4]), size=2), {}),
    "one of q, k and v": (Adapters(RANK, frozenset(["k_proj", "up_proj"]), size=2), {}),
    "all": (Adapters(RANK, size=2), {}),
    "apart": (Adapters(RANK, apart=True), {}),
    "autocast": (Adapters(RANK), {"autocast": True}),
    "norms": (Adapters(RANK, norms=True), {"autocast": True}),
    "dropout": (Adapters(RANK, dropout=True), {"autocast": True}),
    "fp32": (Adapters(RANK), {"size": 4}),
    "fp32 norms": (Adapters(RANK, norms=True), {"size": 4}),
}


def model_of(
    architecture, layers, adapters, size, tokens=TOKENS, width=192, heads=(4, 2), quantise=None
):
    dtype = torch.bfloat16 if size == 2 else torch.float32
    model = make_model(
        architecture,
        dtype=dtype,
        hidden_size=128,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=tokens,
    ).to(dtype)
    if quantise is not None:
        quantise(model)
    lora = LoraConfig(
        r=adapters.rank,
        target_modules=sorted(adapters.targets),
        lora_dropout=0.1 if adapters.dropout else 0.0,
        modules_to_save=NORMS if adapters.norms else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if adapters.size == 4 else dtype)
    if not adapters.apart:
        leave_casts_to_autocast(model)
    return model.train()


class PeakOfTensors(TorchDispatchMode):
    """The highest bytes of tensors at a time; what an operator needs inside is no tensor.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self._live = {}
        for parameter in model.parameters():
            self._see(parameter)

    def _see(self, tensor):
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._see(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live and self._live[key]() is storage:
            return

        def gone(_):
            self.now -= size
            self._live.pop(key, None)

        self._live[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result
