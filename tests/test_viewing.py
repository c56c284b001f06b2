"""The viewer without a browser: cameras, pace, what is drawn, camera paths, comparisons, and the thread that draws."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from entrypoints import TINY, run, write_scene
from flax import struct
from hypothesis import given
from hypothesis import strategies as st
from scenes import BALL, look_at, make_camera, photograph, pixel_rays, poses_around

from jaxngp import runs
from jaxngp.cameras import Cameras, image_size, project
from jaxngp.config import FieldConfig, HashGridConfig, InputError, MarchConfig, OccupancyConfig, StratifiedConfig
from jaxngp.data import SceneTransform, Split
from jaxngp.data.flights import Frames, read_flight
from jaxngp.encodings import hash_encode
from jaxngp.fields import RadianceField, init_params
from jaxngp.hashing import level_offsets
from jaxngp.occupancy import init_occupancy
from jaxngp.training.loop import init_state, train
from jaxngp.viewing import drawing, truth
from jaxngp.viewing.drawing import Look, Scene, colours, copy_scene, draw, single_level
from jaxngp.viewing.pacing import REFRESH_SECONDS, REFRESH_SHARE, STILL_SECONDS, Canvas, Pace
from jaxngp.viewing.paths import CameraPath
from jaxngp.viewing.poses import Viewpoint, from_opencv, to_opencv
from jaxngp.viewing.worker import Picture, Task, Worker, finish

MARCH = MarchConfig(num_steps=256, num_samples=2**10, occupancy=OccupancyConfig(resolution=32))
PIECE = 2**8


@struct.dataclass
class Smooth:
    """A body whose density falls with the distance from the middle: called like a `RadianceField`."""

    steepness: float = struct.field(pytree_node=False, default=60.0)

    def __call__(self, position: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.density(position), jnp.full(position.shape, 0.5, jnp.float32)

    def density(self, position: jax.Array) -> jax.Array:
        return 2000 * jnp.exp(-self.steepness * jnp.sum((position - 0.5) ** 2, axis=-1))


@struct.dataclass
class BallField:
    """`scenes.BALL` as a pytree."""

    def __call__(self, position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        return BALL.evaluate(position, direction)


def scene_of(field: object, sampler: MarchConfig | StratifiedConfig = MARCH) -> Scene:
    full = init_occupancy(jnp.ones(32**3, bool)) if isinstance(sampler, MarchConfig) else None
    return Scene(field, full, sampler)  # type: ignore[arg-type]


# Cameras.


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_poses_survive_the_way_to_viser_and_back(wxyz: list[float]) -> None:
    c2w = from_opencv(wxyz, (0.1, 0.2, 0.3))
    assert np.allclose(c2w[:, :3] @ c2w[:, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(c2w[:, :3]) == pytest.approx(1)
    quaternion, position = to_opencv(c2w)
    expected = np.array(wxyz) / np.linalg.norm(wxyz)
    assert abs(quaternion @ expected) == pytest.approx(1, abs=1e-12)  # q and -q are one rotation
    np.testing.assert_array_equal(position, (0.1, 0.2, 0.3))


def test_a_viewpoint_sees_what_viser_draws() -> None:
    """A point of viser's camera frame, x right, y down, z forward, lands where its perspective puts it."""
    wxyz, position = np.array([0.9, 0.2, -0.3, 0.1]), np.array([0.2, -0.4, 1.5])
    w, x, y, z = wxyz / np.linalg.norm(wxyz)
    rotation = np.array(  # of a unit quaternion, as textbooks have it
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    view = Viewpoint(from_opencv(wxyz, position), 0.8, 640, 400)
    local = np.array([0.3, -0.2, 2.0])
    for width, height in ((640, 400), (63, 41)):  # proportions that differ a little are stretched over the window
        xy, depth = project(view.camera(width, height), jnp.asarray(position + rotation @ local, jnp.float32))
        half = np.tan(0.4)
        expected = [
            (0.5 + 0.5 * local[0] / (local[2] * half * 640 / 400)) * width,
            (0.5 + 0.5 * local[1] / (local[2] * half)) * height,
        ]
        np.testing.assert_allclose(xy, expected, rtol=1e-4)
        assert float(depth) == pytest.approx(2.0, rel=1e-4)


def test_the_ball_seen_from_a_viser_camera() -> None:
    wxyz, position = to_opencv(look_at((1.5, 1.2, 0.9), BALL.centre))
    camera = Viewpoint(from_opencv(wxyz, position), 0.6, 50, 40).camera(50, 40)
    out = finish(draw(scene_of(BallField()), camera, Look(), piece=PIECE))
    seen = BALL.seen(*pixel_rays(camera), background=1.0)
    assert float(np.max(np.asarray(seen.opacity))) > 0.9
    # A step is 1/148 of the box, and a ray may gain or lose half of one at either end: 20/148 of the light.
    assert np.abs(out.rgb - np.asarray(seen.rgb)).max() < 0.14
    assert np.abs(out.rgb - np.asarray(seen.rgb)).mean() < 0.01


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(1, 1e7))
def test_a_picture_keeps_to_its_pixels(width: int, height: int, pixels: float) -> None:
    found = Viewpoint(np.eye(3, 4), 1.0, width, height).size(pixels)
    assert 1 <= found[0] <= width
    assert 1 <= found[1] <= height
    assert found[0] * found[1] <= max(pixels, width, height)  # one row at least of a window that is a line


