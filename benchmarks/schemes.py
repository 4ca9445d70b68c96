"""Time the word language model with random weights under several qconfigs, in milliseconds per call, taking turns.

    python -m benchmarks.schemes [--threads 1] [--rounds 5] [--seconds 0.2]

The embedding is always int8. A figure is the median of the rounds' medians.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.operators import Call, measure
from benchmarks.word_language_model import DOCUMENTS_SIZES
from fxquant import (
    QConfig,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    int3_dynamic_qconfig,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    prepare_fx,
)
from tutorials.word_language_model import WordLanguageModel

SHAPES = [(1, 1), (25, 1), (25, 16)]
SCHEMES: dict[str, tuple[QConfig, QConfig]] = {
    "int8": (default_dynamic_qconfig, default_dynamic_qconfig),
    "decoder int4": (default_dynamic_qconfig, int4_dynamic_qconfig),
    "LSTM and decoder int4": (int4_dynamic_qconfig, int4_dynamic_qconfig),
    "decoder int3": (default_dynamic_qconfig, int3_dynamic_qconfig),
    "LSTM and decoder int3": (int3_dynamic_qconfig, int3_dynamic_qconfig),
    "LSTM and decoder int16": (int16_dynamic_qconfig, int16_dynamic_qconfig),
    "LSTM and decoder float16": (float16_dynamic_qconfig, float16_dynamic_qconfig),
}
"""What the LSTM and the decoder get."""


def quantize(model: WordLanguageModel, lstm: QConfig, decoder: QConfig) -> nn.Module:
    """Return the model under two qconfigs."""
    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    mapping.set_object_type(nn.LSTM, lstm).set_object_type(nn.Linear, decoder)
    return convert_fx(prepare_fx(model, mapping, (torch.zeros(25, 1, dtype=torch.long), model.init_hidden(1))))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="a side's turn")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = WordLanguageModel(**DOCUMENTS_SIZES).eval()
    models = {name: quantize(model, *qconfigs) for name, qconfigs in SCHEMES.items()}
    rows = []
    for steps, batch in SHAPES:
        inputs = torch.randint(DOCUMENTS_SIZES["words"], (steps, batch)), model.init_hidden(batch)
        calls: dict[str, Call] = {name: functools.partial(one, *inputs) for name, one in models.items()}
        with torch.no_grad():
            times = measure(calls, options.rounds, options.seconds)
        rows.append([f"{steps}×{batch}", *(statistics.median(times[name]) / 1000 for name in models)])
    print(tabulate(rows, headers=["shape", *models], floatfmt=".3g"))


if __name__ == "__main__":
    main()
