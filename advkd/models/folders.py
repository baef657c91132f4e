"""Networks that have a folder of their own, in the words of diffusers and the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound="InFolder")


@dataclass(frozen=True)
class Folders:
    """How networks of a kind are stored; `advkd.publish`, which lies above the networks, says so.

    load(source, ...) reads one, save(network, folder, dtype) writes it, and upload(folder,
    repository, ...) takes a folder to the hub.
    """

    load: Callable[..., Any]
    save: Callable[[Any, Path, torch.dtype], None]
    upload: Callable[..., str]


class InFolder(nn.Module):
    """A network with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Take the classes from `advkd` (`from advkd import Student, UNet`): whoever imports them from
    below `advkd.publish` has networks without folders.
    """

    folders: ClassVar[Folders]

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are of."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(cls: type[Network], source: str | Path, **settings: Any) -> Network:
        """Load a network from a folder, `zoo:NAME` or a repository of the hub, OWNER/NAME or
        OWNER/NAME@REVISION: float32, on the CPU, ready to sample.

        As `advkd.load_student` and `advkd.load_teacher` (which takes a `scheduler`), and with their
        errors.
        """
        network: Network = cls.folders.load(source, **settings)
        return network

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config, weights (safetensors) and, where there is none yet, a model card; a
        student's folder also holds a pipeline for diffusers."""
        self.folders.save(self, Path(folder), dtype)

    def push_to_hub(
        self,
        repository: str,
        *,
        dtype: torch.dtype = torch.float32,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Upload by advkd",
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, OWNER/NAME, which is
        made if there is none; a model card that it has stays. Returns the commit's address.

        CheckpointError where huggingface_hub is not installed, or for what the hub refuses. To
        upload a run's student with the model card of its figures: `advkd.push_folder`.
        """
        with tempfile.TemporaryDirectory(prefix="advkd-") as parent:
            # The folder's name is what its model card is headed.
            folder = Path(parent) / (repository.rpartition("/")[2] or "network")
            self.folders.save(self, folder, dtype)
            return self.folders.upload(
                folder, repository, private=private, token=token, revision=revision,
                message=message, create_pr=create_pr,
            )  # fmt: skip
