"""`parse` reads a kernel's TTGIR, as Triton prints it, into a tree of operations.

It knows how a line is built (results, name, operands, attributes, types, location) and how regions
nest; what an operation means is `ttgir_values`, `ttgir_global` and `ttgir_shared`' part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LOCATION = re.compile(r"\s*\bloc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
RESULTS = re.compile(r"^(%[\w$.-]+(?::\d+)?(?:, %[\w$.-]+(?::\d+)?)*) = ")
VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
ATTRIBUTES = re.compile(r"(?:^|\s)<?\{([^{}]*)\}>?")
ASSEMBLY = re.compile(r'"((?:[^"\\]|\\.)*)"')
SHAPED = re.compile(r"(tensor|memdesc|tensordesc)<((?:\d+x)*)(!tt\.ptr<\w+>|\w+)(?:, (.*))?>$")


@dataclass(frozen=True)
class Type:
    """A type: what kind, its shape (of tensors and of shared memory), its elements, its layout."""

    kind: str  # "scalar", "pointer", "tensor", "memdesc" or "tensordesc"
    shape: tuple[int, ...]
    element: str  # as MLIR calls it: bf16, f32, i32, i1, index; of a pointer, what it points to
    layout: str = ""


@dataclass
class Region:
    """Operations, the names that they are given, and what stands before the brace."""

    title: str
    arguments: list[str]
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """A line of TTGIR, and the regions that belong to it."""

    name: str
    results: list[str]  # each by the name that its readers use: "%a:2" gives "%a#0" and "%a#1"
    operands: list[str]
    head: str  # between the name and the types, without attributes and assembly
    attributes: str
    assembly: str
    types: str
    line: int
    location: str
    regions: list[Region] = field(default_factory=list)

    def number(self, name: str) -> int:
        """The integer attribute `name`."""
        found = re.search(rf"\b{name} = (-?\d+)", self.attributes)
        assert found, f"{self.name} without {name}: line {self.line}"
        return int(found[1])

    def numbers(self, name: str) -> list[int]:
        """The attribute `name`, an array of integers."""
        found = re.search(rf"\b{name} = array<i\d+: ([^>]*)>", self.attributes)
        assert found, f"{self.name} without {name}: line {self.line}"
        return [int(number) for number in found[1].split(",")]

    def literals(self) -> list[int]:
        """The integers that stand among the operands."""
        return [int(number) for number in re.findall(r"(?<![\w%#.])-?\d+(?![\w.])", self.head)]


@dataclass
class Function:
    """A kernel: its parameters with their types, in their order, and what it does."""

    name: str
    parameters: dict[str, Type]
    divisible: dict[str, int]  # what the compiler was promised to divide a parameter
    operations: list[Operation]
    aliases: dict[str, str]  # of layouts and locations
    types: dict[str, Type] = field(default_factory=dict)  # by how they are written

    def source(self, location: str, caller: bool = False) -> str:
        """Where in the kernel's source a location is, or nothing: file and line.

        Of what a function does that is called, it is that function's own, or its first caller's.
        """
        for _ in range(20):
            if found := re.search(r'"([^"]*\.py)":(\d+):(\d+)', location):
                place = found[1].rsplit("/", 1)[-1], *found.groups()[1 : 3 if caller else 2]
                return ":".join(place)
            aliases = re.findall(r"#loc\d*", location)
            if not aliases:
                break
            location = self.aliases.get(aliases[-1 if caller else 0], "")
        return ""

    def type_of(self, text: str) -> Type:
        """The type that is written so: one object for each."""
        found = self.types.get(text)
        if found is None:
            found = self.types[text] = self.read_type(text.strip())
        return found

    def read_type(self, text: str) -> Type:
        if found := re.fullmatch(r"!tt\.tensordesc<(tensor<.*>)>", text):
            inner = self.type_of(found[1])
            return Type("tensordesc", inner.shape, inner.element, inner.layout)
        if found := re.fullmatch(r"!tt\.ptr<(\w+)>", text):
            return Type("pointer", (), found[1])
        if found := SHAPED.search(re.sub(r"^!\w+\.", "", text)):
            shape = tuple(int(size) for size in found[2].split("x") if size)
            layout = re.match(r"#\w+(?:\.\w+<\{.*?\}>)?", found[4] or "")
            name = layout[0] if layout else ""
            return Type(found[1], shape, found[3], self.aliases.get(name, name))
        if not re.fullmatch(r"\w+", text):
            raise NotImplementedError(f"ttgir type {text}: add it to tests/support/ttgir_parse.py")
        return Type("scalar", (), text)

    def result_type(self, operation: Operation) -> Type:
        """The type of the operation's one result, or of all of them if they have the same."""
        text = re.split(r"->| to ", operation.types)[-1].strip()
        return self.type_of(split_types(text.strip("()"))[0])

    def operand_types(self, operation: Operation) -> list[Type]:
        """The types of the operands, where the operation names each of them."""
        text = re.split(r"->| to ", operation.types)[0].strip()
        if text.startswith("(") and text.endswith(")"):
            text = text[1:-1]
        text = text.replace(" * ", ", ")
        return [self.type_of(part) for part in split_types(text)]


