"""Typical faults, which the tests should notice: see `experiments.mutants`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A wrong `replacement` of a `text` that a file below jaxngp/ holds exactly once, and the tests that may notice.

    tests: what pytest is given, below tests/ and without the test_ and .py of a file.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    def plant(self, source: str) -> str:
        """The source with the fault in it. Raises ValueError where its text is not there, or not once."""
        if (count := source.count(self.text)) != 1:
            raise ValueError(
                f"fault {self.name}: its text occurs {count} times in jaxngp/{self.file}: expected once; {self.text!r}"
            )
        return source.replace(self.text, self.replacement)


FAULTS = (
    # Hashing and encodings.
    Fault("hash_prime", "hashing.py", "2654435761", "2654435767", ("hashing",)),
    Fault("hash_without_modulo", "hashing.py", "np.uint32(table_size - 1)", "np.uint32(table_size)", ("hashing",)),
    Fault(
        "resolutions_in_floating_point",
        "hashing.py",
        "_integer_root(grid.min_resolution ** (last - level) * grid.max_resolution**level, last)",
        "int(grid.min_resolution * (grid.max_resolution / grid.min_resolution) ** (level / last))",
        ("hashing",),
    ),
    Fault(
        "dense_index_off_by_one",
        "hashing.py",
        "stride * np.asarray(vertices_per_axis, np.uint64)",
        "stride * (np.asarray(vertices_per_axis, np.uint64) - 1)",
        ("hashing", "encodings"),
    ),
    Fault(
        "corners_in_z_order",
        "hashing.py",
        ">> np.arange(num_dims)) & 1",
        ">> np.arange(num_dims)[::-1]) & 1",
        ("hashing", "encodings"),
    ),
    Fault(
        "weight_of_the_opposite_corner",
        "encodings.py",
        "f if o else 1 - f for",
        "1 - f if o else f for",
        ("encodings",),
    ),
    Fault(
        "far_face_beyond_the_last_cell",
        "encodings.py",
        "jnp.clip(jnp.floor(scaled).astype(jnp.int32), 0, last_cell)",
        "jnp.maximum(jnp.floor(scaled).astype(jnp.int32), 0)",
        ("encodings",),
    ),
    Fault(
        "levels_of_a_gpu_shifted_by_one",
        "encodings.py",
        "start=np.array(level_offsets(grid)[:-1], np.uint32)",
        "start=np.array(level_offsets(grid)[1:], np.uint32)",
        ("encodings",),
    ),
    Fault("harmonics_without_their_sign", "encodings.py", "(-1) ** m * math", "math", ("encodings",)),
    Fault(
        "shadow_not_read",
        "encodings.py",
        "fusion_barrier(features, table if half_table is None else half_table, position)",
        "fusion_barrier(features, table, position)",
        ("encodings",),
    ),
    # Compositing.
    Fault(
        "density_as_weight",
        "compositing.py",
        "weight = jnp.exp(-optical_depth_before(thickness, ray, background.shape[0])) * -jnp.expm1(-thickness)",
        "weight = jnp.exp(-optical_depth_before(thickness, ray, background.shape[0])) * thickness",
        ("compositing",),
    ),
    Fault(
        "no_transmittance",
        "compositing.py",
        "weight = jnp.exp(-optical_depth_before(thickness, ray, background.shape[0])) * -jnp.expm1(-thickness)",
        "weight = -jnp.expm1(-thickness)",
        ("compositing",),
    ),
    Fault(
        "background_not_dimmed",
        "compositing.py",
        "rgb + (1 - opacity)[..., None] * background",
        "rgb + background",
        ("compositing",),
    ),
    Fault("depth_not_divided", "compositing.py", "depth * scale / (safe * scale)", "depth", ("compositing",)),
    Fault(
        "lower_half_lost",
        "compositing.py",
        "return (upper * 2**15 + lower) *",
        "return upper * 2**15 *",
        ("compositing",),
    ),
    Fault(
        "sum_not_restarted",
        "compositing.py",
        "jnp.where(right[1], right[0], left[0] + right[0])",
        "left[0] + right[0]",
        ("compositing",),
    ),
    Fault(
        "gradient_of_depth_forwards",
        "compositing.py",
        "_exclusive_sum(cotangent, ray, num_rays, not behind, None)",
        "_exclusive_sum(cotangent, ray, num_rays, behind, None)",
        ("compositing",),
    ),
    # Marching.
    Fault(
        "last_step_dropped",
        "marching.py",
        "inside = t < t_leave[:, None]",
        "inside = t < t_leave[:, None] - config.step_size",
        ("marching",),
    ),
    Fault(
        "last_sample_dropped", "marching.py", "valid = slot < num_kept", "valid = slot < num_kept - 1", ("marching",)
    ),
    Fault("full_buffer_refused", "marching.py", "complete = end <= size", "complete = end < size", ("marching",)),
    Fault("jitter_ignored", "marching.py", "(step + jitter[ray]) *", "(step + 0.5) *", ("marching",)),
    Fault("opaque_bits_read_as_occupied", "marching.py", "even_bits(halves >> i)", "even_bits(halves)", ("marching",)),
    Fault("nth_candidate_off_by_one", "marching.py", "middle - 1] <= n", "middle - 1] < n", ("marching",)),
    Fault(
        "opaque_steps_for_cells",
        "config.py",
        "math.ceil(self.opaque_cells / self.occupancy.resolution / self.step_size - 0.5)",
        "math.ceil(self.opaque_cells - 0.5)",
        ("config", "marching"),
    ),
    Fault(
        "bins_of_equal_length", "marching.py", "jnp.diff(t, axis=1)", "jnp.diff(lower) + 0 * t[:, 1:]", ("marching",)
    ),
    # The occupancy grid, and what is known before the first step.
    Fault("nth_set_bit_off_by_one", "occupancy.py", "above = n >= below", "above = n > below", ("occupancy",)),
    Fault(
        "empty_cells_decay",
        "occupancy.py",
        "jnp.where(grid.density < 0, EMPTY, jnp.maximum(grid.density * config.occupancy.decay, fresh))",
        "jnp.maximum(grid.density * config.occupancy.decay, fresh)",
        ("occupancy",),
    ),
    Fault(
        "density_never_decays", "occupancy.py", "grid.density * config.occupancy.decay", "grid.density", ("occupancy",)
    ),
    Fault("larger_threshold", "occupancy.py", "return jnp.minimum(mean, ", "return jnp.maximum(mean, ", ("occupancy",)),
    Fault(
        "mean_over_empty_cells",
        "occupancy.py",
        "jnp.mean(jnp.maximum(density, 0))",
        "jnp.mean(density)",
        ("occupancy",),
    ),
    Fault(
        "looks_at_centres_only",
        "occupancy.py",
        "cell_centre(cell, resolution=grid.resolution) + offset / grid.resolution",
        "cell_centre(cell, resolution=grid.resolution) + 0 * offset",
        ("occupancy",),
    ),
    Fault("cells_in_z_order", "occupancy.py", "return column, row, layer", "return layer, row, column", ("occupancy",)),
    Fault(
        "carving_ignores_faint_pixels",
        "visual_hull.py",
        "_summed_area(alpha > 0)",
        "_summed_area(alpha > 127)",
        ("visual_hull",),
    ),
    Fault(
        "cells_without_extent",
        "visual_hull.py",
        "jnp.sqrt(1 + jnp.maximum(slope_x, slope_y) ** 2) + 0.5",
        "0 + 0.5",
        ("visual_hull",),
    ),
    # Cameras and data.
    Fault(
        "half_a_pixel_missing_in_views",
        "cameras.py",
        "jnp.arange(camera.width) + 0.5",
        "jnp.arange(camera.width)",
        ("cameras",),
    ),
    Fault(
        "half_a_pixel_missing_in_training",
        "training/steps.py",
        "jnp.stack([x, y], axis=-1) + 0.5",
        "jnp.stack([x, y], axis=-1) + 0.0",
        ("training",),
    ),
    Fault("y_mirrored", "cameras.py", "xy[..., 0], -xy[..., 1]", "xy[..., 0], xy[..., 1]", ("cameras",)),
    Fault(
        "evaluation_views_shifted",
        "data/__init__.py",
        "views[np.arange(num_views) * len(views) // num_views]",
        "views[(np.arange(num_views) * len(views) // num_views + 1) % len(views)]",
        ("data",),
    ),
    Fault("held_out_views_trained_on", "data/__init__.py", "if not held_out or view % HOLD_OUT_EVERY]", "]", ("data",)),
    Fault(
        "box_filter_without_alpha",
        "data/blender.py",
        "block[..., :3] * block[..., 3:].astype(np.int32)",
        "block[..., :3] * np.int32(255)",
        ("data",),
    ),
    # Fields.
    Fault(
        "gradient_of_density_dies",
        "fields.py",
        "tangent * jnp.exp(jnp.clip(x, -MAX_LOG_DENSITY, MAX_LOG_DENSITY))",
        "tangent * jnp.where(x < MAX_LOG_DENSITY, jnp.exp(x), 0)",
        ("fields",),
    ),
    Fault("relu_lets_gradients_through", "fields.py", "jnp.where(y != 0, tangent, 0)", "tangent", ("fields",)),
    Fault(
        "no_mask_in_the_density_alone",
        "fields.py",
        "jnp.where(_inside(position), density, 0) if self.config.mask_outside_box else density",
        "density",
        ("fields",),
    ),
    # Rendering.
    Fault(
        "rays_end_early",
        "rendering.py",
        "(lanes.transmittance < sampler.min_transmittance)",
        "(lanes.transmittance < 1e-2)",
        ("rendering",),
    ),
    Fault(
        "rays_end_while_transparent",
        "rendering.py",
        "(lanes.transmittance < sampler.min_transmittance)",
        "(lanes.transmittance > sampler.min_transmittance)",
        ("rendering",),
    ),
    Fault(
        "transmittance_of_the_round_before",
        "rendering.py",
        "transmittance=lanes.transmittance * through",
        "transmittance=through",
        ("rendering",),
    ),
    Fault(
        "two_lanes_on_a_ray",
        "rendering.py",
        "jnp.cumsum(ended.astype(jnp.int32)) - 1",
        "jnp.cumsum(ended.astype(jnp.int32))",
        ("rendering",),
    ),
    Fault(
        "samples_where_steps_begin",
        "rendering.py",
        "(step + 0.5) * sampler.step_size",
        "step * sampler.step_size",
        ("rendering",),
    ),
    # The loss.
    Fault("huber_not_continuous", "losses.py", "(size - 0.5 * HUBER_DELTA)", "size", ("losses",)),
    Fault(
        "background_not_in_the_target",
        "training/steps.py",
        "batch.rgba[:, :3] * alpha + noise.background * (1 - alpha)",
        "batch.rgba[:, :3] * alpha",
        ("training",),
    ),
    Fault(
        "alpha_taken_as_premultiplied",
        "training/steps.py",
        "batch.rgba[:, :3] * alpha + noise",
        "batch.rgba[:, :3] + noise",
        ("training",),
    ),
    Fault(
        "loss_over_all_rays",
        "training/steps.py",
        "count = 3 * jnp.maximum(num_used, 1)",
        "count = 3 * len(alpha)",
        ("training",),
    ),
    Fault(
        "incomplete_rays_in_the_loss",
        "training/steps.py",
        "jnp.where(samples.ray_complete, terms, 0)",
        "terms",
        ("training",),
    ),
    # Steps.
    Fault(
        "same_noise_every_step",
        "training/steps.py",
        "(step + jnp.arange(num_steps))",
        "(0 * step + jnp.arange(num_steps))",
        ("training",),
    ),
    Fault(
        "same_noise_all_dispatch",
        "training/steps.py",
        "(step + jnp.arange(num_steps))",
        "(step + jnp.zeros(num_steps, jnp.int32))",
        ("training",),
    ),
    Fault(
        "steps_beyond_the_last",
        "training/updates.py",
        "jax.tree.map(functools.partial(jnp.where, taken), tuple(new), carry)",
        "tuple(new)",
        ("training",),
    ),
    Fault(
        "shadow_not_updated",
        "training/updates.py",
        "return state, make_half_table(params, config=config.field), metrics",
        "return state, half_table, metrics",
        ("training",),
    ),
    Fault(
        "update_of_no_number",
        "training/updates.py",
        "sound = jnp.isfinite(metrics.loss) & _is_finite(gradient)",
        "sound = jnp.bool_(True)",
        ("training",),
    ),
    Fault(
        "average_of_one_step",
        "training/updates.py",
        "config.optimizer.ema_decay ** num_steps.astype(jnp.float32)",
        "config.optimizer.ema_decay",
        ("training",),
    ),
    Fault(
        "means_over_steps_not_taken",
        "training/updates.py",
        "sums / jnp.maximum(num_steps, 1)",
        "sums / max_steps",
        ("training",),
    ),
    Fault(
        "refresh_without_the_step",
        "training/steps.py",
        "jax.random.fold_in(jax.random.fold_in(state.key, state.step), 2**31)",
        "jax.random.fold_in(state.key, 2**31)",
        ("training",),
    ),
    Fault(
        "warmup_never_ends",
        "training/steps.py",
        "state.step < config.sampler.occupancy.warmup_steps",
        "state.step >= 0",
        ("training",),
    ),
    Fault(
        "refresh_of_the_average",
        "training/steps.py",
        "evaluate_density, state.params, config",
        "evaluate_density, state.eval_params, config",
        ("training",),
    ),
    # The optimiser and the loop.
    Fault(
        "decay_after_adam",
        "training/optimizer.py",
        "        optax.masked(optax.add_decayed_weights(config.weight_decay), _is_mlp_weight),\n"
        "        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),\n",
        "        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),\n"
        "        optax.masked(optax.add_decayed_weights(config.weight_decay), _is_mlp_weight),\n",
        ("optimizer",),
    ),
    Fault("decay_of_the_table", "training/optimizer.py", 'path[-1].key != "table"', "True", ("optimizer",)),
    Fault(
        "rate_by_dispatch",
        "training/loop.py",
        "steps = step + np.arange(size)",
        "steps = np.full(size, step)",
        ("loop",),
    ),
    Fault(
        "rate_by_step_only",
        "training/loop.py",
        "np.maximum(steps / config.train.max_steps, fraction)",
        "steps / config.train.max_steps",
        ("loop",),
    ),
    Fault(
        "refresh_every_dispatch",
        "training/loop.py",
        "if every and (step + num_steps) // every > step // every:",
        "if every:",
        ("loop",),
    ),
    Fault(
        "grid_of_the_survey_not_used",
        "training/programs.py",
        "return replace(state, occupancy=grid)",
        "return state",
        ("training",),
    ),
    Fault(
        "step_more_on_resume",
        "training/loop.py",
        "progress = resume\n",
        "progress = dataclasses.replace(resume, step=resume.step + 1)\n",
        ("training",),
    ),
    Fault(
        "optimiser_starts_anew_on_resume",
        "training/checkpoints.py",
        "args=args).state\n",
        "args=args).state\n            state = replace(state, opt_state=init_state(0, config=config).opt_state)\n",
        ("training",),
    ),
    # Evaluation.
    Fault(
        "weights_evaluated_not_their_average",
        "training/state.py",
        "return self.ema_params or self.params",
        "return self.params",
        ("training",),
    ),
    Fault("names_of_views_shifted", "training/evaluation.py", "split.views[first:]", "split.views", ("end_to_end",)),
    Fault(
        "truth_over_no_background", "training/evaluation.py", " + background * (1 - rgba[..., 3:])", "", ("end_to_end",)
    ),
    Fault("psnr_by_natural_logarithm", "metrics.py", "-10.0 * jnp.log10(mse)", "-10.0 * jnp.log(mse)", ("metrics",)),
    Fault("window_of_ssim_too_wide", "metrics.py", "SSIM_WINDOW_SIGMA = 1.5", "SSIM_WINDOW_SIGMA = 2.0", ("metrics",)),
    Fault(
        "covariance_of_means_missing",
        "metrics.py",
        "part(covariance, k) + jnp.stack([a * a, b * b, a * b])",
        "part(covariance, k)",
        ("metrics",),
    ),
    # Images and signed distances.
    Fault("image_mirrored", "images.py", "rows[:, :, None]", "rows[:, ::-1, None]", ("images",)),
    Fault(
        "rows_for_columns",
        "images.py",
        "Taps(centre, pixel[:, 1:], pixel[:, :1]",
        "Taps(centre, pixel[:, :1], pixel[:, 1:]",
        ("images",),
    ),
    Fault(
        "centres_at_corners",
        "images.py",
        "(pixel.astype(jnp.float32) + 0.5) / size",
        "pixel.astype(jnp.float32) / size",
        ("images",),
    ),
    Fault("tiles_without_half_a_pixel", "images.py", "return (xy + 0.5) /", "return xy /", ("images",)),
    Fault(
        "no_stratification",
        "images.py",
        "return (corner + jitter) / jnp.array([columns, rows], jnp.float32)",
        "return jitter",
        ("images",),
    ),
    Fault(
        "relative_to_the_prediction",
        "losses.py",
        "(jnp.abs(target) + RELATIVE_FLOOR)",
        "(jnp.abs(prediction) + RELATIVE_FLOOR)",
        ("losses",),
    ),
    Fault(
        "all_points_off_the_surface",
        "training/points.py",
        "[data.surface[on], data.position[off]]",
        "[data.position[on], data.position[off]]",
        ("points",),
    ),
    Fault("distance_of_another_point", "training/points.py", "data.distance[off]]", "data.distance[on]]", ("points",)),
    Fault(
        "same_points_every_step",
        "training/points.py",
        "(step + jnp.arange(num_steps))",
        "(0 * step + jnp.arange(num_steps))",
        ("points",),
    ),
    Fault(
        "pixels_transposed",
        "training/points.py",
        "data.pixels[taps.row, taps.column]",
        "data.pixels[taps.column, taps.row]",
        ("points",),
    ),
    Fault("one_batch_for_all_steps", "training/points.py", "a: a[i], batches", "a: a[0], batches", ("points",)),
    Fault("never_snapped", "training/points.py", " snap=config.train.snap", " snap=False", ("points",)),
    Fault("started_in_the_solid", "tracing.py", " | (distance < 0) & (t <= first)", "", ("tracing",)),
    Fault(
        "fetched_for_step_0",
        "training/programs.py",
        "self._program(jnp.int32(step),",
        "self._program(jnp.int32(0),",
        ("points",),
    ),
    Fault(
        "ray_not_taken_back",
        "tracing.py",
        "jnp.where(going, t + distance, t)",
        "jnp.where(going, t + jnp.abs(distance), t)",
        ("tracing",),
    ),
    Fault(
        "normals_inwards",
        "tracing.py",
        "moved = position[:, None] + width",
        "moved = position[:, None] - width",
        ("tracing",),
    ),
    Fault("no_shadow", "tracing.py", "jnp.where(shadow, 0,", "jnp.where(shadow & False, 0,", ("tracing",)),
    Fault(
        "lanes_write_over_others",
        "tracing.py",
        "index = jnp.where(index < num_rays, index, num_rays + jnp.arange(width))",
        "index = picked = jnp.minimum(index, num_rays - 1)",
        ("tracing",),
    ),
    Fault("faces_inwards", "meshing.py", '"descent"', '"ascent"', ("meshing", "train_sdf")),
    Fault("far_blocks_too_near", "meshing.py", "SAFETY = 1.5", "SAFETY = 0.5", ("meshing",)),
    Fault(
        "open_at_the_box",
        "meshing.py",
        "np.where(distance > 0, distance, -np.inf)",
        "np.full_like(distance, -np.inf)",
        ("meshing",),
    ),
)
