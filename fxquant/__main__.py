"""`python -m fxquant`: what runs here, and whether each operator is right. Exits 1 where one is not."""

from __future__ import annotations

import platform
import sys
import time

import safetensors
import torch
from tabulate import tabulate

from fxquant import __version__, kernel_info
from fxquant.selftest import try_operators


def main() -> int:
    """Write what was found to standard output; return 0 where every operator is right."""
    began = time.perf_counter()
    tried = [try_operators()]
    headers = ["operator", "on this machine"]
    if torch.cuda.is_available():
        tried.append(try_operators(torch.device("cuda", torch.cuda.current_device()), on_gpu=True))
        headers.append("on its GPU")
    seconds = time.perf_counter() - began
    rows = [(of_one[0].name, *map(str, of_one)) for of_one in zip(*tried, strict=True)]
    versions = f"fxquant {__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}"
    wrong = [each[0].name for each in zip(*tried, strict=True) if any(one.wrong for one in each)]
    verdict = f"wrong: {', '.join(wrong)}; please report this with the lines above" if wrong else "all are right"
    lines = (
        f"{versions}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        str(kernel_info()),
        "",
        tabulate(rows, headers=headers),
        "",
        f"{verdict} ({seconds:.1f} s)",
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
