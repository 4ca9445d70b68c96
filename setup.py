"""Build the native kernels, where there is a compiler: the package installs and works without one, only slower.

Everything else is in pyproject.toml. FXQUANT_CFLAGS adds compiler flags (the sanitizers' tests use it).

    _native.abi3.so              the kernels, and the door for Python
    with torch's headers and a C++ compiler (Linux), three:
    libfxquant_kernels.so.1      the kernels
    _native.abi3.so              the door for Python
    libfxquant_ops.so.1          the door for programs without Python: torch.ops.fxquant in C++, AOTInductor's packages
"""

import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
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
TORCH_FLAGS = [
    "-std=c++17",
    "-O2",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-DTORCH_TARGET_VERSION=0x020A000000000000",
]
FOR_TORCH = "-DFXQ_FOR_TORCH"  # what csrc/calls/ reads its arguments as
LEAST_TORCH = (2, 10)  # the first with all of the stable functions that csrc/torch/ calls
LIBRARIES = KERNELS, OPERATORS = "libfxquant_kernels.so.1", "libfxquant_ops.so.1"

EXTRA = os.environ.get("FXQUANT_CFLAGS", "").split()


def find_torch():
    """Return torch's folder where C++ operators can be built against it, else None. To import torch takes long."""
    spec = find_spec("torch") if sys.platform == "linux" and not EXTRA else None
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "include/torch/csrc/stable/ops.h").exists():
        return None
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    return folder if found and tuple(map(int, found.groups())) >= LEAST_TORCH else None


class Build(build_ext):
    """Compiles the files of an extension side by side, and its parts into libraries."""

    def build_extension(self, ext):
        """Build it; the kernels of some instruction sets take a compiler ten seconds each."""
        compile_all, self.libraries_built = self.compiler.compile, False

        def compile_each(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile_each
        self.torch = find_torch()
        doors = self.compile_operators(compile_each) if self.torch else None
        if doors:
            self.link_libraries(ext, doors, compile_each)
        super().build_extension(ext)

    def compile_operators(self, compile_each):
        """Return the object files of the door for programs without Python; None where there is no C++ compiler."""
        compiler = os.environ.get("CXX", "c++").split()
        if shutil.which(compiler[0]) is None:
            return None
        folder = Path(self.build_temp, "torch")
        sources = sorted(map(str, Path("csrc/torch").glob("*.cpp")))
        own, self.compiler.compiler_so = self.compiler.compiler_so, [*compiler, "-fPIC"]
        try:
            flags = [*TORCH_FLAGS, FOR_TORCH, "-isystem", str(self.torch / "include")]
            made = compile_each(sources, output_dir=str(folder), include_dirs=["csrc"], extra_postargs=flags)
        except Exception as error:  # of the compiler: whatever it is, Python's door does without
            self.warn(f"no operators for programs without Python: {error}")
            return None
        finally:
            self.compiler.compiler_so = own
        calls = sorted(map(str, Path("csrc/calls").glob("*.c")))
        return made + compile_each(
            calls, output_dir=str(folder), include_dirs=["csrc"], extra_postargs=[*FLAGS, FOR_TORCH]
        )

    def link_libraries(self, ext, doors, compile_each):
        """Link the kernels and the operators, and leave of the extension what is Python's alone."""
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        core = [path for path in ext.sources if Path(path).parts[1] not in ("python", "calls")]
        objects = compile_each(
            core, output_dir=self.build_temp, include_dirs=ext.include_dirs, extra_postargs=ext.extra_compile_args
        )
        beside = ["-Wl,-rpath,$ORIGIN", str(folder / KERNELS)]
        self.link(folder, KERNELS, objects, ext.extra_link_args)
        torch = [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lstdc++"]
        self.link(folder, OPERATORS, doors, [*beside, *torch, *ext.extra_link_args])
        ext.sources = [path for path in ext.sources if path not in core]
        ext.extra_link_args = [*beside, *ext.extra_link_args]
        self.libraries_built = True

    def link(self, folder, name, objects, flags):
        """Link a shared library, which goes by its file's name."""
        self.compiler.link_shared_object(
            objects, str(folder / name), extra_postargs=[f"-Wl,-soname,{name}", "-Wl,-Bsymbolic", "-s", *flags]
        )

    def copy_extensions_to_source(self):
        """Copy what was built for an installation in place."""
        super().copy_extensions_to_source()
        if not getattr(self, "libraries_built", False):
            return
        for name in LIBRARIES:
            self.copy_file(str(Path(self.build_lib, "fxquant", name)), str(Path("fxquant", name)))

    def get_outputs(self):
        """Return the files that were built."""
        folder = Path(self.build_lib, "fxquant")
        return [*super().get_outputs(), *(str(folder / name) for name in LIBRARIES if (folder / name).exists())]


setup(
    cmdclass={"build_ext": Build},
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
