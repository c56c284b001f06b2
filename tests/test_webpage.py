"""`--format=html`: the page draws what our renderer draws, in a real browser, and holds what it says it holds."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import look_at, make_camera, poses_around

from jaxngp.config import (
    FieldConfig,
    HashGridConfig,
    InputError,
    MarchConfig,
    NerfConfig,
    OccupancyConfig,
    StratifiedConfig,
)
from jaxngp.exporting import webpage
from jaxngp.exporting.webpage import WebpageOptions
from jaxngp.fields import RadianceField, init_params
from jaxngp.hashing import level_offsets, level_sizes
from jaxngp.occupancy import Cells, init_occupancy
from jaxngp.pictures import DEPTH_COLOURS
from jaxngp.runs import Run

ENCODING = HashGridConfig(num_levels=3, num_features=4, table_size=2**11, min_resolution=8, max_resolution=48)
FIELD = FieldConfig(encoding=ENCODING, hidden_width=16, colour_layers=1)
MARCH = MarchConfig(num_steps=128, num_samples=2**12, occupancy=OccupancyConfig(resolution=32))
CONFIGS = {
    "features of 4": NerfConfig(field=FIELD, sampler=MARCH),
    "features of 2, surroundings": NerfConfig(
        field=FieldConfig(
            encoding=HashGridConfig(
                num_levels=3,
                num_features=2,
                table_size=2**11,
                max_resolution=64,
                half_voxel_offset=True,
                smoothstep=True,
            ),
            hidden_width=20,
            density_layers=2,
            num_geometry_features=5,
            direction_encoding="frequency",
            direction_degree=2,
            use_bias=True,
            mask_outside_box=True,
        ),
        sampler=MarchConfig(
            num_steps=96,
            num_samples=2**12,
            growth=1 / 32,
            near=0.05,
            occupancy=OccupancyConfig(resolution=32, num_cascades=2),
        ),
    ),
    "features of 8, bfloat16": NerfConfig(
        field=FieldConfig(
            encoding=HashGridConfig(
                num_levels=2, num_features=8, table_size=2**11, max_resolution=32, dense_levels=False
            ),
            colour_layers=0,
            direction_degree=6,
            precision="bfloat16",
        ),
        sampler=MARCH,
    ),
    "features of 1, wide": NerfConfig(
        field=FieldConfig(
            encoding=HashGridConfig(num_levels=5, num_features=1, table_size=2**11, max_resolution=32),
            hidden_width=72,  # a layer that fills more than one block
        ),
        sampler=MARCH,
    ),
}


def make_run(config: NerfConfig, params: Any = None) -> Run:
    """A run of a random field with a grid of random cells in a ball; nothing is trained."""
    cells = Cells(config.sampler.occupancy.resolution, config.sampler.occupancy.num_cascades)
    rng = np.random.default_rng(1)
    where = np.stack(cells.centre(jnp.arange(cells.num_cells, dtype=jnp.int32)), axis=-1)
    inside = (np.linalg.norm(where - 0.5, axis=-1) < 0.42) & (rng.random(cells.num_cells) < 0.5)
    if params is None:
        shapes = jax.eval_shape(functools.partial(init_params, config=config.field), jax.random.key(0))
        params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) / a.shape[0] ** 0.5, shapes)
        params["encoding"]["table"] *= np.float32(len(params["encoding"]["table"]) ** 0.5)
        points = jnp.asarray(0.1 + 0.8 * rng.random((100, 3)), jnp.float32)
        found = jnp.log(jax.jit(RadianceField.density)(RadianceField.of(params, config=config.field), points))
        last = params["density_mlp"][f"Dense_{config.field.density_layers}"]["kernel"]
        last[:, 0] *= np.sign(found.mean()) * 4 / np.std(found)  # some of it opaque, so that rays end
    grid = init_occupancy(jnp.asarray(inside.reshape(cells.num_cascades, -1)))
    progress: Any = SimpleNamespace(
        field=RadianceField.of(params, config=config.field), state=SimpleNamespace(occupancy=grid, refinement=None)
    )
    return Run(Path(), config, progress, {}, make_camera(60, 40, 55.0, poses_around(4, 1.3)))


@functools.cache
def random_run(name: str) -> Run:
    return make_run(CONFIGS[name])


def flat_run() -> Run:
    """A run of a density that falls with height, and does not change across it: that of the coarsest level."""
    config = CONFIGS["features of 4"]
    params = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), random_run("features of 4").field.params)
    params["encoding"]["table"][: 9**3, 0] = 1 - np.arange(9**3) // 9**2 / 8
    params["density_mlp"]["Dense_0"]["kernel"][0, 0] = 1
    params["density_mlp"]["Dense_1"]["kernel"][0, 0] = 9
    return make_run(config, params)


# The browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install .[browser]")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("JAXNGP_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium: on the path, or where JAXNGP_CHROMIUM says")
    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


class Tab:
    """A page in the browser, and what it complained of."""

    def __init__(self, browser: Any, path: Path, before: str = "", **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 50, "height": 50}, **options)
        self.page.set_default_timeout(120_000)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda asked: self.errors.append(asked.url) if asked.url.startswith("http") else None)
        if before:
            self.page.add_init_script(before)
        self.page.goto(path.resolve().as_uri())
        self.page.add_style_tag(content=".bar { display: none !important }")  # it would cover so small a canvas

    def render(self, camera: Any, **options: str) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        width, height = np.asarray(camera.size).tolist()
        call = "(args) => jaxngp.render(...args).then((pixels) => Array.from(pixels))"
        arguments = [np.asarray(camera.c2w).tolist(), np.asarray(camera.focal_xy).tolist(), width, height, options]
        return np.array(self.page.evaluate(call, arguments), np.uint8).reshape(height, width, 4)[..., :3] / 255

    def settle(self) -> None:
        self.page.wait_for_function("document.documentElement.dataset.complete == version")

    def canvas(self) -> np.ndarray:
        """What is on the page, (H, W, 4) u8, from the bottom row on."""
        self.settle()
        read = """() => { const w = canvas.width, h = canvas.height, a = new Uint8Array(4 * w * h);
            gl.bindFramebuffer(gl.FRAMEBUFFER, null); gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, a);
            return [w, h, Array.from(a)]; }"""
        width, height, values = self.page.evaluate(read)
        return np.array(values, np.uint8).reshape(height, width, 4)

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((np.asarray(a, np.float64) - b) ** 2)))


SIZES = [("features of 4", 50), ("features of 2, surroundings", 50)]
SLOW_SIZES = [("features of 4", 200), ("features of 8, bfloat16", 50), ("features of 1, wide", 50)]


@pytest.mark.parametrize(
    ("name", "size"), [*SIZES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_SIZES)]
)
def test_the_page_draws_what_the_renderer_draws(name: str, size: int, tmp_path: Path, browser: Any) -> None:
    opened = random_run(name)
    webpage.write(opened, tmp_path / "a.html", WebpageOptions())
    camera = make_camera(size, size, 1.4 * size, look_at((1.5, 0.1, 1.1)))
    if CONFIGS[name].sampler.occupancy.num_cascades > 1:
        camera = make_camera(size, size, 0.75 * size, look_at((0.62, 0.45, 0.6), target=(0.3, 0.4, 0.5)))  # from inside
    with Tab(browser, tmp_path / "a.html") as tab:
        for background in ("white", "black"):
            seen, expected = tab.render(camera, background=background), opened.render(camera, background=background)
            assert np.mean(expected.opacity > 0.5) > 0.2
            assert np.std(expected.rgb) > 0.05
            assert decibels(seen, np.clip(expected.rgb, 0, 1)) > 40
        assert tab.errors == []


def test_depths_have_the_colours_of_the_scale(tmp_path: Path, browser: Any) -> None:
    opened = random_run("features of 4")
    webpage.write(opened, tmp_path / "a.html", WebpageOptions())
    camera = make_camera(50, 50, 70.0, look_at((1.5, 0.1, 1.1)))
    expected = opened.render(camera)
    low, high = np.asarray(opened.occupancy.bounds)
    distance, radius = np.linalg.norm(np.asarray(camera.c2w)[:, 3] - (low + high) / 2), np.linalg.norm(high - low) / 2
    place = np.clip((distance + radius - expected.depth) / (2 * radius), 0, 1) * (len(DEPTH_COLOURS) - 1)
    colour = np.stack([np.interp(place, range(len(DEPTH_COLOURS)), c) for c in DEPTH_COLOURS.T], axis=-1) / 255
    with Tab(browser, tmp_path / "a.html") as tab:
        seen = tab.render(camera, mode="depth", background="black")
        assert decibels(seen, colour * expected.opacity[..., None]) > 40


def test_normals_point_to_where_density_falls(tmp_path: Path, browser: Any) -> None:
    opened = flat_run()
    webpage.write(opened, tmp_path / "a.html", WebpageOptions())
    camera = make_camera(50, 50, 75.0, look_at((1.2, 0.4, 1.3)))
    opaque = opened.render(camera).opacity > 0.999
    with Tab(browser, tmp_path / "a.html") as tab:
        seen = tab.render(camera, mode="normals")[opaque]
    assert opaque.mean() > 0.1
    np.testing.assert_allclose(seen, np.broadcast_to([0.5, 0.5, 1.0], seen.shape), atol=0.02)


def test_the_page_opens_with_the_view_of_a_camera(tmp_path: Path, browser: Any) -> None:
    """A training camera's view, as large as fits; it turns with a drag, and comes back."""
    opened = random_run("features of 4")
    webpage.write(opened, tmp_path / "a.html", WebpageOptions(view=2))
    with Tab(browser, tmp_path / "a.html") as tab:
        first = tab.canvas()
        expected = opened.render(make_camera(50, 50, 55.0 * 50 / 60, opened.cameras.c2w[2])).rgb
        assert decibels(first[::-1, :, :3] / 255, np.clip(expected, 0, 1)) > 40
        tab.page.mouse.move(20, 25)
        tab.page.mouse.down()
        tab.page.mouse.move(32, 20, steps=3)
        tab.page.mouse.up()
        assert np.mean(tab.canvas() != first) > 0.1
        for key in ("r", "2", "1", "ArrowLeft", "ArrowRight"):  # and all the way back
            tab.page.keyboard.press(key)
            tab.settle()
        assert np.abs(tab.canvas().astype(int) - first).mean() < 1
        tab.page.keyboard.press("b")
        assert tab.canvas()[0, 0].tolist() == [0, 0, 0, 255]
        assert tab.errors == []


