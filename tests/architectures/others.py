"""Images, recommendation, and networks of other shapes."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from tests.architectures.base import Architecture


def mlp(*sizes):
    """Return linear layers with ReLUs between them."""
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class CRNN(nn.Module):
    """Convolutions that squeeze an image's height to one, two bidirectional LSTMs over its width, letters."""

    def __init__(self, hidden=24, letters=37):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(16, 32, (4, 3), padding=(0, 1)), nn.ReLU(),
        )  # fmt: skip
        self.rnn1 = nn.LSTM(32, hidden, bidirectional=True)
        self.between = nn.Linear(2 * hidden, hidden)
        self.rnn2 = nn.LSTM(hidden, hidden, bidirectional=True)
        self.out = nn.Linear(2 * hidden, letters)

    def forward(self, images):  # (B, 1, 16, W) -> (W / 2, B, letters)
        x = self.cnn(images).squeeze(2).permute(2, 0, 1)
        return self.out(self.rnn2(self.between(self.rnn1(x)[0]))[0])


class Mixer(nn.Module):
    """Patches mixed across places, then across channels."""

    class Block(nn.Module):
        def __init__(self, places, width):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.tokens = nn.Sequential(nn.Linear(places, 24), nn.GELU(), nn.Linear(24, places))
            self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

        def forward(self, x):
            x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norms[1](x))

    def __init__(self, width=32, classes=10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.blocks = nn.Sequential(self.Block(16, width), self.Block(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class PointNet(nn.Module):
    """The same layers for each point, the maximum over points, a classifier."""

    def __init__(self, classes=10):
        super().__init__()
        self.points, self.classify = mlp(3, 32, 64), mlp(64, 32, classes)

    def forward(self, points):
        return self.classify(self.points(points).relu().amax(1))


class NeuralODE(nn.Module):
    """dx/dt = f(x, t), integrated by fixed steps of Heun's rule, between two linear layers."""

    def __init__(self, inputs=12, width=24, steps=4, classes=5):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.steps = steps

    def forward(self, x):
        x, dt = self.first(x), 1 / self.steps
        for _ in range(self.steps):
            slope = self.f(x)
            x = x + dt / 2 * (slope + self.f(x + dt * slope))
        return self.last(x)


class DLRM(nn.Module):
    """Tables of categories as bags, dense features through layers, the dot products of all pairs."""

    def __init__(self, rows=(100, 50, 30), width=16):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum") for n in rows)
        self.bottom, self.top = mlp(13, 32, width), mlp(width + 6, 32, 1)
        self.register_buffer("pairs", torch.tensor([[0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3]]))

    def forward(self, dense, bags):  # (B, 13), (tables, B, N)
        dense = self.bottom(dense).relu()
        x = torch.stack([dense, *[table(bags[k]) for k, table in enumerate(self.tables)]], 1)
        products = (x[:, self.pairs[0]] * x[:, self.pairs[1]]).sum(-1)
        return self.top(torch.cat((dense, products), 1))


class WideAndDeep(nn.Module):
    """A linear model of crossed features beside a deep one of embeddings."""

    def __init__(self, crossed=120, fields=(20, 30, 10), width=8):
        super().__init__()
        self.wide = nn.EmbeddingBag(crossed, 1, mode="sum")
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in fields)
        self.deep = mlp(width * len(fields) + 5, 32, 16, 1)

    def forward(self, crosses, fields, dense):
        found = [table(fields[:, i]) for i, table in enumerate(self.tables)]
        return self.wide(crosses) + self.deep(torch.cat((*found, dense), 1))


class DeepFM(nn.Module):
    """A factorization machine and a deep network that share their embeddings."""

    def __init__(self, features=100, fields=5, width=8):
        super().__init__()
        self.first, self.embed = nn.Embedding(features, 1), nn.Embedding(features, width)
        self.deep = mlp(fields * width, 32, 1)

    def forward(self, features):
        v = self.embed(features)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True) / 2
        return self.first(features).sum(1) + pairs + self.deep(v.flatten(1))


class NCF(nn.Module):
    """Users and items: the product of one pair of embeddings beside layers over another."""

    def __init__(self, users=60, items=80, width=16):
        super().__init__()
        self.tables = nn.ModuleDict(
            {f"{part}_{side}": nn.Embedding(n, width) for part in ("gmf", "mlp") for side, n in
             (("user", users), ("item", items))}
        )  # fmt: skip
        self.mlp, self.out = mlp(2 * width, 32, 16), nn.Linear(2 * width, 1)

    def forward(self, users, items):
        product = self.tables["gmf_user"](users) * self.tables["gmf_item"](items)
        deep = self.mlp(torch.cat((self.tables["mlp_user"](users), self.tables["mlp_item"](items)), 1)).relu()
        return self.out(torch.cat((product, deep), 1))


class MatrixFactorization(nn.Module):
    """The product of a user's and an item's factors, and their biases."""

    def __init__(self, users=60, items=80, width=16):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)

    def forward(self, users, items):
        product = (self.users(users) * self.items(items)).sum(1, keepdim=True)
        return product + self.user_bias(users) + self.item_bias(items)


