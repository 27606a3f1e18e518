"""Weights by their Hugging Face hub id: where a directory of weights may stand, "org/name@revision" may too.

What is fetched lies in the Hugging Face cache, which other programs share. HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE mean what huggingface_hub says they mean.
"""

from __future__ import annotations

import errno
import functools
import glob
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vflax import bucket, mirror
from vflax.errors import UserError
from vflax.weights.tensor_files import read_index

PROJECTORS = ("mm_projector.safetensors", "mm_projector.bin")
# The folders that the recipes name. One that is missing must never become the weights of a stranger.
LOCAL_FOLDERS = ("runs", "weights", "data")

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(
    rf"(?!.*(?:--|\.\.))(?P<repo>{_PART}(?P<name>/{_PART})?)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?",
    re.ASCII,
)
_SMALL = (".json", ".model", ".txt", ".jinja")
_WEIGHTS = re.compile(
    r"(?:pytorch_)?(?P<family>model|adapter_model|non_lora_trainables|mm_projector)"
    r"(?:-\d+-of-\d+)?\.(?P<format>safetensors|bin)(?P<index>\.index\.json)?"
)


@dataclass(frozen=True)
class HubId:
    """A model on the hub at a revision: a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


def parse_hub_id(text: str) -> HubId | None:
    """Read "org/name", "org/name@revision" or either after "hf:", which may have one part ("hf:gpt2"); else None."""
    explicit = text.startswith("hf:")
    found = _ID.fullmatch(text.removeprefix("hf:"))
    if found is None or not (explicit or found["name"]):
        return None
    return HubId(found["repo"], found["revision"] or "main")


def resolve(text: str, *, weights: bool = True, only: tuple[str, ...] = ()) -> Path:
    """The directory or file that `text` names: one that is here, or gs://... or a hub id, which are fetched.

    Args:
        text: a path, gs://BUCKET/FOLDER or a hub id. Of a bare "org/name" that may be a folder of this project
            (`LOCAL_FOLDERS`, or a first part that is a directory here), the path is returned: whoever opens it says
            that it is not there.
        weights, only: what of it to fetch, see `fetch`, `mirror.fetch`.

    Raises:
        UserError: "hf:" is followed by no id, or it cannot be fetched.
    """
    if bucket.is_url(text):
        return mirror.fetch(text, weights=weights, only=only)
    hub_id = meant_id(text)
    if hub_id is None:
        return Path(text).expanduser()
    return fetch(hub_id, weights=weights, only=only)


def meant_id(text: str) -> HubId | None:
    """The hub id that `text` means, or None where it means a path; see `resolve`.

    Raises:
        UserError: "hf:" is followed by no id.
    """
    path = Path(text).expanduser()
    if path.exists():
        return None
    hub_id = parse_hub_id(text)
    if text.startswith("hf:") and hub_id is None:
        raise UserError(f"{text}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION")
    if text.startswith("hf:") or hub_id is None:
        return hub_id
    return None if path.parts[0] in LOCAL_FOLDERS or Path(path.parts[0]).is_dir() else hub_id


@functools.cache  # A run asks for its starting point several times: it is fetched once, at one commit.
def fetch(hub_id: HubId, *, weights: bool = True, only: tuple[str, ...] = ()) -> Path:
    """Bring a model of the hub into the Hugging Face cache; files that are there already are not fetched again.

    Args:
        hub_id: the model.
        weights: with its weights; False: the small files only, such as a tokenizer's.
        only: names of files: those of them that the model has, and nothing else.

    Returns:
        The folder of its files, at one commit.

    Raises:
        UserError: no such model or revision, no access, no network, no room, or nothing in it to take.
    """
    from huggingface_hub import errors

    try:
        return _fetch(hub_id, weights, only)
    except errors.OfflineModeIsEnabled:
        return _from_cache(hub_id, weights, only)
    # HTTPError is that of the HTTP library that huggingface_hub uses; which one has changed with its versions.
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"{hub_id}: {_explain(error)}") from None


def choose(names: Iterable[str], *, weights: bool = True, only: tuple[str, ...] = ()) -> list[str]:
    """The files that a model needs, of all in its repo: at the top, small ones, weights in one format.

    Everything else stays where it is: weights for other programs (subfolders, consolidated.*, fp16 variants, gguf ...),
    and the .bin of weights that are there as safetensors, too.
    """
    top = [name for name in names if "/" not in name]
    if only:
        top = [name for name in top if name in only]
    small = [name for name in top if name.endswith(_SMALL) and ".index." not in name]
    found = {name: match for name in top if (match := _WEIGHTS.fullmatch(name))} if weights else {}
    safe = {match["family"] for name, match in found.items() if name.endswith(".safetensors")}
    taken = [
        n for n, match in found.items() if (match["format"] == "safetensors") == (match["family"] in safe)
    ]
    return sorted({*small, *taken})


def projector_file(path: Path) -> Path:
    """The file of a bridge: `path` itself, or that in a directory; of both kinds safetensors, as everywhere.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        return path  # whoever opens it says when it is not there
    for name in PROJECTORS:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds neither {' nor '.join(PROJECTORS)}; name the file of the bridge itself")


