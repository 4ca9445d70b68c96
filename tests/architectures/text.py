"""Text: taggers, classifiers, sentence encoders, language models, sequence to sequence."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.architectures.base import Architecture


class Tagger(nn.Module):
    """A bidirectional LSTM over packed sentences, and scores of tags."""

    def __init__(self, words=60, width=24, hidden=20, tags=9):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(2 * hidden, tags)

    def forward(self, words, lengths):
        x = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(x)[0], batch_first=True, total_length=words.shape[1])
        return self.tags(x)


class AttentionDecoder(nn.Module):
    """A loop over the words of a target, each after an additive attention to the source."""

    def __init__(self, words, width, hidden):
        super().__init__()
        self.target = nn.Embedding(words, width)
        self.start = nn.Linear(hidden, hidden)
        self.w, self.u = nn.Linear(hidden, hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)
        self.v = nn.Linear(hidden, 1, bias=False)
        self.decoder = nn.GRUCell(width + 2 * hidden, hidden)
        self.out = nn.Linear(3 * hidden + width, words)

    def forward(self, memory, final, target):
        keys, h, scores = self.u(memory), torch.tanh(self.start(final[1])), []
        for t in range(target.shape[1]):
            word = self.target(target[:, t])
            weights = self.v(torch.tanh(self.w(h).unsqueeze(1) + keys)).softmax(1)
            context = (weights * memory).sum(1)
            h = self.decoder(torch.cat((word, context), 1), h)
            scores.append(self.out(torch.cat((h, context, word), 1)))
        return torch.stack(scores, 1)


class Translator(nn.Module):
    """A bidirectional encoder and the decoder's loop."""

    def __init__(self, words=50, width=24, hidden=32):
        super().__init__()
        self.source, self.encoder = (
            nn.Embedding(words, width),
            nn.GRU(width, hidden, batch_first=True, bidirectional=True),
        )
        self.decoder = AttentionDecoder(words, width, hidden)

    def forward(self, source, target):
        memory, final = self.encoder(self.source(source))
        return self.decoder(memory, final, target)


class TextCNN(nn.Module):
    """Convolutions of three widths over words, the maximum over time, one linear layer."""

    def __init__(self, words=80, width=32, channels=16, classes=4):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, size) for size in (3, 4, 5))
        self.out = nn.Linear(3 * channels, classes)

    def forward(self, words):
        x = self.embed(words).transpose(1, 2)
        return self.out(torch.cat([conv(x).relu().amax(-1) for conv in self.convs], 1))


class FastText(nn.Module):
    """The mean of the embeddings of words and n-grams, and one linear layer."""

    def __init__(self, words=200, width=32, classes=5):
        super().__init__()
        self.bag = nn.EmbeddingBag(words, width, mode="mean")
        self.out = nn.Linear(width, classes)

    def forward(self, words):
        return self.out(self.bag(words))


class Highway(nn.Module):
    """y = t ∘ relu(W x) + (1 - t) ∘ x, t = σ(W' x)."""

    def __init__(self, width):
        super().__init__()
        self.transform, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        gate = self.gate(x).sigmoid()
        return gate * self.transform(x).relu() + (1 - gate) * x


class HighwayNetwork(nn.Module):
    """A stack of highway layers between two linear ones."""

    def __init__(self, inputs=48, width=32, layers=6, classes=10):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, width), *[Highway(width) for _ in range(layers)], nn.Linear(width, classes)
        )

    def forward(self, x):
        return self.net(x)


