"""The experiments: what they compute of their measurements, and the programs that they measure."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scenes import BALL, make_camera, photograph, pixel_rays, poses_around

from experiments import encoding_race, race, reference, throughput, timing
from experiments.race import Curve
from jaxngp import hashing
from jaxngp.cameras import Rays, view_rays
from jaxngp.config import FieldConfig, HashGridConfig, InputError, SceneConfig, StratifiedConfig
from jaxngp.data import Split
from jaxngp.data.rays import RayTable
from jaxngp.encodings import hash_encode
from jaxngp.fields import RadianceField, init_params
from jaxngp.presets import PRESETS
from jaxngp.rendering import render_chunk

PROGRAM = """import math
from math import pi

def train(x):
    return x * pi

class NGP:
    pass

def render_rays():
    return math.tau

if __name__ == "__main__":
    raise RuntimeError("run as the main program")
"""
PAGE = f"""A page about a paper · with $formulas$

from its abstract: import duties, among others.
import this is how one might begin a sentence

{PROGRAM}
a last line of prose
"""


# The reference's source.


@pytest.mark.parametrize(
    "text", [PROGRAM, PAGE, f'"""A docstring."""\n\nX = 1\n{PROGRAM}'], ids=["py", "page", "whole"]
)
def test_a_program_is_found_and_executed(tmp_path: Path, text: str) -> None:
    (tmp_path / "source.txt").write_text(text, encoding="utf-8")
    module = reference.load_reference(tmp_path / "source.txt")
    assert module.train(2) == 2 * np.pi
    assert module.device == "cpu"
    line = text.splitlines().index("def train(x):") + 1
    assert module.train.__code__.co_firstlineno == line  # tracebacks point into the file


def test_nothing_of_a_program_is_left_out() -> None:
    assert reference.python_part(PAGE).strip() == PROGRAM.strip()
    assert not reference.python_part("only prose · here\nimport duties among others\n").strip()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("only prose · here", "no Python that defines NGP"),
        (PROGRAM.replace("def train", "raise RuntimeError\n\ndef fit"), "no Python that defines train"),
        (PROGRAM + "import no_such_module\n", "no_such_module, which is not installed: pip install .[bench]"),
    ],
)
def test_a_file_without_the_reference_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "source.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(says)) as info:
        reference.load_reference(tmp_path / "source.txt")
    assert "\n" not in str(info.value)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(InputError, match=re.escape("pip install .[bench]")):
        reference.bench_module("no_such_module")


def ball_split(num_views: int = 3) -> Split:
    images = photograph(BALL, make_camera(5, 4, 6.0, poses_around(num_views, 1.5)))
    return Split("val", tuple(map(str, range(num_views))), images, has_alpha=True)


def test_ray_rows_are_the_views_in_world_units() -> None:
    split, scene = ball_split(), SceneConfig(box_side=3.0, box_centre=(7.0, 0.0, 0.0))
    rows = reference.ray_rows(split, scene).reshape(3, 4, 5, 9)
    assert rows.dtype == np.float32
    for number, view in enumerate(rows):
        rgba = split.images.image(number) / 255.0
        origin, direction = pixel_rays(split.images.cameras[number])
        assert_allclose(view[..., :3], 3 * (origin - 0.5), atol=1e-5)  # the box's middle is the origin
        assert_allclose(view[..., 3:6], direction, atol=1e-6)
        assert_allclose(view[..., 6:], rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], atol=1e-6)


def test_ray_rows_of_a_table_are_those_of_its_views() -> None:
    split, scene = ball_split(), SceneConfig()
    rows = reference.ray_rows(split, scene)
    rays = jax.tree.map(np.asarray, view_rays(split.images.cameras[0]))
    table = RayTable(jax.tree.map(lambda a: a.reshape(-1, 3), rays), rows[:20, 6:], 5, 4)
    assert_allclose(reference.ray_rows(Split("val", ("0",), table, False), scene), rows[:20], atol=1e-5)


# Its weights as ours. The reference, restated: positions in float32, as their products with N decide about cells; the
# rest in float64.


def reference_config(**encoding: int) -> FieldConfig:
    config = PRESETS["hundred_lines"].field
    return replace(config, encoding=replace(config.encoding, **encoding))


SMALL = reference_config(table_size=2**8, num_levels=4, max_resolution=90)
evaluate = jax.jit(lambda field, position, direction: field(position, direction))


def points_and_directions(margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(64, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return rng.uniform(-margin, 1 + margin, (64, 3)).astype(np.float32), direction.astype(np.float32)


def random_state_dict(config: FieldConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    encoding = config.encoding
    state = {
        f"lookup_tables.{level}": rng.uniform(-0.1, 0.1, (encoding.table_size, 2)).astype(np.float32)
        for level in range(encoding.num_levels)
    }
    layers = {
        "density_MLP.0": (64, 2 * encoding.num_levels),
        "density_MLP.2": (16, 64),
        "color_MLP.0": (64, 43),
        "color_MLP.2": (64, 64),
        "color_MLP.4": (3, 64),
    }
    for name, (outputs, inputs) in layers.items():
        bound = inputs**-0.5
        state[f"{name}.weight"] = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
        state[f"{name}.bias"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
    return state


def mlp(state: dict[str, np.ndarray], name: str, x: np.ndarray, last: int) -> np.ndarray:
    for index in range(0, last + 1, 2):
        x = x @ state[f"{name}.{index}.weight"].astype(np.float64).T + state[f"{name}.{index}.bias"]
        x = np.maximum(x, 0) if index < last else x
    return x


def reference_forward(
    state: dict[str, np.ndarray], levels: tuple[int, ...], x: np.ndarray, d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """NGP.forward: x (N, 3) in world units, d (N, 3) -> colour (N, 3), density (N,) per world unit."""
    x = x / 3
    mask = (np.abs(x) < 0.5).all(axis=1)
    x = (x[mask] + 0.5).astype(np.float32)
    features = []
    for level, resolution in enumerate(levels):
        scaled = x * np.float32(resolution)
        low, high = np.floor(scaled), np.ceil(scaled)
        fraction = (scaled - low).astype(np.float64)
        table, total = state[f"lookup_tables.{level}"].astype(np.float64), np.zeros((len(x), 2))
        for corner in np.ndindex(2, 2, 2):
            vertex = np.where(corner, high, low).astype(np.int64)
            row = (vertex[:, 0] ^ (vertex[:, 1] * 2_654_435_761) ^ (vertex[:, 2] * 805_459_861)) % len(table)
            total += np.where(corner, fraction, 1 - fraction).prod(axis=1)[:, None] * table[row]
        features.append(total)
    d = d[mask].astype(np.float64)
    waves = [d, *(wave(2.0**j * d) for j in range(4) for wave in (np.sin, np.cos))]
    h = mlp(state, "density_MLP", np.concatenate(features, axis=1), 2)
    colour, density = np.zeros((len(mask), 3)), np.zeros(len(mask))
    density[mask] = np.exp(h[:, 0])
    colour[mask] = 1 / (1 + np.exp(-mlp(state, "color_MLP", np.concatenate([h, *waves], axis=1), 4)))
    return colour, density


def reference_render(state: dict[str, np.ndarray], levels: tuple[int, ...], o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """render_rays from 2 to 6 world units with 192 bins and noise 0.5: before white."""
    t = np.linspace(2, 6, 192)
    middle = (t[1:] + t[:-1]) / 2
    t = (np.append(t[0], middle) + np.append(middle, t[-1])) / 2
    delta = np.append(np.diff(t), 1e10)
    x = o[:, None] + t[:, None] * d[:, None]
    colour, density = reference_forward(state, levels, x.reshape(-1, 3), np.repeat(d, 192, axis=0))
    alpha = 1 - np.exp(-density.reshape(-1, 192) * delta)
    light = np.cumprod(1 - alpha, axis=1)
    weights = np.concatenate([np.ones((len(o), 1)), light[:, :-1]], axis=1) * alpha
    return np.sum(weights[..., None] * colour.reshape(len(o), 192, 3), axis=1) + 1 - weights.sum(axis=1)[:, None]


def test_the_references_parameters_give_its_pixels() -> None:
    """Densities, colours and whole rays, by the field of the preset with fewer levels."""
    config = reference_config(num_levels=5)
    state, levels = random_state_dict(config), hashing.level_resolutions(config.encoding)
    field = RadianceField.of(reference.params_from_reference(state, config=config), config=config)
    position, direction = points_and_directions()
    position[0] = (0.25, 0.5, 0.75)  # on faces, where floor and ceil agree
    world = (position.astype(np.float64) - 0.5) * 3
    colour, density = reference_forward(state, levels, world, direction)
    assert 0 < (density > 0).sum() < len(density)
    found_density, found_colour = evaluate(field, position, direction)
    np.testing.assert_allclose(found_density, 3 * density, rtol=1e-5)
    np.testing.assert_allclose(found_colour, colour, rtol=1e-5)

    rng = np.random.default_rng(1)
    d = rng.normal(size=(6, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    o = rng.uniform(-0.8, 0.8, (6, 3)) - 4 * d  # world units, as the cameras of the scenes stand
    rays = Rays(origin=jnp.asarray(o / 3 + 0.5, jnp.float32), direction=jnp.asarray(d, jnp.float32))
    sampler = StratifiedConfig()
    out, _ = render_chunk(field, rays, None, jnp.ones(3), sampler=sampler)
    expected = reference_render(state, levels, o, d)
    assert np.abs(expected - 1).max() > 0.1
    np.testing.assert_allclose(out.rgb, expected, atol=1e-5)


def test_the_boxs_side_scales_the_density_alone() -> None:
    box_side = 2.5
    state, (position, direction) = random_state_dict(SMALL), points_and_directions(margin=-0.01)
    unit, scaled = (
        evaluate(
            RadianceField.of(reference.params_from_reference(state, config=SMALL, box_side=side), config=SMALL),
            position,
            direction,
        )
        for side in (1.0, box_side)
    )
    np.testing.assert_allclose(scaled[0], box_side * unit[0], rtol=1e-5)
    np.testing.assert_allclose(scaled[1], unit[1], rtol=1e-5)


def test_converted_parameters_look_like_fresh_ones() -> None:
    fresh = jax.eval_shape(functools.partial(init_params, config=SMALL), jax.random.key(0))
    converted = reference.params_from_reference(random_state_dict(SMALL), config=SMALL)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), fresh) == jax.tree.map(lambda a: (a.shape, a.dtype), converted)


def test_the_state_dict_is_left_as_it_was() -> None:
    state = random_state_dict(SMALL)
    before = {name: array.copy() for name, array in state.items()}
    reference.params_from_reference(state, config=SMALL)
    for name, array in before.items():
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("name", ["lookup_tables.3", "density_MLP.0.bias", "color_MLP.4.weight"])
def test_a_missing_name_is_named(name: str) -> None:
    state = random_state_dict(SMALL)
    del state[name]
    with pytest.raises(InputError, match=f"state_dict has no '{name}': its names are .*lookup_tables.0"):
        reference.params_from_reference(state, config=SMALL)


@pytest.mark.parametrize("name", ["lookup_tables.0", "density_MLP.2.weight", "color_MLP.0.bias"])
def test_an_array_of_another_shape_is_named(name: str) -> None:
    state = random_state_dict(SMALL)
    state[name] = state[name][1:]
    with pytest.raises(InputError, match=rf"state_dict\['{name}'\] has shape \(.*\): this config needs \("):
        reference.params_from_reference(state, config=SMALL)


# The race.

FAST = Curve("small", 4.0, [1.0, 2.0, 4.0], [10, 20, 40], [18.0, 22.0, 26.0])
SLOW = Curve("reference", 0.0, [10.0, 30.0], [1, 3], [12.0, 21.0])


def test_time_to_a_level() -> None:
    assert FAST.time_to(18) == FAST.time_to(10) == 1  # no evaluation before the first
    assert FAST.time_to(20) == 1.5
    assert FAST.time_to(22) == 2
    assert FAST.time_to(24) == 3
    assert FAST.time_to(26.1) is None
    assert FAST.time_to(20, with_compile=True) == 5.5
    dented = Curve("", 0.0, [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4], [10.0, 20.0, 15.0, 25.0])
    assert dented.time_to(18) == 1.8  # the first time that it is reached


def test_the_tables_hold_times_bounds_and_ratios() -> None:
    text = race.tables([FAST, SLOW])
    lines = [line for line in text.splitlines() if line]
    assert "| small | 4.0 | 1.5 | 2.0 | 2.8 | 3.5 | > 4.0 | > 4.0 |" in lines
    assert "| small | 4.0 | 5.5 | 6.0 | 6.8 | 7.5 | > 8.0 | > 8.0 |" in lines
    assert lines.count("| reference | 0.0 | 27.8 | > 30.0 | > 30.0 | > 30.0 | > 30.0 | > 30.0 |") == 2
    # 27.8 / 1.5; then the reference takes longer than 30 s; then neither gets there.
    assert "| small | without | 18.5 | > 15 | > 10.9 | > 8.57 | - | - |" in lines
    assert "| small | with | 5.05 | > 5 | > 4.44 | > 4 | - | - |" in lines
    assert "time of the reference" not in race.tables([FAST]) + race.tables([SLOW])
    faster = Curve("reference", 0.0, [1.0], [1], [30.0])
    assert "| small | without | 0.667 | 0.5 | 0.364 | 0.286 | < 0.25 | < 0.25 |" in race.tables([FAST, faster])


def judged(budget: float, stop_psnr: float, psnr_of_second: dict[float, float]) -> Curve:
    judge = race.Judge("", budget, stop_psnr)
    for step, (seconds, value) in enumerate(psnr_of_second.items(), 1):
        if judge.ended(seconds, step, functools.partial(float, value)):
            return judge.curve
    raise AssertionError("the budget has no end")


def test_a_curve_is_evaluated_at_growing_intervals() -> None:
    """It ends with the budget, or with the level."""
    seconds = {s / 4: s / 4 for s in range(1, 100)}
    assert judged(6, 0, seconds).seconds == [1, 1.5, 2, 3, 5, 6]
    assert judged(6, 2.5, seconds).seconds == [1, 1.5, 2, 3]
    assert judged(6, 2.5, seconds).steps == [4, 6, 8, 12]
    assert judged(0.6, 0, seconds).psnr == [0.75]  # at least once, at the end
    assert judged(50, 0, {0.5: 1, 8: 2, 60: 3}).seconds == [8, 60]  # steps that pass several marks


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs pip install .[bench]")
    race.write_plot(tmp_path / "runs" / "race.png", [FAST, SLOW], "a title")
    assert (tmp_path / "runs" / "race.png").read_bytes().startswith(b"\x89PNG")


TORCH_REFERENCE = """import torch

