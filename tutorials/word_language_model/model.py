"""The word language model: Embedding → dropout → LSTM → dropout → Linear."""

import torch
from torch import Tensor, nn

Hidden = tuple[Tensor, Tensor]


class WordLanguageModel(nn.Module):
    """Scores for the next word of each sequence, given the words so far and the LSTM's state.

    words: V, the vocabulary; embedding_size: I; hidden_size: H; layers: L. The parameters are named encoder.*, rnn.*
    and decoder.*, as in PyTorch's word_language_model example (whose architecture this is): its checkpoints load.
    """

    def __init__(self, words: int, embedding_size: int, hidden_size: int, layers: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.layers = layers
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(words, embedding_size)
        # nn.LSTM puts its dropout between layers, and warns where a single layer leaves it nowhere to go.
        self.rnn = nn.LSTM(embedding_size, hidden_size, layers, dropout=dropout if layers > 1 else 0.0)
        self.decoder = nn.Linear(hidden_size, words)

    def forward(self, words: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Return the scores (T, B, V) of the words that follow `words` (T, B), and the state after the last of them."""
        output, hidden = self.rnn(self.drop(self.encoder(words)), hidden)
        return self.decoder(self.drop(output)), hidden

    def init_hidden(self, batch: int) -> Hidden:
        """Return the state before the first word: two zero tensors (L, B, H)."""
        shape = (self.layers, batch, self.hidden_size)
        return torch.zeros(shape), torch.zeros(shape)
