"""The demo's acts: a trained model, the same model in int8, and a table that compares them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from torch import Tensor, nn

import fxquant

from .checkpoint import load_checkpoint
from .corpus import END_OF_LINE, Corpus
from .errors import WordLanguageModelError
from .evaluation import BPTT, Evaluation, evaluate, state_dict_bytes, torch_threads
from .generation import generate, to_text
from .model import Hidden, WordLanguageModel
from .peers import quantize_with_torch_ao
from .quantization import quantize, save_and_check
from .stdlib_text import build_folder
from .training import TrainingConfig, train_or_load


def find_corpus(data: Path | None, cache: Path) -> Corpus:
    """Return the corpus in the folder `data`, or one made from this Python's own source text."""
    folder = data or build_folder(cache)
    corpus = Corpus.from_folder(folder)
    sizes = f"{len(corpus.dictionary):,} different words; {len(corpus.train):,} to train, {len(corpus.test):,} to test"
    print(f"text: {folder}\n      {sizes}")
    return corpus


def find_model(checkpoint: Path | None, corpus: Corpus, cache: Path, config: TrainingConfig) -> WordLanguageModel:
    """Return the model at `checkpoint`, or one trained on the corpus; raise where the two do not belong together."""
    with torch_threads(1):  # so small a model gains little from a second thread, and waits for it on a busy machine
        model = load_checkpoint(checkpoint) if checkpoint else train_or_load(corpus, config, cache)
    words = model.encoder.num_embeddings
    if words != len(corpus.dictionary):
        raise WordLanguageModelError(
            f"{checkpoint} knows {words} words but the corpus has {len(corpus.dictionary)}; "
            "give --data the folder that the checkpoint was trained on"
        )
    return model


def show_generated(models: dict[str, nn.Module], corpus: Corpus, count: int, seed: int) -> None:
    """Print what each model writes, all with the same dice, so that the texts part only where the models differ."""
    for name, model in models.items():
        numbers = generate(model, model.init_hidden(1), corpus.dictionary.numbers[END_OF_LINE], count, 0.8, seed)
        print(f"\n{name} writes:")
        print("\n".join("    " + line for line in to_text(numbers, corpus.dictionary).splitlines()))


@dataclass
class Row:
    """A line of the table."""

    name: str
    size_bytes: int
    evaluation: Evaluation

    def cells(self) -> list[str | float]:
        """Return the line's cells, in the order of COLUMNS."""
        result = self.evaluation
        return [self.name, self.size_bytes / 1e6, result.loss, result.perplexity, result.seconds, result.ms_a_token]


COLUMNS = ("model", "size, MB", "loss", "perplexity", "seconds", "ms a token")
FORMATS = ("", ".2f", ".5f", ".2f", ".2f", ".3f")


def compare(models: dict[str, nn.Module], text: Tensor, hidden: Hidden) -> list[Row]:
    """Return a row for each model, evaluated side by side on `text` at one thread."""
    with torch_threads(1):
        results = evaluate(models, text, hidden)
    return [Row(name, state_dict_bytes(model), results[name]) for name, model in models.items()]


def print_table(rows: list[Row], text: Tensor, whole: Tensor) -> None:
    """Print the rows under a caption that says what was measured."""
    share = "the whole test text" if len(text) == len(whole) else f"of {len(whole) - 1:,} in the test text"
    print(f"\nLoss over {len(text) - 1:,} words ({share}), sequences of {BPTT}, batch 1, state carried on.")
    print("Size of the state_dict; seconds in the model alone, at one thread, the models taking turns.\n")
    print(tabulate([row.cells() for row in rows], headers=COLUMNS, floatfmt=FORMATS))


def verdict(before: Row, after: Row, file_bytes: int) -> str:
    """Return in a line what quantization saved and what it cost."""
    ratio = before.size_bytes / after.size_bytes
    speed = before.evaluation.seconds / after.evaluation.seconds
    change = after.evaluation.loss - before.evaluation.loss
    return (
        f"{ratio:.2f}× smaller ({before.size_bytes / 1e6:.1f} → {after.size_bytes / 1e6:.1f} MB, "
        f"{file_bytes / 1e6:.1f} MB as a file), loss {change:+.5f}, {speed:.1f}× as fast as float at one thread."
    )


def add_torch_ao(models: dict[str, nn.Module], model: WordLanguageModel, example_inputs: tuple[Tensor, Hidden]) -> None:
    """Add torch.ao's quantized model, or say why it is not among them."""
    try:
        models["torch.ao FX"] = quantize_with_torch_ao(model, example_inputs)
    except ImportError as error:
        print(f"\nno row for torch.ao: this torch does not have it ({error})")


def run_demo(
    data: Path | None,
    checkpoint: Path | None,
    quantized: Path | None,
    tokens: int | None,
    words: int,
    seed: int,
    epochs: int,
    cache: Path,
) -> None:
    """Show the whole path on one model: trained, quantized, explained, compared. The arguments are the options."""
    corpus = find_corpus(data, cache)
    model = find_model(checkpoint, corpus, cache, TrainingConfig(epochs=epochs))
    print(f"\n{model}")
    text = corpus.test if tokens is None else corpus.test[: tokens + 1]
    hidden = model.init_hidden(1)
    example_inputs = (text[:BPTT].unsqueeze(1), hidden)

    int8_model = quantize(model, example_inputs)
    print(f"\nWhat changed:\n\n{fxquant.graph_diff(model, int8_model)}")
    print(f"\nWhy:\n\n{fxquant.explain(int8_model)}")
    print(f"\n{fxquant.kernel_info()}")

    models: dict[str, nn.Module] = {"float": model, "fxquant": int8_model}
    show_generated(models, corpus, words, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = quantized or Path(folder) / "quantized.safetensors"
        file_bytes = save_and_check(model, int8_model, example_inputs, path)
    add_torch_ao(models, model, example_inputs)
    rows = compare(models, text, hidden)
    print_table(rows, text, corpus.test)
    print(f"\n{verdict(rows[0], rows[1], file_bytes)}")
    if quantized:
        print(f"The quantized model is in {quantized}; fxquant.load reads it.")
