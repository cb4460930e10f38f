"""Failures half way: of a call, of a write to a file; and all of a model that one could change."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn


class OutOfMemoryError(RuntimeError):
    """What a device would raise."""


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Have the call number `at` of a method raise."""
    real, left = getattr(owner, name), [at]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OutOfMemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def everything(model: nn.Module) -> list[Any]:
    """Modules, attributes, Parameters, their flags and values."""
    modules = [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]
    hooks = [sorted(m._load_state_dict_pre_hooks) for m in model.modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return [modules, hooks, parameters, [(n, v.tolist()) for n, v in model.state_dict().items()]]


class Watched:
    """A file that does something before one of its writes."""

    def __init__(self, file: Any, at: int, then: Callable[[], Any]) -> None:
        self.file, self.left, self.then = file, at, then

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        """Write, and count."""
        self.left -= 1
        if not self.left:
            self.then()
        self.file.write(data)
