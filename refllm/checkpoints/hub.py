"""A checkpoint of the Hugging Face Hub by its name, downloaded or found in the cache.

| name                  | what is downloaded                                                  |
|-----------------------|---------------------------------------------------------------------|
| ``org/name``          | with a ``config.json``: the configuration, the tokenizer, and the   |
|                       | safetensors files (those that the index names); otherwise the GGUF  |
|                       | file, if the repository has exactly one beside those that hold no   |
|                       | network (mmproj, imatrix)                                           |
| ``org/name:x.gguf``   | that file, with its parts if its name is that of one of them        |

Nothing else is downloaded: no pickled weights, no code, no second copy of the weights. A
``revision`` (a branch, a tag or a commit) pins the version; the default is "main".

``huggingface_hub`` (extra ``hub``) does the work, and its settings hold: ``HF_HOME``,
``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, progress bars on a
terminal. Offline, and where the server cannot be reached, the cache is used.

File names come from a server and from an index, and are not trusted: one that points outside
the repository is rejected.

Left out: uploading, datasets, removing files from the cache (``hf cache``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from refllm.checkpoints.tensor_files import (
    INDEX,
    QUANTIZATION_FILES,
    SINGLE,
    CheckpointError,
    read_json,
)

__all__ = ["fetch", "split_name"]

# Everything beside the weights that ``loading`` reads
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    *QUANTIZATION_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)
TIMEOUT = 10.0  # seconds to wait for the list of files before the cache is used
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<file>[^:]+))?", re.ASCII)
# GGUF files that hold no network: the projector of another model's images, importances
_NO_NETWORK = re.compile(r"(.*/)?([^/]*[-_.])?(mmproj|imatrix)([-_.][^/]*)?", re.IGNORECASE)
_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


class HubName(NamedTuple):
    """A repository, and a file in it or None."""

    repo: str
    file: str | None


class _Repository(NamedTuple):
    """The names of a repository's files; ``folder`` holds them if they are in the cache alone."""

    files: list[str]
    folder: Path | None


def split_name(name: str) -> HubName | None:
    """The parts of a name on the Hub; None if a string cannot be one.

    >>> split_name("org/name:model-Q4_K_M.gguf")
    HubName(repo='org/name', file='model-Q4_K_M.gguf')
    >>> split_name("org/name").file is None
    True
    >>> [split_name(text) for text in ("name", "a/b/c", "./a/b", "a/b.gguf", "../a")]
    [None, None, None, None, None]
    """
    found = _NAME.fullmatch(name)
    if found is None or (found["file"] is None and name.endswith((".gguf", ".safetensors"))):
        return None
    return HubName(found["repo"], found["file"])


def fetch(name: str, revision: str | None = None) -> Path:
    """The directory, or the GGUF file, of a checkpoint on the Hub, downloaded where it is not
    in the cache.

    Raises
    ------
    CheckpointError
        in one sentence: without ``huggingface_hub``, network or permission, for an unknown
        name, revision or file, and for a repository without weights that refllm reads.
    """
    repo, file = split_name(name) or HubName(name, None)
    hub = _library(name)
    listed = _list_files(hub, name, repo, revision)
    for each in listed.files:
        _require_inside(each, repo)
    wanted = _choose(listed.files, repo, file)
    folder = listed.folder or _download(hub, name, repo, revision, wanted)
    if INDEX in wanted:
        shards = _shards(folder / INDEX, listed.files, repo)
        if listed.folder is None:
            _download(hub, name, repo, revision, shards)
    if wanted[0].endswith(".gguf"):
        return folder / wanted[0]
    return folder


# --- which files ---------------------------------------------------------------------------


def _choose(files: list[str], repo: str, file: str | None) -> list[str]:
    """The files to download first; of a sharded checkpoint the index, which names the others.

    A GGUF file stands first.
    """
    gguf = sorted(each for each in files if each.endswith(".gguf"))
    if file is not None:
        if file not in files or not file.endswith(".gguf"):
            known = f"its GGUF files are {', '.join(gguf)}" if gguf else "it has no GGUF files"
            raise CheckpointError(f"{repo} has no GGUF file {file!r}: {known}")
        return _with_parts(file, files, repo)
    small = [each for each in SMALL_FILES if each in files]
    small += [each for each in files if _TEMPLATE.fullmatch(each)]
    if "config.json" in files:
        top = [each for each in files if each.endswith(".safetensors") and "/" not in each]
        if SINGLE in files:
            return [*small, SINGLE]
        if INDEX in files:
            return [*small, INDEX]
        if top:  # such as old GPTQ checkpoints, whose file names the bits
            return [*small, *sorted(top)]
    first = [each for each in gguf if _is_first(each) and not _NO_NETWORK.fullmatch(each)]
    if len(first) == 1:
        return _with_parts(first[0], files, repo)
    if first:
        raise CheckpointError(
            f"{repo} has several GGUF files: choose one, such as {repo}:{first[0]!s}; they are "
            f"{', '.join(first)}"
        )
    raise CheckpointError(
        f"{repo} has neither config.json with safetensors nor a GGUF file: refllm reads nothing "
        f"else (it holds {_first_few(files)})"
    )


