"""The sampling step: against float64, its reference's bits, layouts, threads, bad arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advkd import ops

NOISY = np.array([1.08, -0.41, 0.93, 0.31, -0.07, 0.25], dtype=np.float32)
QUIET = np.array([1.08, -0.41, 0.93, 0.31, -0.07, 0.0], dtype=np.float32)
SHAPES = [(1, 1, 1, 1), (3, 3, 7, 5), (2, 5, 33, 31), (2, 1, 28, 28), (1, 3, 64, 64)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(
    shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_t": torch.randn(shape, generator=generator).contiguous(memory_format=memory_format),
        "model_out": torch.randn(shape, generator=generator).contiguous(
            memory_format=memory_format
        ),
        "clip": 1.0,
        "seed": (1 << 63) + 9,
        "image_index": torch.arange(shape[0]) + 5,
        "step": 17,
    }


def in_float64(args: dict[str, Any], coefficients: np.ndarray) -> tuple[Tensor, Tensor]:
    x, m = args["x_t"].double(), args["model_out"].double()
    a_x, a_m, c_0, c_x, c_m, sigma = (float(c) for c in coefficients)
    noise = ops.philox_normal(
        args["seed"], args["image_index"], args["step"], x.shape[1:], backend="reference"
    ).double()
    x0_hat = a_x * x + a_m * m
    if args["clip"]:
        x0_hat = x0_hat.clamp(-args["clip"], args["clip"])
    return c_0 * x0_hat + c_x * x + c_m * m + sigma * noise, x0_hat


@pytest.mark.parametrize("clip", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("coefficients", [NOISY, QUIET])
@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_step_is_the_formula(
    shape: tuple[int, ...], memory_format: torch.memory_format, coefficients: np.ndarray,
    clip: float, isa: str, nan_filled: None,
) -> None:  # fmt: skip
    args = inputs(shape, memory_format) | {"clip": clip}
    fused = ops.sampling_step(coefficients=coefficients, backend="fused", **args)
    plain = ops.sampling_step(coefficients=coefficients, backend="reference", **args)
    for got, reference, exact in zip(fused, plain, in_float64(args, coefficients), strict=True):
        assert got.stride() == args["x_t"].stride() == reference.stride()
        assert torch.equal(got, reference)
        # Up to 7 roundings of numbers below 8.
        assert (got.double() - exact).abs().max() < 7 * 8 * 2**-24


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_bits_do_not_depend_on_threads_or_batch(
    memory_format: torch.memory_format, set_threads: Any
) -> None:
    args = inputs((7, 3, 45, 47), memory_format)
    set_threads(1)
    x_prev, x0_hat = ops.sampling_step(coefficients=NOISY, **args)
    set_threads(6)
    again = ops.sampling_step(coefficients=NOISY, **args)
    assert torch.equal(x_prev, again[0])
    assert torch.equal(x0_hat, again[1])
    part = args | {key: args[key][4:6] for key in ("x_t", "model_out", "image_index")}
    assert torch.equal(x_prev[4:6], ops.sampling_step(coefficients=NOISY, **part)[0])


def test_layouts_may_differ_and_have_gaps() -> None:
    args = inputs((2, 4, 9, 8))
    expected = ops.sampling_step(coefficients=NOISY, **args)[0]
    mixed = args | {"model_out": args["model_out"].contiguous(memory_format=torch.channels_last)}
    assert torch.equal(expected, ops.sampling_step(coefficients=NOISY, **mixed)[0])
    gaps = torch.stack([args["x_t"], args["x_t"]], dim=-1)[..., 0]
    got = ops.sampling_step(coefficients=NOISY, **args | {"x_t": gaps})[0]
    assert torch.equal(expected, got)
    assert got.is_contiguous()


@pytest.mark.parametrize("backend", ["reference", None])
def test_nan_stays_and_infinity_is_clipped(backend: str | None) -> None:
    args = inputs((1, 1, 4, 4))
    args["x_t"][0, 0, 0, 0] = float("nan")
    args["x_t"][0, 0, 0, 1] = float("inf")
    x0_hat = ops.sampling_step(coefficients=QUIET, backend=backend, **args)[1]
    assert x0_hat[0, 0, 0, 0].isnan()
    assert x0_hat[0, 0, 0, 1] == 1
    assert x0_hat[0, 0, 1:].isfinite().all()


def test_an_empty_batch_passes() -> None:
    args = inputs((0, 3, 4, 4))
    assert ops.sampling_step(coefficients=NOISY, **args)[0].shape == (0, 3, 4, 4)


def test_float64_runs_on_the_reference() -> None:
    args = inputs((2, 3, 5, 5))
    wide = args | {"x_t": args["x_t"].double(), "model_out": args["model_out"].double()}
    got = ops.sampling_step(coefficients=NOISY, **wide)
    for value, exact in zip(got, in_float64(args, NOISY), strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, exact, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="sampling_step has no fused backend here"):
        ops.sampling_step(coefficients=NOISY, backend="fused", **wide)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_out": torch.zeros(2, 3, 4, 5)}, ValueError, "must both be"),
        ({"model_out": torch.zeros(2, 3, 4, 4).double()}, TypeError, "one floating dtype"),
        ({"image_index": torch.arange(3)}, ValueError, "3 entries for a batch of 2"),
        ({"coefficients": (1.0, 2.0)}, ValueError, "2 entries"),
        ({"clip": -1.0}, ValueError, "clip=-1.0"),
        ({"clip": float("nan")}, ValueError, "clip=nan"),
        ({"step": -1}, ValueError, "step=-1"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    args = inputs((2, 3, 4, 4)) | {"coefficients": NOISY} | change
    with pytest.raises(error, match=words):
        ops.sampling_step(**args)


@pytest.mark.parametrize("fused", [True, False])
def test_op_is_registered_correctly(fused: bool) -> None:
    if fused and ops.extension is None:
        pytest.skip("the C++ extension is not installed")
    args = inputs((2, 3, 4, 4), torch.channels_last)
    torch.library.opcheck(
        torch.ops.advkd.sampling_step,
        (
            *(args["x_t"], args["model_out"], [float(c) for c in NOISY]),
            *(1.0, -3, args["image_index"], 5, fused),
        ),
    )
