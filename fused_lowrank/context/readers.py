"""Layers whose weights a model reads instead of calling them: an adapter on one would do nothing.

`readers` finds them in the model's own code. torch's encoder layers, whose fast path is such a
reader, are kept off it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

# What says something of a weight without being a product with it.
HARMLESS = {
    *("dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_cuda", "is_meta"),
    *("size", "dim", "numel", "itemsize", "element_size", "data_ptr", "is_floating_point"),
}
KNOWN = (
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop),
    *(ast.Attribute, ast.Name, ast.Constant, ast.expr_context),
)
# What gives a layer's parameters, and what takes them on; `weight` is the first of them.
GIVING = {"_parameters", "named_parameters", "parameters", "state_dict"}
TAKING = {"dict", "list", "tuple", "iter", "next"}
ASKING = {"isinstance", "hasattr", "getattr", "type", "id"}


class Read(NamedTuple):
    """A place in a method at which the weight of a submodule is read."""

    path: str  # of the submodule, from the method's own
    conditions: tuple[tuple[Any, bool], ...]  # code of the module's attributes, and what it must be


class Method(NamedTuple):
    """The uses that a method makes of its module's attributes."""

    reads: tuple[Read, ...] = ()
    names: frozenset[str] = frozenset()  # of those it mentions, methods among them
    outside: frozenset[tuple[str, str]] = frozenset()  # submodules, and attributes of theirs
    uses_weights: bool = True  # whether it computes with anybody's; True where it is not known


def readers(model: nn.Module) -> dict[int, str]:
    """The places where the model's code reads a linear layer's weight, by the layer's id."""
    found: dict[int, str] = {}
    # torch's own call their layers, or are known: see `never_called` and below.
    modules = [m for m in model.modules() if not type(m).__module__.startswith("torch.")]
    called = called_methods(modules)
    by_class: dict[type[nn.Module], list[tuple[str, Method]]] = {}
    for module in modules:
        kind = type(module)
        for where, method in methods_in_use(module, called[kind], by_class):
            for read in method.reads:
                try:
                    layer = module.get_submodule(read.path)
                except AttributeError:
                    continue
                if all(holds(code, module) in (wanted, None) for code, wanted in read.conditions):
                    found.setdefault(id(layer), f"{kind.__name__}.{where}")
    return found


def called_methods(modules: Sequence[nn.Module]) -> dict[type[nn.Module], set[str]]:
    """The methods of each class called from outside: forward, and those that a method in use names,
    of a submodule.
    """
    called: dict[type[nn.Module], set[str]] = {type(module): {"forward"} for module in modules}
    before = 0
    while before != (before := sum(map(len, called.values()))):
        by_class: dict[type[nn.Module], list[tuple[str, Method]]] = {}
        for module in modules:
            for _, method in methods_in_use(module, called[type(module)], by_class):
                for path, name in method.outside:
                    try:
                        kind = type(module.get_submodule(path))
                    except AttributeError:
                        continue
                    if kind in called and inspect.isfunction(getattr(kind, name, None)):
                        called[kind].add(name)
    return called


def methods_in_use(
    module: nn.Module,
    called: Iterable[str],
    by_class: dict[type[nn.Module], list[tuple[str, Method]]],
) -> list[tuple[str, Method]]:
    """The methods `called`, and those that they use, by name; one list for each class, unless a
    module has methods of its own.
    """
    if any(hasattr(value, "__func__") for value in vars(module).values()):
        return list(methods_from(module, called))
    kind = type(module)
    if kind not in by_class:
        by_class[kind] = list(methods_from(module, called))
    return by_class[kind]


def methods_from(module: nn.Module, called: Iterable[str]) -> Iterator[tuple[str, Method]]:
    """The methods of these names, and those that they use, with their names."""
    seen, coming = set(), sorted(called)
    while coming:
        name = coming.pop()
        own = getattr(vars(module).get(name), "__func__", None)
        function = own or inspect.getattr_static(type(module), name, None)
        if name in seen or not inspect.isfunction(function):
            continue
        seen.add(name)
        method = method_of(inspect.unwrap(function).__code__)
        yield name, method
        coming += method.names


@functools.cache
def method_of(code: CodeType) -> Method:
    """The uses that a method's source shows; nothing where there is no source."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return Method()
    if not isinstance(tree, ast.FunctionDef):
        return Method()
    own = tree.args.args[0].arg if tree.args.args else ""
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    reads, names, outside, uses_weights = [], set(), set(), False
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            uses_weights |= uses(node, above)
        if isinstance(node, ast.Call | ast.Attribute) and (path := taken_from(node, above, own)):
            reads.append(Read(".".join(path), tuple(conditions_above(node, above, own))))
            uses_weights = True
        match chain_of(node, own):
            case [name]:
                names.add(name)
            case [*path, "weight"] if path and uses(node, above):
                conditions = tuple(conditions_above(node, above, own))
                reads.append(Read(".".join(path), conditions))
            case [*path, name] if path:
                outside.add((".".join(path), name))
    return Method(tuple(reads), frozenset(names), frozenset(outside), uses_weights)


@functools.cache
def reads_only(code: CodeType, names: frozenset[str]) -> bool:
    """Whether a method of one argument reads nothing of its module but these attributes.

    False where there is no source, or where the module itself is passed on.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    more = code.co_kwonlyargcount or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    # Of variables around it only what `super()` has.
    if code.co_argcount != 2 or more or code.co_freevars not in ((), ("__class__",)):
        return False
    own = code.co_varnames[0]
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == own:
            user: Any = above[node]
            read = isinstance(user, ast.Attribute) and isinstance(user.ctx, ast.Load)
            if not read or user.attr not in names:
                return False
    return True


