"""What a model costs and what it is worth: loss, seconds and bytes."""

import io
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .generation import LanguageModel
from .model import Hidden
from .progress import progress_bar

BPTT = 25
# Models take turns of so many sequences: short, so that a machine that slows down does so for all of them; not shorter,
# since the first sequence of a turn finds the caches full of the other models' weights.
SEQUENCES_A_TURN = 8
HAVE_DROPOUT = (nn.Dropout, nn.LSTM)


@dataclass
class Evaluation:
    """The loss of one model over a text, and the time spent in the model alone (the loss itself is not timed)."""

    tokens: int = 0
    total_loss: float = 0.0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The mean cross entropy a token, in nats."""
        return self.total_loss / self.tokens

    @property
    def perplexity(self) -> float:
        """How many equally likely words the loss amounts to."""
        return math.exp(self.loss)

    @property
    def ms_a_token(self) -> float:
        """Milliseconds in the model for each word read."""
        return 1e3 * self.seconds / self.tokens


def check_eval_mode(models: Mapping[str, LanguageModel]) -> None:
    """Raise ValueError for a model whose dropout is on: its loss and its time would be another model's."""
    for name, model in models.items():
        parts = model.named_modules() if isinstance(model, nn.Module) else ()
        # Not every part: torch.ao leaves parts without dropout in training mode, where it means nothing.
        if active := [path or "itself" for path, part in parts if part.training and isinstance(part, HAVE_DROPOUT)]:
            raise ValueError(f"{name} is in training mode ({', '.join(active)}); call eval() on it before measuring")


def evaluate(
    models: Mapping[str, LanguageModel], text: Tensor, hidden: Hidden, bptt: int = BPTT, show_progress: bool = True
) -> dict[str, Evaluation]:
    """Return the evaluation of each model on `text` (tokens,), all of them stepped through it side by side.

    Batch 1, sequences of `bptt` words, the state carried on from one to the next, beginning with `hidden`. The first
    word is only read and the last only predicted: tokens - 1 predictions.
    """
    check_eval_mode(models)
    results = {name: Evaluation() for name in models}
    states = dict.fromkeys(models, hidden)
    turn = bptt * SEQUENCES_A_TURN
    with torch.no_grad(), progress_bar((len(text) - 1) * len(models), "evaluating", "token", show_progress) as bar:
        for start in range(0, len(text) - 1, turn):
            stop = min(start + turn, len(text) - 1)
            for name, model in models.items():
                states[name] = _take_turn(model, text[start : stop + 1], states[name], bptt, results[name])
                bar.update(stop - start)
    return results


def _take_turn(model: LanguageModel, text: Tensor, hidden: Hidden, bptt: int, result: Evaluation) -> Hidden:
    """Add `text` to the result, one sequence after another, and return the state at its end."""
    for words, targets in zip(text[:-1].split(bptt), text[1:].split(bptt), strict=True):
        begin = time.perf_counter()
        output, hidden = model(words.unsqueeze(1), hidden)
        result.seconds += time.perf_counter() - begin
        result.total_loss += len(targets) * F.cross_entropy(output.flatten(0, 1), targets).item()
        result.tokens += len(targets)
    return hidden


def state_dict_bytes(model: nn.Module) -> int:
    """Return the size of the model's state_dict as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
