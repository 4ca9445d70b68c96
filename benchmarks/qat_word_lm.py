"""Tune the word language model with 4-bit weights in the loop: what training adds to rounding after training.

    python benchmarks/qat_word_lm.py --data FOLDER --checkpoint FILE [--tokens all] [--steps 300] [--calibrate 160]
        [--lstm all] [--quantized FILE]

The embedding is 4-bit affine, the decoder int4 with a scale for every 32 columns, and so are the LSTM's weights, or
those of its first three input matrices, the others being int8. First GPTQ rounds them, from some batches of the
training text. Training begins there: each weight starts next to the integer that GPTQ gave it, and the scales are
GPTQ's. It distils: on further training text, the loss is KL(p ‖ q), where p are the float model's probabilities of the
next word and q those of the model that rounds. The embedding stays as it is.

Loss and divergence are those of benchmarks/grouped_accuracy.py.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only benchmarks/ is on the path

import fxquant  # noqa: E402
from benchmarks.grouped_accuracy import LSTMS, calibration, mapping_of, measure  # noqa: E402
from fxquant import convert_fx, prepare_fx, prepare_qat_fx  # noqa: E402
from fxquant.learned import LearnedWeight  # noqa: E402
from fxquant.numerics import spread  # noqa: E402
from tutorials.word_language_model import (  # noqa: E402
    Corpus,
    WordLanguageModel,
    load_checkpoint,
    state_dict_bytes,
    torch_threads,
)
from tutorials.word_language_model.options import token_count  # noqa: E402
from tutorials.word_language_model.training import arrange, cut  # noqa: E402

LANES, BPTT = 16, 25
COLUMNS = 32
NEXT_TO = 0.45
"""How far from its integer a weight may begin, in steps: one that GPTQ rounded the other way is near the boundary."""

WARM_UP = 20
RATES = {"lstm": 1e-4, "steps": 1e-5, "decoder": 1e-3}
"""Of Adam, for the LSTM's weights and biases, the step sizes, and the decoder's weight and bias."""

EPS = {"lstm": 1e-8, "steps": 1e-8, "decoder": 1e-3}
"""Adam steps as far for a tiny gradient as for a large one, unless eps is larger: so the weights of rare words, whose
gradients are next to nothing, stay where GPTQ put them."""


def learned_weights(layer: nn.Module) -> Iterator[tuple[str, Tensor, LearnedWeight]]:
    """Yield the name, the weight and what rounds it, for each of a trained layer's weights whose steps are learned."""
    names = {id(parameter): name for name, parameter in layer.named_parameters(recurse=False)}
    for rounding, weight in layer.rounds(layer):
        if isinstance(rounding, LearnedWeight):
            yield names[id(weight)], weight, rounding


@torch.no_grad()
def begin_at(prepared: nn.Module, quantized: nn.Module) -> None:
    """Let a model in training round to the integers of a quantized one; each weight stays near its own value."""
    for path in ("rnn", "decoder"):
        other = quantized.get_submodule(path)
        for name, weight, rounding in learned_weights(prepared.get_submodule(path)):
            scale = getattr(other, f"{name}_scale").float()
            grid, reach = other.dequantize(name), NEXT_TO * spread(scale.abs(), weight.shape, COLUMNS)
            rounding.scale.copy_(scale)
            weight.copy_(grid + torch.minimum(torch.maximum(weight - grid, -reach), reach))


def prepare(model: WordLanguageModel, quantized: nn.Module, lstm: str) -> nn.Module:
    """Return the model that trains: it begins as the quantized one, without dropout, as has its target."""
    inputs = (torch.zeros(BPTT, LANES, dtype=torch.long), model.init_hidden(LANES))
    prepared = prepare_qat_fx(model.train(), mapping_of("int4", COLUMNS, lstm, learns=True), inputs)
    model.eval()
    prepared.drop.p = prepared.rnn.dropout = 0.0
    prepared.encoder.weight.requires_grad_(False)
    begin_at(prepared, quantized)
    return prepared


