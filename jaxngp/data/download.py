"""Fetches the scene that has a public address of its own, and believes nothing that arrives before it is checked.

An archive is loaded into a `.part` file, from which a broken transfer goes on at the next run. What is in it is
unpacked into a temporary folder, compared with the known checksums, and only then takes its name.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from jaxngp.config import InputError
from jaxngp.data import blender

TIMEOUT = 30.0  # seconds without a byte
BLOCK = 2**20  # bytes read at a time
MAX_UNPACKED = 4 * 2**30  # bytes; the largest scene of NeRF-synthetic has a tenth of it


@dataclass(frozen=True)
class Source:
    """Where the archive with a scene lies (each address in turn), which part of it is the scene, and what must be in.

    `checksums` are pairs of a file's path below `folder` and its SHA-256.
    """

    urls: tuple[str, ...]
    folder: str
    checksums: tuple[tuple[str, str], ...]


_EXAMPLE_DATA = "cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/nerf_example_data.zip"
SOURCES: Mapping[str, Source] = {
    "lego": Source(
        urls=(f"https://{_EXAMPLE_DATA}", f"http://{_EXAMPLE_DATA}"),
        folder="nerf_synthetic/lego",
        checksums=(
            ("transforms_train.json", "82d46cfbd405d7da8562b6fa75b6fb0631a3f941adf66f0c023acb8bf9ea273a"),
            ("transforms_val.json", "7100ba06021772ff6a0637246666ebe4dc15175a3d092de628486489d459dde1"),
        ),
    )
}


class _ArchiveError(Exception):
    """What arrived is not what was expected; there is no use in keeping it."""


def download_scene(
    name: str, root: Path, *, looked: tuple[Path, ...] = (), sources: Mapping[str, Source] = SOURCES
) -> Path:
    """Downloads a scene into root/nerf_synthetic/<name>, and returns that folder.

    looked: where the scene was sought before, for the message. Raises InputError where the scene has no address of
    its own, cannot be loaded, or is not what it should be; then nothing takes the folder's name.
    """
    if name not in sources:
        raise not_found(name, looked, "it has no public address from which it could be downloaded alone")
    source, folder, part = sources[name], root / "nerf_synthetic" / name, root / f"{name}.zip.part"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        url = _fetch(source.urls, part)
        _unpack(part, source, folder)
        part.unlink()
    except _ArchiveError as error:
        part.unlink(missing_ok=True)
        raise not_found(name, looked, f"{url} was loaded but refused: {error}") from None
    except (OSError, http.client.HTTPException) as error:  # offline, no such host, too slow; disk full or read-only
        raise not_found(name, looked, f"downloading it to {root} failed ({_one_line(error)})") from None
    return folder


def not_found(name: str, looked: tuple[Path, ...], reason: str) -> InputError:
    """The paragraph for a scene that is not there: where it was sought, what to put there, what needs no data."""
    places = f"looked in {', '.join(map(str, looked))}; " if looked else ""
    return InputError(
        f"scene {name!r} was not found: {places}{reason}. Put the folder {name!r} of NeRF-synthetic (with "
        "transforms_train.json, train/ and so on) into one of these places, or give the folder that holds it with "
        "--data_dir or in JAXNGP_DATA; --scene=bricks needs no data"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Loading.


def _fetch(urls: tuple[str, ...], part: Path) -> str:
    """Loads the archive into `part` from the first address that serves it, and returns that address."""
    faults = []
    for url in urls:
        try:
            _fetch_from(url, part)
            return url
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"{url}: {_one_line(error)}")
    raise OSError("; ".join(faults))


def _fetch_from(url: str, part: Path) -> None:
    """Loads what `part` still lacks. Raises OSError or HTTPException where less than all of it comes."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "jaxngp"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and done:
            return  # nothing is left to load; the checks that follow find out what there is
        raise
    with response, part.open("ab") as file:
        if response.status != http.client.PARTIAL_CONTENT:  # the server starts over, and so does the file
            done = file.truncate(0)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        received = _copy(response, file, total, done)
    if total is not None and received != total:
        raise OSError(f"the transfer ended at byte {received} of {total}; run again to go on from there")


def _copy(response: IO[bytes], file: IO[bytes], total: int | None, done: int) -> int:
    """Copies with a progress bar; returns the size of the whole file."""
    with tqdm(total=total, initial=done, desc="downloading", unit="B", unit_scale=True, mininterval=1.0) as bar:
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))
            done += len(block)
    return done


# Unpacking.

_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError),
    *(FileExistsError, NotADirectoryError, IsADirectoryError),  # two members of one name
)


def _unpack(part: Path, source: Source, folder: Path) -> None:
    """Unpacks the scene next to `folder`, checks it, and gives it that name."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unpacked = Path(temporary) / folder.name
        try:
            with zipfile.ZipFile(part) as archive:
                _extract(archive, source.folder + "/", unpacked)
        except _BROKEN as error:
            raise _ArchiveError(f"the archive is broken ({_one_line(error)})") from None
        _check(unpacked, source)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another run may have been faster; its folder was checked as this one was.
            if not (folder / source.checksums[0][0]).is_file():
                raise OSError(f"{folder} is in the way: move it elsewhere") from None


def _extract(archive: zipfile.ZipFile, prefix: str, folder: Path) -> None:
    """Unpacks the files below `prefix` into `folder`; reading a member to its end compares its CRC."""
    infos = archive.infolist()
    for info in infos:
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
            raise _ArchiveError(f"its member {info.filename!r} leaves the folder")
    members = [info for info in infos if info.filename.startswith(prefix) and not info.is_dir()]
    if not members or sum(info.file_size for info in members) > MAX_UNPACKED:
        raise _ArchiveError(f"it has {len(members)} files in {prefix}, or unpacks to too many bytes")
    for info in tqdm(members, "unpacking", unit="file", delay=1.0, disable=None):
        target = folder / info.filename.removeprefix(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as packed, target.open("xb") as file:
            shutil.copyfileobj(packed, file, BLOCK)


def _check(folder: Path, source: Source) -> None:
    """Raises _ArchiveError where a checksum differs, or an image that a transforms file names is not there."""
    for name, expected in source.checksums:
        path = folder / name
        if not path.is_file() or (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            found = found if path.is_file() else "no file"
            raise _ArchiveError(f"{name} should have the SHA-256 {expected}, found {found}")
    for path in sorted(folder.glob("transforms_*.json")):
        try:
            frames = blender.read_transforms(path).frames
        except InputError as error:
            raise _ArchiveError(str(error)) from None
        if missing := [frame.image for frame in frames if not frame.image.is_file()]:
            raise _ArchiveError(f"{missing[0].relative_to(folder)} and {len(missing) - 1} more images are missing")
