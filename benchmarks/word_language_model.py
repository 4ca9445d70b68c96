"""Measure the word language model's speed, size and loss: fxquant, float torch, torch.ao FX and ONNX Runtime.

    python benchmarks/word_language_model.py [--data FOLDER --checkpoint FILE] [--threads 1,2] [--shapes 25x1,1x1,25x16]
        [--variants plain,reused,avx512_vnni,avx_vnni,avx2]

All sides run in one process and take turns: in each round every side is called repeatedly for a while, and the median
call counts. Ratios are taken within a round, so that a slower machine affects both sides. Sides whose packages are
missing are left out, with a message. Without a checkpoint the weights are random, in the shapes of docs/performance.md
(33278 words, 512, 256, 5 layers): time does not depend on their values. With --data the loss is measured too.

"faults" counts the page faults of a call. Large outputs cost torch much time in page faults, which fxquant's output
pool avoids. In the variant "reused" all sides run in a process whose malloc returns no memory, so that no side has
faults. The other variants are instruction sets (FXQUANT_ISA, which restricts fxquant alone). "lower bound" is the time
of the memory traffic alone, at the rates that benchmarks/limits.py finds in the same process: all weights are read
once from L3 and the scores written once.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only benchmarks/ is on the path

from benchmarks.limits import LEVELS, rates  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.onnx_runtime import OnnxRuntimeModel, export_quantized  # noqa: E402
from tutorials.word_language_model import (  # noqa: E402
    Corpus,
    WordLanguageModel,
    WordLanguageModelError,
    check_eval_mode,
    evaluate,
    load_checkpoint,
    quantize,
    quantize_with_torch_ao,
    state_dict_bytes,
    torch_threads,
)
from tutorials.word_language_model.options import shapes, thread_counts, token_count  # noqa: E402

Hidden = tuple[Tensor, Tensor]
Call = Callable[[Tensor, Hidden], tuple[Tensor, Hidden]]
DOCUMENTS_SIZES = {"words": 33278, "embedding_size": 512, "hidden_size": 256, "layers": 5}
FXQUANT, LOWER_BOUND = "fxquant", "lower bound"
FEWEST_CALLS = 5
PLAIN = "plain"
VARIANTS: dict[str, dict[str, str]] = {
    PLAIN: {},
    # no mmap, so one heap that only grows; by default a block of 53 MB is returned to the system at each call
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(64 << 20)},
    **{isa: {"FXQUANT_ISA": isa} for isa in ("avx512_vnni", "avx_vnni", "avx2")},
}


@dataclass(frozen=True)
class Side:
    """One way to compute the model. `prepare` returns the callable for a number of threads."""

    name: str
    size_bytes: int
    prepare: Callable[[int], Call]


@dataclass(frozen=True)
class Timing:
    """The median call of each round, in ms, for a side, shape and number of threads; and its ratio to fxquant.

    faults: page faults per call, None for the lower bound. variant: the environment of the process.
    """

    side: str
    shape: str
    threads: int
    rounds_ms: list[float]
    ratios: list[float]
    faults: float | None
    variant: str = PLAIN


def make_sides(model: WordLanguageModel, folder: Path) -> list[Side]:
    """Return the available sides; print which are missing, and why."""
    example_inputs = (torch.zeros(25, 1, dtype=torch.long), model.init_hidden(1))
    int8_model = quantize(model, example_inputs)
    sides = [
        Side(FXQUANT, state_dict_bytes(int8_model), lambda _: int8_model),
        Side("float", state_dict_bytes(model), lambda _: model),
    ]
    try:
        theirs = quantize_with_torch_ao(model, example_inputs)
        sides.append(Side("torch.ao FX", state_dict_bytes(theirs), lambda _: theirs))
    except ImportError as error:
        print(f"torch.ao: not here ({error})", file=sys.stderr)
    try:
        path = folder / "quantized.onnx"
        export_quantized(model, example_inputs, path)
        sides.append(Side("ONNX Runtime", path.stat().st_size, lambda threads: OnnxRuntimeModel(path, threads)))
    except ImportError as error:
        print(f"ONNX Runtime: not here ({error})", file=sys.stderr)
    return sides


def median_call_ms(call: Call, words: Tensor, hidden: Hidden, seconds: float) -> float:
    """Return the median time of the calls that fit into `seconds`; the first quarter only warms up."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST_CALLS or time.perf_counter() < end:
        begin = time.perf_counter()
        call(words, hidden)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[len(times) // 4 :])


def time_shape(
    calls: dict[str, Call], words: Tensor, hidden: Hidden, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return each side's median ms, round by round. The sides take turns, and each round begins with another side."""
    names = list(calls)
    results: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for round_number in range(rounds):
            first = round_number % len(names)
            for name in names[first:] + names[:first]:
                results[name].append(median_call_ms(calls[name], words, hidden, seconds))
    return results


def faults_a_call(call: Call, words: Tensor, hidden: Hidden, calls: int = 5) -> float:
    """Return the mean number of page faults per call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        for _ in range(calls):
            call(words, hidden)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def lower_bound_ms(model: WordLanguageModel, length: int, batch: int, speeds: dict[str, float]) -> float:
    """Return the ms for reading all int8 weights and writing float scores at the machine's speeds."""
    weights = sum(p.numel() for p in (*model.rnn.parameters(), *model.decoder.parameters()))
    scores = 4 * length * batch * model.decoder.out_features
    written = "write L3, GB/s" if scores > LEVELS["L2"] else "write L2, GB/s"
    return (weights / speeds["read L3, GB/s"] + scores / speeds[written]) / 1e6


def measure(sides: list[Side], text: Tensor, model: WordLanguageModel, options: argparse.Namespace) -> list[Timing]:
    """Return the timings of all sides for each number of threads and each shape. Progress goes to standard error."""
    timings = []
    for threads in options.threads:
        with torch_threads(threads):
            speeds = rates()  # first: ONNX Runtime's threads spin once they are there
            calls = {side.name: side.prepare(threads) for side in sides}
            check_eval_mode(calls)
            for length, batch in options.shapes:
                shape = f"{length}x{batch}"
                words = text[: length * batch].view(batch, length).t().contiguous()
                print(f"measuring {shape}, {threads} thread(s)", file=sys.stderr)
                hidden = model.init_hidden(batch)
                found = time_shape(calls, words, hidden, options.rounds, options.seconds)
                faults = {name: faults_a_call(call, words, hidden) for name, call in calls.items()}
                found[LOWER_BOUND] = [lower_bound_ms(model, length, batch, speeds)] * options.rounds
                for name, rounds_ms in found.items():
                    ratios = [peer / ours for peer, ours in zip(rounds_ms, found[FXQUANT], strict=True)]
                    timings.append(Timing(name, shape, threads, rounds_ms, ratios, faults.get(name)))
    return timings


def print_speed(timings: list[Timing]) -> None:
    """Print a line for each timing: the median over the rounds, and how many times fxquant's time that is."""
    rows = [
        (
            timing.variant,
            timing.threads,
            timing.shape,
            timing.side,
            f"{statistics.median(timing.rounds_ms):.3f}",
            f"{min(timing.rounds_ms):.3f}–{max(timing.rounds_ms):.3f}",
            f"{statistics.median(timing.ratios):.2f}",
            f"{min(timing.ratios):.2f}–{max(timing.ratios):.2f}",
            "" if timing.faults is None else f"{timing.faults:.0f}",
        )
        for timing in timings
    ]
    headers = ("variant", "threads", "shape", "side", "ms", "least–most", "× fxquant's time", "least–most", "faults")
    align = ("left", "right", "left", "left") + ("right",) * 5
    print(tabulate(rows, headers=headers, disable_numparse=True, colalign=align))


def measure_quality(sides: list[Side], text: Tensor | None, hidden: Hidden) -> list[dict[str, object]]:
    """Return each side's size and, if there is a text, its loss, perplexity and time on it with one thread."""
    rows: list[dict[str, object]] = [{"side": side.name, "size_bytes": side.size_bytes} for side in sides]
    if text is None:
        return rows
    with torch_threads(1):
        results = evaluate({side.name: side.prepare(1) for side in sides}, text, hidden)
    for row, result in zip(rows, results.values(), strict=True):
        row |= {"tokens": result.tokens, "loss": result.loss, "perplexity": result.perplexity}
        row |= {"seconds": result.seconds, "ms_a_token": result.ms_a_token}
    return rows


def print_quality(rows: list[dict[str, object]]) -> None:
    """Print sizes in MB and, where measured, the losses."""
    shown = [{"side": row["side"], "size, MB": row["size_bytes"] / 1e6, **_shown_quality(row)} for row in rows]
    print(tabulate(shown, headers="keys", floatfmt=("", ".2f", "", ".5f", ".2f", ".2f", ".3f")))


def _shown_quality(row: dict[str, object]) -> dict[str, object]:
    return {key.replace("_", " "): value for key, value in row.items() if key not in ("side", "size_bytes")}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", type=Path, help="folder of train.txt, valid.txt and test.txt")
    option("--checkpoint", type=Path, help="float model as safetensors")
    option(
        "--tokens", type=token_count, default=10_000, metavar="N|all", help="words to take the loss over (%(default)s)"
    )
    option("--threads", type=thread_counts, default="1,2", help="(%(default)s)")
    option("--shapes", type=shapes, default="25x1,1x1,25x16", help="length x batch (%(default)s)")
    option("--rounds", type=int, default=5, help="(%(default)s)")
    option("--seconds", type=float, default=1.0, help="for one side in one round (%(default)s)")
    option("--variants", type=variants, default=PLAIN, help=f"of {','.join(VARIANTS)} (%(default)s)")
    option("--json", type=Path, help="where to write the figures with the machine's description")
    return parser.parse_args(arguments)


def variants(argument: str) -> list[str]:
    """Return the names in a list like `plain,avx2`; raises ValueError for an unknown one."""
    names = argument.split(",")
    if not set(names) <= set(VARIANTS):
        raise ValueError(argument)
    return names


def run_variant(name: str, arguments: Sequence[str], folder: Path) -> list[Timing]:
    """Return the timings from a fresh process in the variant's environment; none if the machine lacks it."""
    file = folder / f"{name}.json"
    command = [sys.executable, __file__, *arguments, f"--variants={PLAIN}", f"--json={file}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **VARIANTS[name]})
    content = json.loads(file.read_text(encoding="utf8"))
    isa = VARIANTS[name].get("FXQUANT_ISA", "")
    if isa and f" {isa} kernels" not in content["machine"]["kernel"]:
        print(f"{name}: not here ({content['machine']['kernel']})", file=sys.stderr)
        return []
    return [Timing(**{**timing, "variant": name}) for timing in content["timings"]]


def load(options: argparse.Namespace) -> tuple[WordLanguageModel, Tensor | None]:
    """Return the model and the test text, or random weights and None."""
    if options.checkpoint:
        model = load_checkpoint(options.checkpoint)
    else:
        torch.manual_seed(0)
        model = WordLanguageModel(**DOCUMENTS_SIZES).eval()
    if not options.data:
        return model, None
    corpus = Corpus.from_folder(options.data)
    for length, batch in options.shapes:
        words, there = length * batch, len(corpus.test)
        if words > there:
            raise WordLanguageModelError(f"{length}x{batch} needs {words} words, the test text has {there}")
    if len(corpus.dictionary) > model.encoder.num_embeddings:
        raise WordLanguageModelError(f"{options.data} has more words than the model: {len(corpus.dictionary)}")
    return model, corpus.test


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parse_arguments(arguments)
    try:
        model, text = load(options)
    except WordLanguageModelError as error:
        raise SystemExit(f"error: {error}") from None
    machine = describe_machine()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), "\n")
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(model, Path(folder))
        longest = max(length * batch for length, batch in options.shapes)
        words = text if text is not None else torch.randint(model.encoder.num_embeddings, (longest,))
        part = text if text is None or options.tokens is None else text[: options.tokens + 1]
        quality = measure_quality(sides, part, model.init_hidden(1))
        print_quality(quality)
        timings = measure(sides, words, model, options) if PLAIN in options.variants else []
        given = list(sys.argv[1:] if arguments is None else arguments)
        for name in options.variants:
            timings += run_variant(name, given, Path(folder)) if name != PLAIN else []
    print()
    print_speed(timings)
    if options.json:
        content = {"machine": machine, "quality": quality, "timings": [asdict(timing) for timing in timings]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