class ELMo(nn.Module):
    """Convolutions over the letters of each word, highways, two LSTMs with projections for each direction, mixed."""

    def __init__(self, letters=40, width=32):
        super().__init__()
        self.letters = nn.Embedding(letters, 8)
        self.convs = nn.ModuleList([nn.Conv1d(8, 16, 1), nn.Conv1d(8, 16, 2), nn.Conv1d(8, 24, 3)])
        self.highways = nn.Sequential(Highway(56), Highway(56))
        self.project = nn.Linear(56, width)
        self.first = nn.LSTM(width, 48, batch_first=True, bidirectional=True, proj_size=width // 2)
        self.second = nn.LSTM(width, 48, batch_first=True, bidirectional=True, proj_size=width // 2)
        self.mix = nn.Parameter(torch.randn(3))

    def forward(self, letters):  # (B, T, letters of a word)
        x = self.letters(letters).flatten(0, 1).transpose(1, 2)
        x = torch.cat([conv(x).amax(-1).relu() for conv in self.convs], 1)
        x = self.project(self.highways(x)).unflatten(0, (letters.shape[0], letters.shape[1]))
        y = self.first(x)[0]
        z = self.second(y)[0] + y
        weights = self.mix.softmax(0)
        return weights[0] * x + weights[1] * y + weights[2] * z


class AWDLSTM(nn.Module):
    """Three LSTMs, the last as wide as the embedding, whose table is the output's matrix too."""

    def __init__(self, words=100, width=24, hidden=40):
        super().__init__()
        self.encoder = nn.Embedding(words, width)
        sizes = (width, hidden, hidden, width)
        self.rnns = nn.ModuleList(nn.LSTM(i, h) for i, h in itertools.pairwise(sizes))
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.encoder.weight

    def forward(self, words):  # (T, B)
        x = self.encoder(words)
        for rnn in self.rnns:
            x, _ = rnn(x)
        return self.decoder(x)


class InferSent(nn.Module):
    """One encoder for two sentences, a BiLSTM's maximum over time; where the two differ and agree is classified."""

    def __init__(self, words=80, width=24, hidden=24):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.classify = nn.Sequential(nn.Linear(8 * hidden, 32), nn.ReLU(), nn.Linear(32, 3))

    def encode(self, words):
        return self.lstm(self.embed(words))[0].amax(1)

    def forward(self, premise, hypothesis):
        u, v = self.encode(premise), self.encode(hypothesis)
        return self.classify(torch.cat((u, v, (u - v).abs(), u * v), 1))


class PointerNetwork(nn.Module):
    """An encoder of points and a decoder whose outputs are the weights of its attention over them."""

    def __init__(self, hidden=32, steps=4):
        super().__init__()
        self.encoder = nn.LSTM(2, hidden, batch_first=True)
        self.decoder = nn.LSTMCell(2, hidden)
        self.w1, self.w2 = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.v = nn.Linear(hidden, 1, bias=False)
        self.steps = steps

    def forward(self, points):  # (B, N, 2)
        memory, (h, c) = self.encoder(points)
        keys, state, point, pointers = self.w1(memory), (h[0], c[0]), points[:, 0] * 0, []
        for _ in range(self.steps):
            state = self.decoder(point, state)
            scores = self.v(torch.tanh(keys + self.w2(state[0]).unsqueeze(1))).squeeze(-1)
            point = (scores.softmax(1).unsqueeze(-1) * points).sum(1)
            pointers.append(scores)
        return torch.stack(pointers, 1)


class MemoryNetwork(nn.Module):
    """End-to-end memory: sentences as sums of embeddings, three hops, each hop's output table the next one's input."""

    def __init__(self, words=60, width=24, hops=3):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(words, width) for _ in range(hops + 1))
        self.answer = nn.Linear(width, words, bias=False)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # as in the paper: larger ones make softmax a maximum

    def forward(self, story, question):  # (B, S, W), (B, W)
        state = self.tables[0](question).sum(1)
        for table_in, table_out in zip(self.tables, self.tables[1:], strict=False):
            weights = (table_in(story).sum(2) * state.unsqueeze(1)).sum(-1).softmax(-1)
            state = state + (weights.unsqueeze(-1) * table_out(story).sum(2)).sum(1)
        return self.answer(state)


class HierarchicalAttention(nn.Module):
    """GRUs over words, then over sentences, each read by attention with a learned context."""

    class Reader(nn.Module):
        def __init__(self, inputs, hidden):
            super().__init__()
            self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=True)
            self.attend = nn.Linear(2 * hidden, 2 * hidden)
            self.context = nn.Linear(2 * hidden, 1, bias=False)

        def forward(self, x):
            x = self.gru(x)[0]
            return (self.context(torch.tanh(self.attend(x))).softmax(1) * x).sum(1)

    def __init__(self, words=60, width=16, hidden=16, classes=5):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.words, self.sentences = self.Reader(width, hidden), self.Reader(2 * hidden, hidden)
        self.out = nn.Linear(2 * hidden, classes)

    def forward(self, document):  # (B, S, W)
        x = self.words(self.embed(document).flatten(0, 1))
        return self.out(self.sentences(x.unflatten(0, (document.shape[0], document.shape[1]))))


