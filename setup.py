"""Builds the C++ replay sampler; everything else about the package is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

HEADERS = sorted(str(header) for header in Path("csrc").glob("*.h"))

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_lpr._replay_sampler",
            ["csrc/bindings.cpp"],
            include_dirs=["csrc"],
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ]
)
