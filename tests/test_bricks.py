"""The built-in scene: its rays against a slow float64 caster, its cameras, and the files it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from jaxngp.cameras import Rays, project, unproject
from jaxngp.config import NerfConfig
from jaxngp.data import load_evaluation, load_training
from jaxngp.data.bricks import BRICKS_BOUNDS, bricks_cameras, cast_rays, pictures, write_scene
from jaxngp.data.bricks.harbour import build_parts
from jaxngp.data.bricks.parts import BOX, FRUSTUM, SPHERE, corners
from jaxngp.data.checks import dataset_warnings

NUM_RAYS = 1500  # of every call of cast_rays, so that it compiles once
SIZE = 24  # of every picture, for the same reason; not a multiple of the tile
FEW_VIEWS = {"train": 3, "val": 1, "test": 2}


@pytest.fixture(scope="module")
def parts():
    return build_parts()


@pytest.fixture
def few_views(monkeypatch):
    monkeypatch.setattr(pictures, "NUM_VIEWS", FEW_VIEWS)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A written scene of a few small views."""
    folder = tmp_path_factory.mktemp("scene") / "deep" / "bricks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "NUM_VIEWS", FEW_VIEWS)
        write_scene(folder, SIZE, progress=False)
    return folder


@pytest.fixture(scope="module")
def rays():
    """Rays from the camera sphere, and from below the toy, towards points of its box; some pass it by."""
    rng = np.random.default_rng(3)
    origin = rng.normal(size=(NUM_RAYS, 3))
    origin = 4 * origin / np.linalg.norm(origin, axis=-1, keepdims=True)
    direction = rng.uniform(*BRICKS_BOUNDS, size=(NUM_RAYS, 3)) - origin
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    return Rays(origin.astype(np.float32), direction.astype(np.float32))


@pytest.fixture(scope="module")
def surface(rays):
    return jax.tree.map(np.asarray, cast_rays(rays))


def _crossing(part, origin, direction):
    """Where float64 rays (N, 3) enter a convex part, inf where they do not: clipped by planes, then by the quadric."""
    o, d = (origin - part.centre) @ part.axes.T, direction @ part.axes.T
    planes = []
    if part.kind == BOX:
        planes = [(s * np.eye(3)[i], part.size[i]) for i in range(3) for s in (-1, 1)] + [(part.cut[:3], part.cut[3])]
    if part.kind == FRUSTUM:
        planes = [(s * np.eye(3)[2], part.size[2]) for s in (-1, 1)]
    enter, leave = np.full(len(o), -np.inf), np.full(len(o), np.inf)
    with np.errstate(all="ignore"):
        for normal, offset in planes:
            rate, t = d @ normal, (offset - o @ normal) / (d @ normal)
            enter, leave = (
                np.where(rate < 0, np.maximum(enter, t), enter),
                np.where(rate > 0, np.minimum(leave, t), leave),
            )
        if part.kind == BOX:
            return np.where(enter < leave, enter, np.inf)
        # The quadric's own roots, each kept where it enters the solid: inside just after it, and not before it.
        low, high, half = part.size if part.kind == FRUSTUM else (*part.size[:2], 1.0)
        slope = (high - low) / (2 * half)
        weight = np.array([1, 1, -slope * slope if part.kind == FRUSTUM else 1])
        lean = (low + high) / 2 * slope if part.kind == FRUSTUM else 0.0
        a = (weight * d * d).sum(-1)
        b = (weight * o * d).sum(-1) - lean * d[:, 2]
        c = (weight * o * o).sum(-1) - 2 * lean * o[:, 2] - ((low + high) / 2) ** 2
        root = np.sqrt(b * b - a * c)
        crossings = [(-b - root) / a, (-b + root) / a, enter]
        first = np.full(len(o), np.inf)
        for t in crossings:
            middle = o + (t + 1e-7)[:, None] * d
            inside = _implicit(part, middle) < 0
            first = np.where(inside & (t < first), t, first)
        return first


def _implicit(part, local):
    """Negative inside a part, zero on its surface; positions (N, 3) in the part's frame, float64."""
    if part.kind == SPHERE:
        return np.linalg.norm(local, axis=-1) - part.size[0]
    if part.kind == BOX:
        return np.maximum((np.abs(local) - part.size).max(-1), local @ np.array(part.cut[:3]) - part.cut[3])
    low, high, half = part.size
    radius = (low + high) / 2 + (high - low) * local[:, 2] / (2 * half)
    return np.maximum(np.abs(local[:, 2]) - half, np.linalg.norm(local[:, :2], axis=-1) - radius)


