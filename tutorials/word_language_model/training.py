"""Train a word language model by truncated backpropagation through time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint
from .corpus import Corpus
from .model import WordLanguageModel
from .progress import progress_bar


@dataclass(frozen=True)
class TrainingConfig:
    """The model's sizes and how it is trained; the defaults take about 40 seconds on one core for 250,000 words."""

    embedding_size: int = 256
    hidden_size: int = 256
    layers: int = 1  # a second one learns nothing in the first few hundred steps
    dropout: float = 0.1
    batch: int = 20
    bptt: int = 25
    epochs: int = 1
    learning_rate: float = 4e-3
    clip: float = 0.5
    seed: int = 1


def arrange(text: Tensor, batch: int) -> Tensor:
    """Return `text` (tokens,) as `batch` columns (tokens // batch, batch), each a stretch of it; a rest is cut off."""
    steps = len(text) // batch
    return text[: steps * batch].view(batch, steps).t().contiguous()


def cut(columns: Tensor, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (words, next words), each (T, B) with T = `bptt`, the last pair maybe shorter."""
    for start in range(0, len(columns) - 1, bptt):
        stop = min(start + bptt, len(columns) - 1)
        yield columns[start:stop], columns[start + 1 : stop + 1]


def train(text: Tensor, words: int, config: TrainingConfig, show_progress: bool = True) -> WordLanguageModel:
    """Return a model of `text` (tokens,) in eval mode; the same text and config give the same model on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = WordLanguageModel(words, config.embedding_size, config.hidden_size, config.layers, config.dropout)
        # A short text has fewer columns, so that each is still a few sequences long.
        columns = arrange(text, max(1, min(config.batch, len(text) // (2 * config.bptt))))
        steps = config.epochs * math.ceil((len(columns) - 1) / config.bptt)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
        with progress_bar(steps, "training", "batch", show_progress) as bar:
            for _ in range(config.epochs):
                hidden = model.init_hidden(columns.shape[1])
                for inputs, targets in cut(columns, config.bptt):
                    output, hidden = model(inputs, hidden)
                    # The state is carried on, its history is not: that is the truncation.
                    hidden = (hidden[0].detach(), hidden[1].detach())
                    loss = F.cross_entropy(output.flatten(0, 1), targets.flatten())
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                    optimizer.step()
                    schedule.step()
                    bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
                    bar.update()
    return model.eval()


def train_or_load(corpus: Corpus, config: TrainingConfig, cache: Path, show_progress: bool = True) -> WordLanguageModel:
    """Return the model that `config` gives on the corpus' training text: from the cache, or trained now and cached."""
    sizes = "-".join(str(value) for value in vars(config).values())
    path = cache / f"model-{corpus.digest()}-{sizes}.safetensors"
    if not path.is_file():
        save_checkpoint(train(corpus.train, len(corpus.dictionary), config, show_progress), path)
    return load_checkpoint(path)


def _learning_rate_factor(step: int, steps: int) -> float:
    """Return a factor that rises over the first twentieth of the steps, then falls to 0 as half a cosine."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
