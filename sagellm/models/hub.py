"""From what the user calls a model to a folder on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from sagellm.errors import UserError

BUILTIN = Path(__file__).parent / "builtin"
"""A small model that comes with the package: no network, no download."""

WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "consolidated*"]
"""Subfolders and Mistral's second copy of the weights."""

ACCEPTED = "accepted: a folder, 'builtin', or a name on the Hugging Face hub like 'Qwen/Qwen2.5-0.5B'"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve(model: str, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of `model`: 'builtin', an existing folder, or a name on the Hugging Face hub.

    A hub model is downloaded once and then taken from the hub's cache; HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and
    HF_ENDPOINT mean what they mean to huggingface_hub. `progress` gets one line before the hub is asked.
    Raises UserError where there is no such folder or model, or the hub cannot be reached.
    """
    if model == "builtin":
        return BUILTIN
    folder = Path(os.path.expanduser(model))
    if model and folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{model!r} is a file; {ACCEPTED}")
    if not _HUB_NAME.fullmatch(model):
        raise UserError(f"no such folder: {model!r}; {ACCEPTED}")
    if progress is not None:
        progress(f"looking up {model} on the Hugging Face hub or in its cache")
    return _download(model)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name!r} is no folder here, and not on the Hugging Face hub or not open to you; {ACCEPTED}"
        ) from error
    except Exception as error:  # its HTTP client's own errors too, and that client changes between versions
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{name!r} is no folder here and not cached, and the Hugging Face hub could not be reached "
            f"({reason}); {ACCEPTED}"
        ) from error
