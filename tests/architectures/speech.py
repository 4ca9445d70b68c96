"""Speech: recognisers, a voice detector, synthesis, enhancement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.architectures.base import Architecture


class DeepSpeech(nn.Module):
    """Three layers of clipped ReLUs over frames, one bidirectional RNN, one layer, letters."""

    def __init__(self, features=26, hidden=64, letters=29):
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)])
        self.rnn = nn.RNN(hidden, hidden, nonlinearity="relu", bidirectional=True)
        self.fc5, self.fc6 = nn.Linear(hidden, hidden), nn.Linear(hidden, letters)

    def forward(self, x):
        for layer in self.fc:
            x = layer(x).clamp(0, 20)
        forward, backward = self.rnn(x)[0].chunk(2, -1)
        return self.fc6(self.fc5(forward + backward).clamp(0, 20))


class DeepSpeech2(nn.Module):
    """Two-dimensional convolutions with BatchNorm over a spectrogram, bidirectional GRUs, one linear layer."""

    def __init__(self, bands=20, hidden=32, letters=29):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, (11, 5), stride=(2, 2), padding=(5, 2)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20),
            nn.Conv2d(8, 8, (5, 5), stride=(2, 1), padding=(2, 2)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20),
        )  # fmt: skip
        self.rnn = nn.GRU(8 * bands // 4, hidden, 2, batch_first=True, bidirectional=True)
        self.norm = nn.BatchNorm1d(2 * hidden)
        self.out = nn.Linear(2 * hidden, letters, bias=False)

    def forward(self, x):  # (B, 1, bands, T)
        x = self.conv(x).flatten(1, 2).transpose(1, 2)
        x = self.norm(self.rnn(x)[0].transpose(1, 2)).transpose(1, 2)
        return self.out(x)


class QuartzNet(nn.Module):
    """Blocks of depthwise separable convolutions over time, with BatchNorm and a residual."""

    class Block(nn.Module):
        def __init__(self, channels, kernel):
            super().__init__()
            self.conv = nn.Sequential(
                nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
                nn.Conv1d(channels, channels, 1, bias=False), nn.BatchNorm1d(channels), nn.ReLU(),
                nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
                nn.Conv1d(channels, channels, 1, bias=False), nn.BatchNorm1d(channels),
            )  # fmt: skip
            self.skip = nn.Sequential(nn.Conv1d(channels, channels, 1, bias=False), nn.BatchNorm1d(channels))

        def forward(self, x):
            return (self.conv(x) + self.skip(x)).relu()

    def __init__(self, features=16, channels=32, letters=29):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(features, channels, 11, 2, 5), nn.BatchNorm1d(channels), nn.ReLU())
        self.blocks = nn.Sequential(self.Block(channels, 11), self.Block(channels, 13))
        self.out = nn.Conv1d(channels, letters, 1)

    def forward(self, x):
        return self.out(self.blocks(self.first(x)))


class Wav2Vec2(nn.Module):
    """Convolutions over the waveform, a convolution for positions, a Transformer of pre-norm layers."""

    def __init__(self, width=32, heads=4, layers=2):
        super().__init__()
        self.features = nn.ModuleList(nn.Conv1d(i, 16, 4, stride=3, bias=False) for i in (1, 16, 16))
        self.norms = nn.ModuleList(nn.GroupNorm(16, 16) for _ in range(3))
        self.project = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, width))
        self.positions = nn.Conv1d(width, width, 7, padding=3, groups=4)
        layer = nn.TransformerEncoderLayer(width, heads, 64, 0.1, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):  # (B, 1, samples)
        for conv, norm in zip(self.features, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        x = self.project(x.transpose(1, 2))
        x = x + F.gelu(self.positions(x.transpose(1, 2))).transpose(1, 2)
        return self.norm(self.encoder(x))


class Conformer(nn.Module):
    """Half a feed-forward, self-attention, a convolution module, half a feed-forward."""

    def __init__(self, width=32, heads=4):
        super().__init__()

        def feed_forward():
            return nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
            )

        self.before, self.after = feed_forward(), feed_forward()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.conv_norm = nn.LayerNorm(width)
        self.conv = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1), nn.GLU(1), nn.Conv1d(width, width, 7, padding=3, groups=width),
            nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, x):  # (B, T, width)
        x = x + 0.5 * self.before(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2)
        return self.norm(x + 0.5 * self.after(x))


class Transducer(nn.Module):
    """RNN-T: an encoder of sound, a network that predicts from the letters so far, and their joint."""

    def __init__(self, features=24, hidden=48, letters=30):
        super().__init__()
        self.encoder = nn.LSTM(features, hidden, 2, batch_first=True, bidirectional=True)
        self.embed = nn.Embedding(letters, 16)
        self.predict = nn.LSTM(16, hidden, batch_first=True)
        self.from_sound, self.from_text = nn.Linear(2 * hidden, 64), nn.Linear(hidden, 64)
        self.joint = nn.Linear(64, letters)

    def forward(self, sound, text):  # (B, T, features), (B, U) -> (B, T, U, letters)
        sound = self.from_sound(self.encoder(sound)[0]).unsqueeze(2)
        text = self.from_text(self.predict(self.embed(text))[0]).unsqueeze(1)
        return self.joint(torch.tanh(sound + text))


class VoiceDetector(nn.Module):
    """Convolutions over a chunk's spectrum and an LSTM whose state goes in and out, chunk by chunk."""

    def __init__(self, bands=33, hidden=32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(bands, hidden, 3, padding=1), nn.ReLU(), nn.Conv1d(hidden, hidden, 3, 2, 1), nn.ReLU()
        )
        self.rnn = nn.LSTMCell(hidden, hidden)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, chunk, state):  # (B, bands, 4), (2, B, hidden)
        h, c = self.rnn(self.encoder(chunk).mean(-1), (state[0], state[1]))
        return self.out(h), torch.stack((h, c))


