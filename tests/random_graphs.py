"""Random models, each made from its number alone: modules and calls, shared and tied weights, odd shapes, nesting."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31)


class Part(nn.Module):
    """A piece of a model: (B, T, I) -> (B, T, O).

    exact: whether a row gives the same bits in every batch: torch multiplies no matrices in float, and takes no
    exponential, whose vectors' ends it rounds otherwise. causal: whether a step depends on no later one. calls: which
    parameters are weights of calls that are to be quantized. traces: whether it does.
    """

    exact, causal, traces = True, True, True
    calls: tuple[str, ...] = ()


class Written(Part):
    """A linear form of a parameter in one of its spellings."""

    calls = ("weight",)
    SPELLINGS = {  # noqa: RUF012 - a constant: whether the weight is (I, O), and the call
        "linear": (False, lambda x, w, b: F.linear(x, w, b)),
        "linear relu": (False, lambda x, w, b: F.linear(x, w).relu()),
        "@": (True, lambda x, w, b: x @ w + b),
        "@ t": (False, lambda x, w, b: x @ w.t()),
        "matmul T": (False, lambda x, w, b: torch.matmul(x, w.T)),
        ".matmul": (True, lambda x, w, b: x.matmul(w)),
        "einsum": (False, lambda x, w, b: torch.einsum("bti,oi->bto", x, w)),
        "mm": (True, lambda x, w, b: torch.mm(x.flatten(0, 1), w).unflatten(0, (x.shape[0], x.shape[1]))),
        "addmm": (True, lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).unflatten(0, (x.shape[0], x.shape[1]))),
    }

    def __init__(self, spelling, i, o):
        super().__init__()
        is_io, self.call = self.SPELLINGS[spelling]
        self.weight = nn.Parameter(torch.randn((i, o) if is_io else (o, i)) / i**0.5)
        self.bias = nn.Parameter(torch.randn(o) / 4)

    def forward(self, x):
        return self.call(x, self.weight, self.bias)


class Recurrent(Part):
    """An LSTM, GRU or RNN, batch first or not."""

    def __init__(self, kind, i, hidden, time_first, **options):
        super().__init__()
        self.rnn = kind(i, hidden, batch_first=not time_first, **options)
        self.time_first, self.causal = time_first, not self.rnn.bidirectional

    def forward(self, x):
        if self.time_first:
            return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)
        return self.rnn(x)[0]


class Stepped(Part):
    """A cell, called twice: every row by itself, from nothing and from its own state."""

    def __init__(self, kind, i, hidden, bias):
        super().__init__()
        self.cell, self.is_lstm = kind(i, hidden, bias=bias), kind is nn.LSTMCell

    def forward(self, x):
        rows = x.flatten(0, 1)
        state = self.cell(rows, self.cell(rows))
        return (state[0] if self.is_lstm else state).unflatten(0, (x.shape[0], x.shape[1]))


class Attending(Part):
    """Self-attention."""

    exact = causal = False

    def __init__(self, width, heads, need_weights):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(width, heads, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Convolved(Part):
    """A convolution over time, which stays float, perhaps with a BatchNorm that is folded."""

    exact = causal = False

    def __init__(self, i, o, norm, relu):
        super().__init__()
        parts = [nn.Conv1d(i, o, 3, padding=1), *([nn.BatchNorm1d(o)] if norm else []), *([nn.ReLU()] if relu else [])]
        self.net = nn.Sequential(*parts)

    def forward(self, x):
        return self.net(x.transpose(1, 2)).transpose(1, 2)


class Normed(Part):
    """Linear → BatchNorm1d on rows, which is folded, perhaps → ReLU."""

    def __init__(self, i, o, relu):
        super().__init__()
        self.linear, self.norm, self.relu = nn.Linear(i, o), nn.BatchNorm1d(o), relu

    def forward(self, x):
        y = self.norm(self.linear(x.flatten(0, 1)))
        return (F.relu(y) if self.relu else y).unflatten(0, (x.shape[0], x.shape[1]))


class Squared(Part):
    """A bilinear form, which stays float."""

    exact = False

    def __init__(self, i, o):
        super().__init__()
        self.form = nn.Bilinear(i, i, o)

    def forward(self, x):
        return self.form(x, x)


class Undecided(Part):
    """A part that branches on a value, and so does not trace."""

    traces = False

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return x if bool(x.isnan().any()) else self.part(x)


class Plain(Part):
    """Something without a weight."""

    DO = {  # noqa: RUF012 - a constant
        "relu": lambda x: x.relu(),
        "clamp": lambda x: x.clamp(-2, 2),
        "neg": lambda x: -x,
        "double": lambda x: x + x,
        "times": lambda x: x * 0.75,
    }

    def __init__(self, name):
        super().__init__()
        self.do = self.DO[name]

    def forward(self, x):
        return self.do(x)


class Around(Part):
    """x + part(x), or part(x) beside another(x)."""

    def __init__(self, first, second=None):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return x + self.first(x) if self.second is None else torch.cat((self.first(x), self.second(x)), -1)


class Listed(Part):
    """Parts in a ModuleList or a ModuleDict, one after the other."""

    def __init__(self, parts, named):
        super().__init__()
        self.parts = nn.ModuleDict({f"part{i}": p for i, p in enumerate(parts)}) if named else nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts.values() if isinstance(self.parts, nn.ModuleDict) else self.parts:
            x = part(x)
        return x


class Looked(Part):
    """Indices to rows: a table or bags, as a module or in a call."""

    def __init__(self, way, words, width, mode):
        super().__init__()
        self.way, self.mode = way, mode
        if way in ("embedding", "bag"):
            self.table = nn.Embedding(words, width) if way == "embedding" else nn.EmbeddingBag(words, width, mode=mode)
        else:
            self.weight, self.calls = nn.Parameter(torch.randn(words, width)), ("weight",)
        self.causal = "bag" not in way

    def forward(self, indices):
        if self.way == "F.embedding":
            return F.embedding(indices, self.weight)
        if self.way == "F.embedding_bag":
            return F.embedding_bag(indices, self.weight, mode=self.mode).unsqueeze(1)
        return self.table(indices) if self.way == "embedding" else self.table(indices).unsqueeze(1)


class Head(Part):
    """The product with a table that is used elsewhere."""

    calls = ("owner.weight",)

    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def forward(self, x):
        return F.linear(x, self.owner.weight)


class Graph(nn.Module):
    """Parts one after the other."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Draft:
    """Draws the parts of one model."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.pool: list[tuple[int, int, nn.Module]] = []  # what may be used once more

    def model(self) -> tuple[Graph, tuple[torch.Tensor, ...]]:
        """Return a model in eval mode and its inputs."""
        draw, parts = self.draw, []
        batch, time, width = draw.randint(1, 5), draw.choice((1, 2, 3, 5, 7)), draw.choice(SIZES)
        way = draw.choice(("float", "float", "embedding", "F.embedding", "bag", "F.embedding_bag"))
        words = draw.choice((2, 11, 50))
        if way == "float":
            x = torch.randn(batch, time, width) * 10 ** draw.uniform(-3, 3)
        else:
            parts.append(Looked(way, words, width, draw.choice(("sum", "mean", "max"))))
            x = torch.randint(words, (batch, time))
        for _ in range(draw.randint(2, 5)):
            part, width = self.part(width, 2)
            parts.append(part)
        if way != "float" and draw.random() < 0.4:
            owner = getattr(parts[0], "table", parts[0])
            parts += [nn.Linear(width, owner.weight.shape[1]), Head(owner)]
            if draw.random() < 0.5:
                parts[-1] = nn.Linear(owner.weight.shape[1], words)
                parts[-1].weight = owner.weight
        model = Graph(parts).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model, (x,)

    def part(self, i: int, depth: int) -> tuple[nn.Module, int]:
        """Return a part that takes rows of size i, and the size that it gives."""
        draw = self.draw
        known = [(module, o) for size, o, module in self.pool if size == i]
        if known and draw.random() < 0.15:
            return draw.choice(known)
        kinds = [self.linear, self.linear, self.written, self.written, self.recurrent, self.stepped, self.plain]
        kinds += [self.attention, self.convolved, self.normed, self.squared, self.layer_norm]
        if depth:
            kinds += [self.residual, self.branch, self.nested, self.nested, self.undecided]
        module, o = draw.choice(kinds)(i, depth - 1)
        self.pool.append((i, o, module))
        return module, o

    def size(self) -> int:
        """Return a size."""
        return self.draw.choice(SIZES)

    def linear(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a Linear: its weight may be another's, a ReLU may follow."""
        o = self.size()
        like = [m for size, _, m in self.pool if size == i and type(m) is nn.Linear]
        if like and self.draw.random() < 0.4:
            weight = self.draw.choice(like).weight
            o = weight.shape[0]
            linear = nn.Linear(i, o)
            linear.weight = weight
            return linear, o
        linear = nn.Linear(i, o, bias=self.draw.random() < 0.7)
        relu = self.draw.random() < 0.3
        return (nn.Sequential(linear, nn.ReLU()) if relu else linear), o

    def written(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a functional form: its weight may be a Linear's."""
        spelling, o = self.draw.choice(list(Written.SPELLINGS)), self.size()
        like = [m.weight for size, _, m in self.pool if size == i and type(m) is nn.Linear]
        if not like or Written.SPELLINGS[spelling][0] or self.draw.random() < 0.5:
            return Written(spelling, i, o), o
        weight = self.draw.choice(like)
        part = Written(spelling, i, weight.shape[0])
        part.weight = weight
        return part, weight.shape[0]

    def recurrent(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a recurrent layer."""
        draw, hidden = self.draw, self.size()
        options: dict[str, Any] = {
            "num_layers": draw.choice((1, 1, 2)),
            "bidirectional": draw.random() < 0.3,
            "bias": draw.random() < 0.8,
        }
        kind = draw.choice((nn.LSTM, nn.LSTM, nn.GRU, nn.RNN))
        if kind is nn.LSTM and hidden > 2 and draw.random() < 0.3:
            options["proj_size"] = hidden // 2
        if kind is nn.RNN:
            options["nonlinearity"] = draw.choice(("tanh", "relu"))
        part = Recurrent(kind, i, hidden, draw.random() < 0.5, **options)
        return part, (options.get("proj_size") or hidden) * (1 + options["bidirectional"])

    def stepped(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a cell."""
        o = self.size()
        return Stepped(self.draw.choice((nn.LSTMCell, nn.GRUCell, nn.RNNCell)), i, o, self.draw.random() < 0.8), o

    def plain(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw something without a weight."""
        return Plain(self.draw.choice(list(Plain.DO))), i

    def attention(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw an attention or a whole encoder layer."""
        heads = self.draw.choice([n for n in (1, 2, 4, 7) if i % n == 0])
        if self.draw.random() < 0.6:
            return Attending(i, heads, self.draw.random() < 0.5), i
        options = {"norm_first": self.draw.random() < 0.5, "activation": self.draw.choice(("relu", "gelu"))}
        return nn.TransformerEncoderLayer(i, heads, self.size(), batch_first=True, **options), i

    def convolved(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a convolution."""
        o = self.size()
        return Convolved(i, o, self.draw.random() < 0.6, self.draw.random() < 0.5), o

    def normed(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a Linear with a BatchNorm."""
        o = self.size()
        return Normed(i, o, self.draw.random() < 0.5), o

    def squared(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a bilinear form."""
        o = self.draw.choice((1, 3, 8))
        return Squared(i, o), o

    def layer_norm(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a LayerNorm."""
        return nn.LayerNorm(i), i

    def residual(self, i: int, depth: int) -> tuple[nn.Module, int]:
        """Draw x + part(x)."""
        part, o = self.part(i, depth)
        return Around(part if o == i else nn.Sequential(part, nn.Linear(o, i))), i

    def branch(self, i: int, depth: int) -> tuple[nn.Module, int]:
        """Draw two parts side by side."""
        (first, left), (second, right) = self.part(i, depth), self.part(i, depth)
        return Around(first, second), left + right

    def nested(self, i: int, depth: int) -> tuple[nn.Module, int]:
        """Draw parts in a container."""
        parts = []
        for _ in range(self.draw.randint(1, 3)):
            part, i = self.part(i, depth)
            parts.append(part)
        kind = self.draw.choice(("sequential", "list", "dict"))
        return (nn.Sequential(*parts) if kind == "sequential" else Listed(parts, kind == "dict")), i

    def undecided(self, i: int, _: int) -> tuple[nn.Module, int]:
        """Draw a part that does not trace; what it holds, modules only, may be used elsewhere too."""
        known = [(m, o) for size, o, m in self.pool if size == i and isinstance(m, (nn.Linear, Recurrent, Stepped))]
        part, o = self.draw.choice(known or [self.recurrent(i, 0), (nn.Linear(i, 5), 5)])
        return Undecided(part), o
