"""Find the cameras of photographs or of a video, by structure from motion, so that one can train from them.

    python -m jaxngp.capture --images=photos
    python -m jaxngp.capture --video=walk.mp4

Writes transforms.json, as nerfstudio and instant-ngp read it too, and the sparse points. The photographs stay where
they are, and are only read. The same command goes on where an interrupted one stopped.

Needs pycolmap and PyAV: pip install .[capture].
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from jaxngp import flags
from jaxngp.config import InputError
from jaxngp.console import warn
from jaxngp.data.motion import Matching, Reconstruction, reconstruct
from jaxngp.data.video import sharp_frames

PLAIN_NAMES = ("images", "input", "photos", "frames", "rgb")  # of folders, that do not name what they hold
SHOWN_NAMES = 10


def main(values: flags.Flags) -> None:
    if bool(values.images) == bool(values.video):
        raise InputError("give either --images, a folder of photographs, or --video, a file")
    source = Path(values.images or values.video)
    out = Path(values.out or Path("captures") / default_name(source))
    matching: Matching = values.matching
    if values.video:
        images = video_frames(source, out, values.frames, restart=values.restart)
        matching = "sequential" if matching == "auto" else matching
    else:
        images = source
    found = reconstruct(
        images,
        out,
        camera_model=values.camera_model,
        matching=matching,
        seed=values.seed,
        restart=values.restart,
    )
    print(summary(found))
    warn(*advice(found))
    scene = out if len(out.parts) > 1 else f"./{out}"  # a bare word is a known scene's name
    print(f"{out / found.transforms.name}   next: python -m jaxngp.train --scene={scene}")


def default_name(source: Path) -> str:
    """What a capture is called: after its folder or video, or the folder that holds a folder called images."""
    resolved = source.resolve()
    plain = resolved.name.lower() in PLAIN_NAMES and resolved.parent.name
    return resolved.parent.name if plain else resolved.stem


def video_frames(video: Path, out: Path, count: int, *, restart: bool) -> Path:
    """The folder of the sharp frames of a video, taken now or by an earlier call. Raises InputError."""
    folder, record = out / "images", out / "video.json"
    status = video.stat() if video.is_file() else None
    wanted = [str(video.resolve()), count, *((status.st_size, status.st_mtime_ns) if status else ())]
    if folder.exists():
        taken = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if taken == wanted:
            return folder
        if not (restart and taken):  # without a record they are not ours to remove
            raise InputError(
                f"{folder}: holds other images; give another --out"
                + (", or --restart to discard the frames of the other video" if taken else "")
            )
        shutil.rmtree(folder)
    record.unlink(missing_ok=True)
    frames = sharp_frames(video, folder, count)
    record.write_text(json.dumps(wanted), encoding="utf-8")
    print(f"{len(frames)} sharp frames: {folder}")
    return folder


def summary(found: Reconstruction) -> str:
    """What was found, for people."""
    num_images = len(found.registered) + len(found.unregistered)
    return "\n".join(
        [
            f"{len(found.registered)} of {num_images} images registered; mean reprojection error "
            f"{found.reprojection_error:.2f} px over {found.num_points} points",
            *(f"lens of {lens}" for lens in found.lenses),
        ]
    )


def advice(found: Reconstruction) -> list[str]:
    """Warnings about a capture of which too little was understood, and what to do."""
    if not found.unregistered:
        return []
    names = ", ".join(found.unregistered[:SHOWN_NAMES])
    more = f" and {len(found.unregistered) - SHOWN_NAMES} more" if len(found.unregistered) > SHOWN_NAMES else ""
    said = [f"not registered, and left out: {names}{more}"]
    if not found.enough:
        parts = f", in {found.num_parts} parts that do not connect" if found.num_parts > 1 else ""
        share = math.floor(100 * len(found.registered) / (len(found.registered) + len(found.unregistered)))
        said.append(
            f"only {share} % of the images are registered{parts}: add images between those that are left out and the "
            "others, so that each overlaps its neighbours by two thirds; leave out blurred ones; have texture in view, "
            "such as a printed cloth under a plain object; of a video, take more --frames; or try --matching=exhaustive"
        )
    return said


if __name__ == "__main__":
    flags.run("jaxngp.capture", flags.define_capture_flags, main, __doc__)
