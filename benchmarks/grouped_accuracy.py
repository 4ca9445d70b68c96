"""Measure the word language model with weights in groups: its bytes, its loss, and how far its probabilities move.

    python benchmarks/grouped_accuracy.py --data FOLDER --checkpoint FILE [--tokens 20000] [--calibrate 10]
        [--formats int4 int3] [--columns 32 64 128] [--lstm none inputs all]
        [--suggest BUDGET [--valid 4480] [--by loss] [--schemes int4 "int4 of 32" int8 float]]

The embedding is always 4-bit affine, and the decoder has a format with groups. So have none of the LSTM's weights, the
input matrices of its first three layers, or all; the others are int8. Each is rounded to nearest, and with GPTQ from
some batches of the training text.
Divergence is the mean over the words of KL(p ‖ q), where p are the float model's probabilities of the next word and q
those of the quantized model. It is the expected rise of the loss on text that follows the float model's probabilities,
without the noise of a sample.

With --suggest the model is the one that suggest_mapping finds: the smallest whose loss, or divergence, on some words of
the validation text exceeds float's by at most BUDGET, with groups rounded by GPTQ. It does not see the test text.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only benchmarks/ is on the path

import fxquant  # noqa: E402
from fxquant import QConfigMapping, convert_fx, prepare_fx, suggest_mapping  # noqa: E402
from fxquant.formats import FORMATS  # noqa: E402
from fxquant.qconfig import BEST  # noqa: E402
from fxquant.ranges import Learned  # noqa: E402
from fxquant.tuning.ladder import LADDER  # noqa: E402
from tutorials.word_language_model import (  # noqa: E402
    Corpus,
    WordLanguageModel,
    load_checkpoint,
    state_dict_bytes,
    torch_threads,
)
from tutorials.word_language_model.options import token_count  # noqa: E402

BPTT, LANES, STEPS = 100, 16, 100
METRICS = ("loss", "divergence")
GROUP_SIZES = (32, 64, 128)
GROUPED = tuple(row.name for row in FORMATS if row.group_sizes)
LSTMS = {"none": (), "inputs": ("weight_ih_l0", "weight_ih_l1", "weight_ih_l2"), "all": ("",)}
"""Which of the LSTM's weights have the format; "" for all."""


def mapping_of(name: str, group_size: int, lstm: str, learns: bool = False) -> QConfigMapping:
    """Return the mapping for a format of GROUPED and a group size; lstm: of LSTMS; learns: training learns scales."""
    grouped = BEST[name].with_group_size(group_size)
    if learns:
        grouped = dataclasses.replace(grouped, weight=dataclasses.replace(grouped.weight, range=Learned()))
    mapping = (
        QConfigMapping()
        .set_object_type(nn.Embedding, fxquant.uint4_weight_only_qconfig)
        .set_object_type(nn.LSTM, fxquant.default_dynamic_qconfig)
        .set_object_type(nn.Linear, grouped)
    )
    for weight in LSTMS[lstm]:
        mapping.set_module_name(f"rnn.{weight}".rstrip("."), grouped)
    return mapping


def calibration(model: WordLanguageModel, text: Tensor, batches: int) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Return batches of (STEPS, LANES) words, spread over the whole text."""
    starts = torch.linspace(0, len(text) - STEPS * LANES, batches).long().tolist()
    parts = [text[start : start + STEPS * LANES] for start in starts]
    return [(part.view(LANES, STEPS).t().contiguous(), model.init_hidden(LANES)) for part in parts]


def variants(
    model: WordLanguageModel, text: Tensor, batches: int, ways: Iterator[tuple[str, int, str]]
) -> Iterator[tuple[str, str, str, str, float, nn.Module]]:
    """Yield the format, columns per scale, the LSTM's weights, the rounding, the seconds to convert, and the model.

    ways: arguments of `mapping_of`.
    """
    data = calibration(model, text, batches)
    for name, group_size, lstm in ways:
        prepared = prepare_fx(model, mapping_of(name, group_size, lstm), data[0])
        for rounding, given in (("to nearest", None), ("GPTQ", data)):
            begin = time.perf_counter()
            converted = convert_fx(prepared, data=given)
            yield name, str(group_size), lstm, rounding, time.perf_counter() - begin, converted


def metric_on(text: Tensor, model: WordLanguageModel, name: str) -> Callable[[nn.Module], float]:
    """Return a function that gives a model's loss on a text, or its divergence from a float model.

    The text is cut into LANES that run in parallel, with their states carried over.
    """
    lanes = text[: len(text) // LANES * LANES].view(LANES, -1).t().contiguous()
    return lambda one: float(measure(model, [one], lanes, model.init_hidden(LANES))[1][METRICS.index(name)])


def suggested(
    model: WordLanguageModel, corpus: Corpus, options: argparse.Namespace
) -> tuple[str, str, str, str, float, nn.Module]:
    """Return what `variants` yields, for suggest_mapping's model; print how it was found."""
    data, begin = calibration(model, corpus.train, options.calibrate), time.perf_counter()
    text = corpus.valid if options.valid is None else corpus.valid[: options.valid + LANES]
    metric = metric_on(text, model, options.by)
    found = suggest_mapping(model, data, metric, budget=options.suggest, schemes=options.schemes)
    print(found, found.mapping, "", sep="\n")
    return "suggested", "", "", "GPTQ", time.perf_counter() - begin, found.model