def chain_of(node: ast.AST, own: str) -> list[str]:
    """["a", "b"] of `self.a.b`."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return names[::-1] if isinstance(node, ast.Name) and node.id == own else []


def taken_from(node: Any, above: dict[ast.AST, Any], own: str) -> list[str]:
    """The submodule of whose weight something is computed there, if not by `layer.weight`.

    That is `Class.forward(layer, x)`, `getattr(layer, "weight")`, or one of its parameters, such as
    `layer._parameters["weight"]` or `next(layer.parameters())`.
    """
    match node:
        case ast.Call(func=ast.Attribute(attr="forward", value=value), args=[layer, *_]):
            mine = chain_of(value, own) or (isinstance(value, ast.Name) and value.id == own)
            return [] if mine else chain_of(layer, own)
        case ast.Call(func=ast.Name(id="getattr"), args=[layer, ast.Constant(value="weight"), *_]):
            return chain_of(layer, own) if uses(node, above) else []
        case ast.Attribute(attr=attr) if attr in GIVING:
            weight = weight_of(node, above)
            return chain_of(node, own)[:-1] if weight and uses(weight, above) else []
    return []


def weight_of(node: Any, above: dict[ast.AST, Any]) -> Any:
    """The expression that takes the weight of what gives a layer's parameters; or None."""
    weight = None
    while True:
        match above[node]:
            case ast.Subscript(value=value, slice=ast.Constant(value="weight" | 0)) if (
                value is node
            ):
                weight = above[node]
            case ast.Call(func=ast.Name(id=name)) if name in TAKING:
                weight = above[node] if name == "next" else None
            case ast.Call(func=function) if function is node:
                pass
            case _:
                return weight
        node = above[node]


def uses(node: Any, above: dict[ast.AST, Any]) -> bool:
    """Whether the values of a weight that is named there are used."""
    user = above[node]
    read = isinstance(getattr(node, "ctx", None), ast.Load | None)  # a call has none
    if not read or isinstance(user, ast.Compare):
        return False
    if isinstance(user, ast.Attribute):
        return uses(user, above) if user.attr == "data" else user.attr not in HARMLESS
    if isinstance(user, ast.Call):
        return not (isinstance(user.func, ast.Name) and user.func.id in ASKING)
    return True


def conditions_above(
    node: ast.AST, above: dict[ast.AST, Any], own: str
) -> Iterator[tuple[Any, bool]]:
    """The conditions that a node is under and that the module's attributes decide."""
    user: Any
    while (user := above.get(node)) is not None:
        either = isinstance(user, ast.If | ast.IfExp) and node is not user.test
        if either and is_decided(user.test, own):
            body = user.body if isinstance(user.body, list) else [user.body]
            parameters = ast.arguments([], [ast.arg(own)], None, [], [], None, [])
            function = ast.Expression(ast.Lambda(parameters, user.test))
            code = compile(ast.fix_missing_locations(function), "<condition>", "eval")
            yield code, node in body
        node = user


def is_decided(test: ast.AST, own: str) -> bool:
    """Whether a condition is of the module's attributes and constants alone; not of its mode."""
    for part in ast.walk(test):
        if not isinstance(part, KNOWN) or (isinstance(part, ast.Name) and part.id != own):
            return False
        if isinstance(part, ast.Attribute) and part.attr == "training":
            return False
    return True


def holds(code: Any, module: nn.Module) -> bool | None:
    """Whether a condition holds for a module; None if it cannot be said."""
    try:
        return bool(eval(code)(module))
    except Exception:
        return None


# --- torch's encoder fast path ---


def leave_fast_paths(model: nn.Module, adapted: type[nn.Module]) -> None:
    """Make torch's encoder fast path, which reads linear1 and linear2 by their weights, unreachable
    in encoder layers with an adapted layer, of that class; `restore_fast_paths` undoes it.
    """
    for module in model.modules():
        if "_lowrank_fast_path" in vars(module):
            continue
        inside = any(isinstance(child, adapted) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            vars(module)["_lowrank_fast_path"] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and inside:
            vars(module)["_lowrank_fast_path"] = module.use_nested_tensor
            module.use_nested_tensor = False


def restore_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths`."""
    for module in model.modules():
        if "_lowrank_fast_path" in vars(module):
            layer = isinstance(module, nn.TransformerEncoderLayer)
            name = "activation_relu_or_gelu" if layer else "use_nested_tensor"
            setattr(module, name, vars(module).pop("_lowrank_fast_path"))