@pytest.mark.slow
def test_nearest_hit_is_that_of_a_float64_search(parts, rays, surface):
    o, d = np.asarray(rays.origin, np.float64), np.asarray(rays.direction, np.float64)
    expected = np.min([_crossing(part, o, d) for part in parts], axis=0)
    missed = np.isinf(expected) & np.isinf(surface.depth)
    agrees = missed | (np.abs(np.nan_to_num(expected, posinf=1e3) - np.nan_to_num(surface.depth, posinf=1e3)) < 2e-5)
    # A ray that grazes an edge may fall to either side of it in float32.
    assert 0.3 < surface.alpha.mean() < 0.95
    assert (~agrees).mean() < 0.003
    assert (surface.depth > expected - 2e-5)[np.isfinite(expected)].all()


def _points(rays, surface):
    hit = surface.alpha == 1
    return (np.asarray(rays.origin, np.float64) + rays.direction * np.where(hit, surface.depth, 0)[:, None])[hit]


def test_hit_points_lie_on_the_surface(parts, rays, surface):
    points = _points(rays, surface)
    values = [_implicit(part, (points - part.centre) @ part.axes.T) for part in parts]
    np.testing.assert_allclose(np.min(values, axis=0), 0, atol=5e-6)  # on one part, and inside none


def test_normals_are_unit_gradients_facing_the_ray(parts, rays, surface):
    hit = surface.alpha == 1
    normal = surface.normal[hit]
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=1e-5)
    assert ((normal * np.asarray(rays.direction)[hit]).sum(-1) < 1e-6).all()
    points = _points(rays, surface)
    owner = np.argmin([np.abs(_implicit(p, (points - p.centre) @ p.axes.T)) for p in parts], axis=0)
    agreement = np.zeros(len(points))
    for i in np.unique(owner):
        local = (points[owner == i] - parts[i].centre) @ parts[i].axes.T
        steps = 1e-6 * np.eye(3)
        sides = [_implicit(parts[i], local + step) - _implicit(parts[i], local - step) for step in steps]
        gradient = np.stack(sides, axis=-1) @ parts[i].axes
        cosine = (gradient * normal[owner == i]).sum(-1) / np.linalg.norm(gradient, axis=-1)
        agreement[owner == i] = cosine
    assert np.mean(agreement > 0.9999) > 0.98  # not where a second face or part is as near


def test_misses_are_empty_and_hits_are_coloured(surface):
    miss = surface.alpha == 0
    assert set(np.unique(surface.alpha)) == {0.0, 1.0}
    assert np.isinf(surface.depth[miss]).all()
    assert (surface.rgb[miss] == 0).all()
    assert (surface.normal[miss] == 0).all()
    assert ((surface.rgb >= 0) & (surface.rgb <= 1)).all()
    assert surface.rgb[~miss].std(axis=0).min() > 0.15


def test_geometry_lies_within_its_bounds(parts):
    points = np.concatenate([corners(part) for part in parts])
    assert (points >= BRICKS_BOUNDS[0]).all()
    assert (points <= BRICKS_BOUNDS[1]).all()
    assert np.abs(BRICKS_BOUNDS).max() <= 1.3


def test_cameras_on_the_upper_shell_look_at_the_origin():
    for split, count in pictures.NUM_VIEWS.items():
        c2w = bricks_cameras(split)
        assert c2w.shape == (count, 3, 4)
        assert c2w.dtype == np.float32
        rotation, position = c2w[..., :3].astype(np.float64), c2w[..., 3]
        np.testing.assert_allclose(
            rotation @ rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (count, 3, 3)), atol=1e-6
        )
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(position, axis=-1), pictures.CAMERA_RADIUS, rtol=1e-6)
        np.testing.assert_allclose(rotation[..., 2] * pictures.CAMERA_RADIUS, position, atol=1e-5)
        assert (position[:, 2] > 0).all()
        assert len(np.unique(position.round(3), axis=0)) == count


def test_camera_at_the_zenith_is_finite():
    assert np.isfinite(pictures._pose(np.array([0.0, 0.0, 4.0]))).all()


def test_toy_never_touches_the_border_of_a_view(parts):
    points = np.concatenate([corners(part) for part in parts]).astype(np.float32)
    c2w = np.concatenate([bricks_cameras(split) for split in pictures.NUM_VIEWS])
    xy, depth = jax.jit(project)(pictures.make_camera(c2w[:, None], 200), points[None])
    assert (np.asarray(depth) > 2).all()
    assert (np.asarray(xy) > 2).all()
    assert (np.asarray(xy) < 198).all()


camera_rays = jax.jit(unproject)


