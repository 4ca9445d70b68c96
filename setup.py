"""Build the native kernels, where there is a compiler: the package installs and works without one, only slower.

Everything else is in pyproject.toml. FXQUANT_CFLAGS adds compiler flags (the sanitizers' tests use it).
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.c"))
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


class ParallelBuild(build_ext):
    """Compiles the files of an extension side by side."""

    def build_extension(self, ext):
        """Build it; the kernels of some instruction sets take a compiler ten seconds each."""
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile_each
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": ParallelBuild},
    ext_modules=[
        Extension(
            "fxquant._native",
            SOURCES,
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            include_dirs=["csrc"],
            extra_compile_args=FLAGS + EXTRA,
            extra_link_args=["-pthread", "-lm", *(["-ldl"] if sys.platform == "linux" else []), *EXTRA],
            py_limited_api=True,
            optional=True,
        )
    ]
    if sys.platform != "win32"  # the kernels are written for gcc and clang
    else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
