"""Progress bars on standard error."""

import sys

from tqdm import tqdm


def progress_bar(total: int, title: str, unit: str, show: bool = True) -> "tqdm[None]":
    """Return a bar to be updated by hand (and closed: it is a context manager)."""
    # In a log file each refresh is a line of its own: a few tell as much as hundreds.
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total, desc=title, unit=unit, disable=not show, mininterval=seconds, maxinterval=seconds, ncols=100
    )
