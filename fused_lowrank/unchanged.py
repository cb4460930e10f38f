"""A failure half way leaves a model as it was."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was if anything is raised: its modules, their attributes and hooks,
    their Parameters and which of them are trained.

    Values of tensors are not kept: `values_unchanged_on_error` does that.
    """
    modules = [(module, attributes_of(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            put_back(module, attributes)
        for parameter, required in trained:
            parameter.requires_grad_(required)
        raise


@contextmanager
def values_unchanged_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors their values back if anything is raised; copies of them are made beforehand."""
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def attributes_of(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """(name, value, what is in it) of all attributes, Parameters and submodules among them."""
    return [(name, value, contents_of(value)) for name, value in vars(module).items()]


def contents_of(value: Any) -> Any:
    """A copy of a container, whatever its class; None of anything else."""
    kind = next((kind for kind in CONTAINERS if isinstance(value, kind)), None)
    return None if kind is None else kind(value)


def put_back(module: nn.Module, attributes: list[tuple[str, Any, Any]]) -> None:
    """Undo what has changed; what has not is not touched, for other threads may read it."""
    own = vars(module)
    for name in own.keys() - {name for name, *_ in attributes}:
        del own[name]
    for name, value, contents in attributes:
        own[name] = value
        if contents is None or is_alike(value, contents):
            continue
        if isinstance(value, list):
            value[:] = contents
        else:
            value.clear()
            value.update(contents)


def is_alike(container: Any, contents: Any) -> bool:
    """Whether the very same objects are in it, in the same order."""
    if isinstance(container, set):
        return bool(container == contents)
    if isinstance(container, dict):
        if list(container) != list(contents):
            return False
        container, contents = container.values(), contents.values()
    return len(container) == len(contents) and all(map(operator.is_, container, contents))
