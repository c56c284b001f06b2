"""Export a trained run in a form that other programs read.

    python -m jaxngp.export --workdir=runs/bricks --format=volume

Coordinates are those of the scene's own files. Options are listed under the formats that
they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxngp import flags, runs
from jaxngp.config import Config, InputError, NerfConfig
from jaxngp.exporting import mesh, points, poses, splats, tcnn, volume, webpage
from jaxngp.runs import Run


@dataclass(frozen=True)
class Format:
    """A form that a run can be written in."""

    write: Callable[[Run, Path, Any], str]
    options: type[Config]
    ending: str  # of the file's default name, after that of the scene
    summary: str  # for --help
    others: tuple[str, ...] = ()  # suffixes that --out may have besides that of `ending`

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All that --out may have."""
        return (Path(f"x{self.ending}").suffix, *self.others)


FORMATS = {
    "html": Format(webpage.write, webpage.WebpageOptions, ".html", "one page that shows the scene in a browser"),
    "mesh": Format(
        mesh.write,
        mesh.MeshOptions,
        ".glb",
        "triangles with a texture, or with colours of vertices; --out says whether glb, obj or ply",
        others=(".ply", ".obj"),
    ),
    "points": Format(points.write, points.PointOptions, "-points.ply", "a point cloud with colours and normals"),
    "splats": Format(
        splats.write, splats.SplatOptions, "-splats.ply", "Gaussian splats; --out says whether ply or glb", (".glb",)
    ),
    "transforms": Format(
        poses.write_transforms,
        poses.PoseOptions,
        "-transforms.json",
        "the cameras, refined where they were, as nerfstudio, instant-ngp and we read them",
    ),
    "colmap": Format(
        poses.write_colmap, poses.PoseOptions, "-colmap", "the cameras as a text model of COLMAP, in a folder"
    ),
    "tcnn": Format(
        tcnn.write, tcnn.TcnnOptions, "-tcnn.npz", "the parameters in the layout of tiny-cuda-nn, as arrays"
    ),
    "volume": Format(volume.write, volume.VolumeOptions, "-volume.npz", "the density on a regular lattice, as arrays"),
}


OPTIONS = {name: form.options for name, form in FORMATS.items()}


def define_flags(values: flags.Flags) -> None:
    flags.define_export_flags(values, {name: form.summary for name, form in FORMATS.items()}, OPTIONS)


def main(values: flags.Flags) -> None:
    if not values.format:
        raise InputError(f"--format is missing: give one of {', '.join(FORMATS)}")
    if not values.workdir:
        raise InputError("--workdir is missing: give the folder of a run of python -m jaxngp.train")
    chosen = FORMATS[values.format]
    options = flags.export_options(values, chosen.options, OPTIONS)
    run = runs.load(values.workdir, NerfConfig)
    path = Path(values.out or run.workdir / "exports" / f"{Path(run.config.scene.name).stem}{chosen.ending}")
    if path.suffix.lower() not in chosen.suffixes:
        raise InputError(f"--out={path}: --format={values.format} is written as {' or '.join(chosen.suffixes)}")
    said = chosen.write(run, path, options)
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    print(f"{path}: {said}, {f'{size / 1e6:.1f} MB' if size > 1e5 else f'{size / 1e3:.1f} kB'}")


if __name__ == "__main__":
    flags.run("jaxngp.export", define_flags, main, __doc__)