class TCN(nn.Module):
    """Dilated causal convolutions with residuals, and a linear layer on the last step."""

    def __init__(self, inputs=8, channels=16, levels=3, classes=6):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList([nn.Conv1d(inputs if i == 0 else channels, channels, 3, dilation=2**i),
                           nn.Conv1d(channels, channels, 3, dilation=2**i)])
            for i in range(levels)
        )  # fmt: skip
        self.match = nn.Conv1d(inputs, channels, 1)
        self.out = nn.Linear(channels, classes)

    def forward(self, x):  # (B, inputs, T)
        for i, (first, second) in enumerate(self.levels):
            y = first(F.pad(x, (2 * 2**i, 0))).relu()
            y = second(F.pad(y, (2 * 2**i, 0))).relu()
            x = ((self.match(x) if i == 0 else x) + y).relu()
        return self.out(x[:, :, -1])


TEXT = (
    Architecture(
        name="BiLSTM tagger",
        paper="Huang 2015",
        build=Tagger,
        inputs=lambda: (torch.randint(1, 60, (4, 8)), torch.tensor([8, 3, 5, 1])),
    ),
    Architecture(
        name="Seq2seq with attention",
        paper="Bahdanau 2015",
        build=Translator,
        inputs=lambda: (torch.randint(50, (3, 7)), torch.randint(50, (3, 5))),
        kept=("decoder",),
    ),
    Architecture(name="TextCNN", paper="Kim 2014", build=TextCNN, inputs=lambda: (torch.randint(80, (4, 12)),)),
    Architecture(name="fastText", paper="Joulin 2017", build=FastText, inputs=lambda: (torch.randint(200, (6, 9)),)),
    Architecture(
        name="Highway network", paper="Srivastava 2015", build=HighwayNetwork, inputs=lambda: (torch.randn(6, 48),)
    ),
    Architecture(name="ELMo", paper="Peters 2018", build=ELMo, inputs=lambda: (torch.randint(40, (3, 5, 7)),)),
    Architecture(
        name="AWD-LSTM",
        paper="Merity 2018",
        build=AWDLSTM,
        inputs=lambda: (torch.randint(100, (7, 4)),),
        rows=(1,),
        outputs=(1,),
    ),
    Architecture(
        name="InferSent",
        paper="Conneau 2017",
        build=InferSent,
        inputs=lambda: (torch.randint(80, (4, 7)), torch.randint(80, (4, 6))),
    ),
    Architecture(
        name="Pointer network", paper="Vinyals 2015", build=PointerNetwork, inputs=lambda: (torch.rand(3, 8, 2),)
    ),
    Architecture(
        name="Memory network",
        paper="Sukhbaatar 2015",
        build=MemoryNetwork,
        inputs=lambda: (torch.randint(60, (3, 6, 5)), torch.randint(60, (3, 4))),
    ),
    Architecture(
        name="Hierarchical attention",
        paper="Yang 2016",
        build=HierarchicalAttention,
        inputs=lambda: (torch.randint(60, (3, 4, 5)),),
    ),
    Architecture(name="TCN", paper="Bai 2018", build=TCN, inputs=lambda: (torch.randn(3, 8, 20),)),
)
