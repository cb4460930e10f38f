"""What importing does and does not do, each in a fresh process."""

import os
import subprocess
import sys
import textwrap

NO_TRITON = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    import importlib.util
    find_spec = importlib.util.find_spec
    def hidden(name, package=None):
        return None if name.partition(".")[0] == "triton" else find_spec(name, package)
    importlib.util.find_spec = hidden
"""


def run(code: str) -> str:
    """The output of a Python program; fails with its error."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_initialises_no_gpu_and_no_triton() -> None:
    """Neither CUDA nor Triton is touched, nor what integrations are with."""
    out = run(
        """
        import sys, torch

        def forbidden(*args, **kwargs):
            raise AssertionError("a GPU was asked for")

        torch.cuda.is_available = torch.cuda.get_device_capability = forbidden
        torch._C._cuda_init = forbidden
        import fused_lowrank
        print(torch.cuda.is_initialized(), *(name in sys.modules for name in ("triton", "peft")))
        """
    )
    assert out.split() == ["False", "False", "False"]


def test_works_without_triton() -> None:
    """Layers train through aten; asking for the kernels says what is missing."""
    out = run(
        textwrap.dedent(NO_TRITON)
        + textwrap.dedent(
            """
            import torch, fused_lowrank
            for name in ("FusedLoraXSLinear", "FusedLoraMiniLinear", "FusedLoraLinear"):
                layer = getattr(fused_lowrank, name)(80, 70, r=4)
                layer(torch.randn(3, 80)).sum().backward()
                print(sum(p.grad is not None for p in layer.parameters()))
            one = torch.ones(1, 1)
            try:
                fused_lowrank.lowrank_linear(one, one, one, one, one, impl="triton")
            except RuntimeError as error:
                print(error)
            """
        )
    )
    *counts, error = out.splitlines()
    assert counts == ["1", "2", "2"]
    assert "Triton is not installed" in error


def test_kernels_are_the_top_level_folder_under_their_own_name() -> None:
    """`fused_lowrank.kernels.shrink` lies in kernels/; by its bare name the folder is empty."""
    out = run(
        """
        import sys
        from pathlib import Path
        import fused_lowrank.kernels.shrink as shrink
        folder = Path(shrink.__file__).parent
        print(folder.name, shrink.__name__)
        sys.path.insert(0, str(folder.parent))
        import kernels
        try:
            import kernels.shrink
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert out.splitlines() == [
        "kernels fused_lowrank.kernels.shrink",
        "No module named 'kernels.shrink'",
    ]