# Pace.


@given(st.floats(1e-8, 1e-5), st.floats(0, 0.05), st.floats(0.5, 1), st.integers(0, 100))
def test_the_pace_converges_to_the_time(per_pixel: float, overhead: float, power: float, seed: int) -> None:
    """Whatever a picture costs: a constant, and a power of its pixels that is at most 1, with noise of 10 %."""
    noise, pace = np.random.default_rng(seed), Pace(seconds=0.07, smallest=2**4, largest=2**30)

    def cost() -> float:
        return overhead + (per_pixel * pace.pixels) ** power

    for _ in range(100):
        pace.took(cost() * noise.uniform(0.9, 1.1))
    assert pace.pixels in (2**4, 2**30) or cost() == pytest.approx(0.07, rel=0.3)


def test_the_pace_stays_in_bounds() -> None:
    pace = Pace(smallest=100, largest=1000)
    for _ in range(50):
        pace.took(10.0)
    assert pace.pixels == 100
    for _ in range(50):
        pace.took(0.0)
    assert pace.pixels == 1000


def test_a_canvas_is_coarse_then_fine_then_rests() -> None:
    ask = {"moving": 1000.0, "version": 5, "limit": 100}
    canvas = Canvas()
    assert canvas.wanted(0.0, **ask) == 0
    canvas.change(1.0, Viewpoint(np.eye(3, 4), 1.0, 200, 160))
    assert canvas.urgent()
    assert canvas.wanted(1.0, **ask) == 1000
    canvas.show(1.1, pixels=1000, seconds=0.1, version=5)
    assert not canvas.urgent()
    assert canvas.wanted(1.0 + STILL_SECONDS / 2, **ask) == 0  # it may move on
    assert canvas.wanted(1.0 + STILL_SECONDS, **ask) == 4000
    canvas.show(1.3, pixels=4000, seconds=0.1, version=5)
    assert canvas.wanted(1.3, **ask) == 100 * 80
    canvas.show(3.0, pixels=8000, seconds=1.5, version=5)
    assert canvas.wanted(1e6, **ask) == 0


def test_a_newer_scene_takes_its_share_of_the_time() -> None:
    canvas, ask = Canvas(), {"moving": 1e9, "limit": 100}
    canvas.change(0.0, Viewpoint(np.eye(3, 4), 1.0, 100, 100))
    for seconds in (0.001, 3.0):
        canvas.show(100.0, pixels=10**4, seconds=seconds, version=1)
        start = 100.0 + max(REFRESH_SECONDS, seconds / REFRESH_SHARE - seconds)
        assert canvas.wanted(start - 0.01, version=2, **ask) == 0
        assert canvas.wanted(start + 0.01, version=2, **ask) == 10**4
        assert canvas.wanted(start + 0.01, version=1, **ask) == 0


