"""An LSTM word language model: text, training, generation, evaluation, and the demo that quantizes it.

`make demo` at the project's root runs it; the notebooks and the benchmark import it.
"""

from .checkpoint import infer_sizes, load_checkpoint, save_checkpoint
from .corpus import Corpus, Dictionary
from .errors import WordLanguageModelError
from .evaluation import Evaluation, check_eval_mode, evaluate, state_dict_bytes, torch_threads
from .generation import generate, to_text
from .model import WordLanguageModel
from .peers import quantize_with_torch_ao
from .quantization import quantize
from .stdlib_text import build_folder
from .training import TrainingConfig, train, train_or_load

__all__ = [
    "Corpus",
    "Dictionary",
    "Evaluation",
    "TrainingConfig",
    "WordLanguageModel",
    "WordLanguageModelError",
    "build_folder",
    "check_eval_mode",
    "evaluate",
    "generate",
    "infer_sizes",
    "load_checkpoint",
    "quantize",
    "quantize_with_torch_ao",
    "save_checkpoint",
    "state_dict_bytes",
    "to_text",
    "torch_threads",
    "train",
    "train_or_load",
]
