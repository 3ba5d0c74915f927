"""One job from its request to its manifest: fetch, reconstruct, deliver. Jobs share nothing but the volume."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from dust3r_sfm import __version__
from dust3r_sfm.demo import write_photos
from dust3r_sfm.errors import InputError, ReconstructionError
from dust3r_sfm.serving.archives import copy, is_archive, pack, unpack_photos
from dust3r_sfm.serving.isolation import CHILD, OutOfMemoryError, reconstruct_apart
from dust3r_sfm.serving.limits import Allowance, Limits, TimeLimitError
from dust3r_sfm.serving.request import Request, arguments_of, parse_request
from dust3r_sfm.serving.transfer import Transfer, split_url, without_query
from dust3r_sfm.views import SUFFIXES, list_images

logger = logging.getLogger(__name__)

NUM_DOWNLOADS = 8
"""At once."""
DEMO_SEED = 5
SUFFIX_OF_TYPE = {"image/jpeg": ".jpg", "image/png": ".png", "image/tiff": ".tif", "image/webp": ".webp"}
SUFFIX_OF_TYPE |= {"image/heic": ".heic", "image/heif": ".heif"}
CACHES = ("pointmaps.h5", "pointmaps.shards", "aligned.h5", "features.db")
"""What a run keeps to continue from; it is not delivered."""
CODES: dict[type[Exception], str] = {
    InputError: "input",
    ReconstructionError: "scene",
    TimeLimitError: "time",
    OutOfMemoryError: "memory",
    OSError: "internal",
    RuntimeError: "internal",
}
"""What each error is told as; the first that fits."""
MAX_PATH, MAX_NAME = 1024, 200
"""Bytes of a path below the volume, and of each name in it: temporary names and those of the result are longer."""
MAX_REASONS = 100
"""Photos without a pose that the manifest gives reasons for; summary.json has all."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Runs jobs, several at once where it is asked to: each in a folder and a process of its own."""

    limits: Limits
    local: Collection[str] = ()
    """Addresses that may be reached although they are not public; for tests."""
    child: Sequence[str] = CHILD
    """The command that reconstructs."""

    def run(self, content: Any, progress: Progress) -> dict[str, Any]:
        """What a job's input asks for: a manifest, or `error` (a sentence) and `code`.

        `input` and `scene`: what was sent cannot be used; `time` and `memory`: the machine does not
        suffice; `internal`: we are at fault, and the log says more. `progress` is told each stage.
        """
        try:
            return self._run(parse_request(content), progress)
        except tuple(CODES) as error:
            code = next(code for kind, code in CODES.items() if isinstance(error, kind))
            if code == "internal":
                logger.exception("The job failed.")
            return {"error": str(error), "code": code}

    def _run(self, request: Request, progress: Progress) -> dict[str, Any]:
        allowance = Allowance(self.limits)
        transfer = Transfer(allowance, self.local)
        target = None if request.output_path is None else _new_folder(self.limits, request.output_path)
        if request.output_url is not None:
            transfer.check(request.output_url)
        with tempfile.TemporaryDirectory(prefix="job-", dir=self.limits.scratch) as name:
            folder = Path(name)
            progress("fetch")
            source = _fetch(request, folder, self.limits, allowance, transfer)
            arguments = arguments_of(request, source, folder / "out", self.limits.model, self.limits.max_images)
            try:
                tries = reconstruct_apart(arguments, folder / "log.txt", allowance, progress, self.child)
            except ReconstructionError as error:  # folders of this machine say nothing to who sent the job
                told = str(error).replace(f"{folder}/", "").replace(f"{self.limits.volume_path.resolve()}/", "")
                raise ReconstructionError(told) from None
            progress("deliver")
            manifest = _manifest(folder / "out") | {"tries": tries}
            return manifest | {"output": _deliver(request, folder, target, transfer)}


