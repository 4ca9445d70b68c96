"""A text as numbers: the dictionary and the three parts of a corpus."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import WordLanguageModelError

END_OF_LINE = "<eos>"
PARTS = ("train", "valid", "test")


class Dictionary:
    """Words numbered by first appearance."""

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.words: list[str] = []
        self.numbers: dict[str, int] = {}
        for word in words:
            self.add(word)

    def add(self, word: str) -> int:
        """Return the word's number, a new one where it has none yet."""
        number = self.numbers.setdefault(word, len(self.words))
        if number == len(self.words):
            self.words.append(word)
        return number

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Corpus:
    """A dictionary and three texts, each a tensor (tokens,) of word numbers."""

    dictionary: Dictionary
    train: Tensor
    valid: Tensor
    test: Tensor

    @classmethod
    def from_folder(cls, folder: Path) -> "Corpus":
        """Return the corpus of folder/train.txt, valid.txt and test.txt, numbered in that order.

        A line is its words split at white space, then `<eos>`. Raises WordLanguageModelError for a folder or file that
        is missing, empty or not UTF-8.
        """
        if not folder.is_dir():
            raise WordLanguageModelError(
                f"no folder at {folder}; name one that holds {', '.join(map(_file_name, PARTS))}"
            )
        missing = [_file_name(part) for part in PARTS if not (folder / _file_name(part)).is_file()]
        if missing:
            raise WordLanguageModelError(
                f"{folder} lacks {', '.join(missing)}; a corpus is train.txt, valid.txt and test.txt"
            )
        dictionary = Dictionary()
        train, valid, test = (_read_numbers(folder / _file_name(part), dictionary) for part in PARTS)
        return cls(dictionary, train, valid, test)

    def digest(self) -> str:
        """Return a short name for what a model trained on this corpus depends on: the words and the training text."""
        content = hashlib.sha256("\n".join(self.dictionary.words).encode())
        content.update(self.train.numpy().tobytes())
        return content.hexdigest()[:12]


def _file_name(part: str) -> str:
    return f"{part}.txt"


def _read_words(path: Path) -> Iterator[str]:
    with path.open(encoding="utf8") as lines:
        for line in lines:
            yield from line.split()
            yield END_OF_LINE


def _read_numbers(path: Path, dictionary: Dictionary) -> Tensor:
    try:
        numbers = [dictionary.add(word) for word in _read_words(path)]
    except UnicodeDecodeError as error:
        raise WordLanguageModelError(f"{path} is not UTF-8 text ({error})") from error
    if len(numbers) < 2:
        raise WordLanguageModelError(f"{path} holds no text; at least one word is needed")
    return torch.tensor(numbers)
