"""The order of the inside: imports run down, signatures are short, a call is few frames deep."""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused_lowrank import FusedLoraXSLinear
from fused_lowrank.testing import pinned_plan

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_lowrank"
PARAMETERS = 9  # at most, by position or by name; of public calls, by position
ENTRIES = 15  # of a folder
LINES = 430  # of a file at most
FRAMES = 8  # of ours at most, from a layer's forward to a launch
RIDDLES = ("What", "Who", "Whoever", "Whose")  # as subjects that name nothing

# From the top to the bottom. A module's floor is that of its longest part that is named.
FLOORS = (
    ("files.cli", "integrations"),
    (
        "files.inspection",
        "files.official",
        "files.lora_export",
        "files.lora_parts",
        "files.peft_export",
        "parallel",
        "explain",
    ),
    ("bank",),
    ("files",),
    ("models",),
    ("methods",),
    ("functional", "testing", "context"),
    ("compute",),
    ("config",),
    ("kernels",),
)


def modules() -> dict[str, Path]:
    """module → its file, below `fused_lowrank`, the kernels included."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder == PACKAGE and parts[0] == "kernels":
                continue
            name = prefix + ".".join(part for part in parts if part != "__init__")
            found[name.rstrip(".")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports, anywhere in it: late, and for types alone too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {a.name.removeprefix("fused_lowrank.") for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".") if package else []
                up = up[: len(up) - (node.level - 1)] if node.level > 1 else up
                base = ".".join([*up, *([base] if base else [])])
            elif base.split(".")[0] != "fused_lowrank":
                continue
            else:
                base = base.removeprefix("fused_lowrank").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                named.add(inner if inner in known else base)
    return {other for other in named if other in known and other not in ("", name)}


def graph() -> dict[str, set[str]]:
    """module → those that it imports; the package's own `__init__` left out."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items() if name}


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """The modules that a module imports, directly or not."""
    seen, todo = set(), [start]
    while todo:
        for other in edges.get(todo.pop(), ()):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def test_no_circle_of_imports() -> None:
    """Among modules, late imports and those for types alone included."""
    edges = graph()
    circles = {
        frozenset(other for other in reachable(name, edges) if name in reachable(other, edges))
        for name in edges
        if name in reachable(name, edges)
    }
    assert not circles, sorted(map(sorted, circles))


def floor(module: str) -> int:
    """The floor of a module, 0 at the top."""
    floors = {name: i for i, names in enumerate(FLOORS) for name in names}
    while module not in floors:
        module = module.rpartition(".")[0]
    return floors[module]


def test_imports_run_down() -> None:
    """From a floor to itself or to a lower one."""
    up = [
        f"{name} → {other}"
        for name, others in graph().items()
        for other in others
        if floor(other) < floor(name)
    ]
    assert not up


@pytest.mark.parametrize("room", ["compute", "context", "methods", "models", "files", "bank"])
def test_a_room_is_in_the_order_that_it_says(room: str) -> None:
    """Each module of it imports only those that stand above it in the folder's list."""
    text = (PACKAGE / room / "__init__.py").read_text()
    order: list[str] = []
    for line in text.splitlines():
        if line.startswith("    ") and line[4:5].isalpha():
            order += [name.strip() for name in line[4:22].split(",") if name.strip()]
    for name, others in graph().items():
        if name.startswith(f"{room}."):
            mine = order.index(name.removeprefix(f"{room}."))
            for other in others:
                if other.startswith(f"{room}."):
                    assert order.index(other.removeprefix(f"{room}.")) < mine, f"{name} → {other}"


def test_no_folder_is_full() -> None:
    """Fifteen entries at most, the folder's own file among them."""
    for folder in (PACKAGE, *PACKAGE.rglob("*/")):
        entries = [path for path in folder.iterdir() if path.name != "__pycache__"]
        assert len(entries) <= ENTRIES, folder