def make_optimizer(prepared: nn.Module) -> torch.optim.Optimizer:
    """Return Adam with RATES and EPS."""
    parts: dict[str, list[Tensor]] = {name: [] for name in RATES}
    for name, parameter in prepared.named_parameters():
        if parameter.requires_grad:
            which = "steps" if name.endswith("scale") else "lstm" if name.startswith("rnn.") else "decoder"
            parts[which].append(parameter)
    groups = [{"params": found, "lr": RATES[name], "eps": EPS[name]} for name, found in parts.items()]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)


def factor(step: int, steps: int) -> float:
    """Return the learning rate's factor: it rises over WARM_UP steps and falls to 0 as half a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def tune(prepared: nn.Module, model: WordLanguageModel, text: Tensor, steps: int) -> Iterator[float]:
    """Train towards the float model's probabilities, and yield the divergence of each step's words."""
    optimizer = make_optimizer(prepared)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, steps))
    ours = theirs = model.init_hidden(LANES)
    for _, (words, _) in zip(range(steps), cut(arrange(text, LANES), BPTT), strict=False):
        with torch.no_grad():
            expected, theirs = model(words, theirs)
        scores, ours = prepared(words, ours)
        ours = tuple(state.detach() for state in ours)
        p, q = (F.log_softmax(each.flatten(0, 1), 1) for each in (expected, scores))
        loss = F.kl_div(q, p, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def make(model: WordLanguageModel, text: Tensor, options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Return the model that GPTQ rounds, and the one that is tuned from there."""
    begin, data = time.perf_counter(), calibration(model, text, options.calibrate)
    rounded = convert_fx(prepare_fx(model, mapping_of("int4", COLUMNS, options.lstm), data[0]), data=data)
    print(f"GPTQ: {time.perf_counter() - begin:.0f} s", flush=True)
    begin, prepared, losses = time.perf_counter(), prepare(model, rounded, options.lstm), []
    for loss in tune(prepared, model, text, options.steps):
        losses.append(loss)
        if len(losses) % 25 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {len(losses)}, {seconds:.0f} s: divergence {sum(losses[-25:]) / 25:.5f}", flush=True)
    return rounded, convert_fx(prepared.eval())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", type=Path, required=True, help="folder of train.txt, valid.txt and test.txt")
    option("--checkpoint", type=Path, required=True, help="float model as safetensors")
    option("--tokens", type=token_count, default=20_000, metavar="N|all", help="words of the test text (%(default)s)")
    option("--calibrate", type=int, default=160, metavar="N", help="batches of training text for GPTQ (%(default)s)")
    option("--steps", type=int, default=300, metavar="N", help="of training, 400 words each (%(default)s)")
    option("--lstm", choices=LSTMS, default="all", help="which of its weights have 4 bits (%(default)s)")
    option("--quantized", type=Path, metavar="FILE", help="where to save the tuned model; default: nowhere")
    options = parser.parse_args(arguments)
    corpus, model = Corpus.from_folder(options.data), load_checkpoint(options.checkpoint)
    text = corpus.test if options.tokens is None else corpus.test[: options.tokens + 1]
    with torch_threads(1):
        made = make(model, corpus.train, options)
        if options.quantized:
            fxquant.save(made[1], options.quantized)
        before, *found = measure(model, made, text.unsqueeze(1), model.init_hidden(1))
    size = state_dict_bytes(model)
    rows = [("float", size / 1e6, 1.0, float(before[0]), 0.0, 0.0)]
    for name, one, (loss, divergence) in zip(("GPTQ", "tuned"), made, found, strict=True):
        ours = state_dict_bytes(one)
        rows.append((name, ours / 1e6, size / ours, float(loss), float(loss - before[0]), float(divergence)))
    headers = ("model", "MB", "smaller", "loss", "rise", "divergence")
    print(f"{len(text) - 1:,} words of the test text; {options.calibrate} batches to calibrate, {options.steps} steps")
    print(tabulate(rows, headers=headers, floatfmt=("", ".2f", ".2f", ".5f", ".5f", ".5f")))


if __name__ == "__main__":
    main()
