"""Float checkpoints of the word language model, as safetensors files."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .errors import WordLanguageModelError
from .model import WordLanguageModel


def infer_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the arguments of WordLanguageModel (words, embedding_size, hidden_size, layers) that gave `state`."""
    words, embedding_size = state["encoder.weight"].shape
    layers = sum(key.startswith("rnn.weight_hh_l") for key in state)
    return {
        "words": words,
        "embedding_size": embedding_size,
        "hidden_size": state["rnn.weight_hh_l0"].shape[1],
        "layers": layers,
    }


def load_checkpoint(path: Path) -> WordLanguageModel:
    """Return the model stored at `path` in eval mode: its sizes from the tensors' shapes, its weights in float32."""
    if not path.is_file():
        raise WordLanguageModelError(f"no checkpoint at {path}; name a safetensors file")
    try:
        state = load_file(path)
        model = WordLanguageModel(**infer_sizes(state))
        # Copies into the model's own float32 parameters, so that a file stored in float16 is widened on the way.
        model.load_state_dict(state)
    except SafetensorError as error:
        raise WordLanguageModelError(f"{path} is not a whole safetensors file ({error})") from error
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WordLanguageModelError(
            f"{path} does not hold a word language model (encoder.weight, rnn.*, decoder.*): {reason}"
        ) from error
    return model.eval()


def save_checkpoint(model: WordLanguageModel, path: Path) -> None:
    """Write the model's parameters to `path`; whoever looks meanwhile sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Neither tempfile nor save_file: what they create only its owner may read, and it keeps that when it is renamed.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(save({key: tensor.contiguous() for key, tensor in model.state_dict().items()}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
