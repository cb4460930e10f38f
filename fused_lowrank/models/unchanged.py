"""A failure half way leaves a model as it was."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, list, set)


class Snapshot:
    """A model's modules, their attributes and hooks, their Parameters, and which of those are
    trained; not the values of tensors, which `values_unchanged_on_error` keeps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, attributes_of(module)) for module in model.modules()]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Make the model what it was."""
        for module, attributes in self.modules:
            put_back(module, attributes)
        for parameter, required in self.trained:
            parameter.requires_grad_(required)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was, as far as a `Snapshot` has it, if anything is raised."""
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
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
