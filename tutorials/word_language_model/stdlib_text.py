"""A corpus for machines without one: the source and documentation text of the Python installation that runs this."""

import hashlib
import os
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .corpus import PARTS
from .errors import WordLanguageModelError

UNKNOWN = "<unk>"
# Names and words, numbers, the operators of two or three characters, any other sign by itself.
TOKEN = re.compile(r"[^\W\d]\w*|\d+|\*\*|//|->|:=|\.\.\.|[=!<>+\-*/|&]=|\S")
# Installed packages differ between machines; tests, character tables and generated topics are poor prose and poor code.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
LONGEST_FILE_BYTES = 150_000
FEWEST_WORDS = 2_000


def find_sources(root: Path) -> list[Path]:
    """Return the .py files under `root`, shuffled the same way everywhere, so that any prefix is a fair mixture."""
    sources = {
        path.relative_to(root): path
        for path in root.rglob("*.py")
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and path.stat().st_size <= LONGEST_FILE_BYTES
    }
    return [
        sources[name] for name in sorted(sources, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    ]


def split_line(line: str) -> list[str]:
    """Return the words and signs of a line."""
    return TOKEN.findall(line)


def read_parts(root: Path, max_words: int) -> dict[str, list[list[str]]]:
    """Return train, valid and test as lists of split lines, about `max_words` words in all; a file is in one part."""
    parts: dict[str, list[list[str]]] = {part: [] for part in PARTS}
    words = 0
    for number, path in enumerate(find_sources(root)):
        if words >= max_words:
            break
        # Of twenty files, one goes to test, one to valid. Whole files, since lines of one file repeat each other.
        part = {0: "test", 1: "valid"}.get(number % 20, "train")
        lines = list(_split_file(path))
        parts[part] += lines
        words += sum(map(len, lines))
    if words < FEWEST_WORDS or not all(parts.values()):
        raise WordLanguageModelError(
            f"only {words} words of Python source under {root}, too few to train on; name a folder of text with --data"
        )
    return parts


def build_folder(cache: Path, max_words: int = 250_000, max_vocabulary: int = 5_000, root: Path | None = None) -> Path:
    """Return a folder of train.txt, valid.txt and test.txt made from the standard library, built once and then kept.

    cache: where such folders lie, one for each installation and pair of limits. max_words: the text's length.
    max_vocabulary: how many different words are kept, `<unk>` and `<eos>` among them; the rarest become `<unk>`.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    key = hashlib.sha256(f"{root} {max_words} {max_vocabulary} {TOKEN.pattern} {sorted(LEFT_OUT)}".encode()).hexdigest()
    folder = cache / f"python-{'.'.join(map(str, sys.version_info[:3]))}-{key[:8]}"
    if not folder.is_dir():
        _write_folder(folder, _replace_rare(read_parts(root, max_words), max_vocabulary))
    return folder


def _split_file(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf8", errors="replace") as lines:
        for line in lines:
            if words := split_line(line):
                yield words


def _replace_rare(parts: dict[str, list[list[str]]], max_vocabulary: int) -> dict[str, list[list[str]]]:
    counts = Counter(word for lines in parts.values() for line in lines for word in line)
    # Two places are taken: <unk> itself and the <eos> that the corpus adds to each line.
    kept = {word for word, _ in counts.most_common(max_vocabulary - 2)}
    return {
        part: [[word if word in kept else UNKNOWN for word in line] for line in lines] for part, lines in parts.items()
    }


def _write_folder(folder: Path, parts: dict[str, list[list[str]]]) -> None:
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for part, lines in parts.items():
            (temporary / f"{part}.txt").write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf8")
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        # Another process may have finished the same folder first; anything else is an error to report.
        if not folder.is_dir():
            raise
