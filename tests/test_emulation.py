"""The emulation of CUDA that the kernels' tests rest on where there is no GPU: it shows the mistakes it is made to show."""

import pytest
import torch

from pspnet_fast import backends

pytestmark = pytest.mark.skipif(not backends.emulated(), reason="the CUDA kernels are not emulated here")

NONE, NO_WAIT, NO_BARRIER, LONELY_BARRIER, NEVER_WAITS, MISALIGNED, BULK_NO_WAIT = range(7)
X = torch.arange(64.0)


@pytest.fixture
def reverse():
    backends.find("pyramid_pool", "forward", "cuda")  # loads it
    yield torch.ops.pspnet_fast_emulated.reverse
    torch.ops.pspnet_fast_emulated.set_order(0)


@pytest.mark.parametrize("order", range(4))
def test_a_right_kernel_is_right_in_every_order(reverse, order):
    torch.ops.pspnet_fast_emulated.set_order(order)
    assert torch.equal(reverse(X, NONE), X.flip(0))


@pytest.mark.parametrize("mistake", [NO_WAIT, BULK_NO_WAIT])
def test_what_is_read_before_it_came_is_nan(reverse, mistake):
    assert reverse(X, mistake).isnan().all()


def test_a_missing_barrier_shows(reverse):
    """In the order of the threads' numbers half of what is read is not written yet, in others another half."""
    results = []
    for order in (0, 1):
        torch.ops.pspnet_fast_emulated.set_order(order)
        results.append(reverse(X, NO_BARRIER).isnan())
    assert results[0].sum() == 32
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (LONELY_BARRIER, "wait at a barrier that others never reach"),
        (NEVER_WAITS, "ends before its asynchronous copies"),
        (MISALIGNED, "not aligned to 16 bytes"),
    ],
)
def test_mistakes_that_are_errors(reverse, mistake, words):
    with pytest.raises(RuntimeError, match=f"emulation: .*{words}"):
        reverse(X, mistake)
    assert torch.equal(reverse(X, NONE), X.flip(0))  # and the next launch works