def _fetch(request: Request, folder: Path, limits: Limits, allowance: Allowance, transfer: Transfer) -> Path:
    """The folder of photos or the video of a job."""
    if request.demo is not None:
        write_photos(folder, request.demo, DEMO_SEED)
        return folder / "images"
    if request.images is not None:
        allowance.check_count(len(request.images))
        return _download_photos(request.images, folder / "photos", transfer)
    if request.volume_path is not None:
        source = _below(limits, request.volume_path)
        if not source.exists():
            raise InputError(f"there is no {request.volume_path} on the volume")
    else:
        is_video = request.archive is None
        source = folder / ("video" if is_video else "archive")
        transfer.download(request.video or request.archive or "", source)
        if is_video:
            return source
    if source.is_dir():
        names = list_images(source)
        allowance.check_count(len(names))
        allowance.spend(sum((source / name).stat().st_size for name in names))
        return source
    if request.volume_path is not None:
        allowance.spend(source.stat().st_size)
    if is_archive(source):
        allowance.give_back(source.stat().st_size)  # what it unpacks to counts
        unpack_photos(source, folder / "photos", allowance)
        return folder / "photos"
    if request.archive is not None:
        raise InputError(f"{without_query(request.archive)} is no archive: expected a zip or tar file of photos")
    return source  # a video, or what the reader of videos has a sentence for


def _download_photos(urls: list[str], folder: Path, transfer: Transfer) -> Path:
    folder.mkdir()
    with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
        jobs = [pool.submit(_download_photo, url, index, folder, transfer) for index, url in enumerate(urls)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return folder


def _download_photo(url: str, index: int, folder: Path, transfer: Transfer) -> None:
    """One photo, named by its place in the list and by what of its own name is harmless."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(unquote(split_url(url).path)).name)[-80:]
    path = folder / f"{index:04d}_{name or 'photo'}"
    media_type = transfer.download(url, path)
    if path.suffix.lower() not in SUFFIXES:
        if media_type not in SUFFIX_OF_TYPE:
            raise InputError(
                f"{without_query(url)} is no photo but {media_type}: expected one of {', '.join(SUFFIXES)}"
            )
        path.rename(path.with_name(path.name + SUFFIX_OF_TYPE[media_type]))


def _below(limits: Limits, path: str) -> Path:
    """A path of the volume; InputError where it leads out of it, also by a link, or can be none."""
    if "\0" in path or len(path.encode()) > MAX_PATH or any(len(part.encode()) > MAX_NAME for part in path.split("/")):
        raise InputError(f"{path[:MAX_NAME]!r} is no path here: expected names of up to {MAX_NAME} bytes")
    volume = limits.volume_path.resolve()
    found = (volume / path).resolve()
    if not volume.is_dir():
        raise InputError("this worker has no volume: send addresses")
    if found == volume or not found.is_relative_to(volume):
        raise InputError(f"{path} is not below the volume: expected a path within it, such as castle/images")
    return found


def _new_folder(limits: Limits, path: str) -> Path:
    target = _below(limits, path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{path} is on the volume already: choose another output_path")
    if any(parent.is_file() for parent in target.parents):
        raise InputError(f"{path} is below a file of the volume: choose another output_path")
    return target


def _manifest(output: Path) -> dict[str, Any]:
    """What the run's summary says, small enough to send back."""
    summary = json.loads((output / "summary.json").read_text())
    out = {name: image["reason"] for name, image in summary["images"].items() if not image["registered"]}
    return {
        "version": __version__,
        "network": summary["network"],
        "counts": summary["counts"],
        "models": summary["models"],
        "not_registered": dict(list(out.items())[:MAX_REASONS]),
        "timings_s": summary["timings_s"],
    }


def _deliver(request: Request, folder: Path, target: Path | None, transfer: Transfer) -> list[dict[str, Any]]:
    """Put the result where the job wants it; what is where, without the keys in addresses."""
    output, delivered = folder / "out", []
    files = [path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file()]
    files = [f for f in files if f.parts[0] not in CACHES and not any(part.startswith(".") for part in f.parts)]
    names = [file.as_posix() for file in files]
    if target is not None:
        _place(output, names, target, str(request.output_path))
        delivered.append({"volume_path": request.output_path, "files": len(names), "bytes": _size(output, names)})
    if request.output_url is not None:
        archive = folder / "result.zip"
        pack(output, names, archive)
        transfer.upload(archive, request.output_url)
        found = {"url": without_query(request.output_url), "files": len(names), "bytes": archive.stat().st_size}
        delivered.append(found | {"sha256": _sha256(archive)})
    return delivered


def _place(output: Path, names: list[str], target: Path, shown: str) -> None:
    """Copy the result beside `target` and rename it, so that it is there as a whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        copy(output, names, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except FileExistsError:
        raise InputError(f"{shown} was made by another job in the meantime: choose another output_path") from None
    except OSError as error:
        if target.exists() and any(target.iterdir()):
            raise InputError(f"{shown} was made by another job in the meantime: choose another output_path") from None
        raise error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _size(folder: Path, names: list[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