class NGP(torch.nn.Module):
    def __init__(self, T, Nl, L, device, aabb_scale):
        super().__init__()
        self.lookup_tables = torch.nn.ParameterDict({"0": torch.nn.Parameter(torch.zeros(2))})
        self.density_MLP = torch.nn.Linear(1, 1)
        self.color_MLP = torch.nn.Linear(6, 3)

def render_rays(model, origin, direction, hn, hf, nb_bins):
    assert torch.is_grad_enabled() == (len(origin) == 8)  # in training and not in evaluation
    return torch.sigmoid(model.color_MLP(torch.cat((origin, direction), dim=1)))

def train(model, optimizer, data_loader, device, hn, hf, nb_epochs, nb_bins):
    for _ in range(nb_epochs):
        for batch in data_loader:
            loss = ((render_rays(model, batch[:, :3], batch[:, 3:6], hn, hf, nb_bins) - batch[:, 6:]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
"""


def test_the_reference_trains_until_the_judge_ends_it(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the reference needs pip install .[bench]")
    (tmp_path / "source.py").write_text(TORCH_REFERENCE, encoding="utf-8")

    class Every8th(race.Judge):
        """A clock that tells steps."""

        def ended(self, seconds: float, step: int, evaluate: object) -> bool:
            assert seconds > 0
            return super().ended(step / 8, step, evaluate)

    module, split = reference.load_reference(tmp_path / "source.py"), ball_split(2)
    judge = Every8th("reference", 4, 0)
    curve = race.run_reference(module, split, split, judge, scene=SceneConfig(), batch_size=8)
    assert curve.steps == [8, 12, 16, 24, 32]
    assert curve.psnr[-1] > curve.psnr[0]


# The encoding's race.

GRID = HashGridConfig(num_levels=2, table_size=2**8, min_resolution=4, max_resolution=50, dense_levels=False)


def problem(grid: HashGridConfig = GRID) -> encoding_race.Problem:
    return encoding_race.make_problem(grid, timing.points_on_rays(jax.random.key(0), 40))


def test_the_naive_encoding_is_ours() -> None:
    """Differently written, so that each tests the other, at the faces of the cube too."""
    given = problem()
    corners = jnp.array([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    position = jnp.concatenate([given.position, corners])
    ours = jax.jit(hash_encode, static_argnames="grid")(given.table, position, grid=GRID)
    naive = jax.jit(encoding_race.encode_naive, static_argnames="grid")(given.table, position, grid=GRID)
    assert_allclose(naive, ours, atol=1e-4)


def test_the_encodings_race() -> None:
    rows = encoding_race.race("uniform", problem(replace(GRID, num_levels=1)), "", runs=1)
    assert [row["contestant"] for row in rows] == ["jaxngp", "naive JAX"] * 2
    assert "| uniform | forward | jaxngp |" in encoding_race.markdown(rows)


def test_contestants_that_disagree_are_refused() -> None:
    def contestant(feature: float, *gradients: float) -> encoding_race.Contestant:
        parts = tuple(np.array([g]) for g in gradients)
        return encoding_race.Contestant(lambda: None, lambda: (np.array([1.0, feature]), parts), ())

    same = {"ours": contestant(2, 4, 5), "close": contestant(2.001, 4, 5)}
    assert encoding_race.check_agreement(same, tolerance=1e-3) == {"ours": 0, "close": pytest.approx(5e-4)}
    for other in (contestant(2.1, 4, 5), contestant(2, 4, 5.1), contestant(np.nan, 4, 5)):
        with pytest.raises(InputError, match="other differs from ours"):
            encoding_race.check_agreement({**same, "other": other}, tolerance=1e-3)


# Times.


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    times = timing.median_ms({name: functools.partial(calls.append, name) for name in "AB"}, runs=2)
    assert "".join(calls) == "ABABAB"  # the first of each is not counted
    assert times.keys() == {"A", "B"}


def test_a_loop_runs_every_round_on_all_of_the_output() -> None:
    x = jnp.arange(4.0)
    total = timing.in_loop(lambda x, factor: {"a": factor * x, "b": jnp.ones(3)}, x, jnp.float32(2), rounds=5)()
    assert_allclose(total, 5 * (2 * 6 + 3))


def test_points_on_rays_lie_in_the_cube_a_step_apart() -> None:
    points = timing.points_on_rays(jax.random.key(0), 50, per_ray=10, step=0.001)
    assert points.shape == (50, 3)
    assert ((points >= 0) & (points <= 1)).all()
    gaps = np.linalg.norm(np.diff(np.asarray(points).reshape(5, 10, 3), axis=1), axis=-1)
    assert np.median(gaps) == pytest.approx(0.001, rel=1e-2)


# Throughput.

CEILINGS = {
    "gflop_per_s": 100.0,
    "gb_per_s": 10.0,
    "mreads_per_s": 200.0,
    "madditions_per_s": 50.0,
    "mword_reads_per_s": 400.0,
}


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (throughput.Work(flops=3e8, num_bytes=1e7), (3.0, "arithmetic")),
        (throughput.Work(flops=3e8, num_bytes=4e7), (4.0, "memory")),
        (throughput.Work(reads=1e6, num_bytes=1e7), (5.0, "reads of rows")),
        (throughput.Work(reads=1e6, additions=1e6), (20.0, "additions to rows")),
        (throughput.Work(word_reads=1e6), (2.5, "reads of words")),
    ],
)
def test_the_limit_is_the_time_of_what_takes_longest(work: throughput.Work, expected: tuple[float, str]) -> None:
    limit, bound_by = throughput.limit_ms(work, CEILINGS)
    assert_allclose(limit, expected[0], rtol=1e-12)
    assert bound_by == expected[1]


def test_a_row_states_rates_and_times_the_limit() -> None:
    work = throughput.Work(flops=3e8, num_bytes=1e7)
    row = throughput.stage_row("stage", 6.0, 12_000, work, CEILINGS)
    assert_allclose([row.msamples_per_s, row.gflop_per_s, row.gb_per_s], [2.0, 50.0, 10 / 6], rtol=1e-12)
    whole = throughput.stage_row("image", 6.0, 0, throughput.Work(), CEILINGS)
    assert whole.limit_ms is None
    lines = throughput.markdown([row, whole]).splitlines()
    assert lines[2] == "| stage | 6.00 | 2.0 | 50.0 | 1.7 | 3.00 | 2.0 | arithmetic |"
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_iterated_goes_on_where_it_ended() -> None:
    """And its input is left alone."""
    start = jnp.arange(3.0)
    call = timing.iterated(lambda x, step: x + step, start, jnp.float32(2), rounds=5)
    assert_allclose(call(), np.arange(3) + 10)
    assert_allclose(call(), np.arange(3) + 20)
    assert_allclose(start, np.arange(3))
