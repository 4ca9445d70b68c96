"""The one error that a user of this package can cause."""


class WordLanguageModelError(Exception):
    """A path, a text or a checkpoint that cannot be used; the message is one line and says what to do."""
