"""Transformers: encoders, decoders, translation, images, adapters, experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.architectures.base import Architecture


class Attention(nn.Module):
    """Attention written out with four linear layers."""

    def __init__(self, width, heads, memory=None):
        super().__init__()
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(memory or width, width), nn.Linear(memory or width, width)
        self.heads = heads

    def forward(self, x, memory=None, mask=None):
        memory = x if memory is None else memory
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def feed_forward(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class MiniLM(nn.Module):
    """A sentence encoder: post-norm layers, the mean over a sentence's words, scaled to length 1."""

    def __init__(self, words=80, width=32, heads=4, layers=3):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(16, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.feed = nn.ModuleList(feed_forward(width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]) for _ in range(layers))

    def forward(self, words, mask):  # (B, T), (B, T) of 1 and 0
        places = torch.arange(words.shape[1], device=words.device)
        x = self.norm(self.words(words) + self.positions(places))
        hidden = (1 - mask)[:, None, None, :] * -1e4
        for attention, feed, (first, second) in zip(self.attention, self.feed, self.norms, strict=True):
            x = first(x + attention(x, mask=hidden))
            x = second(x + feed(x))
        mean = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)


class BERT(nn.Module):
    """Words, positions and segments through torch's encoder; the first word's pooled state."""

    def __init__(self, words=80, width=32, heads=4, layers=2):
        super().__init__()
        self.words, self.segments = nn.Embedding(words, width, padding_idx=0), nn.Embedding(2, width)
        self.positions = nn.Parameter(torch.randn(1, 16, width) / 10)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.pooler, self.classify = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, words, segments):
        x = self.words(words) + self.segments(segments) + self.positions[:, : words.shape[1]]
        x = self.encoder(self.norm(x), src_key_padding_mask=words == 0)
        return self.classify(torch.tanh(self.pooler(x[:, 0])))


class GPT2(nn.Module):
    """Pre-norm blocks whose matrices are (inputs, outputs), multiplied by addmm; the table of words is the output's."""

    class Conv1D(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            shape = x.size()[:-1] + (self.weight.shape[1],)  # noqa: RUF005 - as Hugging Face does; a star cannot be traced
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)

    class Block(nn.Module):
        def __init__(self, width, heads, linear):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.c_attn, self.c_proj = linear(width, 3 * width), linear(width, width)
            self.c_fc, self.c_out = linear(width, 4 * width), linear(4 * width, width)
            self.heads = heads

        def forward(self, x):
            q, k, v = self.c_attn(self.ln_1(x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
            x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    def __init__(self, words=90, width=32, heads=4, layers=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(*[self.Block(width, heads, self.Conv1D) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, words):
        x = self.wte(words) + self.wpe(torch.arange(words.shape[1], device=words.device))
        return F.linear(self.norm(self.blocks(x)), self.wte.weight)


class GPT(nn.Module):
    """The same of linear layers, with a head that is tied to the table of words."""

    def __init__(self, words=90, width=32, heads=4, layers=2):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(*[GPT2.Block(width, heads, nn.Linear) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words):
        x = self.words(words) + self.positions(torch.arange(words.shape[1], device=words.device))
        return self.head(self.norm(self.blocks(x)))


class Translation(nn.Module):
    """torch's Transformer with a causal mask, and one linear layer to words."""

    def __init__(self, words=60, width=32, heads=4):
        super().__init__()
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.transformer = nn.Transformer(width, heads, 2, 2, 64, batch_first=True)
        self.out = nn.Linear(width, words)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, source, target):
        x = self.transformer(self.source(source), self.target(target), tgt_mask=self.mask)
        return self.out(x)


class ViT(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, pre-norm layers."""

    def __init__(self, width=32, heads=4, layers=2, classes=10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width))
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Perceiver(nn.Module):
    """A few learned latents that read a long input by cross attention, and think; twice, with the same weights."""

    def __init__(self, inputs=12, width=32, latents=6, heads=4, classes=7):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.read, self.think = Attention(width, heads, inputs), Attention(width, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.feed, self.more = feed_forward(width), feed_forward(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):  # (B, M, inputs)
        latents = self.latents.expand(x.shape[0], -1, -1)
        for _ in range(2):
            latents = latents + self.read(self.norms[0](latents), x)
            latents = latents + self.feed(self.norms[1](latents))
            latents = latents + self.think(self.norms[2](latents))
            latents = latents + self.more(self.norms[3](latents))
        return self.head(latents.mean(1))


class LoRA(nn.Module):
    """A linear layer and a change to it of low rank."""

    def __init__(self, base, rank=4, alpha=8):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * self.scaling


class Adapted(nn.Module):
    """An attention layer whose query and value are adapted by LoRA, and a feed-forward."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.attention, self.feed = Attention(width, heads), feed_forward(width)
        self.attention.q, self.attention.v = LoRA(self.attention.q), LoRA(self.attention.v)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


class Experts(nn.Module):
    """Each row goes to the two experts that its gate prefers, by indexing, which does not trace."""

    def __init__(self, width=24, experts=4):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(feed_forward(width) for _ in range(experts))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            for row, place in (chosen == i).nonzero().tolist():
                y[row] += weights[row, place] * expert(x[row : row + 1])[0]
        return y


class MixtureOfExperts(nn.Module):
    """A layer of experts between two linear ones."""

    def __init__(self, inputs=16, width=24, classes=8):
        super().__init__()
        self.before, self.moe, self.after = nn.Linear(inputs, width), Experts(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.before(x)
        return self.after(x + self.moe(x))


def lengths_mask(*lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).float()


def padded(words, mask):
    return words * mask.long()


TRANSFORMERS = (
    Architecture(
        name="MiniLM sentence encoder",
        paper="Wang 2020",
        build=MiniLM,
        inputs=lambda: (torch.randint(80, (4, 9)), lengths_mask(9, 4, 7, 2)),
    ),
    Architecture(
        name="BERT",
        paper="Devlin 2019",
        build=BERT,
        inputs=lambda: (padded(torch.randint(1, 80, (4, 9)), lengths_mask(9, 4, 7, 2)), torch.randint(2, (4, 9))),
    ),
    Architecture(
        name="GPT-2",
        paper="Radford 2019",
        build=GPT2,
        inputs=lambda: (torch.randint(90, (3, 8)),),
        called=(
            "wte.weight",
            *(f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("c_attn", "c_proj", "c_fc", "c_out")),
        ),
    ),
    Architecture(name="GPT", paper="Radford 2018", build=GPT, inputs=lambda: (torch.randint(90, (3, 8)),)),
    Architecture(
        name="Transformer, translation",
        paper="Vaswani 2017",
        build=Translation,
        inputs=lambda: (torch.randint(60, (3, 7)), torch.randint(60, (3, 6))),
    ),
    Architecture(name="ViT", paper="Dosovitskiy 2021", build=ViT, inputs=lambda: (torch.randn(2, 3, 32, 32),)),
    Architecture(name="Perceiver", paper="Jaegle 2021", build=Perceiver, inputs=lambda: (torch.randn(3, 20, 12),)),
    Architecture(name="LoRA", paper="Hu 2022", build=Adapted, inputs=lambda: (torch.randn(3, 6, 32),)),
    Architecture(
        name="Mixture of experts",
        paper="Shazeer 2017",
        build=MixtureOfExperts,
        inputs=lambda: (torch.randn(6, 16),),
        kept=("moe",),
    ),
)
