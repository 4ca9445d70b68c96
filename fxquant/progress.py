"""A line on a terminal that counts batches, for runs that take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TextIO, TypeAlias

Progress: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps the batches of a run, such as tqdm for a bar."""

_PATIENCE_S = 2.0
"""How long a run may take before a line appears: a short one needs none."""

_PERIOD_S = 0.2


def count_on_terminal(batches: Iterable[Any], stream: TextIO | None = None) -> Iterator[Any]:
    """Yield the batches. After two seconds a line on a terminal counts them; it is removed at the end.

    stream: standard error, if None. Nothing is written where it is no terminal. If the batches have a length, the line
    says how long the others will take.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty():  # a program without a console has none
        yield from batches
        return
    total = len(batches) if isinstance(batches, Sized) else None
    begin = last = time.monotonic()
    is_shown = False
    try:
        for done, batch in enumerate(batches):
            now = time.monotonic()
            if now - begin >= _PATIENCE_S and (not is_shown or now - last >= _PERIOD_S):
                stream.write(f"\r{_line(done, total, now - begin)}\x1b[K")
                stream.flush()
                last, is_shown = now, True
            yield batch
    finally:
        if is_shown:
            stream.write("\r\x1b[K")
            stream.flush()


def _line(done: int, total: int | None, seconds: float) -> str:
    """Return what is shown after some batches."""
    if total is None or not done:
        return f"{done} batch{'' if done == 1 else 'es'} in {_clock(seconds)}"
    return f"{done} of {total} batches, {_clock(seconds * max(total - done, 0) / done)} left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
