"""Scenes on disk -> views for training and evaluation, as numpy arrays in scene units.

    places.locate --> Location --> Format.read --> Capture --> capture.normalise --> Placement
                                                      |               |
                                                      +----> splits.load_training, load_evaluation --> Split

A format is a module with `detect` and `read`, and an entry in `places.FORMATS`: `transforms` (NeRF-synthetic,
instant-ngp, nerfstudio), `sparse` (COLMAP), `llff`, `phones` (Polycam, Record3D), `rays`. `views` is what they share:
it finds files and makes the `Capture`; `points` reads point clouds. `bricks` renders the scene that needs no data,
`download` fetches the one that has a public address. `checks` says what looks wrong with what was read,
and `fingerprint` whether it changed.

`motion` finds the cameras of photographs by structure from motion, with `colmap`, and `video` takes them from a video.

`image` reads one picture of any size, and `atlas` draws one; `meshes`, `solids` and `shapes` are signed distances.
"""

from __future__ import annotations

from jaxngp.data.cache import cache_dir, expand
from jaxngp.data.capture import SPLITS, Capture, Placement, SceneTransform, normalise
from jaxngp.data.fingerprint import Fingerprint, changed, content_fingerprint, fingerprint
from jaxngp.data.places import FORMATS, Format, Location, locate
from jaxngp.data.rays import RayTable
from jaxngp.data.splits import Split, load_evaluation, load_training, read_views

__all__ = [
    "FORMATS",
    "SPLITS",
    "Capture",
    "Fingerprint",
    "Format",
    "Location",
    "Placement",
    "RayTable",
    "SceneTransform",
    "Split",
    "cache_dir",
    "changed",
    "content_fingerprint",
    "expand",
    "fingerprint",
    "load_evaluation",
    "load_training",
    "locate",
    "normalise",
    "read_views",
]
