"""The command: `make` writes the fixture, `check` compares with it. Native and reference run in two processes."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

import fxquant
from tests.golden import cases
from tests.old_files import by_format

SETTINGS = {"native": "1", "reference": "0"}
"""What FXQUANT_NATIVE is in each of the processes; the native one goes through all instruction sets."""
MACHINE = "machine"
FIRST = 20


def machine() -> str:
    """Return what torch's own operators depend on."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def run(setting: str, folder: pathlib.Path, file: pathlib.Path) -> None:
    """Write this process's hashes to a file; an error where it is not what it was started for."""
    found = "native" if fxquant.kernel_info().library else "reference"
    if setting != found:
        raise SystemExit(f"{setting} was asked for, but this is {found}: {fxquant.kernel_info()}")
    file.write_text(json.dumps(cases.everything_of(folder)))


def start(setting: str, folder: pathlib.Path, scratch: pathlib.Path) -> dict[str, str]:
    """Return a setting's hashes from a process of its own."""
    file = scratch / f"{setting}.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.golden", "run", str(folder), setting, str(file)]
    chosen = {"FXQUANT_NATIVE": SETTINGS[setting], "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "2"}
    status = subprocess.run(command, env={**os.environ, **chosen}, check=False).returncode
    if status:
        raise SystemExit(f"the process of {setting} failed with status {status}")
    return {f"{setting}|{case}": value for case, value in json.loads(file.read_text()).items()}


def collect(folder: pathlib.Path) -> dict[str, str]:
    """Return the hashes of both settings, by "setting|subject|scheme|what"."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        parts = pool.map(lambda setting: start(setting, folder, pathlib.Path(scratch)), SETTINGS)
        return {MACHINE: machine()} | {case: value for part in parts for case, value in part.items()}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the cases that are in one and not, or not the same, in the other."""
    return [case for case in {**expected, **found} if expected.get(case) != found.get(case)]


def summary(expected: dict[str, str], found: dict[str, str]) -> str:
    """Return what differs: the first cases, then counts by setting, scheme and what was hashed; "" if nothing."""
    wrong = differences(expected, found)
    if not wrong:
        return ""
    if MACHINE in wrong:
        return f"made on another machine: {expected.get(MACHINE)}; this is {found.get(MACHINE)}; make it anew"
    fates = {case: "missing" if case not in found else "new" if case not in expected else "differs" for case in wrong}
    lines = [f"{fates[case]}: {case}" for case in wrong[:FIRST]]
    for part, name in ((0, "setting"), (2, "scheme"), (3, "what")):
        counts = collections.Counter(case.split("|")[part] for case in wrong)
        lines.append(f"by {name}: " + ", ".join(f"{value} {count}" for value, count in counts.most_common()))
    return "\n".join((*lines, f"{len(wrong)} of {len({**expected, **found})} cases differ"))


def make(folder: pathlib.Path) -> dict[str, str]:
    """Write the fixture and return its hashes."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    by_format.write(checkpoints)
    found = collect(checkpoints)
    (folder / "hashes.json").write_text(json.dumps(found, indent=0))
    return found


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("command", choices=("make", "check", "run"), help="run: what the other two start")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("setting", nargs="?")
    parser.add_argument("file", nargs="?", type=pathlib.Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.setting, args.folder, args.file)
        return 0
    if args.command == "make":
        print(f"{len(make(args.folder))} cases in {args.folder}")
        return 0
    expected = json.loads((args.folder / "hashes.json").read_text())
    told = summary(expected, collect(args.folder / "checkpoints"))
    print(told or f"all {len(expected)} cases are the same")
    return 1 if told else 0


if __name__ == "__main__":
    raise SystemExit(main())