class SpeakerEncoder(nn.Module):
    """GE2E: three LSTM layers with projections; the last frame, scaled to length 1."""

    def __init__(self, bands=40, hidden=48, size=32):
        super().__init__()
        self.lstm = nn.LSTM(bands, hidden, 3, batch_first=True, proj_size=size)
        self.linear = nn.Linear(size, size)

    def forward(self, mels):
        _, (h, _) = self.lstm(mels)
        embedding = self.linear(h[-1]).relu()
        return embedding / (embedding.norm(dim=1, keepdim=True) + 1e-5)


class Tacotron(nn.Module):
    """Text to mel frames: a bidirectional encoder, and a loop of attention and two decoder LSTMCells."""

    def __init__(self, symbols=40, width=32, mels=20, steps=5):
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.encoder = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.prenet = nn.Sequential(nn.Linear(mels, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.attention_rnn = nn.LSTMCell(16 + width, 48)
        self.query, self.memory = nn.Linear(48, 24, bias=False), nn.Linear(width, 24, bias=False)
        self.score = nn.Linear(24, 1, bias=False)
        self.decoder_rnn = nn.LSTMCell(48 + width, 48)
        self.frame, self.stop = nn.Linear(48 + width, mels), nn.Linear(48 + width, 1)
        self.mels, self.steps = mels, steps

    def forward(self, text):
        memory, _ = self.encoder(self.embed(text))
        keys = self.memory(memory)
        frame, context = keys.new_zeros(text.shape[0], self.mels), memory[:, 0] * 0
        attention_state = decoder_state = None
        frames, stops = [], []
        for _ in range(self.steps):
            attention_state = self.attention_rnn(torch.cat((self.prenet(frame), context), 1), attention_state)
            scores = self.score(torch.tanh(self.query(attention_state[0]).unsqueeze(1) + keys))
            context = (scores.softmax(1) * memory).sum(1)
            decoder_state = self.decoder_rnn(torch.cat((attention_state[0], context), 1), decoder_state)
            both = torch.cat((decoder_state[0], context), 1)
            frame = self.frame(both)
            frames.append(frame)
            stops.append(self.stop(both))
        return torch.stack(frames, 1), torch.cat(stops, 1)


class WaveRNN(nn.Module):
    """A GRUCell called sample by sample, conditioned on smoothed frames, that reads its own last output."""

    def __init__(self, mels=20, hidden=48, levels=32):
        super().__init__()
        self.smooth = nn.Linear(mels, mels)
        self.rnn = nn.GRUCell(1 + mels, hidden)
        self.o1, self.o2 = nn.Linear(hidden, hidden), nn.Linear(hidden, levels)
        self.register_buffer("levels", torch.linspace(-1, 1, levels))

    def forward(self, mels):  # (B, T, mels) -> (B, 3 T): each sample is the mean of its distribution
        mels = self.smooth(mels).repeat_interleave(3, 1)
        h, sample, samples = None, mels[:, 0, :1] * 0, []
        for t in range(mels.shape[1]):
            h = self.rnn(torch.cat((sample, mels[:, t]), 1), h)
            probabilities = self.o2(self.o1(h).relu()).softmax(-1)
            sample = (probabilities * self.levels).sum(-1, keepdim=True)
            samples.append(sample)
        return torch.cat(samples, 1)


class RNNoise(nn.Module):
    """Three GRUs that share their inputs: voice activity, noise, gains of the bands."""

    def __init__(self, features=42, bands=22):
        super().__init__()
        self.dense = nn.Linear(features, 24)
        self.vad, self.noise = nn.GRU(24, 24, batch_first=True), nn.GRU(24 + 24 + features, 48, batch_first=True)
        self.denoise = nn.GRU(24 + 48 + features, 96, batch_first=True)
        self.vad_out, self.gains = nn.Linear(24, 1), nn.Linear(96, bands)

    def forward(self, x):
        dense = torch.tanh(self.dense(x))
        vad, _ = self.vad(dense)
        noise, _ = self.noise(torch.cat((dense, vad.relu(), x), -1))
        denoise, _ = self.denoise(torch.cat((vad.relu(), noise.relu(), x), -1))
        return self.gains(denoise), self.vad_out(vad)


class Speller(nn.Module):
    """A loop over the letters of a text, each after a look at what was heard."""

    def __init__(self, hidden, letters):
        super().__init__()
        self.embed = nn.Embedding(letters, 16)
        self.spell = nn.LSTMCell(16 + 2 * hidden, 2 * hidden)
        self.query, self.key = nn.Linear(2 * hidden, 32), nn.Linear(2 * hidden, 32)
        self.out = nn.Linear(4 * hidden, letters)

    def forward(self, x, text):
        keys, context, state, letters = self.key(x), x[:, 0] * 0, None, []
        for u in range(text.shape[1]):
            state = self.spell(torch.cat((self.embed(text[:, u]), context), 1), state)
            weights = torch.bmm(keys, self.query(state[0]).unsqueeze(2)).softmax(1)
            context = (weights * x).sum(1)
            letters.append(self.out(torch.cat((state[0], context), 1)))
        return torch.stack(letters, 1)


class Listener(nn.Module):
    """Listen, attend and spell: a pyramid of bidirectional LSTMs that halve time, and the speller."""

    def __init__(self, features=20, hidden=24, letters=30):
        super().__init__()
        sizes = (features, 4 * hidden, 4 * hidden)
        self.listen = nn.ModuleList(nn.LSTM(i, hidden, batch_first=True, bidirectional=True) for i in sizes)
        self.spell = Speller(hidden, letters)

    def forward(self, x, text):  # (B, T, features), (B, U)
        for i, layer in enumerate(self.listen):
            x = layer(x if i == 0 else x.reshape(x.shape[0], x.shape[1] // 2, -1))[0]
        return self.spell(x, text)


SPEECH = (
    Architecture(
        name="DeepSpeech",
        paper="Hannun 2014",
        build=DeepSpeech,
        inputs=lambda: (torch.randn(9, 4, 26),),
        rows=(1,),
        outputs=(1,),
    ),
    Architecture(
        name="DeepSpeech 2", paper="Amodei 2016", build=DeepSpeech2, inputs=lambda: (torch.randn(3, 1, 20, 24),)
    ),
    Architecture(name="QuartzNet", paper="Kriman 2020", build=QuartzNet, inputs=lambda: (torch.randn(3, 16, 32),)),
    Architecture(name="wav2vec 2.0", paper="Baevski 2020", build=Wav2Vec2, inputs=lambda: (torch.randn(3, 1, 400),)),
    Architecture(
        name="Conformer block", paper="Gulati 2020", build=Conformer, inputs=lambda: (torch.randn(3, 12, 32),)
    ),
    Architecture(
        name="RNN-T",
        paper="Graves 2012",
        build=Transducer,
        inputs=lambda: (torch.randn(3, 8, 24), torch.randint(30, (3, 4))),
    ),
    Architecture(
        name="Voice activity detector",
        paper="Silero 2021",
        build=VoiceDetector,
        inputs=lambda: (torch.randn(4, 33, 4), torch.randn(2, 4, 32) / 2),
        rows=(0, 1),
        outputs=(0, 1),
    ),
    Architecture(
        name="GE2E speaker encoder",
        paper="Wan 2018",
        build=SpeakerEncoder,
        inputs=lambda: (torch.randn(4, 12, 40),),
    ),
    Architecture(
        name="Tacotron decoder",
        paper="Wang 2017",
        build=Tacotron,
        inputs=lambda: (torch.randint(40, (3, 7)),),
    ),
    Architecture(
        name="WaveRNN",
        paper="Kalchbrenner 2018",
        build=WaveRNN,
        inputs=lambda: (torch.randn(3, 4, 20),),
        kept=("",),
    ),
    Architecture(name="RNNoise", paper="Valin 2018", build=RNNoise, inputs=lambda: (torch.randn(3, 10, 42),)),
    Architecture(
        name="Listen, Attend and Spell",
        paper="Chan 2016",
        build=Listener,
        inputs=lambda: (torch.randn(3, 12, 20), torch.randint(30, (3, 4))),
        kept=("spell",),
    ),
)
