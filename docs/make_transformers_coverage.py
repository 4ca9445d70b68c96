"""Write the table of transformers' models into docs/coverage.md: python -m docs.make_transformers_coverage."""

import tempfile

import torch
import transformers

from docs.make_coverage import PAGE, TRANSFORMERS
from fxquant.graph.edit import byte_count
from fxquant.huggingface import FxQuantConfig
from tests.architectures.base import sqnr
from tests.huggingface.models import MODELS, float_outputs, prompt_of

_HEAD = f"""
{TRANSFORMERS}

Models of Hugging Face's transformers, built from configs in a small size with random weights
(`tests/huggingface/models.py`), quantized by [`from_pretrained`](huggingface.md) under
`default_dynamic_qconfig_mapping()`. The table is made by `python -m docs.make_transformers_coverage`, which also
asserts that each model has the same outputs, bit for bit, after `save_pretrained` and `from_pretrained`, from one file
and from several:

- *sites*: the number of quantized modules.
- *stays float*: the types of the other candidates, and how many there are; `explain` has the reason of each.
- *quantized*, *kB*, *SQNR*: as above.
- *same tokens*: in which ways `generate` gives the tokens of the float model, 8 after each of two prompts. The weights
  are random, so that many tokens are nearly as likely as the best.

| model | sites | stays float | quantized, % | kB, float → int8 | SQNR, dB | same tokens |
|---|---|---|---|---|---|---|
"""
_WAYS = {"greedy": {}, "3 beams": {"num_beams": 3}, "static cache": {"cache_implementation": "static"}}


def cells(name: str) -> list[str]:
    """Return a model's cells of the table; AssertionError where a saved folder gives something else."""
    torch.manual_seed(0)
    make, inputs_of = MODELS[name]
    model, inputs = make().eval(), inputs_of()
    with tempfile.TemporaryDirectory() as room:
        model.save_pretrained(f"{room}/float")
        quantized = type(model).from_pretrained(f"{room}/float", quantization_config=FxQuantConfig())
        outputs = float_outputs(quantized, inputs)
        for shard in ("50GB", "50KB"):
            quantized.save_pretrained(f"{room}/{shard}", max_shard_size=shard)
            loaded = type(model).from_pretrained(f"{room}/{shard}")
            assert all(map(torch.equal, outputs, float_outputs(loaded, inputs))), name
    record = quantized.hf_quantizer.record
    kinds = [part.kind.rpartition(".")[2] for part in record.skipped]
    floats = ", ".join(f"{kinds.count(kind)} `{kind}`" for kind in dict.fromkeys(kinds)) or "nothing"
    near = f"{min(map(sqnr, float_outputs(model, inputs), outputs)):.0f}"
    size = f"{byte_count(model) / 1e3:.1f} → {byte_count(quantized) / 1e3:.1f}"
    same = _same_tokens(model, loaded, inputs) if model.can_generate() else "–"
    return [name, str(len(record.sites)), floats, f"{100 * record.coverage.share:.0f}", size, near, same]


def _same_tokens(model: torch.nn.Module, quantized: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> str:
    """Return the ways in which two models generate the same tokens."""
    same = []
    for way, options in _WAYS.items():
        options = {"max_new_tokens": 8, "do_sample": False, **options}
        tokens = [each.generate(**prompt_of(inputs), **options) for each in (model, quantized)]
        same += [way] if torch.equal(*tokens) else []
    return ", ".join(same) or "none"


def section() -> str:
    """Return the page's last section."""
    return _HEAD + "".join(f"| {' | '.join(cells(name))} |\n" for name in MODELS)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rest = PAGE.read_text(encoding="utf8").partition(f"\n{TRANSFORMERS}")[0]
    PAGE.write_text(rest + section(), encoding="utf8")
