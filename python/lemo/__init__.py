"""lemo: fine-tune large language models on very long sequences with contextual token sparsity."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lemo.distributed.context import ContextParallel
    from lemo.models.callback import TrainerCallback
    from lemo.models.enable import Handle, enable
    from lemo.settings.elimination import LemoConfig

__version__ = "0.1.0"

__all__ = ["ContextParallel", "Handle", "LemoConfig", "TrainerCallback", "__version__", "enable"]

# Imported on first use: Transformers takes seconds, and `import lemo` should not.
_HOMES = {
    "ContextParallel": "lemo.distributed.context",
    "Handle": "lemo.models.enable",
    "LemoConfig": "lemo.settings.elimination",
    "TrainerCallback": "lemo.models.callback",
    "enable": "lemo.models.enable",
}
_MODULES = ("attention", "ops")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"lemo.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lemo' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