def test_two_fingers_zoom(tmp_path: Path, browser: Any) -> None:
    webpage.write(random_run("features of 4"), tmp_path / "a.html", WebpageOptions())
    with Tab(browser, tmp_path / "a.html", has_touch=True, is_mobile=True) as tab:
        tab.settle()  # until then "Loading…" lies over the canvas
        far = "Math.hypot(...camera.position.map((x, i) => x - camera.pivot[i]))"
        before = tab.page.evaluate(far)
        touch = tab.page.context.new_cdp_session(tab.page)
        for kind, apart in (("touchStart", 10), ("touchMove", 15), ("touchMove", 20), ("touchEnd", 0)):
            points = [{"x": 25 + s * apart, "y": 25, "id": s + 1} for s in (-1, 1)] if apart else []
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        # A browser hands touches over when it next draws.
        tab.page.wait_for_function(f"Math.abs({far} - {before / 2}) < {1e-3 * before}")
        assert tab.errors == []


def test_a_lost_context_is_said_and_comes_back(tmp_path: Path, browser: Any) -> None:
    webpage.write(random_run("features of 4"), tmp_path / "a.html", WebpageOptions())
    with Tab(browser, tmp_path / "a.html") as tab:
        first = tab.canvas()
        tab.page.evaluate("window.loser = gl.getExtension('WEBGL_lose_context'); loser.loseContext()")
        tab.page.wait_for_function("message.textContent.includes('context was lost')")
        tab.page.evaluate("delete document.documentElement.dataset.complete; loser.restoreContext()")
        tab.page.wait_for_function("message.textContent === ''")
        np.testing.assert_array_equal(tab.canvas(), first)


