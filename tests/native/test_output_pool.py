"""Large outputs share memory only with outputs that nobody can see any more."""

import gc

import pytest
import torch

from fxquant.ops import library
from fxquant.ops.output_pool import OutputPool
from tests.native import native

SHAPE, BYTES = (1024, 2048), 8 << 20


@pytest.fixture
def pool():
    return OutputPool(3 * BYTES, lambda *_: None)


def take(pool, shape=SHAPE):
    return pool.empty(shape)


def test_memory_is_used_again(pool):
    address = take(pool).data_ptr()
    assert take(pool).data_ptr() == address
    assert take(pool, (2048, 1024)).shape == (2048, 1024)


HOLDERS = [
    lambda t: t,
    lambda t: t[3:5],
    lambda t: t.detach(),
    lambda t: t.numpy(),
    lambda t: t.__dlpack__(),
    lambda t: t.untyped_storage(),
    lambda t: t.storage(),
    lambda t: torch.nn.Parameter(t),
    lambda t: memoryview(t.numpy()),
]


@pytest.mark.parametrize("hold", HOLDERS)
@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
def test_memory_that_anything_still_has_is_left_alone(pool, hold):
    out = take(pool)
    address, held = out.data_ptr(), hold(out)
    del out
    other = take(pool)
    assert other.data_ptr() != address
    del held
    gc.collect()
    assert take(pool).data_ptr() in (address, other.data_ptr())


def test_shared_memory_is_never_used_again(pool):
    out = take(pool)
    out.share_memory_()
    address = out.data_ptr()
    del out
    assert take(pool).data_ptr() != address


def test_an_output_can_be_resized(pool):
    out = take(pool).fill_(1.0)
    out.resize_(2 * SHAPE[0], SHAPE[1])
    assert bool((out[: SHAPE[0]] == 1.0).all())
    del out
    take(pool)
    assert pool.held_bytes() == BYTES  # the storage that grew is forgotten


def test_what_is_kept_is_bounded(pool):
    outs = [take(pool) for _ in range(6)]
    assert len({out.data_ptr() for out in outs}) == 6
    assert pool.held_bytes() <= 3 * BYTES


def test_a_pool_of_nothing_keeps_nothing():
    pool = OutputPool(0, lambda *_: None)
    take(pool)
    assert pool.held_bytes() == 0


def test_small_outputs_are_left_to_torch():
    library.output_pool.clear()
    native.linear(torch.randn(4, 8), torch.ones(4, 8, dtype=torch.int8), torch.rand(4))
    assert library.output_pool.held_bytes() == 0


def test_an_output_is_saved_with_its_own_size(pool, tmp_path):
    torch.save(take(pool), tmp_path / "out.pt")
    assert (tmp_path / "out.pt").stat().st_size < BYTES + 10_000


def test_large_products_use_it():
    x, weight, scale = torch.randn(64, 8), torch.randint(-9, 9, (40_000, 8), dtype=torch.int8), torch.rand(40_000)
    library.output_pool.clear()
    first = native.linear(x, weight, scale)
    kept, address = first.clone(), first.data_ptr()
    second = native.linear(x * 2, weight, scale)
    assert second.data_ptr() != address
    assert torch.equal(first, kept)
    del first
    assert native.linear(x, weight, scale).data_ptr() == address
