"""A forward that takes the place of a module's own, on the instance, and can be taken off again.

It looks like a bound method to whatever wraps it (`__func__`, `__self__`, the signature of the
class), is copied and pickled with its module, and is never traced by torch.compile.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lemo.ops.call import translated

__all__ = ["Implementation", "ReplacedForward", "bind"]

# Called as run(handle, arguments, replaced forward, original), where `original()` does what the
# module did before with this call.
Implementation = Callable[[Any, dict[str, Any], "ReplacedForward", Callable[[], Any]], Any]


class ReplacedForward:
    """Runs an implementation on the call's arguments until `release` is called.

    Args:
        module: whose forward is replaced.
        handle: the first argument of the implementation.
        run: a module-level function; see `Implementation`.
    """

    def __init__(self, module: nn.Module, handle: Any, run: Implementation) -> None:
        self.__self__ = module
        self.previous = vars(module).get("forward")  # of somebody else, None: that of the class
        self._handle: Any = handle
        self._run = run
        self._function: Callable[..., Any] | None = None
        module.forward = self

    @property
    def __func__(self) -> Callable[..., Any]:
        if self._function is None:
            original = type(self.__self__).forward

            @functools.wraps(original)
            def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
                return self(*args, **kwargs)

            # Accelerate unwraps by following __wrapped__ down to the innermost: stop it here.
            del forward.__wrapped__
            vars(forward)["__signature__"] = inspect.signature(original)
            self._function = forward
        return self._function

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make a function of their own.
        return vars(self) | {"_function": None}

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.__self__).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(self.original, *args, **kwargs)
        handle = self._handle
        if handle is None:
            return original()
        # Layers inside may be compiled.
        with translated():
            try:
                return self._run(handle, bind(self.__self__, args, kwargs), self, original)
            except Exception:
                raise
            except BaseException:
                handle.interrupted()
                raise

    @property
    def original(self) -> Callable[..., Any]:
        """What ran before: somebody else's forward on the instance, or the class's."""
        if self.previous is not None:
            return self.previous
        return functools.partial(type(self.__self__).forward, self.__self__)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside, calls are only passed on."""
        handle, self._handle = self._handle, None
        try:
            yield
        finally:
            self._handle = handle

    def release(self) -> None:
        """Puts the earlier forward back.

        Where somebody has wrapped this one since, it stays inside and only passes calls on.
        """
        self._handle = None
        module = self.__self__
        installed = vars(module).get("forward")
        function = getattr(installed, "__func__", None)
        if installed is self or (function is not None and function is self._function):
            if self.previous is None:
                del module.forward
            else:
                module.forward = self.previous


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the class's forward by name, those of its **kwargs included."""
    signature = inspect.signature(type(module).forward)
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)))
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments
