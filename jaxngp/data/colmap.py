"""COLMAP's stages, as a script that `motion` runs in a process of its own: colmap.py STAGE ARGUMENTS (JSON).

pycolmap 4.2 is not for the process of a library: what fails in it may abort, it logs to stderr, and where it is
imported before Pillow, Pillow crashes when it writes a PNG. The script imports nothing of jaxngp, and starts at once.

All stages but the mapping are continued where they were interrupted, since the database has what is done.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

CAMERA_MODELS = {
    "OPENCV": ("SIMPLE_RADIAL", "ffck000"),
    "SIMPLE_PINHOLE": ("SIMPLE_PINHOLE", "fc"),
    "PINHOLE": ("SIMPLE_PINHOLE", "ffc"),
    "SIMPLE_RADIAL": ("SIMPLE_RADIAL", "fck"),
    "RADIAL": ("SIMPLE_RADIAL", "fck0"),
    "OPENCV_FISHEYE": ("SIMPLE_RADIAL_FISHEYE", "ffck000"),
}
"""Of COLMAP's models those that a transforms.json can express.

To each, the model that the mapping uses, and how its parameters f, c (two of them) and k become those of the full
model. A lens with more parameters takes up the errors of the first few images, and the mapping fails or stays wrong.
"""

ROBUST_SCALE = 0.25  # px, of the Cauchy loss: from there on an error counts less than its square
PAIRS_AT_ONCE = 64  # and between two lines of the log


def extract(database: str, images: str, groups: list[list[str]], camera_model: str) -> list[str]:
    """The features of all images into the database; one camera a group. Returns the images that it then has."""
    import pycolmap

    known = _camera_ids(pycolmap, database)
    for group in groups:
        options = pycolmap.ImageReaderOptions(camera_model=CAMERA_MODELS[camera_model][0])
        if (camera := next((known[name] for name in group if name in known), None)) is not None:
            options.existing_camera_id = camera
        pycolmap.extract_features(
            database, images, group, camera_mode=pycolmap.CameraMode.SINGLE, reader_options=options
        )
    return [*_camera_ids(pycolmap, database)]


def _camera_ids(pycolmap: Any, database: str) -> dict[str, int]:
    """The camera of each image in a database, by the image's name."""
    opened = pycolmap.Database.open(database)
    try:
        return {image.name: image.camera_id for image in opened.read_all_images()}
    finally:
        opened.close()


def match(database: str, pairs: str, seed: int) -> None:
    """The matches of pairs of images, each verified by what two views of one scene allow, into the database.

    pairs: a file with two names a line. COLMAP splits lines at spaces, so it is "" where all pairs are to be matched.
    """
    import pycolmap

    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = seed
    if pairs:
        listed = pycolmap.ImportedPairingOptions(match_list_path=pairs, block_size=PAIRS_AT_ONCE)
        pycolmap.match_image_pairs(database, pairing_options=listed, verification_options=verification)
    else:
        every = pycolmap.ExhaustivePairingOptions(block_size=int(PAIRS_AT_ONCE**0.5))
        pycolmap.match_exhaustive(database, pairing_options=every, verification_options=verification)


def map_images(
    database: str, images: str, names: list[str], camera_model: str, seed: int, folder: str, sparse: str
) -> int:
    """The model with most images of `names` into `sparse`; how many models there are that do not connect."""
    import pycolmap

    options = pycolmap.IncrementalPipelineOptions()
    options.image_names = names  # the database may have images that are there no more
    for seeded in (options, options.mapper, options.triangulation):
        seeded.random_seed = seed
    pycolmap.set_random_seed(seed)
    models = pycolmap.incremental_mapping(database, images, folder, options)
    if models:
        best = max(models.values(), key=lambda model: (model.num_reg_images(), model.num_points3D()))
        _refine(pycolmap, best, camera_model)
        unfinished = Path(folder) / "best"
        unfinished.mkdir()
        best.write(unfinished)
        shutil.rmtree(sparse, ignore_errors=True)
        Path(sparse).parent.mkdir(exist_ok=True)
        unfinished.rename(sparse)
    return len(models)


def _refine(pycolmap: Any, model: Any, camera_model: str) -> None:
    """Gives the cameras their full model, and adjusts everything once more, robustly.

    The mapping keeps matches up to 4 px off, among them outlines of round things, highlights and repeated details, and
    counts their squares: without the robust loss the poses of the built-in scene are off by three times as much.
    """
    for camera in model.cameras.values():
        values: dict[str, Any] = {"0": [0.0], "f": camera.params[:1], "c": camera.params[1:3], "k": camera.params[3:]}
        parameters = np.concatenate([values[letter] for letter in CAMERA_MODELS[camera_model][1]])
        camera.model = getattr(pycolmap.CameraModelId, camera_model)
        camera.params = parameters
    options = pycolmap.BundleAdjustmentOptions()
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.loss_function_scale = ROBUST_SCALE
    pycolmap.bundle_adjustment(model, options)
    model.update_point_3d_errors()


def export(sparse: str, arrays: str) -> dict[str, Any]:
    """What a model holds: its poses and points as .npz, the rest as JSON."""
    import pycolmap

    model = pycolmap.Reconstruction(sparse)
    views = [model.images[number] for number in model.reg_image_ids()]
    points = [*model.points3D.values()]
    np.savez(
        arrays,
        w2c=np.array([view.cam_from_world().matrix() for view in views]).reshape(-1, 3, 4),  # OpenCV axes
        xyz=np.array([point.xyz for point in points]).reshape(-1, 3),
        rgb=np.array([point.color for point in points], np.uint8).reshape(-1, 3),
    )
    cameras = {
        number: {"model": camera.model.name, "size": [camera.width, camera.height], "params": camera.params.tolist()}
        for number, camera in model.cameras.items()
    }
    return {
        "names": [view.name for view in views],
        "camera_ids": [view.camera_id for view in views],
        "cameras": cameras,
        "error": model.compute_mean_reprojection_error(),
    }


STAGES = {function.__name__: function for function in (extract, match, map_images, export)}

if __name__ == "__main__":
    print(json.dumps(STAGES[sys.argv[1]](**json.load(sys.stdin))))
