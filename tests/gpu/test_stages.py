"""Commands on a real GPU: no network makes a pass on the CPU, from the first stage to the last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd import evaluate, sample, train
from advkd.engine.cpu import CpuEngine
from advkd.models.student import Student
from advkd.models.unet import UNet

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_pass_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a network was to be run on the CPU")

    monkeypatch.setattr(CpuEngine, "make", refuse)

    def check(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, UNet | Student) and next(module.parameters()).is_cpu:
            refuse()

    hook = torch.nn.modules.module.register_module_forward_pre_hook(check)
    yield
    hook.remove()


def test_every_stage_of_a_run(tmp_path: Path) -> None:
    runs = ["--runs", str(tmp_path), "--device", "cuda"]
    assert train.main(["--preset", "smoke", *runs]) == 0
    (run,) = tmp_path.iterdir()
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["ms_per_image"]["student"] > 0
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert evaluate.main(["--run", str(run), "--device", "cuda", "--fresh"]) == 0
    student = str(run / "student")
    images = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.npz"
        chosen = ["--student", student, "--device", "cuda", "--dtype", dtype, "--num", "70"]
        assert sample.main([*chosen, "--npz", str(out)]) == 0
        images.append(np.load(out)["images"])
    assert 0 < np.abs(images[0] - images[1]).mean() < 0.1


def test_a_teacher_is_sampled_in_half_precision(tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    chosen = ["--teacher", "zoo:fashion-mnist", "--device", "cuda", "--dtype", "float16"]
    assert sample.main([*chosen, "--num", "9", "--steps", "10", "--npz", str(out)]) == 0
    images = np.load(out)["images"]
    assert images.shape == (9, 1, 28, 28) and np.isfinite(images).all()
    assert images.std() > 0.2
