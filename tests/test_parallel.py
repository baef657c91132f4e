"""Workers: fixed shares, the batch's gradient, memory layouts, torch's threads given back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advkd.parallel import Workers

CPU = torch.device("cpu")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 64])
def test_shares_are_the_batch_in_order(count: int, batch: int, accumulate: int) -> None:
    with Workers(count, CPU, accumulate) as workers:
        shares = workers.shares(batch)
    assert len(shares) <= count * accumulate
    assert max(share.stop - share.start for share in shares) == -(-batch // (count * accumulate))
    assert [i for share in shares for i in range(batch)[share]] == list(range(batch))
    assert all(share.stop > share.start for share in shares)


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 3)).double()
    return net, torch.randn(7, 2, 6, 6).double(), torch.randn(7, 1, 2, 2).double()


@pytest.mark.parametrize(("count", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 2)])
def test_gradients_and_logs_are_those_of_the_whole_batch(count: int, accumulate: int) -> None:
    net, x, target = regression()
    parameters = list(net.parameters())

    def loss_of(share: slice) -> Tensor:
        return (net(x[share]) - target[share]).square().mean()

    def gradients_of(share: slice) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        loss = loss_of(share)
        return torch.autograd.grad(loss, parameters), {"loss": loss.detach()}

    with Workers(count, CPU, accumulate) as workers:
        logged = workers.gradients(gradients_of, len(x), iter(parameters))
    loss = loss_of(slice(None))
    expected = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(logged["loss"].double(), loss.detach(), rtol=1e-6, atol=0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_gradients_do_not_depend_on_which_worker_is_slow() -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(1000))

    def gradients(slow: int) -> Tensor:
        def gradients_of(share: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
            if share.start // 16 == slow:
                time.sleep(0.02)
            return [x[share].mean(dim=0)], {}

        with Workers(4, CPU) as workers:
            workers.gradients(gradients_of, 64, [weight])
        assert weight.grad is not None
        return weight.grad

    assert all(torch.equal(gradients(slow), gradients(0)) for slow in range(1, 4))


def test_gradients_lie_in_memory_as_their_parameters() -> None:
    """Fused Adam walks parameter and gradient side by side in memory, whatever their strides."""
    given = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    updated = []
    for fused in (False, True):
        weight = nn.Parameter(torch.zeros(8, 4, 3, 3).to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=fused)
        with Workers(2, CPU) as workers:
            for _ in range(2):
                workers.gradients(lambda share: ([given.clone()], {}), 4, [weight])
                assert weight.grad is not None
                assert weight.grad.stride() == weight.stride()
                assert torch.equal(weight.grad, given)
                optimizer.step()
        updated.append(weight.detach())
    torch.testing.assert_close(*updated)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (4, 1), (2, 8)])
def test_shares_run_in_the_callers_thread_where_a_mode_watches_it(count: int, batch: int) -> None:
    """A dispatch mode sees the work of its own thread only, and so does a CUDA stream, which one
    worker serves; without them there are other threads for the work."""
    threads = []

    def gradients_of(share: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
        threads.append(threading.get_ident())
        return [torch.ones(2)], {}

    parameters = [nn.Parameter(torch.zeros(2))]
    with Workers(count, CPU) as workers:
        workers.gradients(gradients_of, batch, parameters)
        assert (threading.get_ident() in threads) == (count == 1)
        threads.clear()
        with Watching():
            workers.gradients(gradients_of, batch, parameters)
    assert set(threads) == {threading.get_ident()}


def test_map_keeps_the_order_and_runs_side_by_side() -> None:
    together = threading.Barrier(2, timeout=20)

    def work(item: int) -> int:
        if item < 2:
            together.wait()  # passes only if two items run at once
        time.sleep(0.01 * (item == 2))
        return item * item

    with Workers(2, CPU) as workers:
        assert list(workers.map(work, range(5))) == [0, 1, 4, 9, 16]


def test_each_worker_runs_torch_with_one_thread(set_threads) -> None:
    set_threads(2)
    with Workers(0, CPU) as workers:
        assert workers.count == 2
        assert list(workers.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == 2


def test_an_error_reaches_the_caller_and_drops_what_has_not_begun(set_threads) -> None:
    set_threads(2)
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.01)
        raise RuntimeError(f"item {item}")

    with pytest.raises(RuntimeError, match="item 0"), Workers(1, CPU) as workers:
        list(workers.map(work, range(100)))
    assert len(begun) < 100
    assert torch.get_num_threads() == 2


def test_a_negative_number_of_threads_is_an_error(set_threads) -> None:
    set_threads(2)
    with pytest.raises(ValueError, match="threads=-1"):
        Workers(-1, CPU)
    with pytest.raises(ValueError, match="accumulate=0 is below 1"):
        Workers(1, CPU, 0)
    assert torch.get_num_threads() == 2