def _is_first(file: str) -> bool:
    """Whether a GGUF file is complete, or the first of its parts."""
    part = _PART.fullmatch(file)
    return part is None or file == f"{part['stem']}-00001-of-{part['count']}.gguf"


def _with_parts(file: str, files: list[str], repo: str) -> list[str]:
    """A GGUF file and its other parts."""
    part = _PART.fullmatch(file)
    if part is None:
        return [file]
    count = int(part["count"])
    parts = [f"{part['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    missing = [each for each in parts if each not in files]
    if missing:
        raise CheckpointError(f"{repo} lacks {missing[0]}, a part of {file}")
    return [file, *(each for each in parts if each != file)]


def _shards(index: Path, files: list[str], repo: str) -> list[str]:
    """The files that an index of safetensors names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        _require_inside(shard, repo)
        if shard not in files:
            raise CheckpointError(f"{repo} lacks {shard}, which its {INDEX} names")
    return shards


def _require_inside(name: str, repo: str) -> None:
    """CheckpointError for a file name that could leave the repository's folder."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    anchored = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    if anchored or ".." in parts or not name or "\0" in name:
        raise CheckpointError(
            f"{repo} names the file {name!r}, which points outside the repository: rejected"
        )


def _first_few(files: Iterable[str], most: int = 5) -> str:
    """A few names, and how many more there are.

    >>> _first_few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    listed = sorted(files)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "nothing") + more


# --- huggingface_hub -----------------------------------------------------------------------


def _library(name: str) -> Any:
    """The package; CheckpointError with the command that installs it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no path here, and to download it from the Hugging Face Hub "
            "huggingface_hub is needed: pip install 'refllm[hub]'"
        ) from error
    return huggingface_hub


def _list_files(hub: Any, name: str, repo: str, revision: str | None) -> _Repository:
    """The repository's files, from the server or, if it cannot be reached, from the cache."""
    if hub.constants.HF_HUB_OFFLINE:
        return _cached(hub, name, repo, revision, "HF_HUB_OFFLINE is set")
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
    except Exception as error:
        _explain(hub, error, name, repo, revision)
        if not _is_transport(error):
            raise
        reason = f"{hub.constants.ENDPOINT} cannot be reached"
        return _cached(hub, name, repo, revision, reason, error)
    return _Repository([each.rfilename for each in info.siblings or ()], None)


def _cached(
    hub: Any,
    name: str,
    repo: str,
    revision: str | None,
    reason: str,
    error: Exception | None = None,
) -> _Repository:
    """What the cache holds of a revision; CheckpointError if that is nothing."""
    wanted = revision or "main"
    try:
        cache = hub.scan_cache_dir(hub.constants.HF_HUB_CACHE)
        found = [each for each in cache.repos if each.repo_id == repo]
    except hub.errors.CacheNotFound:
        found = []
    for each in found:
        for one in each.revisions if each.repo_type == "model" else ():
            if wanted in one.refs or one.commit_hash == wanted:
                paths = [Path(f.file_path).relative_to(one.snapshot_path) for f in one.files]
                return _Repository([path.as_posix() for path in paths], one.snapshot_path)
    raise CheckpointError(
        f"{name!r} is no path here, {reason}, and {wanted!r} of it is not in the cache "
        f"({hub.constants.HF_HUB_CACHE}): go online once, or pass the path of a checkpoint"
    ) from error


def _download(hub: Any, name: str, repo: str, revision: str | None, files: Iterable[str]) -> Path:
    """The folder of the revision, with these files in it."""

    class Bar(hub.utils.tqdm):  # type: ignore[misc]
        """The library's progress bar, on a terminal only."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": not sys.stderr.isatty()})

    try:
        return Path(
            hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[_literal(each) for each in files],
                tqdm_class=Bar,
            )
        )
    except Exception as error:
        _explain(hub, error, name, repo, revision)
        if not _is_transport(error) or getattr(error, "errno", None) is not None:
            raise  # a full disk, no permission to write
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the download of {repo} broke off ({first}): try again, it continues where it stopped"
        ) from error


def _literal(name: str) -> str:
    """A pattern of ``fnmatch`` that matches this name alone.

    >>> _literal("a[1]*.gguf")
    'a[[]1][*].gguf'
    """
    return re.sub(r"[*?[]", r"[\g<0>]", name)


def _is_transport(error: Exception) -> bool:
    """Whether an error is one of the connection or the server: which class it has depends on
    the version of the library.
    """
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in ("httpx", "httpx2", "httpcore", "requests")


def _explain(hub: Any, error: Exception, name: str, repo: str, revision: str | None) -> None:
    """CheckpointError for what the server says of a request; nothing for other errors."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        raise CheckpointError(
            f"{repo} is gated: accept its terms on its page, then run hf auth login"
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise CheckpointError(
            f"{name!r} is no path here, and {hub.constants.ENDPOINT} has no public model {repo!r}: "
            "check the spelling; for a private one run hf auth login"
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise CheckpointError(f"{repo} has no revision {revision or 'main'!r}") from error
    if isinstance(error, errors.HFValidationError):
        raise CheckpointError(
            f"{name!r} is no path here, and no name of a model: {error}"
        ) from error
