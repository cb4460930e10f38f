"""Maps the top-level folder `kernels/` to the subpackage `fused_lowrank.kernels`.

Everything else is in pyproject.toml; a mapping of one package into another's name can only be said
here. The checkout has a signpost at fused_lowrank/kernels/__init__.py, which a wheel replaces by
kernels/__init__.py.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fused_lowrank", "fused_lowrank.*"])],
    package_dir={"fused_lowrank": "fused_lowrank", "fused_lowrank.kernels": "kernels"},
)
