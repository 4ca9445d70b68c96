"""How options are spelt on the command line."""

from pathlib import Path


def path_or_none(argument: str) -> Path | None:
    """Return the path, or None for the empty string that `make demo` passes on where nothing was given."""
    return Path(argument).expanduser() if argument else None


def token_count(argument: str) -> int | None:
    """Return the number, or None for `all`; raises ValueError below 1."""
    if argument == "all":
        return None
    count = int(argument)
    if count < 1:
        raise ValueError(argument)
    return count


def shapes(argument: str) -> list[tuple[int, int]]:
    """Return the (length, batch) pairs of `25x1,1x1`."""
    pairs = []
    for pair in argument.split(","):
        length, batch = pair.split("x")
        pairs.append((int(length), int(batch)))
    return pairs


def thread_counts(argument: str) -> list[int]:
    """Return the numbers of `1,2`."""
    return [int(count) for count in argument.split(",")]
