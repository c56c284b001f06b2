"""Downloads the scene that has a public address of its own; it takes its name once its checksums are right.

The archive goes into a `.part` file, from which a broken transfer is resumed at the next run.
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
from pathlib import Path

from tqdm import tqdm

from jaxngp.config import InputError
from jaxngp.data import transforms

TIMEOUT = 30.0  # seconds without a byte
BLOCK = 2**20  # bytes read at a time
MAX_UNPACKED = 4 * 2**30  # bytes; the largest scene of NeRF-synthetic has a tenth of it
# What reading a broken archive raises; the second line is two members of one name.
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError),
    *(FileExistsError, NotADirectoryError, IsADirectoryError),
)


@dataclass(frozen=True)
class Source:
    """The addresses of an archive, tried in turn; the scene's folder in it; SHA-256 of files there."""

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


def download_scene(
    name: str, root: Path, *, looked: tuple[Path, ...] = (), sources: Mapping[str, Source] = SOURCES
) -> Path:
    """Downloads a scene into root/nerf_synthetic/<name>, and returns that folder.

    looked: where the scene was looked for before, for the message. Raises InputError where the scene has no address
    of its own, cannot be loaded, or is not what it should be; then nothing takes the folder's name.
    """
    if name not in sources:
        raise _not_found(name, looked, "it has no public address from which it could be downloaded alone")
    source, folder, part = sources[name], root / "nerf_synthetic" / name, root / f"{name}.zip.part"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            raise OSError(f"{folder} is in the way: move it elsewhere")
        url = _fetch(source.urls, part)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
            try:
                unpacked = _unpack(part, source, Path(temporary) / name)
            except (InputError, *BROKEN) as error:
                part.unlink()
                raise _not_found(name, looked, f"the archive of {url} is broken or not the scene ({error})") from None
            if not transforms.detect(folder):  # else another run was faster; its folder was checked as this one was
                unpacked.rename(folder)
        part.unlink()
    except (OSError, http.client.HTTPException) as error:  # offline, no such host, too slow; disk full or read-only
        raise _not_found(name, looked, f"downloading it to {root} failed ({error})") from None
    return folder


def _not_found(name: str, looked: tuple[Path, ...], reason: str) -> InputError:
    """What is wrong, where the scene was looked for, what to put there, and what needs no data."""
    places = f"looked in {', '.join(map(str, looked))}; " if looked else ""
    return InputError(
        f"scene {name!r} was not found: {places}{reason}. Put the folder {name!r} of NeRF-synthetic (with "
        "transforms_train.json, train/ and so on) into one of these places, or give the folder that holds it with "
        "--data_dir or in JAXNGP_DATA; --scene=bricks needs no data"
    )


def _fetch(urls: tuple[str, ...], part: Path) -> str:
    """Loads the archive into `part` from the first address that serves it, and returns that address."""
    faults = []
    for url in urls:
        try:
            _fetch_from(url, part)
            return url
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"{url}: {error or type(error).__name__}")
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
            return  # nothing is left to load; the checksums say whether it is right
        raise
    with response, part.open("ab") as file:
        if response.status != http.client.PARTIAL_CONTENT:  # the server starts over, and so does the file
            done = file.truncate(0)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with tqdm(total=total, initial=done, desc="downloading", unit="B", unit_scale=True, mininterval=1.0) as bar:
            while block := response.read(BLOCK):
                done += file.write(block)
                bar.update(len(block))
    if total is not None and done != total:
        raise OSError(f"the transfer ended at byte {done} of {total}; run again to resume it")


def _unpack(part: Path, source: Source, folder: Path) -> Path:
    """Unpacks the scene into `folder` and checks it. Raises InputError or one of BROKEN."""
    with zipfile.ZipFile(part) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(f"{source.folder}/") and not m.is_dir()]
        if not members or sum(member.file_size for member in members) > MAX_UNPACKED:
            raise InputError(f"it has {len(members)} files in {source.folder}, or unpacks to too many bytes")
        for member in tqdm(members, "unpacking", unit="file", delay=1.0, disable=None):
            target = folder / member.filename.removeprefix(f"{source.folder}/")
            if not target.resolve().is_relative_to(folder.resolve()) or {"\\", ":"} & {*member.filename}:
                raise InputError(f"its member {member.filename!r} leaves the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as packed, target.open("xb") as file:
                shutil.copyfileobj(packed, file, BLOCK)  # compares the CRC at the end
    for name, expected in source.checksums:
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if found != expected:
            raise InputError(f"{name} should have the SHA-256 {expected}, found {found}")
    transforms.read(folder, transforms.detect(folder))  # every image that a transforms file names is there
    return folder
