"""Checks of sizes as models write them; in a file without tests, where pytest leaves `assert` as it is."""


def plain(h, w):
    assert h == 1, f"the height must be 1, not {h}"


def joined(h, w):
    assert h == 1 and w % 2 == 0  # noqa: PT018


def either(h, w):
    if h != 1 or w % 2:
        raise ValueError(f"{h} x {w}")


def inverted(h, w):
    assert not h > 1


def chained(h, w):
    assert 0 < h <= 1


def returned(h, w):
    if h == 1:
        return
    raise ValueError(h)


def goes_both_ways(h, w):
    return h + 1 if h == 1 else w


def in_a_loop(h, w):
    while h > 1:
        h = h - 1
