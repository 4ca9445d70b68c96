"""All of them, in the order of docs/coverage.md."""

from tests.architectures.others import OTHERS
from tests.architectures.speech import SPEECH
from tests.architectures.text import TEXT
from tests.architectures.transformers import TRANSFORMERS

ARCHITECTURES = (*SPEECH, *TEXT, *TRANSFORMERS, *OTHERS)
