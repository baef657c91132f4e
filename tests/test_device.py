"""The device that a setting names, and autocast by what the hardware has."""

from __future__ import annotations

import pytest
import torch

from advkd.device import autocast, resolve


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, current: int = 0) -> None:
    """As if torch saw so many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)


@pytest.mark.parametrize(
    ("name", "gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("auto", 2, "cuda:1"),  # the current one
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "cuda:0"),
    ],
)
def test_devices_that_exist(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, device: str
) -> None:
    machine(monkeypatch, gpus, current=1)
    assert resolve(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "gpus", "words"),
    [
        ("cuda", 0, "device='cuda' does not exist: torch "),
        ("cuda:0", 0, "device='cuda:0' does not exist: torch "),
        ("cuda:1", 1, "device='cuda:1' does not exist: torch sees cuda:0"),
        ("cuda:3", 2, "device='cuda:3' does not exist: torch sees cuda:0 to cuda:1"),
        *(
            (name, 2, f"device={name!r} is not one of auto, cpu, cuda, cuda:N")
            for name in ("gpu", "", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "meta")
        ),
    ],
)
def test_devices_that_do_not_exist_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, words: str
) -> None:
    machine(monkeypatch, gpus)
    with pytest.raises(ValueError) as caught:
        resolve(name)
    assert str(caught.value).startswith(words)


def test_why_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0)
    for version, words in ((None, "built without CUDA"), ("12.4", "sees no CUDA device")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(ValueError, match=words):
            resolve("cuda")


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_autocast_on_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    x = torch.ones(2, 2)
    with autocast(mode, torch.device("cpu")):
        assert (x @ x).dtype == (torch.bfloat16 if mode == "on" else torch.float32)


@pytest.mark.parametrize("has", [False, True])
def test_automatic_autocast_on_cuda_asks_for_native_bfloat16(
    monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    asked = []

    def supported(including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return has

    made = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: made.append((args, kwargs)))
    autocast("auto", torch.device("cuda", 1))
    assert asked == [False]
    assert made == [(("cuda", torch.bfloat16), {"enabled": has})]


def test_another_mode_of_autocast_is_an_error() -> None:
    with pytest.raises(ValueError, match="'sometimes' is not one of auto, on, off"):
        autocast("sometimes", torch.device("cpu"))