def _premultiplied_view(c2w, subsamples, shift=(0.0, 0.0)):
    """(SIZE, SIZE, 4) means of sRGB times alpha and of alpha over a lattice of `cast_rays`, without culling.

    shift: of the lattice, in pixels.
    """
    at = (np.arange(SIZE * subsamples) + 0.5) / subsamples
    xy = (np.stack(np.meshgrid(at, at), axis=-1) + shift).reshape(-1, 2).astype(np.float32)
    padded = np.pad(xy, [(0, -len(xy) % NUM_RAYS), (0, 0)]).reshape(-1, NUM_RAYS, 2)
    views = [cast_rays(camera_rays(pictures.make_camera(c2w, SIZE), chunk)) for chunk in padded]
    rgba = np.concatenate([np.c_[np.asarray(view.rgb), np.asarray(view.alpha)] for view in views])[: len(xy)]
    return rgba.reshape(SIZE, subsamples, SIZE, subsamples, 4).mean((1, 3))


def _poses(scene, split):
    frames = json.loads((scene / f"transforms_{split}.json").read_text())["frames"]
    return np.array([frame["transform_matrix"] for frame in frames], np.float32)


def test_picture_is_the_mean_of_cast_rays(scene):
    """To the rounding of 8 bits, where no ray of a pixel grazes an edge.

    A ray grazes where a shift by far more than its rounding, and far less than a pixel, changes what it meets. There
    float32 decides, and decides otherwise on another CPU: one of the nine rays of a pixel, rarely two.
    """
    with Image.open(scene / "train" / "r_1.png") as image:
        rgba = np.asarray(image) / 255
    picture = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    c2w = _poses(scene, "train")[1, :3]
    expected = _premultiplied_view(c2w, 3)
    shifted = [_premultiplied_view(c2w, 3, shift) for shift in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3))]
    grazed = np.max(np.abs(shifted - expected), axis=(0, 3)) > 0.002
    difference = np.abs(picture - expected).max(-1)
    assert grazed.mean() < 0.4
    # Half a level, 0.002, and as much that the shift leaves unnoticed; three times that.
    assert difference[~grazed].max() < 0.012
    assert difference.max() < 4 / 9


def test_another_subsampling_agrees_on_average(scene):
    c2w = _poses(scene, "train")[1, :3]
    one, three = (_premultiplied_view(c2w, subsamples) for subsamples in (1, 3))
    np.testing.assert_allclose(one.mean((0, 1)), three.mean((0, 1)), atol=0.02)


def test_written_scene_is_in_blender_format(scene, few_views):
    for split, count in FEW_VIEWS.items():
        transforms = json.loads((scene / f"transforms_{split}.json").read_text())
        assert transforms["camera_angle_x"] == 0.6911112070083618
        assert [frame["file_path"] for frame in transforms["frames"]] == [f"./{split}/r_{i}" for i in range(count)]
        pose = _poses(scene, split)
        np.testing.assert_array_equal(pose[:, :3], bricks_cameras(split))
        np.testing.assert_array_equal(pose[:, 3], np.broadcast_to(np.float32([0, 0, 0, 1]), (count, 4)))
        for i in range(count):
            with Image.open(scene / split / f"r_{i}.png") as image:
                assert (image.size, image.mode) == ((SIZE, SIZE), "RGBA")
                alpha = np.asarray(image)[..., 3]
            assert alpha.max() == 255
            assert (alpha[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


def test_writing_is_deterministic_and_complete(scene, few_views, tmp_path):
    write_scene(tmp_path / "bricks", SIZE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bricks"]
    names = sorted(path.relative_to(scene) for path in scene.rglob("*.*"))
    assert len(names) == sum(FEW_VIEWS.values()) + 3
    for name in names:
        assert (scene / name).read_bytes() == (tmp_path / "bricks" / name).read_bytes()


def test_interrupted_writing_leaves_nothing(few_views, tmp_path, monkeypatch):
    written = []

    def fail(path, rgba):
        written.append(path)
        raise OSError("disk full")

    monkeypatch.setattr(pictures, "_write_picture", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scene(tmp_path / "bricks", SIZE, progress=False)
    assert written
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "bricks").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        write_scene(tmp_path / "bricks", SIZE, progress=False)


def test_nothing_is_said_of_the_scene(tmp_path, monkeypatch):
    """By the checks of data sets, of its first views; `test_inspect` asks about all of them."""
    monkeypatch.setenv("JAXNGP_CACHE", str(tmp_path))
    monkeypatch.setattr(pictures, "NUM_VIEWS", {"train": 24, "val": 6, "test": 6})
    scene = replace(NerfConfig().scene, image_size=SIZE)
    training, evaluation = load_training(scene), load_evaluation(scene)
    assert len(training.images.offset) == 24
    assert dataset_warnings(training, evaluation) == []
