"""`python -m tutorials.word_language_model`: quantize a trained word language model, and see that nothing was lost.

With no options it needs no data: the text is the source of the Python that runs it, and the model is trained on that
text once (under a minute on one core) and kept. With --data and --checkpoint it takes a text and a model of yours.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .demo import run_demo
from .errors import WordLanguageModelError
from .options import path_or_none, token_count
from .training import TrainingConfig

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "word_language_model"
DEFAULT_TOKENS = 40_000


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m tutorials.word_language_model", description=__doc__)
    option = parser.add_argument
    option(
        "--data",
        type=path_or_none,
        metavar="FOLDER",
        help="train.txt, valid.txt and test.txt; default: made from Python's source",
    )
    option(
        "--checkpoint",
        type=path_or_none,
        metavar="FILE",
        help="a float model as safetensors; default: trained on the text and cached",
    )
    option("--quantized", type=path_or_none, metavar="FILE", help="where to save the quantized model; default: nowhere")
    option(
        "--tokens",
        type=token_count,
        default=DEFAULT_TOKENS,
        metavar="N|all",
        help="words of the test text to evaluate on (%(default)s)",
    )
    option("--words", type=int, default=60, metavar="N", help="words to generate (%(default)s)")
    option("--seed", type=int, default=3, metavar="N", help="of the generated text (%(default)s)")
    option(
        "--epochs",
        type=int,
        default=TrainingConfig.epochs,
        metavar="N",
        help="training passes over the text (%(default)s)",
    )
    option(
        "--cache",
        type=Path,
        default=CACHE,
        metavar="FOLDER",
        help="where text and trained model are kept (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; leave with a line of explanation where something that was named cannot be used."""
    options = parse_arguments(arguments)
    try:
        run_demo(**vars(options))
    except WordLanguageModelError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what was not finished is not kept") from None


if __name__ == "__main__":
    main()
