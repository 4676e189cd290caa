"""The attention that a model's configurations name, in which its layers look up what to call."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lemo.models.generic.attention import is_registered, register

__all__ = ["AttentionNames"]

_lock = threading.Lock()


class AttentionNames:
    """The names of a model's own attention, and in their place those of lemo's.

    Calls that run as without lemo see the own names, while one thread alone calls the model. All
    threads read the same configurations, so once there is a second one they keep lemo's names:
    lemo's attention computes what the own one does wherever a mask is not one of kept rows.

    Args:
        configs: the configurations.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        self._configs = configs
        self._own = self._now()
        self._thread: int | None = None
        self._has_several = False
        self._depth = 0

    def __getstate__(self) -> dict[str, Any]:
        # No thread has called a copied or pickled model.
        return vars(self) | {"_thread": None, "_has_several": False, "_depth": 0}

    def register(self) -> tuple[str, ...]:
        """Makes lemo's names known to Transformers, and returns them; again is harmless."""
        return tuple(map(register, self._own))

    def install(self) -> None:
        """Names lemo's attention."""
        self._own = self._now()
        self._set(self.register())

    def uninstall(self) -> None:
        """Names the model's own."""
        self._set(self._own)

    def check(self) -> None:
        """Looks at the names in front of a pass on kept rows.

        Raises:
            ValueError: attention was set since `install`, or `uninstall` was called.
        """
        self._enter()
        for own, now in zip(self._own, self._now()):
            if not is_registered(now):
                raise ValueError(
                    f"attn_implementation: expected lemo's in place of '{own}', got '{now}', which "
                    "was set since lemo.enable (set it before), or by handle.remove()"
                )

    def check_behind(self) -> None:
        """Looks at them behind such a pass, whose layers backward computes again.

        Raises:
            RuntimeError: attention was set since, or `uninstall` was called.
        """
        for now in self._now():
            if not is_registered(now):
                raise RuntimeError(
                    "attn_implementation: expected lemo's in backward, which computes layers again "
                    f"(gradient checkpointing), got '{now}'; call handle.remove() after backward"
                )

    @contextmanager
    def own(self) -> Iterator[None]:
        """Inside, the own names are seen, if this is the only thread."""
        self._enter()
        with self._named(self._own, only_here=True):
            yield

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, eager attention is named."""
        with self._named(("eager",) * len(self._configs)):
            yield

    @contextmanager
    def _named(self, names: Sequence[str], only_here: bool = False) -> Iterator[None]:
        with _lock:
            before = self._now()
            if not (only_here and self._has_several):
                self._set(names)
            self._depth += 1
        try:
            yield
        finally:
            with _lock:
                self._depth -= 1
                if not (only_here and self._has_several):
                    self._set(before)

    def _enter(self) -> None:
        """Takes note of the thread that calls the model."""
        thread = threading.get_ident()
        with _lock:
            self._thread = self._thread or thread
            if thread == self._thread or self._has_several:
                return
            self._has_several = True
            if self._depth:  # the other one is in the middle of a call as without lemo
                self._set(self.register())

    def _now(self) -> tuple[str, ...]:
        return tuple(config._attn_implementation for config in self._configs)

    def _set(self, names: Sequence[str]) -> None:
        for config, name in zip(self._configs, names):
            config._attn_implementation = {"": name}  # not those of its parts
