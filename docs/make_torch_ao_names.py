"""Write docs/torch_ao_names.md from the tables of torch.ao's names."""

import pathlib

from fxquant.torch_ao.names import MOVED, SAME

_HEAD = """# Names of torch.ao

What became of each public name of `torch.ao.quantization`, made from fxquant's own tables by
`python docs/make_torch_ao_names.py`. The guide: [coming from torch.ao](from_torch_ao.md).

## Names that are the same

| name | the difference |
|---|---|
"""

_MODULES = """
## Modules, options

| torch.ao | fxquant |
|---|---|
| `torch.ao.nn.quantized.dynamic.Linear`, `.LSTM`, `.GRU`, the cells | `fxquant.nn.DynamicQuantizedLinear`, `…LSTM`, `…GRU`, `…RNN`, `…LSTMCell`, `…GRUCell`, `…RNNCell`: plain buffers, no packed objects |
| `torch.ao.nn.quantized.Embedding`, `EmbeddingBag` | `fxquant.nn.QuantizedEmbedding`, `QuantizedEmbeddingBag` |
| `torch.ao.nn.quantizable.MultiheadAttention` (static only) | `fxquant.nn.DynamicQuantizedMultiheadAttention`, for `nn.MultiheadAttention` and in `nn.Transformer…` |
| `torch.ao.nn.intrinsic.quantized.dynamic.LinearReLU` | `fxquant.nn.DynamicQuantizedLinearReLU` |
| `prepare_custom_config` (preserved attributes) | `preserved_attributes=(…)`: methods and properties too |
| `inplace`, `_equalization_config`, `is_reference`, … | an `ArgumentError` says what to do instead |
| `backend_config` | `operators=(*OPERATORS, MY_ROW)`: [adding an operator](adding_an_operator.md) |
| one mapping entry for `nn.Embedding` beside the global one | not needed: under `default_dynamic_qconfig` its rows become int8 |
| `torch.backends.quantized.engine` | not needed: kernels are chosen for the machine |
| `torch.jit.script(quantized)` | not supported: TorchScript is deprecated, see [questions](questions.md) |

## Names that fxquant does not have

"""  # noqa: E501 - rows of a table


def page() -> str:
    """Return the page's text."""
    same = "".join(f"| `{name}` | {difference} |\n" for name, difference in SAME.items())
    groups: dict[str, list[str]] = {}
    for name, instead in MOVED.items():
        groups.setdefault(instead, []).append(f"`{name}`")
    moved = "\n".join(f"- {instead}.\n  {', '.join(names)}" for instead, names in groups.items())
    return f"{_HEAD}{same}{_MODULES}{moved}\n"


if __name__ == "__main__":
    (pathlib.Path(__file__).parent / "torch_ao_names.md").write_text(page(), encoding="utf8")
