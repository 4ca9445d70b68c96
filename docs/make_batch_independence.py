"""Measure which float operators give a token different bits in another batch: python -m docs.make_batch_independence.

Each operator is called with a batch and with parts of it, placed elsewhere in memory, at several sizes, with one thread
and with two. The results of each machine are stored in batch_independence.json and written into docs/numerics.md.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.machine import describe_machine
from fxquant import ops

DATA = pathlib.Path(__file__).parent / "batch_independence.json"
PAGE = pathlib.Path(__file__).parent / "numerics.md"
BEGIN, END = "<!-- batch independence: begin -->", "<!-- batch independence: end -->"
SIZES = (  # batch, length, width, heads
    (4, 9, 36, 4),
    (4, 9, 32, 4),
    (3, 6, 32, 4),
    (8, 16, 64, 4),
    (9, 33, 48, 3),
    (5, 1, 32, 2),
    (33, 7, 40, 4),
    (4, 128, 384, 12),
    (2, 17, 512, 8),
    (16, 64, 96, 12),
    (6, 5, 7, 1),
)
OFFSETS = (0, 1, 4, 8)
"""At how many floats after a multiple of 64 bytes a part begins."""
THREADS = (1, 2)

Sizes = tuple[int, int, int, int]
Make = Callable[[Sizes], tuple[torch.Tensor, ...]]


class Probe(NamedTuple):
    """An operator: a function that makes its inputs, with the batch as first dimension, and calls of the operator."""

    name: str
    make: Make
    calls: tuple[Callable[..., torch.Tensor], ...]


def rows(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return (B, T, D)."""
    return (torch.randn(*sizes[:3]),)


