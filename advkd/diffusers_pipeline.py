"""A student of advkd as a pipeline of diffusers. `save_pretrained` puts this file into a student's
folder as pipeline.py, by which diffusers finds it:

    pipeline = DiffusionPipeline.from_pretrained(
        FOLDER, custom_pipeline=FOLDER, trust_remote_code=True
    )
    images = pipeline(batch_size=16).images
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

import advkd


class StudentPipeline(DiffusionPipeline):
    """Images of a student, each in one network pass."""

    _optional_components = ("student",)

    def __init__(self, student: torch.nn.Module | None = None):
        """`student` is read when it is first asked for, from where this pipeline is from."""
        super().__init__()
        self.register_modules(student=student)

    def loaded(self) -> Any:
        """The student, on the pipeline's device."""
        if self.student is None:
            self.register_modules(student=advkd.load_student(self.config._name_or_path))
        return self.student

    def to(self, *args: Any, **kwargs: Any) -> StudentPipeline:
        """Move the student, as `torch.nn.Module.to`."""
        self.loaded()
        super().to(*args, **kwargs)
        return self

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """Write the student's folder, this file included."""
        self.loaded().save_pretrained(save_directory, **settings)

    @torch.inference_mode()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample `batch_size` images, from another seed each time, or one that `generator` draws.

        class_labels: a class's name or number, for all images or for each; None picks at random.
        output_type: "pil", "np" (batch_size, H, W, C) in [0, 1], or "pt" (batch_size, C, H, W) in
        [0, 1]. ValueError for labels that the student does not have.
        """
        student = self.loaded()
        place = None if generator is None else generator.device
        seed = int(torch.randint(1 << 62, (), generator=generator, device=place))
        y = self._labels(student, class_labels, batch_size)
        images = advkd.generate(student, batch_size, seed, y=y) / 2 + 0.5
        if output_type != "pt":
            images = self._array(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _array(self, images: torch.Tensor, output_type: str) -> Any:
        array = images.permute(0, 2, 3, 1).numpy()
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type={output_type!r} is not pil, np or pt")
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def _labels(
        self, student: Any, given: int | str | Sequence[int | str] | None, count: int
    ) -> torch.Tensor | None:
        """The labels of the images; None leaves them to the seed."""
        if given is None:
            return None
        each = [given] * count if isinstance(given, int | str) else list(given)
        names = student.class_names or ()
        for label in each:
            if isinstance(label, str) and label not in names:
                raise ValueError(f"{label!r} is not a class of this student: {', '.join(names)}")
        numbers = [names.index(label) if isinstance(label, str) else label for label in each]
        return torch.tensor(numbers, dtype=torch.int64)
