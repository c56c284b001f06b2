"""Typical faults, which the tests should notice: see `experiments.mutants`.

A fault changes one function or constant of a module while the module is imported, so that everything that uses it sees
the change, and no file is touched. As a plugin of pytest, this module plants one:

    python -m pytest -p experiments.faults --fault=hash_prime tests/test_hashing.py
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_PACKAGE = Path(__file__).resolve().parents[1] / "jaxngp"
_PLANTED = "planted_fault"  # what a changed module calls the object that its new code refers to

Change = Callable[[ast.Module], object]
"""Edits the tree of a module; returns the object that its new code refers to as `_PLANTED`.

Raises LookupError where the tree does not have exactly one place for the change.
"""


@dataclass(frozen=True)
class Fault:
    """A change of a module below jaxngp, and the tests that may notice it.

    tests: what pytest is given, below tests/ and without the test_ and .py of a file.
    """

    name: str
    module: str
    change: Change
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file of the module."""
        path = _PACKAGE.joinpath(*self.module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def plant(self, source: str) -> tuple[CodeType, dict[str, object]]:
        """The faulty code of the module, and a name that it needs. Raises ValueError where the fault does not fit."""
        tree = ast.parse(source)
        try:
            planted = self.change(tree)
        except LookupError as error:
            raise ValueError(f"fault {self.name} does not fit jaxngp.{self.module}: {error.args[0]}") from None
        return compile(ast.fix_missing_locations(tree), str(self.path), "exec"), {_PLANTED: planted}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As a finder in `sys.meta_path`, find the module with the fault in it."""
        if name != f"jaxngp.{self.module}" or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        spec.loader = _Loader(self, name, str(self.path))
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fault: Fault, name: str, path: str) -> None:
        super().__init__(name, path)
        self._fault = fault

    def exec_module(self, module: ModuleType) -> None:
        code, names = self._fault.plant(self._fault.path.read_text(encoding="utf-8"))
        module.__dict__.update(names)
        exec(code, module.__dict__)


def pytest_addoption(parser: pytest.Parser) -> None:
    """A hook of pytest: defines --fault."""
    parser.addoption("--fault", choices=[fault.name for fault in FAULTS], help="plant a fault of experiments.faults")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """A hook of pytest, called before anything is imported that imports the package: plants the fault."""
    name = early_config.known_args_namespace.fault
    sys.meta_path[:0] = [fault for fault in FAULTS if fault.name == name]


# Changes.


def constant(name: str, value: object) -> Change:
    """Give a constant of the module another value."""

    def change(tree: ast.Module) -> object:
        assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
        assignments = [node for node in assignments if ast.unparse(node.targets[0]) == name]
        if len(assignments) != 1:
            raise LookupError(f"{name} is assigned {len(assignments)} times")
        assignments[0].value = ast.Name(_PLANTED, ast.Load())
        return value

    return change


def wrap(function: str, faulty: Callable[..., Any]) -> Change:
    """Call `faulty` in place of a function; a method is named Class.method.

    faulty(call, ...) is given the arguments of the function that its parameters name. call() is what the function
    returns; call(name=value) with other arguments. What decorates the function, jax.jit for one, decorates the faulty
    one.
    """
    wanted = [*inspect.signature(faulty).parameters][1:]

    def decorate(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def planted(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()

            def call(**changes: Any) -> Any:
                if not changes.keys() <= bound.arguments.keys():
                    pytest.exit(f"{function}{signature} does not have all of {', '.join(changes)}", returncode=3)
                bound.arguments.update(changes)
                return original(*bound.args, **bound.kwargs)

            return faulty(call, *(bound.arguments[name] for name in wanted))

        return planted

    def change(tree: ast.Module) -> object:
        node = _function(tree, function)
        if missing := set(wanted) - {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}:
            raise LookupError(f"{function} has no parameter {min(missing)}")
        node.decorator_list.append(ast.Name(_PLANTED, ast.Load()))
        return decorate

    return change


def rewrite(function: str, old: str, new: str) -> Change:
    """Replace the one expression `old` in a function. In it, ... is any expression, and f(...) any call of f."""

    def change(tree: ast.Module) -> None:
        node = _function(tree, function)
        replacement = _Replacement(_expression(old), _expression(new))
        replacement.visit(node)
        if replacement.count != 1:
            raise LookupError(f"{function}: {old!r} occurs {replacement.count} times")
        if unknown := _names(replacement.new, ast.Load) - _names(tree) - _names(replacement.new) - set(dir(builtins)):
            raise LookupError(f"{function}: no {min(unknown)}, which {new!r} needs")

    return change


class _Replacement(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new, self.count = old, new, 0

    def visit(self, node: ast.AST) -> ast.AST:
        if _matches(node, self.old):
            self.count += 1
            return self.new
        return self.generic_visit(node)


def _matches(node: Any, pattern: Any) -> bool:
    """Whether two trees, or parts of them, are equal but for what ... stands for in the second."""
    if isinstance(pattern, ast.Constant) and pattern.value is ...:
        return isinstance(node, ast.expr)
    if type(node) is not type(pattern):
        return False
    if isinstance(pattern, list):
        return len(node) == len(pattern) and all(map(_matches, node, pattern))
    if not isinstance(pattern, ast.AST):
        return bool(node == pattern)
    fields = pattern._fields
    if isinstance(pattern, ast.Call) and ast.unparse(pattern).endswith("(...)"):
        fields = ("func",)
    return all(_matches(getattr(node, field), getattr(pattern, field)) for field in fields)


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def _names(tree: ast.AST, context: type[ast.expr_context] = ast.Store) -> set[str]:
    """The names that a tree defines, or those that it reads (ast.Load)."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    if context is ast.Load:
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def _function(tree: ast.AST, name: str) -> ast.FunctionDef:
    """The function of a name, or the method Class.method."""
    node: Any = tree
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if len(found) != 1:
            raise LookupError(f"{len(found)} functions are called {name}")
        (node,) = found
    return node


# Faults.


def faults(module: str, tests: str, **changes: Change) -> list[Fault]:
    """Faults of one module that the same files of tests may notice."""
    return [Fault(name, module, change, tuple(tests.split())) for name, change in changes.items()]


def _transposed(taps: Any) -> Any:
    return taps.replace(row=taps.column, column=taps.row)


def _without_moments(progress: Any) -> Any:
    """A `Progress` whose optimiser knows of no gradient yet; None as it is."""
    state = progress and progress.state
    fresh = jax.tree.map(jnp.zeros_like, state and state.opt_state)
    return progress and replace(progress, state=replace(state, opt_state=fresh))


FAULTS = [
    *faults(
        "hashing",
        "hashing encodings",
        hash_prime=constant("PRIMES", (1, 2654435767, 805459861)),
        hash_without_modulo=wrap("spatial_hash", lambda call, table_size: call(table_size=table_size + 1)),
        resolutions_in_floating_point=wrap("_integer_root", lambda _, value, degree: int(value ** (1 / degree))),
        dense_index_off_by_one=wrap(
            "dense_index", lambda call, vertices_per_axis: call(vertices_per_axis=vertices_per_axis - 1)
        ),
        corners_in_z_order=wrap("corner_offsets", lambda call: call()[:, ::-1]),
    ),
    *faults(
        "encodings",
        "encodings",
        weight_of_the_opposite_corner=wrap("_corner_weight", lambda call, offset: call(offset=1 - offset)),
        far_face_beyond_the_last_cell=wrap("_cell_along", lambda call, last_cell: call(last_cell=last_cell + 1)),
        levels_of_a_gpu_shifted_by_one=wrap("_levels", lambda call: replace(call(), start=np.roll(call().start, -1))),
        harmonics_without_their_sign=rewrite("_sh_scale", "(-1) ** m", "1"),
        harmonics_of_the_next_order=wrap("_sh_tables", lambda call: (np.roll(call()[0], 1, axis=0), call()[1])),
        half_table_not_read=wrap("_encode", lambda call: call(half_table=None)),
    ),
    *faults(
        "compositing",
        "compositing",
        density_as_weight=rewrite("composite", "-jnp.expm1(...)", "thickness"),
        no_transmittance=rewrite("composite", "optical_depth_before(...)", "jnp.zeros_like(thickness)"),
        background_not_dimmed=rewrite("blend", "(1 - opacity)[..., None] * background", "background"),
        depth_not_divided=wrap("blend", lambda call, opacity, depth: call(depth=depth * opacity)),
        lower_half_lost=rewrite("exclusive_fixed_point", "upper * 2**15 + lower", "upper * 2**15"),
        sum_not_restarted=wrap("exclusive_scan", lambda call, ray: call(ray=jnp.zeros_like(ray))),
        gradient_of_depth_forwards=wrap("_exclusive_sum_bwd", lambda call, behind: call(behind=not behind)),
    ),
    # From rays to samples.
    *faults(
        "bitsets",
        "bitsets",
        nth_set_bit_off_by_one=rewrite("nth_set_bit", "n >= below", "n > below"),
        nth_candidate_off_by_one=rewrite("nth_bit_of_row", "end[row, middle - 1] <= n", "end[row, middle - 1] < n"),
    ),
    *faults(
        "marching",
        "marching roulette",
        last_step_dropped=rewrite("_test_steps", "t < t_leave[:, None]", "t < t_leave[:, None] - config.step_size"),
        last_sample_dropped=rewrite("_Slots.samples", "self.number < self.last", "self.number < self.last - 1"),
        full_buffer_refused=rewrite("pack_steps", "end <= size", "end < size"),
        hidden_steps_kept=rewrite("_roulette_units", "depth < -math.log(...)", "depth >= 0"),
        rays_left_out_unnoticed=rewrite("draw_samples", "complete & (end <= size)", "end <= size"),
        full_draw_refused=rewrite("draw_samples", "end <= size", "end < size"),
        rare_steps_not_longer=rewrite("draw_samples", "looked_at.dt * (...)", "looked_at.dt"),
        roulette_without_an_offset=wrap("draw_samples", lambda call, offset: call(offset=0 * offset)),
        faint_steps_never_drawn=rewrite(
            "_roulette_units", "jnp.clip(...)", "weight * (ROULETTE_UNITS / config.roulette)"
        ),
        jitter_ignored=wrap("march_rays", lambda call, jitter: call(jitter=jnp.full_like(jitter, 0.5))),
        opaque_bits_read_as_occupied=wrap("_test_steps", lambda call, sets: call(sets=sets[:1] * len(sets))),
        bins_of_equal_length=rewrite("stratified_samples", "jnp.diff(t, axis=1)", "jnp.diff(lower) + 0 * t[:, 1:]"),
    ),
    *faults(
        "config",
        "config marching",
        opaque_steps_for_cells=wrap("MarchConfig.opaque_steps", lambda _, self: math.ceil(self.opaque_cells - 0.5)),
    ),
    *faults(
        "occupancy",
        "occupancy",
        empty_cells_decay=rewrite("update_occupancy", "grid.density < 0", "False"),
        density_never_decays=rewrite("update_occupancy", "config.occupancy.decay", "1.0"),
        larger_threshold=rewrite("_threshold", "jnp.minimum", "jnp.maximum"),
        mean_over_empty_cells=rewrite("_threshold", "jnp.maximum(cascade, 0)", "cascade"),
        every_turn_looks_alike=rewrite("update_occupancy", "turn * at_once", "0 * turn"),
        looks_at_centres_only=rewrite("update_occupancy", "... * 2.0**-24 - 0.5", "jnp.zeros((len(rank), 3))"),
        cells_in_z_order=wrap("Cells.at", lambda call: (lambda x, y, z, cascade: (z, y, x, cascade))(*call())),
    ),
    *faults(
        "visual_hull",
        "visual_hull",
        faint_pixels_ignored=wrap(
            "candidate_cells", lambda call, images: call(images=images.replace(rgba=images.rgba // 128))
        ),
        cells_without_extent=rewrite("_footprint", "jnp.sqrt(1 + jnp.maximum(slope_x, slope_y) ** 2)", "0"),
    ),
    # Cameras and data.
    *faults(
        "cameras",
        "cameras",
        half_a_pixel_missing_in_views=wrap(
            "_view_rays", lambda call, camera: call(camera=camera.replace(centre_xy=camera.centre_xy + 0.5))
        ),
        y_mirrored=rewrite("unproject", "-xy[..., 1]", "xy[..., 1]"),
    ),
    *faults(
        "cameras",
        "training",
        half_a_pixel_missing_in_training=wrap(
            "PosedImages.pixel", lambda call: (lambda view, xy, rgba: (view, xy - 0.5, rgba))(*call())
        ),
    ),
    *faults(
        "data.splits",
        "data",
        evaluation_views_shifted=rewrite(
            "load_evaluation", "views[...]", "np.roll(views, -1)[np.arange(num_views) * len(views) // num_views]"
        ),
        held_out_views_trained_on=wrap(
            "_view_numbers", lambda call, name, count: call() if name == "held-out" else np.arange(count)
        ),
    ),
    *faults(
        "data.photos",
        "data",
        box_filter_without_alpha=rewrite(
            "box_downscale", "rgba[..., channel] * alpha", "rgba[..., channel] * np.uint16(255)"
        ),
    ),
    # Captures.
    *faults(
        "lenses",
        "lenses",
        tangential_slots_swapped=rewrite("_bend", "2 * p1 * a * b", "2 * p2 * a * b"),
        newton_without_its_last_step=rewrite("_unbend", "a + change_a", "a"),
        longitude_from_the_side=rewrite("_distort", "jnp.arctan2(x, z)", "jnp.arctan2(z, x)"),
        whole_sphere_is_shown=rewrite("distort", "... <= lens.reach", "x == x"),
    ),
    *faults(
        "marching",
        "marching",
        growth_of_the_step_before=rewrite("Steps.dt_at", "self._t(step, jnp.float32(0))", "self.t_at(step - 1)"),
    ),
    *faults(
        "data.capture",
        "data placement",
        world_not_turned_back=rewrite("SceneTransform.to_world", "... @ np.array(self.rotation)", "position - 0.5"),
        box_ignores_the_points=rewrite("_placed", "2 * max(reach) / side", "2 * reach[0] / side"),
    ),
    *faults(
        "data.sparse",
        "dialects",
        quaternion_not_of_unit_length=rewrite("_pose", "w / length", "w"),
        opencv_axes_kept=rewrite("_pose", "to_camera.T * (1, -1, -1)", "to_camera.T"),
        centre_is_the_translation=rewrite("_pose", "-to_camera.T @ np.array(...)", "np.array(image.translation)"),
    ),
    *faults("data.llff", "dialects", down_taken_for_up=rewrite("read", "-down", "down")),
    *faults(
        "data.transforms",
        "dialects masks depths",
        dynamic_masks_like_others=rewrite("_masks", "'zero'", "'non-zero'"),
        millimetres_as_metres=rewrite("_depths", "1e-3 * _applied_scale(file)", "_applied_scale(file)"),
        offset_not_scaled=rewrite("_ngp_cube", "o / scale", "o"),
    ),
    *faults(
        "data.photos",
        "masks",
        masks_of_both_kinds_alike=rewrite("read_masks", "mask.keep == 'non-zero'", "True"),
    ),
    *faults(
        "data.depths",
        "depths",
        depth_along_the_axis_as_the_ray=rewrite("read_depths", "depth.along == 'axis'", "False"),
    ),
    *faults(
        "training.pixels",
        "pixel_stores",
        numbers_of_the_call_before=rewrite("HostStore.drawn", "np.int32(following)", "np.int32(step)"),
    ),
    *faults(
        "data.checks.agreement",
        "inspect",
        every_reading_fits_better=wrap("_clearly", lambda _: True),
        no_reading_fits_better=wrap("_clearly", lambda _: False),
    ),
    *faults(
        "data.flights",
        "flights",
        key_frames_the_long_way=rewrite("_spline", "near[:, :4] @ near[1, :4] < 0", "near[:, 0] > 2"),
        field_of_view_is_horizontal=rewrite("_read_nerfstudio", "0.5 * height / ...", "0.5 * width"),
    ),
    *faults(
        "filming",
        "filming",
        frames_of_the_centre_only=rewrite("film", "view_rays(camera, place)", "view_rays(camera)"),
        normals_across_edges=rewrite("_flatter_side", "to_next <= from_previous", "to_next > from_previous"),
        colour_with_its_background=rewrite("straight_alpha", "(1 - opacity) * ...", "0"),
    ),
    # From samples to a loss.
    *faults(
        "fields",
        "fields",
        gradient_of_density_dies=rewrite(
            "_clamped_exp_jvp", "jnp.exp(...)", "jnp.where(x < MAX_LOG_DENSITY, jnp.exp(x), 0)"
        ),
        relu_lets_gradients_through=rewrite("_relu_jvp", "jnp.where(y != 0, tangent, 0)", "tangent"),
        no_mask_in_the_density_alone=rewrite(
            "NerfNetwork.density", "jnp.where(_inside(position), density, 0)", "density"
        ),
    ),
    *faults(
        "rendering",
        "rendering",
        rays_end_early=rewrite("_render_marched", "sampler.min_transmittance", "1e-2"),
        rays_end_while_transparent=rewrite(
            "_render_marched", "lanes.transmittance < ...", "lanes.transmittance > sampler.min_transmittance"
        ),
        transmittance_of_the_round_before=rewrite("_take_samples", "lanes.transmittance * through", "through"),
        ray_without_a_lane=wrap("_refill", lambda call, next_place: call(next_place=next_place + 1)),
        samples_where_steps_begin=rewrite("_render_marched", "jnp.full(...)", "jnp.zeros(num_rays)"),
    ),
    *faults(
        "losses",
        "losses",
        huber_not_continuous=rewrite("colour_loss", "size - 0.5 * HUBER_DELTA", "size"),
        relative_to_the_prediction=wrap(
            "relative_error", lambda call, prediction, target: call(prediction=target, target=prediction)
        ),
    ),
    *faults(
        "metrics",
        "metrics",
        psnr_by_natural_logarithm=rewrite("psnr", "jnp.log10", "jnp.log"),
        window_of_ssim_too_wide=constant("SSIM_WINDOW_SIGMA", 2.0),
        covariance_of_means_missing=rewrite("_pool_window", "jnp.stack(...)", "0"),
    ),
    # Images and signed distances.
    *faults(
        "images",
        "images",
        image_mirrored=rewrite("pixel_taps", "rows[:, :, None]", "rows[:, ::-1, None]"),
        rows_for_columns=wrap("pixel_taps", lambda call: _transposed(call())),
        centres_at_corners=rewrite("pixel_taps", "pixel.astype(jnp.float32) + 0.5", "pixel.astype(jnp.float32)"),
        tiles_without_half_a_pixel=rewrite("tile_centres", "xy + 0.5", "xy"),
        no_stratification=wrap("stratified_positions", lambda _, bits: (bits >> 8).astype(jnp.float32) * 2.0**-24),
    ),
    *faults(
        "tracing",
        "tracing",
        started_in_the_solid=rewrite("trace_rays", "... & (t <= first)", "False"),
        ray_not_taken_back=rewrite("trace_rays", "t + to_surface", "t + jnp.abs(to_surface)"),
        normals_inwards=wrap("surface_normals", lambda call: -call()),
        no_shadow=wrap("_shade", lambda call, shadow: call(shadow=jnp.zeros_like(shadow))),
        lanes_write_over_others=rewrite("trace_rays", "num_rays + jnp.arange(...)", "num_rays - 1"),
    ),
    *faults(
        "meshing",
        "meshing",
        faces_inwards=wrap(
            "extract_surface", lambda call: (lambda vertices, faces: (vertices, faces[:, ::-1]))(*call())
        ),
        far_blocks_too_near=constant("SAFETY", 0.5),
        open_at_the_box=wrap("_beyond", lambda call: np.full_like(call(), -np.inf)),
    ),
    # Training.
    *faults(
        "training.step",
        "training",
        same_noise_all_dispatch=wrap(
            "draw_bits", lambda call, shape, num_steps: jnp.broadcast_to(call(num_steps=1), (num_steps, *shape))
        ),
        steps_beyond_the_last=rewrite("repeat_steps", "jax.tree.map(...)", "one(i, carry)"),
        half_table_not_updated=rewrite("apply_gradient", "make_half_table(...)", "carry.half_table"),
        update_of_non_finite=rewrite("apply_gradient", "... & _is_finite(gradient)", "jnp.bool_(True)"),
        average_of_one_step=rewrite("finish_steps", "num_steps.astype(...)", "1.0"),
        means_over_steps_not_taken=rewrite("finish_steps", "jnp.maximum(num_steps, 1)", "max_steps"),
    ),
    *faults(
        "training.nerf",
        "training",
        background_not_in_the_target=rewrite("nerf_loss", "noise.background * (1 - alpha)", "0"),
        alpha_taken_as_premultiplied=rewrite("nerf_loss", "batch.rgba[:, :3] * alpha", "batch.rgba[:, :3]"),
        loss_over_all_rays=rewrite("nerf_loss", "jnp.maximum(num_used, 1)", "len(alpha)"),
        incomplete_rays_in_the_loss=rewrite("nerf_loss", "jnp.where(samples.ray_complete, terms, 0)", "terms"),
        same_noise_every_step=wrap("draw_batches", lambda call, step: call(step=0 * step)),
        refresh_without_the_step=rewrite("refresh_occupancy", "jax.random.fold_in(..., state.step)", "state.key"),
        warmup_never_ends=rewrite("refresh_occupancy", "state.step < ...", "jnp.bool_(True)"),
        refresh_of_the_average=rewrite("refresh_occupancy", "state.params", "state.eval_params"),
        grid_of_the_hull_not_used=rewrite("compile_programs", "replace(state, occupancy=grid)", "state"),
    ),
    *faults(
        "training.image",
        "image_training",
        same_points_every_step=wrap("draw_taps", lambda call, step: call(step=0 * step)),
        pixels_transposed=wrap("ImagePixels.values", lambda call, taps: call(taps=_transposed(taps))),
        one_batch_for_all_steps=rewrite("image_steps", "a[i]", "a[0]"),
        never_snapped=rewrite("draw_taps", "config.train.snap", "False"),
        fetched_for_step_0=wrap("_Fetcher._start", lambda call, step: (step, call(step=0)[1])),
    ),
    *faults(
        "training.sdf",
        "sdf_training",
        all_points_off_the_surface=rewrite("draw_batches", "data.surface[on]", "data.position[on]"),
        distance_of_another_point=rewrite("draw_batches", "data.distance[off]", "data.distance[on]"),
    ),
    *faults(
        "training.optimizer",
        "optimizer",
        decay_after_adam=rewrite("make_optimizer", "optax.chain", "lambda *parts: optax.chain(*reversed(parts))"),
        decay_of_the_table=wrap("_is_mlp_weight", lambda _, params: jax.tree.map(lambda _: True, params)),
    ),
    *faults(
        "training.loop",
        "loop",
        rate_by_dispatch=rewrite("learning_rates", "np.arange(size)", "np.zeros(size)"),
        rate_by_step_only=wrap("learning_rates", lambda call: call(fraction=0.0)),
        refresh_every_dispatch=rewrite("_dispatch", "(step + num_steps) // every > step // every", "True"),
    ),
    *faults(
        "training.loop",
        "training",
        step_more_on_resume=wrap(
            "train", lambda call, resume: call(resume=resume and replace(resume, step=resume.step + 1))
        ),
    ),
    *faults(
        "training.state",
        "training",
        weights_evaluated_not_their_average=wrap("TrainState.eval_params", lambda _, self: self.params),
    ),
    *faults(
        "checkpoints",
        "training",
        optimiser_starts_anew_on_resume=wrap("Checkpoints.restore", lambda call: _without_moments(call())),
    ),
    *faults(
        "evaluation",
        "end_to_end",
        names_of_views_shifted=rewrite("evaluate_views", "split.views[first:]", "split.views"),
        truth_over_no_background=wrap("_view", lambda call: call(background=0.0)),
    ),
]
