"""The host's loop over a graph, on the fake runtime: launches, chunks, turns, devices, failures."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from harness import ORDERS, ToyLoop, expected

from advkd.diffusion import Schedule, ddim_table
from advkd.engine.noise import MAX_STEPS, Noise, Purpose

SHAPE = (3, 8, 8)
INDICES = torch.arange(2)
NOISE = Noise(7, Purpose.TRAINING)


def toy_loop(cuda: Any, device: int = 0) -> ToyLoop:
    return ToyLoop(cuda, 2, SHAPE, torch.bfloat16, device=device)


def wanted(steps: int, noise: Noise = NOISE) -> torch.Tensor:
    table = ddim_table(Schedule(), steps, eta=1.0)
    return expected(table, noise, INDICES, SHAPE, torch.bfloat16, [steps], "state")[0]


def run(loop: ToyLoop, steps: int, noise: Noise = NOISE, **how: Any) -> torch.Tensor:
    table = ddim_table(Schedule(), steps, eta=1.0)
    return loop.run(table, noise, INDICES, saved=[steps], target="state", **how)[0]


@pytest.mark.parametrize(("steps", "chunk"), [(1, 1), (7, 3), (6, 3), (5, 1), (4, 100)])
def test_one_launch_a_step_besides_the_networks(cuda: Any, steps: int, chunk: int) -> None:
    loop = toy_loop(cuda)
    cuda.launches()
    reported: list[int] = []
    got = run(loop, steps, chunk=chunk, on_chunk=reported.append)
    assert torch.equal(got, wanted(steps))
    # x_T is the one launch outside of a graph; inside there is the network's and one of ours.
    assert cuda.launches() == {"graph launch": steps, "kernel": 1, "graph kernel": 2 * steps}
    assert reported == [*range(chunk, steps, chunk), steps]


@pytest.mark.parametrize("order", ORDERS)
def test_bits_do_not_depend_on_the_order_of_threads(cuda: Any, order: int) -> None:
    cuda.set_order(order)
    assert torch.equal(run(toy_loop(cuda), 6, chunk=4), wanted(6))


def test_what_the_callback_raises_ends_the_run(cuda: Any) -> None:
    loop = toy_loop(cuda)

    def stop(done: int) -> None:
        raise KeyboardInterrupt(f"after {done} steps")

    with pytest.raises(KeyboardInterrupt, match="after 2 steps"):
        run(loop, 10, chunk=2, on_chunk=stop)
    assert cuda.pending() == 0
    assert cuda.launches()["graph launch"] == 4  # one chunk ahead
    assert torch.equal(run(loop, 5, chunk=2), wanted(5))


def test_a_run_inside_of_a_run_is_refused_and_harms_nothing(cuda: Any) -> None:
    loop = toy_loop(cuda)
    refused = []

    def again(done: int) -> None:
        with pytest.raises(RuntimeError, match="another run uses the buffers"):
            run(loop, 9, Noise(8, Purpose.TRAINING))
        refused.append(done)

    assert torch.equal(run(loop, 5, chunk=2, on_chunk=again), wanted(5))
    assert refused == [2, 4, 5]


def test_a_run_of_another_thread_is_refused_and_harms_nothing(cuda: Any) -> None:
    """The callback, which runs with the loop half done, waits for the other thread."""
    loop = toy_loop(cuda)
    errors: list[str] = []

    def attempt() -> None:
        try:
            run(loop, 9, Noise(8, Purpose.TRAINING))
        except RuntimeError as error:
            errors.append(str(error))

    def elsewhere(done: int) -> None:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    assert torch.equal(run(loop, 4, chunk=2, on_chunk=elsewhere), wanted(4))
    assert errors == ["another run uses the buffers of this sampling loop"] * 2


def test_a_loop_runs_on_its_device_and_restores_the_callers(cuda: Any) -> None:
    cuda.set_devices(3)
    cuda.set_device(1)
    stream_of_another = cuda.new_stream()
    cuda.set_device(2)
    stream = cuda.new_stream()
    cuda.set_device(0)
    loop = toy_loop(cuda, device=2)
    assert cuda.device() == 0
    assert torch.equal(run(loop, 5, chunk=2, stream=stream), wanted(5))
    assert cuda.device() == 0
    cuda.set_device(1)
    with pytest.raises(RuntimeError, match="kernel failed: invalid resource handle"):
        run(loop, 5, stream=stream_of_another)
    assert cuda.device() == 1
    cuda.set_device(0)
    cuda.synchronize()
    for each in (stream, stream_of_another):
        cuda.destroy_stream(each)


def test_every_failing_call_is_named_and_nothing_leaks(cuda: Any) -> None:
    names = set()
    for number in range(1, 200):
        cuda.fail_call(0)
        loop = None
        graph_calls = counted_toy_calls(cuda)
        cuda.fail_call(graph_calls + number)
        try:
            loop = toy_loop(cuda)
            run(loop, 3, chunk=2)
        except RuntimeError as error:
            found = re.fullmatch(
                r"(\w+) failed: out of memory \(cudaErrorMemoryAllocation\)", str(error)
            )
            assert found, error
            names.add(found[1])
        else:
            if not cuda.failed():
                break  # there are no more calls
        finally:
            cuda.fail_call(0)
            del loop
            assert cuda.pending() == 0
            assert cuda.live_objects() == {}
    else:
        raise AssertionError("the calls do not end")
    assert names == {
        "cudaGetDevice", "cudaSetDevice", "cudaGraphCreate", "cudaGraphAddChildGraphNode",
        "cudaStreamCreateWithFlags", "cudaStreamBeginCapture", "cudaStreamEndCapture",
        "cudaGraphInstantiate", "cudaMemcpyAsync", "cudaEventCreateWithFlags", "cudaEventRecord",
        "cudaEventSynchronize", "cudaStreamSynchronize", "cudaGraphLaunch", "kernel",
    }  # fmt: skip


def counted_toy_calls(cuda: Any) -> int:
    """Calls that capturing the toy network takes, which may not fail here."""
    cuda.fail_call(0)
    at = cuda.allocate(64, 16)
    cuda.destroy_graph(cuda.toy_network(at, at, 0, at, 4))
    cuda.free(at)
    return int(cuda.calls())


def test_missing_devices_are_named(cuda: Any) -> None:
    assert cuda.cuda_unavailable() == ""
    cuda.set_devices(0)
    assert cuda.cuda_unavailable() == (
        "no CUDA device: cudaGetDeviceCount says no CUDA-capable device is detected"
    )
    with pytest.raises(RuntimeError, match="cudaSetDevice failed: invalid argument"):
        toy_loop(cuda)
    cuda.set_devices(-1)
    assert cuda.cuda_unavailable() == "no CUDA device: cudaGetDeviceCount counts none"


def test_bad_runs_are_refused(cuda: Any) -> None:
    loop = toy_loop(cuda)
    how: dict[str, Any] = {
        "steps": 3, "seed": 0, "purpose": 0, "clip": 0.0, "image_index": 0, "rows": 0, "chunk": 1,
        "time_embedding": 0, "saved": 0, "saved_half": False, "stream": 0, "on_chunk": None,
    }  # fmt: skip
    for change, words in (
        ({"chunk": 0}, "chunks of at least one"),
        ({"steps": 0}, r"1 to 2\^23 steps"),
        ({"steps": MAX_STEPS + 1}, r"1 to 2\^23 steps"),
        ({"steps": MAX_STEPS, "purpose": 256}, r"a purpose of noise is below 2\^8"),
    ):
        with pytest.raises(ValueError, match=words):
            loop.loop._loop.run(**how | change)
    assert torch.equal(run(loop, 3), wanted(3))


def test_batches_that_no_grid_holds(cuda: Any) -> None:
    """Only captured, since no memory is so large."""
    at = cuda.allocate(64, 16)
    network = cuda.toy_network(at, at, 0, at, 4)
    how: dict[str, Any] = {"device": 0, "network": network, "loop": at, "x_t": at, "x_in": 0}
    how |= {"model_out": at, "type": "float32", "time_embedding": at, "time_embedding_bytes": 16}
    cuda.CudaSamplingLoop(**how, sizes=((1 << 31) - 1, 1, 1))
    for batch in (0, 1 << 31):
        with pytest.raises(ValueError, match=r"2\^31 tiles"):
            cuda.CudaSamplingLoop(**how, sizes=(batch, 1, 1))
    cuda.destroy_graph(network)
    cuda.free(at)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time_embedding_bytes": 24}, "whole 16 bytes"),
        ({"type": "float16"}, "needs an x_in"),
        ({"type": "float64"}, "no CUDA kernel serves float64"),
    ],
)
def test_bad_buffers_are_refused(cuda: Any, change: dict[str, Any], words: str) -> None:
    how: dict[str, Any] = {"device": 0, "network": 0, "loop": 0, "x_t": 0, "x_in": 0}
    how |= {"model_out": 0, "type": "float32", "time_embedding": 0, "time_embedding_bytes": 16}
    with pytest.raises(ValueError, match=words):
        cuda.CudaSamplingLoop(**how | {"sizes": (1, 1, 1)} | change)


def test_the_emulation_sees_a_race_as_an_order(cuda: Any) -> None:
    """The kernel that lacks a barrier has other results in another order; with it, it has not."""
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
