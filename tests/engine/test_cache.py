"""The engine that belongs to a network: when it is used again, and when it is made anew."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch

from advkd import ops
from advkd.config import UNetConfig
from advkd.diffusion import Schedule
from advkd.engine import cache
from advkd.engine.eager import EagerEngine
from advkd.engine.interface import Engine
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.models.unet import UNet

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

SCHEDULE = Schedule(num_train_timesteps=100, clip_sample=False)
CONFIG = UNetConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
SHAPE = (2, 8, 8)


def teacher() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG, SCHEDULE).eval().requires_grad_(False)


def engine_for(unet: UNet) -> Engine | None:
    """The kept engine of a network; None where the eager one serves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = cache.engine_for(unet, 4)
    return None if isinstance(engine, EagerEngine) else engine


def test_generate_runs_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the eager loop")

    unet = teacher()
    with ops.use_backend("reference"):
        expected = generate(unet, 3, 0, 4)
    monkeypatch.setattr(EagerEngine, "sample", refuse)
    torch.testing.assert_close(generate(unet, 3, 0, 4), expected, rtol=1e-4, atol=1e-4)
    with ops.use_backend("reference"), pytest.raises(AssertionError, match="eager"):
        generate(unet, 3, 0, 4)


def by_numpy(unet: UNet) -> None:
    """Past torch altogether."""
    unet.conv_in.weight.detach().numpy()[0, 0, 0, 0] += 1


def by_an_optimizer(unet: UNet) -> None:
    unet.conv_in.requires_grad_(True)
    unet.conv_in(torch.ones(1, *SHAPE)).sum().backward()
    torch.optim.SGD(unet.conv_in.parameters(), lr=0.1).step()
    unet.requires_grad_(False)


def load(unet: UNet, assign: bool) -> None:
    state = {name: value * 1.5 for name, value in unet.state_dict().items()}
    unet.load_state_dict(state, assign=assign)


def transposed(unet: UNet) -> None:
    """The same memory and shape, read in another order."""
    weight = unet.mid_block.resnets[0].conv1.weight
    weight.data = weight.data.transpose(0, 1)


def by_inference(unet: UNet) -> None:
    """A tensor of inference mode counts no versions."""
    with torch.inference_mode():
        weight = unet.conv_in.weight.clone()
    del unet.conv_in.weight
    unet.conv_in.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert engine_for(unet) is not None
    with torch.inference_mode():
        unet.conv_in.weight.add_(1)


def repeated(unet: UNet) -> None:
    """The same memory and shape, of which one number is read."""
    bias = unet.conv_in.bias
    bias.data = bias.data[:1].expand(len(bias))


def other_module(unet: UNet) -> None:
    torch.manual_seed(1)
    like = unet.conv_out
    unet.conv_out = torch.nn.Conv2d(like.in_channels, like.out_channels, 3, padding=1)
    unet.requires_grad_(False)


def changes() -> dict[str, Callable[[UNet], object]]:
    return {
        "a weight": lambda unet: unet.conv_out.weight.mul_(2),
        "one number of a weight, past autograd": lambda unet: unet.conv_in.weight.data[0, 0].add_(
            1
        ),
        "one number of a weight, past torch": by_numpy,
        "two rows swapped": lambda unet: unet.conv_out.weight.data.copy_(
            unet.conv_out.weight.data.flip(0)
        ),
        "other memory": lambda unet: setattr(
            unet.conv_in.weight, "data", unet.conv_in.weight.data * 2
        ),
        "the same memory, transposed": transposed,
        "the same memory, one number repeated": repeated,
        "a step of an optimizer": by_an_optimizer,
        "a state that is loaded": lambda unet: load(unet, assign=False),
        "a state that is assigned": lambda unet: load(unet, assign=True),
        "a tensor of inference mode": by_inference,
        "a module": other_module,
        "an eps": lambda unet: setattr(unet.conv_norm_out, "eps", 10.0),
        "a scale": lambda unet: setattr(unet.mid_block.resnets[0], "scale", 3.0),
    }


@pytest.mark.parametrize("exchange", [cache._EXCHANGE, None])
@pytest.mark.parametrize("what", changes())
def test_a_changed_network_has_another_engine(
    what: str, exchange: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_EXCHANGE", exchange)
    unet = teacher()
    before = engine_for(unet)
    assert engine_for(unet) is before
    changes()[what](unet)
    after = engine_for(unet)
    assert after is not None
    assert after is not before
    x = Noise(0, Purpose.SAMPLING).x_T(torch.arange(2), SHAPE)
    with ops.use_backend("reference"):
        torch.testing.assert_close(after.run(x, t=3), unet(x, 3), rtol=1e-4, atol=1e-4)


def test_a_hook_or_another_precision_ends_the_engine() -> None:
    unet = teacher()
    assert engine_for(unet) is not None
    hook = unet.conv_in.register_forward_hook(lambda *_: None)
    assert engine_for(unet) is None
    hook.remove()
    assert engine_for(unet) is not None
    assert engine_for(unet.double()) is None


def test_tables_hold_the_very_values() -> None:
    """Equal ones are others, and so are those of another table."""
    assert ops.extension is not None
    x, y, z = object(), 1000.5, object()
    values = [x, y, z]
    for tables, expected in [
        ([{"a": x, "b": y}, {"c": z}], True),
        ([{"a": x}, {"b": y, "c": z}], False),
        ([{"a": x, "b": float("1000.5")}, {"c": z}], False),
        ([{"b": y, "a": x}, {"c": z}], False),
        ([{"a": x, "b": y}, {"c": z, "d": z}], False),
    ]:
        assert ops.extension.hold_values(tables, [2, 1], values) is expected


def test_a_kept_engine_does_not_keep_its_network() -> None:
    unet = teacher()
    assert engine_for(unet) is not None
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None


def test_where_there_is_no_engine() -> None:
    assert engine_for(teacher().double()) is None
    strange = teacher()
    strange.mid_block.extra = torch.nn.Identity()
    assert engine_for(strange) is None
    with ops.use_backend("reference"):
        assert engine_for(teacher()) is None
    with pytest.warns(UserWarning, match="mid_block.extra"):
        other = teacher()
        other.mid_block.extra = torch.nn.Identity()
        assert generate(other, 2, 0, 2).isfinite().all()