class TwoTower(nn.Module):
    """A tower for the query, a bag of words, and one for the item; the cosine of the two."""

    def __init__(self, words=150, items=80, width=24):
        super().__init__()
        self.words, self.items = nn.EmbeddingBag(words, width), nn.Embedding(items, width)
        self.query, self.item = mlp(width, 48, 32), mlp(width + 4, 48, 32)

    def forward(self, words, items, features):
        query, item = self.query(self.words(words)), self.item(torch.cat((self.items(items), features), 1))
        return torch.cosine_similarity(query, item)


class GRU4Rec(nn.Module):
    """A session's items through a GRU, scores of all items by the table itself."""

    def __init__(self, items=90, width=32):
        super().__init__()
        self.items, self.gru = nn.Embedding(items, width), nn.GRU(width, width, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(items))

    def forward(self, session):
        return self.gru(self.items(session))[0][:, -1] @ self.items.weight.t() + self.bias


OTHERS = (
    Architecture(name="CRNN", paper="Shi 2015", build=CRNN, inputs=lambda: (torch.randn(3, 1, 16, 24),), outputs=(1,)),
    Architecture(name="MLP-Mixer", paper="Tolstikhin 2021", build=Mixer, inputs=lambda: (torch.randn(2, 3, 32, 32),)),
    Architecture(name="PointNet", paper="Qi 2017", build=PointNet, inputs=lambda: (torch.randn(4, 20, 3),)),
    Architecture(name="Neural ODE", paper="Chen 2018", build=NeuralODE, inputs=lambda: (torch.randn(6, 12),)),
    Architecture(
        name="DLRM",
        paper="Naumov 2019",
        build=DLRM,
        inputs=lambda: (torch.randn(5, 13), torch.randint(30, (3, 5, 4))),
        rows=(0, 1),
    ),
    Architecture(
        name="Wide & Deep",
        paper="Cheng 2016",
        build=WideAndDeep,
        inputs=lambda: (torch.randint(120, (5, 6)), torch.randint(10, (5, 3)), torch.randn(5, 5)),
    ),
    Architecture(name="DeepFM", paper="Guo 2017", build=DeepFM, inputs=lambda: (torch.randint(100, (6, 5)),)),
    Architecture(
        name="Neural collaborative filtering",
        paper="He 2017",
        build=NCF,
        inputs=lambda: (torch.randint(60, (8,)), torch.randint(80, (8,))),
    ),
    Architecture(
        name="Matrix factorization",
        paper="Koren 2009",
        build=MatrixFactorization,
        inputs=lambda: (torch.randint(60, (16,)), torch.randint(80, (16,))),
    ),
    Architecture(
        name="Two towers",
        paper="Yi 2019",
        build=TwoTower,
        inputs=lambda: (torch.randint(150, (6, 5)), torch.randint(80, (6,)), torch.randn(6, 4)),
    ),
    Architecture(
        name="GRU4Rec",
        paper="Hidasi 2016",
        build=GRU4Rec,
        inputs=lambda: (torch.randint(90, (5, 7)),),
        called=("items.weight",),
    ),
)
