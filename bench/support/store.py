"""Results files: JSON lines, each flushed at once, under the key of what was measured where.

header   the schema and the key: device, versions, commit, a digest of the code
case     one case and the rows of its providers, measured together: whole or not there
block    one figure of the whole-step benchmark
host     the host's time of one call, of a plan or of a layer without one
ceiling  the device's measured bandwidth and matrix rates
end      how many lines there are: without it as the last line the file was cut off
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fused_lowrank.compute.devices import HAS_TRITON

SCHEMA = 2
ROOT = Path(__file__).resolve().parents[2]
KEY = ("device", "driver", "threads", "python", "torch", "triton", "commit", "dirty", "code")
SUPPORT = (
    "cases",
    "bases",
    "tensors",
    "providers",
    "timers",
    "harness",
    "bank_cases",
    "bank_providers",
)
MEASURING = ("block", "bank", *(f"support/{name}" for name in SUPPORT))
BANK_PREFIX = "bank-"  # of the names of files about mixed batches
HOST_PREFIX = "host-"  # and about the host's time of each plan
CODE = ("fused_lowrank", "kernels", *(f"bench/{name}.py" for name in MEASURING))
Line = dict[str, Any]


class Refused(Exception):
    """A results file that must not be used; the text says why."""


def command_output(*command: str) -> str:
    """The output of a command, or "" where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def code_digest() -> str:
    """A digest of the measured and the measuring code."""
    digest = hashlib.sha256()
    for entry in CODE:
        path = ROOT / entry
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """The processor's name."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def make_key(device: torch.device) -> Line:
    """The key of a measurement. BENCH_COMMIT names the commit where there is no git."""
    gpu = device.type == "cuda"
    triton_version = "absent"
    if HAS_TRITON:
        import triton

        triton_version = triton.__version__
    driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = os.environ.get("BENCH_COMMIT") or command_output("git", "rev-parse", "HEAD")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "driver": driver.splitlines()[0] if gpu and driver else "none",
        "threads": 0 if gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit[:12] or "unknown",
        "dirty": bool(command_output("git", "status", "--porcelain", "--", *CODE)),
        "code": code_digest(),
    }


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def key_id(key: Line) -> str:
    """A short name of a key, which every line carries."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


class Store:
    """A results file that is being written."""

    def __init__(self, path: Path, key: Line, lines: list[Line]) -> None:
        self.path, self.key, self.lines, self.id = path, key, lines, key_id(key)

    @classmethod
    def new(cls, folder: Path, key: Line, prefix: str = "") -> Store:
        """A new file in `folder`, numbered after those with the same key and prefix."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{prefix}{slug(key['device'])}-{key['code']}"
        number = 1
        while (path := folder / f"{stem}-{number}.jsonl").exists():
            number += 1
        store = cls(path, key, [])
        store.add({"kind": "header", "schema": SCHEMA, "key": key})
        return store

    @classmethod
    def resume(cls, folder: Path, key: Line, prefix: str = "") -> Store | None:
        """The latest file in `folder` with this key, less a torn last line; None if there is none.

        Raises Refused if the code is the same and something else in the key is not.
        """
        files = sorted(
            folder.glob(f"{prefix}{slug(key['device'])}-{key['code']}-*.jsonl"),
            key=lambda path: int(path.stem.rsplit("-", 1)[1]),
        )
        if not files:
            return None
        path = files[-1]
        lines, whole = parse(path)
        if whole < path.stat().st_size:
            with path.open("rb+") as file:
                file.truncate(whole)
        if not lines:
            return None
        there = lines[0].get("key", {})
        # A commit that leaves the measured code as it was does not part a run.
        changed = [k for k in KEY if k not in ("commit", "dirty") and there.get(k) != key.get(k)]
        if changed:
            said = ", ".join(f"{k} {there.get(k)!r} is now {key.get(k)!r}" for k in changed)
            raise Refused(f"{path.name} cannot be resumed: {said}")
        return cls(path, there, lines)

    def add(self, line: Line) -> None:
        """Append a line, at once and whole."""
        line = {**line, "run": self.id}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def end(self, missing: int) -> None:
        """Say that nothing is torn; `missing` cases were not reached."""
        self.add({"kind": "end", "lines": len(self.lines), "missing": missing})

    def measured(self, name: str) -> set[str]:
        """The providers that a case has rows of."""
        return {
            row["provider"]
            for line in self.lines
            if line["kind"] == "case" and line["case"] == name
            for row in line["rows"]
        }


def parse(path: Path) -> tuple[list[Line], int]:
    """The whole lines at the start of a file, and how many bytes they take."""
    lines, whole = [], 0
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
        whole += len(raw)
    return lines, whole


def read(path: Path) -> tuple[Line, list[Line]]:
    """(key, lines) of a finished file. Raises Refused for any other."""
    lines, whole = parse(path)
    if whole < path.stat().st_size or not lines:
        raise Refused(f"{path.name} is truncated or no results file, after {len(lines)} lines")
    head = lines[0]
    if head.get("kind") != "header" or head.get("schema") != SCHEMA:
        raise Refused(f"{path.name} has schema {head.get('schema')!r}: this code reads {SCHEMA}")
    if missing := [name for name in KEY if name not in head.get("key", {})]:
        raise Refused(f"{path.name} does not say its {', '.join(missing)}")
    last = lines[-1]
    if last.get("kind") != "end" or last.get("lines") != len(lines) - 1:
        raise Refused(f"{path.name} was cut off: finish it with run.py --resume, or --close it")
    for i, line in enumerate(lines, 1):
        if line.get("run") != key_id(head["key"]):
            raise Refused(f"{path.name}:{i} is of another run: files are not mixed")
    return head["key"], lines