def test_no_file_is_long() -> None:
    """Above this a file has two things in it: the later one begins a file of its own."""
    folders = [ROOT / name for name in ("fused_lowrank", "kernels", "tests", "bench", "examples")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert {"kernels/tiles.py", "tests/project/test_structure.py"} <= lengths.keys()
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


def test_the_map_has_every_file() -> None:
    """Below its folder's heading, with the first sentence of its docstring."""
    text = (ROOT / "docs" / "MAP.md").read_text()
    for folder in (
        *("fused_lowrank", "kernels", "bench", "examples", "docs"),
        *("tests/gate", "tests/support"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "__init__.py" and not path.name.startswith("test_"):
                heading = f"## {path.parent.relative_to(ROOT).as_posix()}/\n"
                assert heading in text
                rows = text[text.index(heading) + len(heading) :].split("\n## ")[0]
                said = ast.get_docstring(ast.parse(path.read_text())) or ""
                said = " ".join(said.split("\n\n")[0].split())
                row = re.search(rf"^\| `{re.escape(path.name)}` \| (.+) \|$", rows, re.MULTILINE)
                assert row, path
                assert said.startswith(row[1].replace("\\|", "|")), path


def test_what_tests_share_is_in_support() -> None:
    """No test module is imported: it would be there twice. A folder of tests has tests alone."""
    for path in (ROOT / "tests").rglob("*.py"):
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                named |= {node.module or "", *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        tests = [name for name in named if name.rpartition(".")[2].startswith("test_")]
        assert not tests, path
        if path.parent.name not in ("support", "gate"):
            assert path.name.startswith("test_") or path == ROOT / "tests" / "conftest.py", path
        else:
            assert not path.name.startswith("test_"), path


def signatures() -> list[tuple[str, ast.FunctionDef]]:
    """Every function in fused_lowrank/ that is not the body of a library op."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
                if "custom_op(" not in decorators:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node))
    return found


def test_no_signature_is_long() -> None:
    """Nine parameters at most; those that can be given by name alone are counted apart."""
    long = []
    for name, node in signatures():
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        if len([a for a in positional if a.arg not in ("self", "cls", "ctx")]) > PARAMETERS:
            long.append(name)
    assert not long


@pytest.mark.parametrize("training", [False, True])
def test_a_call_is_few_frames_deep(
    training: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the layer's forward to the kernel's launch, and its plan is asked for once."""
    pytest.importorskip("triton")
    from fused_lowrank.compute import choose, run
    from fused_lowrank.kernels import shrink

    depths, asked = [], []

    def launched(*args, **kwargs):
        frame, ours = sys._getframe(), 0
        while frame is not None:
            ours += (
                "fused_lowrank" in frame.f_code.co_filename
                or str(ROOT / "kernels") in frame.f_code.co_filename
            )
            frame = frame.f_back
        depths.append(ours)
        raise StopIteration

    original = choose.choose
    monkeypatch.setattr(run.choose, "choose", lambda *args: asked.append(args) or original(*args))
    for kernel in shrink.KERNELS.values():
        monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: launched, raising=False)
    layer = FusedLoraXSLinear(96, 64, r=8, device=device)
    x = torch.randn(5, 3, 96, device=device, requires_grad=training)
    with pinned_plan("split"), torch.set_grad_enabled(training), pytest.raises(StopIteration):
        layer(x)
    assert len(depths) == len(asked) == 1
    assert depths[0] <= FRAMES


def docstrings() -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring in the package, the kernels and the benchmarks."""
    for folder in (PACKAGE, ROOT / "kernels", ROOT / "bench"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    line = getattr(node, "lineno", 1)
                    if text := ast.get_docstring(node):
                        yield f"{path.relative_to(ROOT)}:{line}", text


def test_docstrings_begin_with_a_thing() -> None:
    """The first sentence names something in the code, or says what a function does to it."""
    found = list(docstrings())
    assert len(found) > 1000  # the files are where this looks for them
    assert not [f"{place}: {text}" for place, text in found if text.split()[0] in RIDDLES]


def test_public_calls_keep_their_names() -> None:
    """What users of `lowrank_linear` may write stays as it is."""
    from fused_lowrank import lowrank_linear

    assert list(inspect.signature(lowrank_linear).parameters) == [
        *("x", "weight", "down", "core", "up", "bias"),
        *("scale", "dropout_p", "training", "impl", "seed", "gain"),
    ]


def test_no_module_of_the_bank_reaches_into_another() -> None:
    """A private name is used in the module that defines it; torch's own names are not ours."""
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items()}
    defined = {name: set(private_names(tree)) for name, tree in trees.items()}
    reached = []
    for name, tree in trees.items():
        if name.split(".")[0] != "bank":
            continue
        others = set().union(*(names for other, names in defined.items() if other != name))
        for node in ast.walk(tree):
            used = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                used = [node.attr]
            reached += [f"{name}: {use}" for use in used if use in others - defined[name]]
    assert not reached


def private_names(tree: ast.Module) -> Iterator[str]:
    """The names with one underscore in front that a module gives to what it makes."""
    for node in ast.walk(tree):
        named = ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named = node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            named = node.attr if ast.unparse(node.value) == "self" else ""
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            named = node.id
        if named.startswith("_") and not named.startswith("__") and named != "_":
            yield named
