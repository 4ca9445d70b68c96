"""Random cases for the native kernels, each made from its number alone, and the comparison with the reference.

python -m tests.native.cases linear 123 --isa avx2 --threads 2      # one case again, with what differs
python -m tests.native.cases all 0 --count 2000                     # many, on every instruction set of this machine
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fxquant.formats import FORMATS, Format
from fxquant.ops import library
from tests.native import native, static_cases
from tests.ops import reference

LIBRARY = library._library
ISAS: dict[str, str] = dict(LIBRARY.isas()) if LIBRARY else {}  # name -> why it cannot be used, "" if it can
USUAL_SHARE = 1 << 17
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 25, 31, 32, 33, 48, 63, 64, 65, 70, 100, 129)
DEPTHS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 60, 63, 64, 65, 100, 127, 128, 129, 200, 256, 300)
GROUPED = tuple(row for row in FORMATS if row.group_sizes)
EXTREMES = (
    "zeros",
    "ones",
    "negative",
    "constant",
    "largest",
    "denormal",
    "tiny",
    "nan",
    "infinity",
    "mixed",
    "weights",
)


@contextlib.contextmanager
def kernels(isa: str, threads: int, way: str = "waking") -> Iterator[None]:
    """Run on this instruction set and so many threads, which share even the smallest work.

    way: who helps, whatever it costs: "waking" for workers, woken where they sleep, or "openmp".
    """
    before, threads_before = LIBRARY.active_isa(), torch.get_num_threads()
    names = list(ISAS)
    assert LIBRARY.select_isa(names.index(isa)), ISAS[isa]
    torch.set_num_threads(threads)
    LIBRARY.set_least_share(1)
    assert LIBRARY.use_way(way), way
    try:
        yield
    finally:
        LIBRARY.use_way(None)
        LIBRARY.set_least_share(USUAL_SHARE)
        torch.set_num_threads(threads_before)
        LIBRARY.select_isa(names.index(before))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether the two are equal to the bit, any NaN as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.float(), b.float()
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(
        a.masked_fill(nan, 0.0).view(torch.int32), b.masked_fill(nan, 0.0).view(torch.int32)
    )


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def int16(*shape: int) -> torch.Tensor:
    return torch.randint(-32768, 32768, shape, dtype=torch.int16)


def grouped(row: Format, outputs: int, columns: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight of any bytes, past the last column too, and its scales."""
    scale = (torch.randn(outputs, -(-columns // group_size)) * 0.1).to(torch.bfloat16)
    return int8(outputs, row.stored_columns(columns)).view(torch.uint8), scale


def strided(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return the same values, sometimes in other places: transposed, or every second element of a larger tensor."""
    kind = rng.choice(("dense", "dense", "transposed", "sliced", "offset"))
    if kind == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "sliced":
        wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == "offset":  # not aligned to anything but its own elements
        flat = tensor.new_zeros(tensor.numel() + 1)
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(tensor.shape)
    return tensor


def overlapping(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return as many rows, which lie one over another in the values of x: windows of them."""
    rows, columns = x.shape[-2:]
    if not x.numel():
        return x
    return x.reshape(-1).unfold(0, columns, rng.randint(1, columns))[:rows].expand(x.shape)


def make_extreme(x: torch.Tensor, rng: random.Random) -> None:
    """Overwrite x with values at the ends of what a float can hold."""
    kind, largest = rng.choice(EXTREMES), torch.finfo(torch.float32).max
    fills = {
        "zeros": 0.0,
        "ones": 1.0,
        "negative": -1.0,
        "constant": 3.7,
        "largest": largest,
        "denormal": 1e-42,
        "tiny": -1e-38,
    }
    if kind in fills:
        x.fill_(fills[kind])
        if kind in ("largest", "denormal"):
            x.mul_(torch.randn_like(x).sign())
    elif x.numel() and kind in ("nan", "infinity", "mixed"):
        for value in {"nan": [float("nan")], "infinity": [float("inf"), float("-inf")]}.get(
            kind, [1e38, -1e38, 1e-45, -0.0]
        ):
            x.view(-1)[rng.randrange(x.numel())] = value


def linear_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    """Return (native, reference, arguments, whether the result should be mostly other than zero)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, columns, outputs = rng.choice(SIZES), rng.choice(DEPTHS), rng.choice(SIZES)
    if rng.random() < 0.02:  # so many rows that the weights are packed, and so many outputs that they are streamed
        rows, columns = rng.randint(48, 700), rng.choice((3, 64, 70))
        outputs = rng.choice((rng.choice(SIZES), (2 << 20) // rows + rng.randint(1, 90)))
    x = torch.randn(rows, columns) * 10 ** rng.uniform(-3, 3)
    weight, scale = int8(outputs, columns), torch.rand(outputs) * 0.01 + 1e-4
    is_extreme = rng.random() < 0.25
    if is_extreme:
        make_extreme(x, rng)
        if rng.random() < 0.3:
            weight.fill_(rng.choice((-128, 127, 0)))
    bias = torch.randn(outputs) if rng.random() < 0.6 else None
    relu = rng.random() < 0.3
    if rng.random() < 0.1 and not is_extreme:
        x = x.to(rng.choice((torch.float16, torch.bfloat16, torch.float64)))
    if rng.random() < 0.2 and rows:
        x = x.unsqueeze(0)
    args = (
        overlapping(x, rng) if rng.random() < 0.1 else strided(x, rng),
        strided(weight, rng),
        strided(scale, rng),
        bias,
        relu,
        rng.random() < 0.7,
        rng.choice((255, 255, 127)),
    )
    return native.linear, reference.linear, args, not is_extreme and columns > 0 and not relu


def linear_grouped_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    """Return a case like a linear's, whose weights are in groups, the formats in turn."""
    rng = random.Random(-1 - seed)
    run, expect, (x, weight, _, *how), is_rich = linear_case(seed)
    columns, row = x.shape[-1], GROUPED[seed % len(GROUPED)]
    group_size = rng.choice(row.group_sizes)
    weight, scale = grouped(row, weight.shape[0], columns, group_size)
    return run, expect, (x, strided(weight, rng), strided(scale, rng), *how, row.name, group_size, columns), is_rich


def linear_int16_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    """Return a case like a linear's with int16 weights, -32768 too, and now and then more columns than lanes hold."""
    rng = random.Random(-1 - seed)
    run, expect, (x, weight, scale, *how), is_rich = linear_case(seed)
    weight = int16(*weight.shape)
    if rng.random() < 0.05:
        x, weight = torch.randn(x.shape[-2], rng.choice((2049, 4097, 9000))), int16(3, 9000)
        weight, scale, how[0] = weight[:, : x.shape[1]], torch.rand(3) * 0.01, None
        is_rich = False
    if rng.random() < 0.1:
        weight, x = weight.fill_(rng.choice((-32768, 32767))), torch.full_like(x, rng.choice((1.0, -1.0)))
    return run, expect, (x, strided(weight, rng), scale, *how, "int16"), is_rich


def linear_float16_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    """Return a case like a linear's with float16 weights, subnormal ones too; the sums are exact in any order."""
    rng = random.Random(-1 - seed)
    run, expect, (x, weight, _, bias, *how), _ = linear_case(seed)
    if rng.random() < 0.05:  # past one block of columns
        x, weight = x.new_zeros(x.shape[-2], rng.choice((1024, 1025, 2100))), int8(weight.shape[0], 2100)
        weight = weight[:, : x.shape[1]]
    x = torch.randint(-15, 16, x.shape).to(x.dtype)
    if x.shape[-2] * weight.numel() > 1_000_000:  # plain C calls a function for each multiply-add
        weight, bias = weight[:3], None
    weight = (weight.clamp(-15, 15) * 2.0 ** rng.choice((0, -10, -24))).half()
    bias = None if bias is None else bias.mul(8).round()
    return run, expect, (strided(x, rng), strided(weight, rng), None, bias, *how, "float16"), False


def lstm_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    steps, batch = rng.choice((1, 1, 2, 3, 7, 20)), rng.choice((1, 1, 2, 3, 5, 16, 17, 33))
    inputs, hidden = rng.choice((1, 5, 16, 64, 100)), rng.choice((1, 3, 16, 20, 50, 64, 65, 100))
    layers, directions = rng.choice((1, 2, 3)), rng.choice((1, 2))
    projection = min(rng.choice((0, 0, 1, 7, 32)), hidden - 1)
    outputs = projection or hidden
    weights, scales = [], []
    for cell in range(layers * directions):
        columns = inputs if cell < directions else directions * outputs
        for shape in ((4 * hidden, columns), (4 * hidden, outputs), (projection, hidden))[: 3 if projection else 2]:
            weights.append(int8(*shape))
            scales.append(torch.rand(shape[0]) * 0.01)
    biases = [torch.randn(4 * hidden) for _ in range(layers * directions)] if rng.random() < 0.7 else []
    x, sizes = torch.randn(steps, batch, inputs) * 10 ** rng.uniform(-1, 1), None
    if rng.random() < 0.4:
        sizes = torch.tensor([batch, *sorted((rng.randint(1, batch) for _ in range(steps - 1)), reverse=True)])
        x = torch.randn(int(sizes.sum()), inputs)
    is_extreme = rng.random() < 0.15
    if is_extreme:
        make_extreme(x, rng)
    h0 = torch.randn(layers * directions, batch, outputs) * rng.choice((0.0, 1.0))
    c0 = torch.randn(layers * directions, batch, hidden) * rng.choice((0.0, 1.0))
    args = (strided(x, rng), sizes, strided(h0, rng), strided(c0, rng), weights, scales, biases)
    return (
        native.lstm,
        reference.lstm,
        (*args, directions == 2, rng.random() < 0.7, rng.choice((255, 127))),
        not is_extreme,
    )


def with_schemes(
    weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """Return weights of the same sizes, their scales and their formats, each its own: often grouped, seldom float.

    A row of a float weight has one number that is not 0, so that torch's sums are exact in any order.
    """
    rng, names = random.Random(-1 - seed), {row.name: row for row in GROUPED}
    has_floats, made, of_made, formats = rng.random() < 0.3, list[torch.Tensor](), list[torch.Tensor](), list[str]()
    for weight, scale in zip(weights, scales, strict=True):
        rows, columns = weight.shape
        scheme = rng.choice((*names, "int8", "int16", *(("float16", "float32") if has_floats else ())))
        if scheme in names:
            weight, scale = grouped(names[scheme], rows, columns, rng.choice(names[scheme].group_sizes))
        elif scheme == "int16":
            weight = int16(rows, columns)
            scale = scale / 256
        elif scheme != "int8":
            one = torch.arange(columns) == torch.randint(columns, (rows, 1))
            weight, scale = (torch.rand(rows, 1) * one).to(getattr(torch, scheme)), torch.empty(0)
        made.append(strided(weight, rng))
        of_made.append(strided(scale, rng))
        formats.append(scheme)
    return made, of_made, formats


def lstm_mixed_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    """Return a case like an lstm's, whose weights have schemes of their own."""
    run, expect, (x, sizes, h0, c0, weights, scales, *rest), is_rich = lstm_case(seed)
    weights, scales, formats = with_schemes(weights, scales, seed)
    return run, expect, (x, sizes, h0, c0, weights, scales, *rest, formats), is_rich


def rnn_mixed_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    """Return a case like an rnn's, whose weights have schemes of their own."""
    run, expect, (x, sizes, h0, weights, scales, *rest), is_rich = rnn_case(seed)
    weights, scales, formats = with_schemes(weights, scales, seed)
    return run, expect, (x, sizes, h0, weights, scales, *rest, formats), is_rich


def rnn_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    rng = random.Random(seed)
    mode = rng.choice(("gru", "gru", "rnn_tanh", "rnn_relu"))
    gates = 3 if mode == "gru" else 1
    _, _, lstm_args, is_rich = lstm_case(seed)
    x, sizes, h0, _, weights, _, _, bidirectional, per_token, qmax = lstm_args
    cells, directions, hidden = h0.shape[0], 2 if bidirectional else 1, rng.choice((1, 3, 16, 20, 50, 64, 65, 100))
    weights, scales = [], []
    for cell in range(cells):
        columns = x.shape[-1] if cell < directions else directions * hidden
        weights += [int8(gates * hidden, columns), int8(gates * hidden, hidden)]
        scales += [torch.rand(gates * hidden) * 0.01, torch.rand(gates * hidden) * 0.01]
    biases = [torch.randn(gates * hidden) for _ in range(cells)] if rng.random() < 0.7 else []
    hidden_biases = [torch.randn(hidden) for _ in range(cells)] if biases and mode == "gru" else []
    state = strided(torch.randn(cells, h0.shape[1], hidden) * rng.choice((0.0, 1.0)), rng)
    args = (x, sizes, state, weights, scales, biases, hidden_biases, mode, bidirectional, per_token, qmax)
    return native.rnn, reference.rnn, args, is_rich and mode != "rnn_relu"


def table_case(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, str]:
    """Return (weight, scale, zero_point, columns, format)."""
    rows, columns, kind = (
        rng.choice((1, 5, 100)),
        rng.choice((1, 3, 16, 33, 64)),
        rng.choice(("int8", "uint8", "uint4", "float16")),
    )
    if kind == "float16":
        return (torch.randn(rows, columns) * 10.0 ** rng.uniform(-7, 4)).half(), None, None, columns, kind
    weight = int8(rows, (columns + 1) // 2 if kind == "uint4" else columns)
    if kind != "int8":
        weight = weight.view(torch.uint8)
    return weight, torch.rand(rows) + 0.1, None if kind == "int8" else torch.randn(rows) * 10, columns, kind


def embedding_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    weight, scale, zero_point, columns, kind = table_case(rng)
    shape = rng.choice(((), (0,), (1,), (7,), (3, 5), (2, 3, 4)))
    indices = torch.randint(0, weight.shape[0], shape, dtype=rng.choice((torch.int32, torch.int64)))
    if indices.dim():
        indices = strided(indices, rng)
    dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
    return native.embedding, reference.embedding, (indices, weight, scale, zero_point, columns, kind, dtype), True


def embedding_bag_case(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], bool]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    weight, scale, zero_point, columns, kind = table_case(rng)
    dtype = rng.choice((torch.int32, torch.int64))
    indices = torch.randint(0, weight.shape[0], (rng.randint(0, 5), rng.randint(1, 7)), dtype=dtype)
    mode = rng.choice(("sum", "mean", "max"))
    samples = torch.rand(indices.shape) if mode == "sum" and rng.random() < 0.5 else None
    offsets, has_end = None, False
    if rng.random() < 0.5:
        indices, samples = indices.reshape(-1), None if samples is None else samples.reshape(-1)
        cuts = sorted(rng.randint(0, indices.numel()) for _ in range(4))
        has_end = rng.random() < 0.3
        offsets = torch.tensor([0, *cuts, *([indices.numel()] if has_end else [])], dtype=dtype)
    padding = rng.choice((None, 0, -1))
    args = (indices, weight, scale, zero_point, columns, offsets, mode, samples, has_end, padding, kind)
    return native.embedding_bag, reference.embedding_bag, args, False


CASES = {
    "linear": linear_case,
    "linear_grouped": linear_grouped_case,
    "linear_int16": linear_int16_case,
    "linear_float16": linear_float16_case,
    "lstm": lstm_case,
    "rnn": rnn_case,
    "lstm_mixed": lstm_mixed_case,
    "rnn_mixed": rnn_mixed_case,
    "embedding": embedding_case,
    "embedding_bag": embedding_bag_case,
    **static_cases.CASES,
}


def is_right(operator: str, got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether a result is its reference's, to the bit."""
    if operator == "linear_float16":  # torch's sums may begin with a product of -0, ours with 0
        return same_bits(got + 0.0, expected + 0.0)
    if operator in static_cases.CASES:
        return same_bits(got, expected) and static_cases.same_places(got, expected)
    return same_bits(got, expected)


def failures(operator: str, seed: int, settings: Sequence[tuple[str, int]]) -> list[str]:
    """Return a line for each (isa, threads) on which a case goes wrong: the command that shows it again, and what."""
    run, expect, args, should_be_rich = CASES[operator](seed)
    expected = expect(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    lines = []
    for isa, threads in settings:
        with kernels(isa, threads):
            got = run(*args)
        wrong = [
            f"result {i} of {tuple(b.shape)} differs by up to {(a - b).abs().nan_to_num(nan=float('inf')).max():.3g}"
            for i, (a, b) in enumerate(zip(got if isinstance(got, tuple) else (got,), expected, strict=True))
            if not is_right(operator, a, b)
        ]
        if should_be_rich and any(b.numel() > 20 and float((b != 0).float().mean()) < 0.3 for b in expected):
            wrong.append("a bad case: its results are mostly 0")
        if wrong:
            command = f"python -m tests.native.cases {operator} {seed} --isa {isa} --threads {threads}"
            lines.append(f"{command}: {'; '.join(wrong)}")
    return lines


def usable() -> list[str]:
    """Return the instruction sets of this machine."""
    return [name for name, why in ISAS.items() if not why]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=[*CASES, "all"])
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--isa", default="all")
    parser.add_argument("--threads", type=int, default=0, help="0: one and two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    isas = usable() if args.isa == "all" else [args.isa]
    settings = [(isa, threads) for isa in isas for threads in ((args.threads,) if args.threads else (1, 2))]
    runs = wrong = 0
    for operator in CASES if args.operator == "all" else (args.operator,):
        for seed in range(args.seed, args.seed + args.count):
            lines = failures(operator, seed, settings)
            runs, wrong = runs + len(settings), wrong + len(lines)
            for line in lines:
                print(line)
    print(f"{runs} cases, {wrong} failures")
    raise SystemExit(1 if wrong or not runs else 0)


if __name__ == "__main__":
    main()