# What is drawn.


def ball_view(size: int = 32) -> Cameras:
    return make_camera(size, size, 1.2 * size, look_at((0.5, -1.0, 0.5)))


def test_normals_point_out_of_a_ball() -> None:
    camera = ball_view()
    out = finish(draw(scene_of(Smooth()), camera, Look("normals", background="black"), piece=PIECE))
    origin, direction = pixel_rays(camera)
    inside = np.asarray(out.opacity) > 0.999
    assert inside.sum() > 100
    points = origin + np.asarray(out.depth)[..., None] * direction
    expected = points - 0.5
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    found = 2 * np.asarray(out.rgb) - 1
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    cosine = np.sum(found * expected, axis=-1)[inside]
    assert cosine.min() > 0.95  # the mean over a soft surface, some steps deep
    assert cosine.mean() > 0.995


def test_opacity_and_cost_of_a_ball() -> None:
    camera = ball_view()
    out = finish(draw(scene_of(BallField()), camera, Look("cost"), piece=PIECE))
    seen = BALL.seen(*pixel_rays(camera), background=1.0)
    assert np.abs(np.asarray(out.opacity) - np.asarray(seen.opacity)).max() < 0.14  # as above
    # Nothing ends a ray of this ball, since at most 1 - e^-12 is stopped but min_transmittance is 1e-4 = e^-9.2:
    # a ray that misses takes every step through the box.
    missed = np.asarray(seen.opacity) == 0
    straight = 1 / MARCH.step_size  # from one face of the box to the opposite one
    assert np.asarray(out.samples)[missed].max() == pytest.approx(straight, rel=0.2)  # obliquely, at most 1.2 times
    assert np.asarray(out.samples)[16, 16] < np.asarray(out.samples)[missed].max()
    image, said = colours(out, Look("cost"))
    assert image.shape == (32, 32, 3)
    assert "samples a ray" in said


def test_a_crop_cuts_the_ball() -> None:
    """What is outside of the box is not seen, and what is inside is seen as if alone."""
    camera = ball_view(64)
    half = Look(crop=((0.0, 0.0, 0.0), (1.0, 1.0, BALL.centre[2])))
    whole = finish(draw(scene_of(BallField()), camera, Look(), piece=PIECE))
    cut = finish(draw(scene_of(BallField()), camera, half, piece=PIECE))
    _, direction = pixel_rays(camera)
    upwards = direction[..., 2] > 0.06  # above the cut from the near side of the box on: z = 0.5 + 1.0 * 0.06 > 0.55
    assert np.asarray(whole.opacity)[upwards].max() > 0.9
    assert np.asarray(cut.opacity)[upwards].max() == 0
    downwards = direction[..., 2] < -0.01
    np.testing.assert_allclose(np.asarray(cut.rgb)[downwards], np.asarray(whole.rgb)[downwards], atol=2e-6)
    nothing = finish(draw(scene_of(BallField()), camera, Look(crop=((0, 0, 0), (0.01, 0.01, 0.01))), piece=PIECE))
    assert np.asarray(nothing.opacity).max() == 0
    bins = StratifiedConfig(near=0.5, far=2.5, num_bins=64)
    without_grid = finish(draw(scene_of(BallField(), bins), camera, half, piece=PIECE))
    assert np.asarray(without_grid.opacity)[upwards].max() == 0
    assert "occupancy" not in drawing.modes(bins)


def test_occupied_cells_are_drawn_as_cubes() -> None:
    """One occupied cell: its silhouette, and its nearest face as the depth."""
    one = np.zeros((32, 32, 32), bool)
    one[16, 16, 16] = True
    scene = replace(scene_of(BallField()), grid=init_occupancy(jnp.asarray(one.reshape(-1))))
    camera = make_camera(48, 48, 900.0, look_at((0.5 + 1 / 64, -1.0, 0.5 + 1 / 64), (0.5 + 1 / 64, 0.5, 0.5 + 1 / 64)))
    out = finish(draw(scene, camera, Look("occupancy"), piece=PIECE))
    solid = np.asarray(out.opacity) > 0.5
    half = 900 / 32 / 2 / 1.5  # px, of the nearest face, which is 1.5 away
    assert solid.sum() == pytest.approx((2 * half) ** 2, rel=0.15)
    assert np.asarray(out.depth)[solid].mean() == pytest.approx(1.5, abs=1.5 * MARCH.step_size)
    faces = np.asarray(out.rgb)[solid]
    assert np.ptp(faces, axis=0).max() < 1e-5  # one face of one cell


