"""Build the native kernels, where there is a compiler: the package installs and works without one, only slower.

Everything else is in pyproject.toml. FXQUANT_CFLAGS adds compiler flags (the sanitizers' tests use it).
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.c"))
FLAGS = [
    "-std=c11",
    "-O3",
    "-ffp-contract=off",  # a fused multiply-add would give other bits than the reference
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
]

EXTRA = os.environ.get("FXQUANT_CFLAGS", "").split()

setup(
    ext_modules=[
        Extension(
            "fxquant._native",
            SOURCES,
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            extra_compile_args=FLAGS + EXTRA,
            extra_link_args=["-pthread", "-lm", *EXTRA],
            py_limited_api=True,
            optional=True,
        )
    ]
    if sys.platform != "win32"  # the kernels are written for gcc and clang
    else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
