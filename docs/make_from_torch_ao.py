"""Write docs/from_torch_ao.md from the tables of torch.ao's names."""

import pathlib

from fxquant._torch_ao_names import MOVED, SAME

_HEAD = """# Coming from torch.ao

Change the import and keep the code:

```python
# from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
# from torch.ao.quantization.quantize_fx import prepare_fx, convert_fx
from fxquant import QConfigMapping, default_dynamic_qconfig
from fxquant.quantize_fx import prepare_fx, convert_fx
```

A name that fxquant does not have is an error that says what takes its place: `from fxquant import prepare_qat_fx`.

## Checkpoints and models that torch.ao quantized

```python
quantized = fxquant.load_torch_ao("quantized_state_dict.pt", model)  # model: the float architecture, in eval mode
quantized = fxquant.from_torch_ao(theirs)  # what torch.ao's quantize_dynamic or convert_fx gave
quantized = fxquant.from_torch_ao(theirs, model)  # or theirs.state_dict()
fxquant.save(quantized, "model.safetensors")
```

The integers and scales are torch.ao's, bit for bit: Linear, LinearReLU, `F.linear`, LSTM, GRU, the cells, Embedding (8
and 4 bits), EmbeddingBag; float16 weights too; eager and FX. Static quantization is refused.

- A state_dict file is read with `weights_only=True`: nothing in it is run. `load_torch_ao(path)` without a model takes
  a file of the whole model, which is unpickled: only for files from someone you trust.
- With the float model beside it, a result of `convert_fx` finds the places of `F.linear`'s weights and of folded
  BatchNorms again, so that `fxquant.load(model, …)` takes what `fxquant.save` wrote. Without it such a result runs and
  saves, but its file loads into no float architecture.
- Needed for it: quantized tensors in this torch, and for models (not for state_dict files) torch.ao's modules. Where
  they are gone, `TorchAoError` says so; convert once under an older torch and keep what `fxquant.save` writes.

## Numbers

| | torch.ao | fxquant by default |
|---|---|---|
| inputs | one scale a tensor, 7 bits (`reduce_range`) | one scale a row, 8 bits |
| weights | one scale a tensor, -128–127 | one scale an output channel, ±127 |
| LSTM, GRU | the inputs of all time steps share a scale | each row of each step has its own |
| 4-bit rows | scale and offset in float16 | in float32 |
| EmbeddingBag | always sums, whatever its mode | sum, mean, max, padding_idx |

`from_torch_ao(…, qconfig=per_tensor_dynamic_qconfig.with_reduce_range())` keeps torch.ao's arithmetic as well as its
integers, and its outputs to float rounding. The default has torch.ao's weights and finer inputs: nearer to the float
model, and a row's result depends on that row alone. See [numerics](numerics.md); on WikiText-2, [results](results.md).

An `nn.TransformerEncoder` that torch.ao's `quantize_dynamic` made fails in eval mode without gradients (`'function'
object has no attribute 'device'`: torch's fast path reads weights that are none); fxquant keeps that path off
quantized layers.

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
    (pathlib.Path(__file__).parent / "from_torch_ao.md").write_text(page(), encoding="utf8")