def test_a_level_alone_is_its_features_alone() -> None:
    grid = HashGridConfig(num_levels=3, num_features=2, table_size=2**8, max_resolution=32)
    config = FieldConfig(encoding=grid, hidden_width=16)
    field = RadianceField.of(init_params(jax.random.key(0), config=config), config=config)
    alone = single_level(field, 1)
    position = jax.random.uniform(jax.random.key(1), (50, 3))
    before, after = (hash_encode(f.params["encoding"]["table"], position, grid=grid) for f in (field, alone))
    np.testing.assert_array_equal(after[:, 2:4], before[:, 2:4])
    assert not np.any(np.asarray(after)[:, [0, 1, 4, 5]])
    assert level_offsets(grid)[-1] == len(alone.params["encoding"]["table"])


@pytest.mark.slow
def test_pieces_do_not_show(workdir: Path) -> None:
    """Whatever their size, and where the last one is not full."""
    opened = runs.load(workdir)
    scene = Scene(opened.field, opened.occupancy, opened.config.sampler)
    assert opened.cameras is not None
    whole = opened.render(opened.cameras[0])
    for piece in (2**7, 2**10):
        out = finish(draw(scene, opened.cameras[0], Look(), piece=piece))
        np.testing.assert_allclose(out.rgb, whole.rgb, atol=1e-5)


@pytest.mark.slow
def test_every_mode_gives_a_picture(workdir: Path) -> None:
    opened = runs.load(workdir)
    scene = Scene(opened.field, opened.occupancy, opened.config.sampler)
    assert opened.cameras is not None
    for mode in drawing.modes(scene.sampler):
        look = Look(mode, level=1)
        image, _ = colours(finish(draw(scene, opened.cameras[0], look, piece=PIECE)), look)
        assert image.shape == (24, 24, 3)
        assert image.dtype == np.uint8


# Camera paths.


def some_path() -> CameraPath:
    keys = tuple(poses_around(5, 1.5)[1:4].astype(np.float64))
    return CameraPath(keys, fov=0.8, seconds=1.5, fps=10.0, width=64, height=48)


def test_paths_are_read_by_the_command_that_renders(tmp_path: Path) -> None:
    """Whatever coordinates a path of nerfstudio would be in."""
    path, transform = (
        some_path(),
        SceneTransform((1.0, 2.0, 3.0), 4.0, ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0))),
    )
    (tmp_path / "path.json").write_text(path.to_json(transform))
    flight = read_flight(tmp_path / "path.json", 0, (1, 1), Frames(nerfstudio=SceneTransform((9.0, 9.0, 9.0), 2.0)))
    expected = path.cameras()
    np.testing.assert_allclose(transform.pose_to_scene(flight.cameras.c2w), expected.c2w, atol=1e-5)
    np.testing.assert_allclose(flight.cameras.focal_xy, expected.focal_xy, rtol=1e-6)
    np.testing.assert_array_equal(flight.cameras.size, expected.size)
    assert flight.fps == path.fps