def measure(model: nn.Module, others: Sequence[nn.Module], text: Tensor, hidden: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return the METRICS, (2,), of each model, the float one first, from one pass over the text, (N, B), of B lanes."""
    models = [model, *others]
    states, sums = [hidden] * len(models), torch.zeros(len(models), 2, dtype=torch.float64)
    with torch.no_grad():
        for words, targets in zip(text[:-1].split(BPTT), text[1:].split(BPTT), strict=True):
            expected = probabilities = torch.empty(0)
            for i, each in enumerate(models):
                scores, states[i] = each(words, states[i])
                found = F.log_softmax(scores.flatten(0, 1), 1)
                if i == 0:
                    expected, probabilities = found, found.exp()
                sums[i, 0] += F.nll_loss(found, targets.flatten(), reduction="sum")
                sums[i, 1] += torch.linalg.vecdot(probabilities, expected - found).sum()
    return list(sums / text[1:].numel())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", type=Path, required=True, help="folder of train.txt, valid.txt and test.txt")
    option("--checkpoint", type=Path, required=True, help="float model as safetensors")
    option("--tokens", type=token_count, default=20_000, metavar="N|all", help="words of the test text (%(default)s)")
    option("--calibrate", type=int, default=10, metavar="N", help="batches of the training text (%(default)s)")
    option("--formats", nargs="+", choices=GROUPED, default=GROUPED, help="of the decoder and parts of the LSTM")
    option("--columns", type=int, nargs="+", choices=GROUP_SIZES, default=GROUP_SIZES, help="columns per scale")
    option("--lstm", nargs="+", choices=LSTMS, default=list(LSTMS), help="which of its weights have the format")
    option("--suggest", type=float, metavar="BUDGET", help="measure suggest_mapping's model, for this budget, instead")
    option("--valid", type=token_count, default=4480, metavar="N|all", help="validation words (%(default)s)")
    option("--by", choices=METRICS, default="loss", help="the metric it chooses by (%(default)s)")
    option("--schemes", nargs="+", choices=LADDER, help="what it may give a weight (all)")
    options = parser.parse_args(arguments)
    corpus, model = Corpus.from_folder(options.data), load_checkpoint(options.checkpoint)
    text = corpus.test if options.tokens is None else corpus.test[: options.tokens + 1]
    with torch_threads(1):
        if options.suggest is None:
            ways = itertools.product(options.formats, options.columns, options.lstm)
            made = list(variants(model, corpus.train, options.calibrate, ways))
        else:
            made = [suggested(model, corpus, options)]
        before, *found = measure(model, [one[-1] for one in made], text.unsqueeze(1), model.init_hidden(1))
    size = state_dict_bytes(model)
    rows = [("float", "", "", "", "", size / 1e6, 1.0, float(before[0]), 0.0, 0.0)]
    for (*told, seconds, one), (loss, divergence) in zip(made, found, strict=True):
        ours = state_dict_bytes(one)
        rows.append(
            (*told, f"{seconds:.1f}", ours / 1e6, size / ours, float(loss), float(loss - before[0]), float(divergence))
        )
    headers = ("format", "columns per scale", "LSTM", "rounding", "s", "MB", "smaller", "loss", "rise", "divergence")
    print(f"{len(text) - 1:,} words of the test text; {options.calibrate} batches of {STEPS * LANES:,} to calibrate")
    print(tabulate(rows, headers=headers, floatfmt=("", "", "", "", "", ".2f", ".2f", ".5f", ".5f", ".5f")))


if __name__ == "__main__":
    main()
