"""The host's loop over a graph, on the fake runtime: launches, chunks, failures, leftovers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from harness import ORDERS, ToyLoop, expected

from advkd.diffusion import Schedule, ddim_table

SHAPE = (3, 8, 8)
INDICES = torch.arange(2)


def toy_loop(cuda: Any, on_device: bool = False) -> ToyLoop:
    return ToyLoop(cuda, 2, SHAPE, torch.bfloat16, torch.channels_last, on_device)


def wanted(steps: int) -> torch.Tensor:
    table = ddim_table(Schedule(), steps, eta=1.0)
    return expected(
        table, 7, INDICES, SHAPE, torch.bfloat16, [steps], "state", torch.channels_last
    )[0]


def run(loop: ToyLoop, steps: int, **how: Any) -> torch.Tensor:
    table = ddim_table(Schedule(), steps, eta=1.0)
    return loop.run(table, 7, INDICES, kept=[steps], target="state", **how)[0]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("steps", "chunk"), [(1, 1), (7, 3), (6, 3), (5, 1), (4, 100)])
def test_one_launch_a_step_besides_the_networks(
    cuda: Any, steps: int, chunk: int, on_device: bool
) -> None:
    loop = toy_loop(cuda, on_device)
    cuda.launches()
    told: list[int] = []
    got = run(loop, steps, chunk=chunk, on_chunk=told.append)
    assert torch.equal(got, wanted(steps))
    launched = cuda.launches()
    graphs = -(-steps // chunk) if on_device else steps
    # x_T is the one launch outside of a graph; inside there is the network's and one of ours.
    assert launched.pop("graph launch") == graphs
    assert launched == {"kernel": 1, "graph kernel": 2 * steps}
    ends = [*range(chunk, steps, chunk), steps]
    assert told == ends


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("on_device", [False, True])
def test_both_loops_have_the_same_bits_in_any_order(cuda: Any, order: int, on_device: bool) -> None:
    cuda.set_order(order)
    assert torch.equal(run(toy_loop(cuda, on_device), 6, chunk=4), wanted(6))


@pytest.mark.parametrize("on_device", [False, True])
def test_what_the_callback_raises_ends_the_run(cuda: Any, on_device: bool) -> None:
    loop = toy_loop(cuda, on_device)

    def stop(done: int) -> None:
        raise KeyboardInterrupt(f"after {done} steps")

    with pytest.raises(KeyboardInterrupt, match="after 2 steps"):
        run(loop, 10, chunk=2, on_chunk=stop)
    assert cuda.pending() == 0
    launched = cuda.launches()["graph launch"]
    assert launched == (2 if on_device else 4)  # one chunk ahead
    assert torch.equal(run(loop, 5, chunk=2), wanted(5))


@pytest.mark.parametrize("on_device", [False, True])
def test_every_failing_call_is_named_and_nothing_leaks(cuda: Any, on_device: bool) -> None:
    names = set()
    for number in range(1, 200):
        cuda.fail_call(0)
        loop = None
        graph_calls = counted_toy_calls(cuda)
        cuda.fail_call(graph_calls + number)
        try:
            loop = toy_loop(cuda, on_device)
            run(loop, 3, chunk=2)
        except RuntimeError as error:
            found = re.fullmatch(
                r"(\w+) failed: out of memory \(cudaErrorMemoryAllocation\)", str(error)
            )
            assert found, error
            names.add(found[1])
        else:
            break
        finally:
            cuda.fail_call(0)
            del loop
            assert cuda.pending() == 0
            assert cuda.live_objects() == {}
    else:
        raise AssertionError("the calls do not end")
    assert names >= {
        "cudaSetDevice", "cudaMalloc", "cudaGraphCreate", "cudaGraphAddChildGraphNode",
        "cudaStreamCreateWithFlags", "cudaStreamBeginCaptureToGraph", "cudaStreamEndCapture",
        "cudaGraphInstantiate", "cudaMemcpyAsync", "cudaEventCreateWithFlags", "cudaEventRecord",
        "cudaEventSynchronize", "cudaStreamSynchronize", "cudaGraphLaunch", "kernel",
    }  # fmt: skip
    conditional = {"cudaGraphConditionalHandleCreate", "cudaGraphAddNode"}
    assert names >= conditional if on_device else not names & conditional


def counted_toy_calls(cuda: Any) -> int:
    """Calls that capturing the toy network takes, which may not fail here."""
    cuda.fail_call(0)
    at = cuda.allocate(64, 16)
    cuda.destroy_graph(cuda.toy_network(at, at, 0, at, 4))
    cuda.free(at)
    return int(cuda.calls())


def test_no_device_and_old_drivers_are_told(cuda: Any) -> None:
    assert cuda.cuda_unavailable() == ""
    cuda.set_devices(0)
    assert cuda.cuda_unavailable() == (
        "no CUDA device: cudaGetDeviceCount says no CUDA-capable device is detected"
    )
    with pytest.raises(RuntimeError, match="cudaSetDevice failed: invalid argument"):
        toy_loop(cuda)
    cuda.set_devices(-1)
    assert cuda.cuda_unavailable() == "no CUDA device: cudaGetDeviceCount counts none"
    cuda.set_driver(12020)
    assert "the driver is of CUDA 12.2" in cuda.cuda_device_loop_unavailable()
    cuda.set_driver(12040)
    assert cuda.cuda_device_loop_unavailable() == ""


def test_bad_runs_are_refused(cuda: Any) -> None:
    loop = toy_loop(cuda)
    with pytest.raises(ValueError, match="chunks of at least one"):
        run(loop, 3, chunk=0)
    for steps in (0, 0xFFFFFFFF):  # the latter is the number whose noise is x_T
        with pytest.raises(ValueError, match="at least one step"):
            loop.loop.loop.run(
                steps=steps, seed=0, clip=0.0, image_index=0, rows=0, told=0, kept=0,
                kept_half=False, chunk=1, stream=0, on_chunk=None,
            )  # fmt: skip
    assert torch.equal(run(loop, 3), wanted(3))


def test_batches_that_no_grid_holds(cuda: Any) -> None:
    """Only captured, since no memory is so large."""
    at = cuda.allocate(64, 16)
    network = cuda.toy_network(at, at, 0, at, 4)
    for batch in (0, (1 << 31) - 1, 1 << 31):
        how: dict[str, Any] = {"sizes": (batch, 1, 1), "channels_last": False, "on_device": False}
        how |= {"device": 0, "network": network, "type": "float32", "told": at, "told_bytes": 16}
        how |= {"x_t": at, "x_in": 0, "model_out": at}
        if batch == (1 << 31) - 1:
            cuda.CudaSamplingLoop(**how)
            continue
        with pytest.raises(ValueError, match=r"2\^31 tiles"):
            cuda.CudaSamplingLoop(**how)
    cuda.destroy_graph(network)
    cuda.free(at)


def test_the_emulation_sees_a_race_as_an_order(cuda: Any) -> None:
    """The kernel that lacks a barrier gives other results in another order; with it, none."""
    x = torch.arange(64.0)
    for barrier in (True, False):
        found = []
        for order in (0, 1):
            cuda.set_order(order)
            y = torch.full((64,), float("nan"))
            cuda.sum(x.data_ptr(), y.data_ptr(), barrier)
            cuda.synchronize()
            found.append(y)
        assert torch.equal(found[0], found[1]) == barrier
        assert found[0].isnan().any() != barrier


def test_the_emulation_sees_accesses_outside_of_memory(cuda: Any) -> None:
    inside = torch.zeros(64)
    at = cuda.allocate(63 * 4, 4)
    cuda.sum(inside.data_ptr(), at, True)
    with pytest.raises(RuntimeError, match="sum_kernel reads or writes outside its memory"):
        cuda.synchronize()
    cuda.free(at)