def test_paths_survive_their_json() -> None:
    transform = SceneTransform((1.0, -2.0, 0.5), 3.0, ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
    path = some_path()
    again = CameraPath.from_json(path.to_json(transform), transform)
    np.testing.assert_allclose(np.stack(again.keys), np.stack(path.keys), atol=1e-9)
    assert again.fov == pytest.approx(path.fov)
    assert (again.seconds, again.fps) == (path.seconds, path.fps)
    assert (again.width, again.height) == (path.width, path.height)


def test_the_json_is_nerfstudios() -> None:
    """A frame's camera, read as nerfstudio defines it, sees what ours sees, in the coordinates of the source."""
    transform, path = SceneTransform((1.0, -2.0, 0.5), 3.0), some_path()
    top = json.loads(path.to_json(transform))
    assert (top["render_width"], top["render_height"], top["fps"], top["seconds"]) == (64, 48, 10.0, 1.5)
    assert top["camera_type"] == "perspective"
    assert len(top["camera_path"]) == 15
    frame, camera = top["camera_path"][7], path.cameras()[7]
    matrix = np.reshape(frame["camera_to_world"], (4, 4))
    np.testing.assert_array_equal(matrix[3], [0, 0, 0, 1])
    point = np.array([0.55, 0.4, 0.6])
    local = np.linalg.inv(matrix) @ [*transform.to_world(point), 1]
    focal = 48 / 2 / np.tan(np.radians(frame["fov"]) / 2)
    expected = [32 - focal * local[0] / local[2], 24 + focal * local[1] / local[2]]
    xy, _ = project(camera, jnp.asarray(point, jnp.float32))
    np.testing.assert_allclose(xy, expected, rtol=1e-4)
    assert frame["aspect"] == pytest.approx(64 / 48)


def test_key_frames_are_added_and_removed() -> None:
    path = CameraPath()
    assert path.num_frames == 0
    assert len(path.cameras()) == 0
    keys = poses_around(3, 1.0)
    for key in keys:
        path = path.added(key)
    assert len(path.cameras()) == 96
    np.testing.assert_allclose(path.cameras().c2w[0], keys[0], atol=1e-5)
    np.testing.assert_allclose(path.cameras().c2w[-1], keys[2], atol=1e-5)
    np.testing.assert_array_equal(np.stack(path.removed(1).keys), keys[[0, 2]].astype(np.float64))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"keyframes": []}',
        some_path().to_json(SceneTransform()).replace("64", "1e9")[:-1] + ', "fps": NaN}',
    ],
)
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="viewer"):
        CameraPath.from_json(text, SceneTransform())


# Truth.


def ball_split(keep: np.ndarray | None = None) -> Split:
    cameras = make_camera(60, 40, 70.0, poses_around(3, 1.5))
    images = photograph(BALL, cameras)
    return Split("train", ("a", "b", "c"), images.replace(keep=keep), has_alpha=True)


def test_a_comparison_leaves_masked_pixels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "SIDE", 30)  # so that pictures are halved
    keep = np.ones((3, 40, 60), bool)
    keep[:, :11] = False
    views = truth.Views(ball_split().images.cameras, lambda: ball_split(keep.reshape(-1)))
    view = views.view(1)
    assert view.name == "b"
    assert image_size(view.camera) == (30, 20)
    assert view.keep.sum() == 14 * 30  # a block with a masked pixel is masked
    prediction = truth.over(view.rgba, "white")
    prediction[:6] += 0.5
    sheet, said = truth.compare(view, prediction, "white")
    assert "PSNR 100.00 dB" in said
    assert "30% of the pixels are masked" in said
    assert sheet.shape[1] > 90
    seen = BALL.seen(*pixel_rays(view.camera), background=1.0)
    assert np.abs(np.asarray(seen.rgb) - truth.over(view.rgba, "white")).mean() < 0.02


def test_a_view_without_its_image_says_why() -> None:
    def gone() -> Split:
        raise InputError("scene: gone")

    cameras = ball_split().images.cameras
    view = truth.Views(cameras, gone).view(2)
    sheet, said = truth.compare(view, np.zeros((40, 60, 3)), "white")
    assert "scene: gone" in said
    assert sheet.shape[0] < 80
    moved = truth.Views(cameras.replace(c2w=np.asarray(cameras.c2w) + 1), ball_split).view(0)
    assert "have changed" in moved.missing


# The thread that draws.