def split_types(text: str) -> list[str]:
    """What commas separate, outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        if letter in "<({[":
            depth += 1
        elif letter in ")}]" or (letter == ">" and text[at - 1] != "-"):
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def cut(line: str) -> tuple[str, str]:
    """(the line without locations, the last of these)."""
    found = LOCATION.findall(line)
    return LOCATION.sub("", line).strip(), found[-1].strip() if found else ""


def operation_of(text: str, line: int, location: str) -> Operation:
    """The operation that a line without its location describes."""
    results: list[str] = []
    if found := RESULTS.match(text):
        text = text[found.end() :]
        for part in found[1].split(", "):
            name, _, many = part.partition(":")
            results += [f"{name}#{i}" for i in range(int(many))] if many else [name]
    name, _, rest = text.partition(" ")
    if "(" in name:  # without a space: ttg.warp_specialize(%a) and scf.while (%a) alike
        name, bracket, more = text.partition("(")
        name, rest = name.strip('"'), bracket + more
    assembly = ""
    if name == "tt.elementwise_inline_asm":
        found = ASSEMBLY.search(rest)
        assembly = re.sub(r"\\([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), found[1])
        rest = rest[: found.start()] + rest[found.end() :]
    rest = rest.removesuffix("{").rstrip()
    attributes = ATTRIBUTES.search(rest)
    if attributes:
        rest = rest[: attributes.start()] + rest[attributes.end() :]
    head, _, types = (
        f"{rest} ".partition(" : ") if not rest.startswith(": ") else ("", "", rest[2:])
    )
    return Operation(
        name,
        results,
        VALUE.findall(head),
        head.strip(),
        attributes[1] if attributes else "",
        assembly,
        types.strip(),
        line,
        location,
    )


class Reader:
    """The lines of a function's body, one after the other."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        self.at = 0

    def region(self, region: Region) -> str:
        """Fill the region; the line that ends it."""
        while True:
            text, location = cut(self.lines[self.at])
            number = self.at + 1
            self.at += 1
            if text.startswith("}"):
                return text
            if not text or text.startswith("//"):
                continue
            if text.startswith("^"):
                if region.operations:
                    raise NotImplementedError(f"line {number}: blocks of a region that branch")
                region.arguments = VALUE.findall(text)
                continue
            title = re.match(r"(default|partition\d+)\b", text)
            if title:  # a region of the operation before, ttg.warp_specialize
                owner = region.operations[-1]
                inner = Region(title[0], VALUE.findall(text))
                owner.regions.append(inner)
                self.region(inner)
                continue
            operation = operation_of(text, number, location)
            region.operations.append(operation)
            end = text
            while end.endswith("{"):
                title = {"} else {": "else", "} do {": "do"}.get(end, "")
                inner = Region(title, [])
                operation.regions.append(inner)
                end = self.region(inner)
            if end.startswith("}) : "):  # the types of an operation whose region is an operand
                operation.types = end.removeprefix("}) : ")


def parse(text: str) -> Function:
    """The one kernel in a module's text."""
    lines = text.splitlines()
    aliases = {}
    start = None
    for at, line in enumerate(lines):
        if found := re.match(r"(#\w+) = (.*)", line):
            aliases[found[1]] = found[2]
        elif "tt.func public" in line and start is None:
            start = at
    assert start is not None, "no kernel in this text"
    header, _ = cut(lines[start])
    name = re.search(r"@([\w$.]+)\(", header)[1]
    function = Function(name, {}, {}, [], aliases)
    inside = header[
        header.index("(") + 1 : header.rindex(") attributes" if ") attributes" in header else ")")
    ]
    for part in split_types(inside):
        parameter, _, kind = part.partition(": ")
        kind, brace, promised = kind.partition(" {")
        function.parameters[parameter] = function.type_of(kind)
        if divisor := re.search(r"tt\.divisibility = (\d+)", brace + promised):
            function.divisible[parameter] = int(divisor[1])
    body = Region("", [])
    reader = Reader(lines)
    reader.at = start + 1
    reader.region(body)
    function.operations = body.operations
    return function
