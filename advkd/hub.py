"""Repositories of the Hugging Face hub, by the library huggingface_hub, which is optional.

What is downloaded lies in that library's cache (`HF_HOME`), so a second use needs no connection.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from advkd.files import CheckpointError

# OWNER/NAME or OWNER/NAME@REVISION
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# What advkd reads of a network: never a pickle, and of a larger pipeline its UNet and scheduler.
_WANTED = [
    *("config.json", "model_index.json", "scheduler_config.json", "scheduler/*.json"),
    *("model.safetensors", "diffusion_pytorch_model*.safetensors*"),
    *("unet/*.json", "unet/*.safetensors", "unet_ema/*.json", "unet_ema/*.safetensors"),
]
_OWN = ["*.done.json", ".*"]  # what a run keeps beside a network for itself


def is_repository(source: str) -> bool:
    """Whether a text is OWNER/NAME or OWNER/NAME@REVISION, and no folder here has that name."""
    return _NAME.fullmatch(source) is not None and not Path(source).exists()


def download(source: str) -> Path:
    """The folder of a repository's network, OWNER/NAME or OWNER/NAME@REVISION, in the cache.

    CheckpointError where huggingface_hub is not installed, or for what it cannot bring.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source!r} is not OWNER/NAME, as a repository of the hub is called")
    try:
        library = _library()
    except CheckpointError as error:
        raise CheckpointError(f"there is no folder {source}, and {error}") from None
    try:
        folder = library.snapshot_download(match[1], revision=match[2], allow_patterns=_WANTED)
    except Exception as error:  # of the library, and of those that it calls
        raise CheckpointError(
            f"there is no folder {source}, and the hub gives no such repository: {_reason(error)}"
        ) from error
    return Path(folder)


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload by advkd",
    create_pr: bool = False,
) -> str:
    """Upload a folder as it stands to a repository, which is made if there is none; the commit's
    address.

    A model card that the repository has stays. CheckpointError as in `download`.
    """
    api = _library().HfApi(token=token)
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        kept = ["README.md"] if api.file_exists(name, "README.md", revision=revision) else []
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            ignore_patterns=[*_OWN, *kept],
        )
    except Exception as error:
        reason = _reason(error)
        raise CheckpointError(f"{folder} was not uploaded to {repository}: {reason}") from error
    return str(commit.commit_url)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            "the Hugging Face hub needs the library huggingface_hub, which is not installed: "
            "pip install 'advkd[hub]'"
        ) from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    """The first two lines of what the library says; the first is often a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{' '.join(lines[:2]) or type(error).__name__:.300}"
