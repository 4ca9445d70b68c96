"""Let a model write."""

from collections.abc import Callable

import torch
from torch import Tensor

from .corpus import END_OF_LINE, Dictionary
from .model import Hidden

LanguageModel = Callable[[Tensor, Hidden], tuple[Tensor, Hidden]]


def generate(
    model: LanguageModel, hidden: Hidden, first: int, count: int, temperature: float = 1.0, seed: int = 0
) -> list[int]:
    """Return `count` word numbers, each drawn from the model's distribution after the ones before it.

    hidden: the state to begin with, for a batch of one. first: the word to begin after, itself not returned.
    temperature: below 1 the likely words become likelier. The same seed draws the same words.
    """
    generator = torch.Generator().manual_seed(seed)
    word, numbers = torch.tensor([[first]]), []
    with torch.no_grad():
        for _ in range(count):
            scores, hidden = model(word, hidden)
            chances = torch.softmax(scores.flatten() / temperature, dim=0)
            word = torch.multinomial(chances, 1, generator=generator).view(1, 1)
            numbers.append(int(word))
    return numbers


def to_text(numbers: list[int], dictionary: Dictionary) -> str:
    """Return the words separated by blanks, with a line break for each `<eos>`."""
    words = (dictionary.words[number] for number in numbers)
    lines = " ".join("\n" if word == END_OF_LINE else word for word in words).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())