def origin(path: Path) -> str | None:
    """The "org/name@COMMIT" that a path in the Hugging Face cache holds; None for any other path."""
    # Not resolved: the files of a snapshot are links to blobs, which have no commit.
    parts = path.absolute().parts
    for repo, snapshots, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if repo.startswith("models--") and snapshots == "snapshots":
            return f"{repo.removeprefix('models--').replace('--', '/')}@{commit}"
    return None


# --- fetching -----------------------------------------------------------------------------------------------


def _fetch(hub_id: HubId, weights: bool, only: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    repo, revision = hub_id.repo, hub_id.revision
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    chosen = choose(sizes, weights=weights, only=only)
    if (only and not chosen) or (weights and not any(map(_WEIGHTS.fullmatch, chosen))):
        wanted = " or ".join(only or ("safetensors", ".bin weights of PyTorch"))
        raise UserError(
            f"{hub_id}: no {wanted} in it; it holds {_listed(sizes)}. Name another model or revision"
        )
    cached = [isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str) for name in chosen]
    missing = sum(sizes[name] for name, there in zip(chosen, cached, strict=True) if not there)
    total = sum(sizes[name] for name in chosen)
    print(
        f"{hub_id} is commit {info.sha}: {len(chosen)} files, {total / 1e9:.2f} GB, "
        f"{missing / 1e9:.2f} GB of them to fetch",
        file=sys.stderr,
    )
    _check_room(hub_id, missing)
    # By the revision, not its commit: the library then notes which commit it is, for HF_HUB_OFFLINE.
    folder = Path(
        snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in chosen])
    )
    # When the network goes away between two requests, the library returns what is in the cache.
    lost = [name for name in chosen if not (folder / name).is_file()]
    if lost:
        raise UserError(f"{hub_id}: {_listed(lost)} did not arrive; run the same command again")
    return folder


def _from_cache(hub_id: HubId, weights: bool, only: tuple[str, ...]) -> Path:
    """The folder of a model that was fetched earlier, for HF_HUB_OFFLINE."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        # What must be in it is judged here: the library would miss the files that were not chosen.
        folder = Path(
            snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True, allow_patterns=[])
        )
    except errors.LocalEntryNotFoundError:
        folder = None
    if folder is None or not _is_whole(folder, weights, only):
        state = "not" if folder is None else "only in part"
        raise UserError(
            f"{hub_id}: {state} in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it; "
            "fetch it once without HF_HUB_OFFLINE, or set HF_HOME to where it was fetched"
        )
    print(f"{hub_id} is commit {folder.name}, from the cache (HF_HUB_OFFLINE)", file=sys.stderr)
    return folder


def _is_whole(folder: Path, weights: bool, only: tuple[str, ...]) -> bool:
    """Whether a cached folder has what `choose` would take, as far as its own files tell."""
    here = {path.name for path in folder.iterdir()}
    if only:
        return not here.isdisjoint(only)
    found = [match for name in here if (match := _WEIGHTS.fullmatch(name))]
    shards = {shard for match in found if match["index"] for shard in read_index(folder / match[0]).values()}
    return not weights or (shards <= here and any(not match["index"] for match in found))


def _check_room(hub_id: HubId, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    # Some versions of the library go on with what an interrupted download left.
    blobs = cache / f"models--{hub_id.repo.replace('/', '--')}" / "blobs"
    needed -= sum(path.stat().st_size for path in blobs.glob("*.incomplete"))
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise UserError(
            f"{hub_id}: {needed / 1e9:.1f} GB to fetch, but {cache} has {free / 1e9:.1f} GB free; set HF_HOME to a "
            "folder on a larger disk"
        )


def _explain(error: Exception) -> str:
    """What is wrong, and what to do, in one line."""
    from huggingface_hub import constants, errors

    endpoint, said = constants.ENDPOINT, " ".join(str(error).split())
    if isinstance(error, errors.GatedRepoError):
        return f"its owner grants access on request; ask for it at {endpoint}, then set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{endpoint} has no such model, or it is private. A private one needs HF_TOKEN; if a directory is meant, "
            f"it is not there (looked in {Path.cwd()})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model has no such revision; give a branch, tag or commit that {endpoint} lists for it"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "an error"
        return f"{endpoint} answers {status} ({said}); try again later, or check HF_TOKEN and HF_ENDPOINT"
    if isinstance(error, errors.HFValidationError):
        return f"not an id that a model can have ({said}); give ORG/NAME or ORG/NAME@REVISION"
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to another folder"
    return (
        f"cannot be fetched from {endpoint} ({type(error).__name__}: {said}). Run the same command again; without a "
        "network set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 to take what was fetched earlier; if a directory is "
        f"meant, it is not there (looked in {Path.cwd()})"
    )


def _listed(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:8]) + (f" and {len(some) - 8} more" if len(some) > 8 else "") or "no files"
