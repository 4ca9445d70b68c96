"""The operators' references, called as the operators are."""

from fxquant.ops import KERNELS


def _reference(name):
    kernel = KERNELS[name]
    return lambda *args, **kwargs: kernel.reference(kernel.arguments(*args, **kwargs))


linear, lstm, rnn = map(_reference, ("linear", "lstm", "rnn"))
embedding, embedding_bag = map(_reference, ("embedding", "embedding_bag"))
matmul, attention = map(_reference, ("matmul", "attention"))