def test_a_browser_without_webgl_is_told(tmp_path: Path, browser: Any) -> None:
    webpage.write(random_run("features of 4"), tmp_path / "a.html", WebpageOptions())
    with Tab(browser, tmp_path / "a.html", before="HTMLCanvasElement.prototype.getContext = () => null;") as tab:
        tab.page.wait_for_function("message.textContent.includes('WebGL 2')")
        assert tab.errors == []


# The file.


def test_the_same_run_makes_the_same_bytes(tmp_path: Path) -> None:
    opened = random_run("features of 4")
    for name in "ab":
        webpage.write(opened, tmp_path / name, WebpageOptions())
    page = (tmp_path / "a").read_bytes()
    assert page == (tmp_path / "b").read_bytes()
    assert b"{{" not in page


@pytest.mark.parametrize("name", CONFIGS)
def test_a_table_in_8_bits_is_off_by_half_a_step(name: str) -> None:
    """And its rows lie where the shader looks for them."""
    grid = CONFIGS[name].field.encoding
    rng = np.random.default_rng(0)
    spread = np.repeat(10.0 ** np.arange(grid.num_levels), level_sizes(grid))[:, None]
    table = (spread * rng.normal(size=(level_offsets(grid)[-1], grid.num_features))).astype(np.float32)
    table[: level_offsets(grid)[1], 0] = 0
    codes, scale = webpage.quantise_table(table, grid)
    half = np.repeat(scale / 254, level_sizes(grid), axis=0)
    assert np.all(np.abs(webpage.dequantise_table(codes, scale, grid) - table) <= half * (1 + 1e-4))
    texture, parts = webpage.pack_table(codes, grid), max(1, grid.num_features // 4)
    width = texture.shape[2]
    for level, (first, size) in enumerate(zip(level_offsets(grid)[:-1], level_sizes(grid), strict=True)):
        texel = np.arange(size)[:, None] * parts + np.arange(parts)
        read = texture[level, texel // width, texel % width].reshape(size, -1)
        np.testing.assert_array_equal(read, codes[first : first + size])


@pytest.mark.parametrize("num_cascades", [1, 3])
def test_cells_nearer_than_the_distance_are_empty(num_cascades: int) -> None:
    """And belong to the same cascade; where the distance is 1 short of that, some cell is not."""
    size = 32
    cells = Cells(size, num_cascades)
    grid = init_occupancy(jnp.asarray(np.random.default_rng(2).random((num_cascades, size**3)) < 2e-4))
    distances = webpage.skip_distances(grid)
    occupied = np.asarray(grid.density >= 0).reshape(distances.shape)
    readable = np.asarray(cells.readable()).reshape(distances.shape)
    np.testing.assert_array_equal((distances == 0)[readable], occupied[readable])
    for k in range(num_cascades):
        outside = k < num_cascades - 1  # whether beyond this cascade another one follows
        blocked = np.pad(occupied[k] | ~readable[k], webpage.MAX_SKIP, constant_values=outside)
        for z, y, x in np.argwhere(readable[k] & ~occupied[k])[::499]:
            d = int(distances[k, z, y, x])
            for reach, found in ((d - 1, False), (d, True)):
                box = tuple(slice(c + webpage.MAX_SKIP - reach, c + webpage.MAX_SKIP + reach + 1) for c in (z, y, x))
                assert blocked[box].any() == found or (found and d == webpage.MAX_SKIP)


def test_outliers_in_the_table_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = random_run("features of 4")
    webpage.write(opened, tmp_path / "a.html", WebpageOptions())
    assert "warning" not in capsys.readouterr().err
    table = opened.field.params["encoding"]["table"].copy()
    table[::2000] *= 1000
    outliers = make_run(opened.config, opened.field.params | {"encoding": {"table": table}})
    webpage.write(outliers, tmp_path / "a.html", WebpageOptions())
    assert "the hash table has outliers" in capsys.readouterr().err


def refused(config: NerfConfig) -> str:
    with pytest.raises(InputError) as error:
        webpage.check_supported(config)
    return str(error.value)


def test_what_a_page_refuses(tmp_path: Path) -> None:
    large = HashGridConfig(table_size=2**25)
    assert "sampler = StratifiedConfig" in refused(NerfConfig(sampler=StratifiedConfig()))
    assert "field.encoding.table_size = 33554432" in refused(NerfConfig(field=FieldConfig(encoding=large)))
    fine = MarchConfig(occupancy=OccupancyConfig(resolution=512, num_cascades=8))
    assert "resolution x num_cascades = 4096" in refused(NerfConfig(sampler=fine))
    wide = NerfConfig(field=FieldConfig(encoding=ENCODING, hidden_width=256), sampler=MARCH)
    with pytest.raises(InputError, match=r"smaller field\.hidden_width"):
        webpage.write(make_run(wide), tmp_path / "a.html", WebpageOptions())
    with pytest.raises(InputError, match="--view=4: this run has 4 training cameras"):
        webpage.write(random_run("features of 4"), tmp_path / "a.html", WebpageOptions(view=4))
    assert not list(tmp_path.iterdir())
