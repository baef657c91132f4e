"""The losses by name: their formulas, the ratio of both networks' gradients, adding one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkd.config import ConfigError, override
from advkd.data.trajectories import Trajectories
from advkd.training import losses
from advkd.training.distill import distill_student
from advkd.training.losses import (
    ADVERSARIAL,
    LOWEST_LOGIT,
    RECONSTRUCTION,
    AdversarialTerms,
    ReconstructionLoss,
    adversarial_loss,
    find_loss,
    generator_gradient,
    held,
    reconstruction_loss,
)

from .tiny import CONFIG, metrics

# Of exp, expm1 and a division, each off by an ulp or two, and of an argument of up to 30 rounded.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [0.001, 0.05, 0.1, 0.5, 3.0])
def test_reconstruction(size: float) -> None:
    error = torch.tensor([[size, -size]], dtype=torch.float64)
    assert RECONSTRUCTION["l2"](error, 0.1).item() == pytest.approx(size**2, rel=1e-12)
    expected = size**2 / 0.2 if size < 0.1 else size - 0.05
    assert RECONSTRUCTION["huber"](error, 0.1).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", RECONSTRUCTION)
def test_every_reconstruction_loss_is_least_where_nothing_is_wrong(name: str) -> None:
    check_reconstruction(RECONSTRUCTION[name])


def check_reconstruction(rho: ReconstructionLoss) -> None:
    """0 at 0 with slope 0, even, growing, and a mean whatever the number of entries."""
    error = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = rho(error, 0.1)
    assert loss.shape == () and loss.item() == 0
    assert torch.autograd.grad(loss, error)[0].tolist() == [0.0] * 5
    sizes = torch.tensor([0.01, 0.09, 0.2, 1.0, 30.0], dtype=torch.float64)
    values = [rho(size.repeat(3), 0.1).item() for size in sizes]
    assert values == sorted(values) and values[0] > 0
    assert values == [rho(-size.repeat(3), 0.1).item() for size in sizes]
    assert rho(sizes, 0.1).item() == pytest.approx(sum(values) / len(values))


def documented_loss() -> str:
    """The example of docs/method.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text()
    return text.split("### Adding a loss")[1].split("```python\n")[1].split("```")[0]


def test_a_loss_is_added_as_the_documentation_says(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "RECONSTRUCTION", dict(RECONSTRUCTION))
    exec(documented_loss(), dict(vars(losses)))
    check_reconstruction(losses.RECONSTRUCTION["charbonnier"])
    for rho in ("charbonnier", "l2"):
        config = override(CONFIG, [f"distill.rho={rho}", "distill.steps=2"])
        distill_student(config, store, tmp_path / rho)
    ours, theirs = (metrics(tmp_path / rho) for rho in ("charbonnier", "l2"))
    assert [entry["step"] for entry in ours] == [1, 2]
    assert ours[1]["rec_3"] != theirs[1]["rec_3"]
    with pytest.raises(ConfigError, match="nearest is 'charbonnier'"):
        distill_student(override(config, ["distill.rho=charbonier"]), store, tmp_path / "x")