def odd(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return (B, 7): most of its elements have another place in a register than they have alone."""
    return (torch.randn(sizes[0], 7),)


def heads(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return q, k and v, (B, H, T, D / H)."""
    b, t, d, h = sizes
    return tuple(torch.randn(b, h, t, d // h) for _ in range(3))


def heads_and_mask(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return q, k, v and what is added to the scores, (B, 1, 1, T)."""
    return (*heads(sizes), torch.randn(sizes[0], 1, 1, sizes[1]))


def scores(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return (B, H, T, T)."""
    b, t, _, h = sizes
    return (torch.randn(b, h, t, t),)


def pairs(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return (B, T, D) twice."""
    return torch.randn(*sizes[:3]), torch.randn(*sizes[:3])


def images(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return (B, 8, T + 2, T + 2), at most 20 wide."""
    side = min(sizes[1] + 2, 20)
    return (torch.randn(sizes[0], 8, side, side),)


def words(sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return indices (B, T)."""
    return (torch.randint(50, sizes[:2]),)


def fixed(*shape: int) -> torch.Tensor:
    """Return the same tensor at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def built(kind: type[nn.Module], *sizes: int, **options: Any) -> Any:
    """Return a module whose parameters are the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind(*sizes, **options)


ELEMENTWISE = {
    "sigmoid": (torch.sigmoid, lambda x: F.glu(torch.cat([x, x], -1))),
    "silu": (F.silu, F.mish),
    "softplus": (F.softplus,),
    "elu": (F.elu, F.selu, F.celu),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"),),
    "gelu": (F.gelu,),
    "relu, leaky_relu, hardswish, hardsigmoid, hardtanh": (
        *(F.relu, F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh),
    ),
    "logsigmoid": (F.logsigmoid,),
    "pow": (lambda x: x.abs() ** 0.7, lambda x: 1.3**x),
    "exp, expm1, log, log1p": (torch.exp, torch.expm1, lambda x: x.abs().log(), lambda x: x.abs().log1p()),
    "tanh, erf, sin, cos, atan": (torch.tanh, torch.erf, torch.sin, torch.cos, torch.atan),
    "sqrt, rsqrt, reciprocal": (lambda x: x.abs().sqrt(), lambda x: x.abs().rsqrt(), torch.reciprocal),
    "+, -, *, /, addcmul, lerp": (lambda x: x * x / (x + 3) - x, lambda x: torch.addcmul(x, x, x),
                                  lambda x: torch.lerp(x, -x, x)),
}  # fmt: skip


def elementwise_probes() -> Iterator[Probe]:
    """Yield two probes for each operator: of whole rows, and of rows with 7 elements."""
    for name, calls in ELEMENTWISE.items():
        yield Probe(name, rows, calls)
        yield Probe(name, odd, calls)


def on_rows(name: str, *calls: Callable[..., torch.Tensor]) -> Probe:
    """Return a probe of calls of (B, T, D)."""
    return Probe(name, rows, calls)


PROBES = (
    Probe("matmul", heads, (lambda q, k, _: q @ k.transpose(-2, -1), lambda q, _, v: q.transpose(-2, -1) @ v)),
    Probe("matmul", pairs, (
        lambda a, b: torch.bmm(a, b.transpose(1, 2)), lambda a, b: torch.bmm(a.transpose(1, 2).contiguous(), b),
        lambda a, b: torch.einsum("btd,bsd->bts", a, b))),
    Probe("scaled_dot_product_attention", heads, (F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))),
    Probe("scaled_dot_product_attention", heads_and_mask, (F.scaled_dot_product_attention,)),
    on_rows("linear", lambda x: F.linear(x, fixed(24, x.shape[-1]), fixed(24)),
            lambda x: F.linear(x[:, 0], fixed(2 * x.shape[-1], x.shape[-1]))),
    Probe("bilinear", pairs, (lambda a, b: built(nn.Bilinear, a.shape[-1], a.shape[-1], 3)(a, b),)),
    Probe("cdist", pairs, (torch.cdist,)),
    on_rows("convolution", lambda x: F.conv1d(x.transpose(1, 2), fixed(12, x.shape[-1], 3), padding=1),
            lambda x: F.conv_transpose1d(x.transpose(1, 2), fixed(x.shape[-1], 4, 3))),
    Probe("convolution", images, (lambda x: F.conv2d(x, fixed(12, 8, 3, 3)),)),
    on_rows("recurrent", lambda x: built(nn.LSTM, x.shape[-1], 24, batch_first=True)(x)[0],
            lambda x: built(nn.GRU, x.shape[-1], 24, batch_first=True)(x)[0]),
    on_rows("softmax, another dimension than the last", lambda x: x.softmax(1)),
    on_rows("sum of several dimensions", lambda x: x.sum((1, 2)), lambda x: x.mean((1, 2))),
    *elementwise_probes(),
    on_rows("softmax, log_softmax, last dimension", lambda x: x.softmax(-1), lambda x: x.log_softmax(-1)),
    Probe("softmax, log_softmax, last dimension", scores, (lambda x: x.softmax(-1),)),
    on_rows("layer_norm, rms_norm", lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: F.rms_norm(x, x.shape[-1:])),
    on_rows("group_norm, instance_norm", lambda x: F.group_norm(x.transpose(1, 2).contiguous(), 1),
            lambda x: F.instance_norm(F.pad(x, (0, 0, 0, 1)).transpose(1, 2))),
    on_rows("batch_norm, in eval mode", lambda x: F.batch_norm(
        x.transpose(1, 2), fixed(x.shape[-1]), fixed(x.shape[-1]).abs())),
    on_rows("sum, mean, var, prod, logsumexp of one dimension", lambda x: x.sum(-1), lambda x: x.sum(1),
            lambda x: x.mean(-1), lambda x: x.mean(1), lambda x: x.var(-1), lambda x: x.prod(-1),
            lambda x: x.logsumexp(-1)),
    on_rows("norm, normalize", lambda x: x.norm(dim=-1), lambda x: F.normalize(x, dim=-1), lambda x: x.norm(dim=1)),
    on_rows("cumsum", lambda x: x.cumsum(1), lambda x: x.cumsum(-1)),
    Probe("cosine_similarity", pairs, (lambda a, b: F.cosine_similarity(a, b, -1),)),
    on_rows("adaptive_avg_pool, interpolate", lambda x: F.adaptive_avg_pool1d(x, 1),
            lambda x: F.interpolate(x, scale_factor=2, mode="linear")),
    Probe("embedding, embedding_bag", words, (
        lambda i: F.embedding(i, fixed(50, 24)), lambda i: F.embedding_bag(i, fixed(50, 24)))),
    Probe("fxquant.ops.matmul", heads, (lambda q, k, _: ops.matmul(q, k.transpose(-2, -1)),
        lambda q, _, v: ops.matmul(q.transpose(-2, -1), v))),
    Probe("fxquant.ops.attention", heads_and_mask, (ops.attention,)),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(probe.name for probe in PROBES))


def moved(x: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a copy that begins so many elements after a multiple of 64 bytes."""
    memory = x.new_empty(x.numel() + 16 + offset)
    first = -(memory.data_ptr() // x.element_size()) % (64 // x.element_size()) + offset
    return memory[first : first + x.numel()].view(x.shape).copy_(x)


def worst(probe: Probe, sizes: Sizes) -> float:
    """Return the largest difference of a row in a batch and in parts of it, relative to the largest value."""
    inputs, found = probe.make(sizes), 0.0
    batch = sizes[0]
    parts = {(row, row + 1) for row in range(min(batch, 5))} | {(batch - 1, batch), (0, batch // 2), (1, batch)}
    for call in probe.calls:
        together = call(*inputs)
        for first, last in parts:
            for offset in OFFSETS:
                alone = call(*(moved(x[first:last], offset) for x in inputs))
                far = (alone - together[first:last]).abs().amax() / together.abs().amax()
                found = max(found, float(far.nan_to_num(0.0)))
    return found


@torch.no_grad()
def measure() -> dict[str, list[float]]:
    """Return the largest difference of each operator, for each number of threads."""
    found = {name: [0.0] * len(THREADS) for name in NAMES}
    before = torch.get_num_threads()
    for place, threads in enumerate(THREADS):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        for probe in PROBES:
            found[probe.name][place] = max(found[probe.name][place], *(worst(probe, sizes) for sizes in SIZES))
    torch.set_num_threads(before)
    return found


def machine_name() -> str:
    """Return the processor, the instruction set that torch uses, and torch's version."""
    return f"{describe_machine()['cpu']} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"


def cell(differences: list[float]) -> str:
    """Return the table's cell for one operator and one machine."""
    if not any(differences):
        return "the same"
    told = [f"{most:.0e}" if most else "the same" for most in differences]
    return " / ".join(told)


def table(data: dict[str, dict[str, list[float]]]) -> str:
    """Return the page's block."""
    machines = list(data)
    columns = [*machines, *([] if any("Intel" in machine for machine in machines) else ["Intel"])]
    lines = [f"| operator | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in NAMES:
        cells = [cell(data[machine][name]) if name in data[machine] else "not measured" for machine in machines]
        lines.append(f"| {name} | {' | '.join([*cells, *['not measured here'] * (len(columns) - len(cells))])} |")
    return "\n".join([BEGIN, "", *lines, "", END])


def write(data: dict[str, dict[str, list[float]]]) -> str:
    """Return the page with its block replaced."""
    page = PAGE.read_text(encoding="utf8")
    before, _, rest = page.partition(BEGIN)
    return before + table(data) + rest.partition(END)[2]


if __name__ == "__main__":
    known = json.loads(DATA.read_text(encoding="utf8")) if DATA.exists() else {}
    known[machine_name()] = measure()
    DATA.write_text(json.dumps(known, indent=1) + "\n", encoding="utf8")
    PAGE.write_text(write(known), encoding="utf8")
