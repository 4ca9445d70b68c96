"""Write docs/torch_ao_names.md from the tables of torch.ao's names."""

import pathlib

from fxquant.torch_ao.names import MOVED, SAME

_HEAD = """# Names of torch.ao

Every public name of `torch.ao.quantization`, and what replaces it in fxquant. `python docs/make_torch_ao_names.py`
generates this page from fxquant's own tables. For a guide see [coming from torch.ao](from_torch_ao.md).

## Names that are the same

| name | the difference |
|---|---|
"""

_MODULES = """
## Modules and options

| torch.ao | fxquant |
|---|---|
| `torch.ao.nn.quantized.dynamic.Linear`, `.LSTM`, `.GRU` and the cells | `fxquant.nn.DynamicQuantizedLinear`, `…LSTM`, `…GRU`, `…RNN`, `…LSTMCell`, `…GRUCell`, `…RNNCell`: plain buffers, no packed objects |
| `torch.ao.nn.quantized.Embedding`, `EmbeddingBag` | `fxquant.nn.QuantizedEmbedding`, `QuantizedEmbeddingBag` |
| `torch.ao.nn.quantizable.MultiheadAttention` (static only) | `fxquant.nn.DynamicQuantizedMultiheadAttention`, for `nn.MultiheadAttention`, also inside `nn.Transformer…` |
| `torch.ao.nn.intrinsic.quantized.dynamic.LinearReLU` | `fxquant.nn.DynamicQuantizedLinearReLU` |
| `prepare_custom_config` (preserved attributes) | `preserved_attributes=(…)`, also for methods and properties |
| `inplace`, `_equalization_config`, `is_reference`, … | not supported: an `ArgumentError` says what to do instead |
| `backend_config` | `operators=(*OPERATORS, MY_OPERATOR)`: [adding an operator](adding_an_operator.md) |
| an extra mapping entry for `nn.Embedding` beside the global one | not needed: `default_dynamic_qconfig` makes it int8 |
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
