"""The fenced blocks of the README and of the documentation's pages, and how one page's Python blocks are run.

A page's blocks share one module and run from top to bottom. A text block right under a Python block (only blank lines
between) is what that block prints, warns of or raises: the words must be the same, numbers may differ, and "…" stands
for anything. What a block warns of or raises must be shown so; what it prints may be.
"""

import contextlib
import importlib.util
import io
import itertools
import re
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}

_FENCE = re.compile(r"^( *)```(?:\{code-block\} *)?([^\n`]*)\n(.*?)^\1```$", re.M | re.S)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line in the page; shown: the text block right under it, or None."""

    language: str
    code: str
    line: int
    shown: str | None = None


def blocks_of(path: Path) -> list[Block]:
    """Return a page's fenced blocks in their order."""
    text = path.read_text(encoding="utf8")
    found = list(_FENCE.finditer(text))
    blocks = []
    for match, following in itertools.zip_longest(found, found[1:]):
        is_output = (
            following is not None and following[2] == "text" and not text[match.end() : following.start()].strip()
        )
        line = text.count("\n", 0, match.start(3)) + 1
        blocks.append(Block(match[2].strip(), match[3], line, following[3] if is_output else None))
    return blocks


def _needs_more(block: Block) -> bool:
    """Return whether a block needs an optional package that is not installed."""
    needed = [package for words, package in _OPTIONAL.items() if words in block.code]
    return any(importlib.util.find_spec(package) is None for package in needed)


_OPTIONAL = {"to_onnx(": "onnxscript", "onnxruntime": "onnxruntime"}


def run(blocks: list[Block], page: str) -> None:
    """Run a page's Python blocks in one module; AssertionError where one does something else than the page shows."""
    module = types.ModuleType("page")
    sys.modules["page"] = module  # pickle and torch.export look classes up there
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # until the page says otherwise
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what peft calls there
            for block in blocks:
                if block.language == "python" and not _needs_more(block):
                    _check(block, page, *_run_one(block, page, module, caught))
    finally:
        del sys.modules["page"]


def _check(block: Block, page: str, told: "_Told", error: Exception | None) -> None:
    """Raise AssertionError where a block did something else than its page shows."""
    where = f"{page}, line {block.line}"
    if block.shown is None and (error is not None or told.warned):
        raise AssertionError(f"{where}: warns or raises, which the page does not show:\n{told}") from error
    if block.shown is not None and not matches(str(told), block.shown):
        raise AssertionError(f"{where}: the page shows\n{block.shown}\nbut it gives\n{told}") from error


def matches(told: str, shown: str) -> bool:
    """Return whether what a block told is what its page shows."""
    parts = map(re.escape, _plain(shown).split("…"))
    return re.fullmatch(".*".join(part.replace(r"\ ", " ").strip() for part in parts), _plain(told).strip()) is not None


def _plain(text: str) -> str:
    """Return a text on one line, its numbers and the lines drawn with dashes all alike."""
    return re.sub(r"\s+", " ", re.sub(r"-{2,}", "--", _NUMBER.sub("0", text))).replace(" …", "…").replace("… ", "…")


@dataclass
class _Told:
    printed: str
    warned: str
    raised: str

    def __str__(self) -> str:
        return self.printed + self.warned + self.raised


def _run_one(
    block: Block, page: str, module: types.ModuleType, caught: list[warnings.WarningMessage]
) -> tuple[_Told, Exception | None]:
    """Return what a block printed, warned of and raised."""
    code = compile("\n" * (block.line - 1) + block.code, page, "exec")  # so that its lines are the page's
    printed, raised, error = io.StringIO(), "", None
    caught.clear()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, module.__dict__)
        except Exception as found:
            kind, error = type(found), found
            room = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
            raised = f"{room}{kind.__qualname__}: {found}\n"
    warned = "".join(f"{warning.category.__name__}: {warning.message}\n" for warning in caught)
    return _Told(printed.getvalue(), warned, raised), error