class Shown:
    """What a worker has drawn."""

    def __init__(self) -> None:
        self.pictures: list[tuple[int, Picture]] = []

    def __call__(self, window: int, picture: Picture) -> None:
        self.pictures.append((window, picture))

    def wait(self, condition: object, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewing")
    run("train", f"--scene={write_scene(folder / 's')}", f"--workdir={folder / 'run'}", *TINY, "--scale=0.5")
    return folder / "run"


def test_a_window_gets_a_coarse_picture_then_a_full(workdir: Path) -> None:
    opened, shown = runs.load(workdir), Shown()
    view = Viewpoint(np.asarray(opened.cameras.c2w[0]), 0.7, 160, 120)
    with Worker(shown, limit=120) as worker:
        worker.set_scene(Scene(opened.field, opened.occupancy, opened.config.sampler, version=3))
        worker.move(7, view)
        shown.wait(lambda: shown.pictures and shown.pictures[-1][1].full)
        window, picture = shown.pictures[-1]
        assert window == 7
        assert picture.image.shape == (90, 120, 3)
        assert picture.version == 3
        assert shown.pictures[0][1].image.size < picture.image.size
        count = len(shown.pictures)
        time.sleep(0.3)
        assert len(shown.pictures) == count  # at rest, nothing is drawn
        worker.set_look(Look("depth"), limit=80)
        shown.wait(lambda: len(shown.pictures) > count and shown.pictures[-1][1].full)
        assert shown.pictures[-1][1].image.shape == (60, 80, 3)
        assert "scene units" in shown.pictures[-1][1].legend
        worker.leave(7)
        assert not worker.watched


def test_a_moving_window_comes_before_a_long_task(workdir: Path) -> None:
    opened, shown = runs.load(workdir), Shown()
    pieces: list[int] = []
    ended = threading.Event()

    def long() -> Task:
        while len(pieces) < 10**4 and not ended.is_set():
            pieces.append(len(shown.pictures))
            time.sleep(0.01)
            yield

    with Worker(shown, limit=64) as worker:
        worker.set_scene(Scene(opened.field, opened.occupancy, opened.config.sampler))
        worker.submit(long())
        shown.wait(lambda: len(pieces) > 3)
        for _ in range(5):
            before = len(shown.pictures)
            worker.move(1, Viewpoint(np.asarray(opened.cameras.c2w[0]), 0.7, 64, 64))
            shown.wait(lambda before=before: len(shown.pictures) > before)
        assert not ended.is_set()
        ended.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_task_that_fails_ends_alone(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened, shown = runs.load(workdir), Shown()

    def failing() -> Task:
        yield
        raise RuntimeError("no such thing")

    with Worker(shown, limit=64) as worker:
        worker.set_scene(Scene(opened.field, opened.occupancy, opened.config.sampler))
        worker.submit(failing())
        worker.move(1, Viewpoint(np.asarray(opened.cameras.c2w[0]), 0.7, 64, 64))
        shown.wait(lambda: shown.pictures)
    assert "no such thing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_copied_scene_outlives_the_training_step(workdir: Path) -> None:
    """Training donates its buffers; and with a viewer, too, it compiles each of its programs once."""
    from jaxngp.data import load_training

    config = runs.load(workdir).config
    config = replace(config, train=replace(config.train, max_steps=96), field=replace(config.field, hidden_width=24))
    images = load_training(config.scene).images
    scenes: list[Scene] = []
    with Compilations() as compiled:
        drawing.compile_ahead(config)
        for progress in train(config, images):
            if len(scenes) == 1:
                started = sum(compiled.counts.values())
            scenes.append(copy_scene(progress))
            camera = images.cameras[0]
            out = finish(draw(scenes[0], camera, Look()))
            if len(scenes) == 2:
                first, during = out, sum(compiled.counts.values()) - started
    assert compiled["nerf_steps"] == 1
    assert compiled["refresh_occupancy"] == 1
    assert compiled["_draw_piece"] == 1
    assert compiled["_copy"] == 1
    assert during == 0
    np.testing.assert_array_equal(out.rgb, first.rgb)
    last = init_state(0, config=config)
    assert jax.tree.structure(last.params) == jax.tree.structure(scenes[-1].field.params)
    changed = [
        np.any(np.asarray(a) != np.asarray(b))
        for a, b in zip(jax.tree.leaves(scenes[0].field), jax.tree.leaves(scenes[-1].field), strict=True)
    ]
    assert any(changed)
