"""Runs of `lemo finetune` in several processes, for the tests of data parallelism and sharding."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from data_parallel_cases import as_torchrun
from lemo.settings.finetune import FinetuneConfig
from lemo.training import finetune as module
from lemo.training.finetune import finetune
from lemo.training.model import load_config, load_model
from lemo.training.run_log import read_log

PASSES = 4
STEPS = 4
SETTINGS: dict[str, Any] = {
    "context_length": 96,
    "steps": STEPS,
    "save_every": 2,
    "warmup_steps": 0,
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "train_norms": True,
    "device": "cpu",
    "elimination": {"block_size": 8, "keep": 0.5, "scorer": "random"},
}
# What runs in two processes, by name: settings beside these.
TWO = {
    "two": {},
    "sharded": {"shard": True},
    "sharded, recomputed": {"shard": True, "gradient_checkpointing": True},
    "sharded, dense": {"shard": True, "elimination": None},
    "sharded, nf4": {"shard": True, "quantize": "nf4"},
    "sharded, nf4, selective": {
        "shard": True,
        "quantize": "nf4",
        "elimination": SETTINGS["elimination"] | {"recompute": "selective"},
    },
    "sharded, nf4, dense": {"shard": True, "quantize": "nf4", "elimination": None},
    # A model that is stored so.
    "sharded, packed": {"shard": True, "model": "packed"},
}


def train(folder: str, name: str, **more: Any) -> None:
    """A run into `folder`/`name`; the model and the documents lie in `folder`."""
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    place = Path(folder)
    paths = {"model": place / "model", "documents": place / "d.jsonl", "output": place / name}
    accumulation = {"gradient_accumulation": PASSES // processes}
    if "model" in more:
        paths["model"] = place / more.pop("model")
    settings = SETTINGS | accumulation | {key: str(path) for key, path in paths.items()} | more
    finetune(FinetuneConfig.from_dict(settings))


def save_packed(folder: str) -> None:
    """The model of the runs, stored in 4 bits that are packed in uint8."""
    place = Path(folder)
    plain, packed = str(place / "model"), place / "packed"
    load_model(plain, load_config(plain), torch.float32, "nf4").save_pretrained(packed)
    for file in (place / "model").glob("tokenizer*"):
        shutil.copy(file, packed)


def in_two(folder: str) -> dict[str, str]:
    """The runs of two processes, and what their mistakes raise."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    as_torchrun()
    FSDPParam.__init__ = _of_old_torch
    for name, settings in TWO.items():
        train(folder, name, **settings)
    place, main = Path(folder), distributed.get_rank() == 0
    for name, source in (("resumed sharded", "two"), ("resumed whole", "sharded")):
        if main:
            stop(place / source, place / name)
        distributed.barrier()
        train(folder, name, resume=True, shard=name == "resumed sharded")
    if main:
        stop(place / "one", place / "resumed by two")
    distributed.barrier()
    train(folder, "resumed by two", resume=True)
    return {"quantised": _error(folder, shard=True, quantize="int8")}


_of_torch = FSDPParam.__init__


def _of_old_torch(self: FSDPParam, param: torch.nn.Parameter, *more: Any) -> None:
    """As in torch 2.11, whatever torch it is."""
    if not param.is_floating_point():
        raise RuntimeError("only Tensors of floating point dtype can require gradients")
    _of_torch(self, param, *more)


def losing_one(folder: str) -> str:
    """What the main process raises where the other one is gone after the first checkpoint."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    as_torchrun()
    own = module.learning_rate

    def rate(step: int, config: FinetuneConfig) -> float:
        if step == 3 and distributed.get_rank() == 1:
            raise KeyboardInterrupt
        return own(step, config)

    module.learning_rate = rate
    try:
        train(folder, "lost")
    except KeyboardInterrupt:
        return ""
    except ConnectionError as error:
        return str(error)
    finally:
        module.learning_rate = own
    return "done"


def stop(source: Path, target: Path) -> None:
    """A copy of a run that ended behind its first checkpoint."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / f"step-{STEPS}")
    shutil.rmtree(target / "adapter")


def losses(folder: Path) -> list[float]:
    """By step."""
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def adapter(folder: Path) -> torch.Tensor:
    """All of its weights."""
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten().float() for name in sorted(weights)])


def _error(folder: str, **more: Any) -> str:
    try:
        train(folder, "refused", **more)
    except ValueError as error:
        return str(error)
    return ""