def test_an_adversarial_loss_of_ones_own(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ADVERSARIAL", dict(ADVERSARIAL))

    @adversarial_loss("wasserstein")
    def wasserstein(real: Tensor, fake: Tensor) -> AdversarialTerms:
        student = -fake.detach()
        return AdversarialTerms((fake - real).mean(), student.mean(), -torch.ones_like(student))

    config = override(CONFIG, ["distill.adversarial_loss=wasserstein", "distill.steps=2"])
    distill_student(config, store, tmp_path)
    for entry in metrics(tmp_path):
        assert entry["loss_d"] == pytest.approx(-sum(gaps(entry)), abs=1e-5)


def gaps(entry: dict[str, Any]) -> list[float]:
    """The weighted logit gaps of a step in which D saw all heads, or only the last one."""
    weights = (0.5, 0.5, 1.0) if entry["step"] == 1 else (0, 0, 1.0)
    return [w * entry[f"logit_gap_{k}"] for k, w in enumerate(weights, 1)]


def pairs(limit: int = 1000) -> tuple[Tensor, Tensor]:
    """Logits of real and generated images from -limit to limit, all over their plane."""
    values = torch.tensor(
        sorted({sign * limit * share for sign in (-1, 1) for share in (0, 1e-4, *SHARES)}),
        dtype=torch.float32,
    )
    real, fake = torch.meshgrid(values, values, indexing="ij")
    return real.flatten(), fake.flatten()


SHARES = (0.003, 0.02, 0.029, 0.0301, 0.031, 0.06, 0.087, 0.09, 0.104, 0.11, 0.3, 1)


# The losses as their docstrings state them: D's and the student's of every pair.
STATED = {
    "logistic": lambda real, fake: (F.softplus(-real) + F.softplus(fake), F.softplus(-fake)),
    "relativistic": lambda real, fake: (F.softplus(fake - real), F.softplus(real - fake)),
}


def derivative(values: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(values.sum(), of, retain_graph=True)
    return found


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_both_networks_gradients_over_the_whole_range(name: str) -> None:
    """float32 against float64: D's own gradient, and the student's from it by the ratio."""
    real, fake = (logits.requires_grad_() for logits in pairs())
    B = len(real)
    terms = ADVERSARIAL[name](real, fake)
    of_real, of_fake = torch.autograd.grad(terms.discriminator, [real, fake])
    students = generator_gradient(of_fake[:, None, None, None], terms.ratio)[:, 0, 0, 0]
    real_64, fake_64 = (logits.detach().double().requires_grad_() for logits in (real, fake))
    stated_d, stated_g = STATED[name](real_64, fake_64)
    assert terms.discriminator.item() == pytest.approx(stated_d.mean().item(), rel=1e-6)
    assert terms.generator.item() == pytest.approx(stated_g.mean().item(), rel=1e-6)
    assert not terms.generator.requires_grad and not terms.ratio.requires_grad
    # torch's softplus is linear from 20 on, which leaves out exp(-20).
    linear, lowest = math.exp(-20), math.exp(LOWEST_LOGIT)
    expected = derivative(stated_g, fake_64) / B
    torch.testing.assert_close(students.double(), expected, rtol=TOLERANCE + linear, atol=1e-37)
    for ours, theirs in ((of_real, real_64), (of_fake, fake_64)):
        torch.testing.assert_close(
            ours.double(), derivative(stated_d, theirs) / B, rtol=TOLERANCE + linear, atol=lowest
        )


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_an_image_that_D_is_sure_of_gets_all_of_its_gradient(name: str) -> None:
    for logit in (-30.0, -88.0, -104.0, -1e3, -1e9):
        fake = torch.tensor([logit], requires_grad=True)
        terms = ADVERSARIAL[name](torch.zeros(1), fake)
        (of_fake,) = torch.autograd.grad(terms.discriminator, fake)
        assert (of_fake * terms.ratio).item() == pytest.approx(-1, abs=TOLERANCE)


def test_held_logits_are_the_same_bits_down_to_the_lowest() -> None:
    logits = torch.linspace(-30, 100, 1001, requires_grad=True)
    assert torch.equal(held(logits), logits)
    low = torch.tensor([-30.001, -1e4, -3e38], requires_grad=True)
    assert held(low).tolist() == [LOWEST_LOGIT] * 3
    assert torch.autograd.grad(held(low).sum(), low)[0].tolist() == [1.0] * 3
    assert held(torch.tensor([math.nan, math.inf, -math.inf])).isnan().all()


def test_names_that_are_no_loss_and_names_that_are_taken() -> None:
    with pytest.raises(ConfigError) as caught:
        find_loss(RECONSTRUCTION, "rho", "l1")
    words = "distill.rho='l1' is not one of huber, l2; the nearest is 'l2'"
    assert str(caught.value) == words
    assert find_loss(ADVERSARIAL, "adversarial_loss", "logistic") is losses.logistic
    with pytest.raises(ValueError, match="already is a loss named 'l2'"):
        reconstruction_loss("l2")(losses.huber)
    assert RECONSTRUCTION["l2"] is losses.squared_error
