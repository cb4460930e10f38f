"""The wheel holds the kernels under fused_lowrank.kernels, without the checkout's signpost."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_wheel(tmp_path: Path) -> None:
    """Built from a copy of the sources and unpacked elsewhere, it imports from there alone."""
    pytest.importorskip("setuptools", minversion="77")
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("fused_lowrank", "kernels"):
        shutil.copytree(
            ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, sources)
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('..'))"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=sources, capture_output=True, text=True, check=True
    )
    wheel = zipfile.ZipFile(tmp_path / built.stdout.splitlines()[-1])
    assert not any(name.startswith("kernels/") for name in wheel.namelist())
    site = tmp_path / "site"
    wheel.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import fused_lowrank, fused_lowrank.kernels.gemm_tail as kernel\n"
        "print(fused_lowrank.__file__); print(kernel.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    package, kernel = out.stdout.splitlines()
    assert package == str(site / "fused_lowrank" / "__init__.py")
    assert kernel == str(site / "fused_lowrank" / "kernels" / "gemm_tail.py")
