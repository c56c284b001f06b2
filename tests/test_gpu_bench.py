"""The benchmark of a GPU: all of it on a toy, and what it computes of its measurements."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_commands import write_scene

from experiments import float64, gpu_bench, gpu_profile, gpu_run, gpu_sections, gpu_stages, sdf, timing
from experiments.gpu_profile import Event
from experiments.gpu_run import Bench, Section
from jaxngp import flags
from jaxngp.config import HashGridConfig, InputError
from jaxngp.encodings import hash_encode, init_table
from jaxngp.presets import PRESETS

# All of it.


def run(*args: str) -> None:
    flags.run("experiments.gpu_bench", gpu_bench.define_flags, gpu_bench.main, "", ["gpu_bench", *args])


@pytest.mark.slow
def test_a_toy_runs_through_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # put back afterwards
    # Fewer programs, for compiling them takes nearly all of the time.
    options = {"as everything else": {}, "unknown": {"xla_gpu_no_such_option": True}}
    kept = ("draw", "encode, backward, (level, point, corner)", "additions to one row, float32 x 2")
    monkeypatch.setattr(gpu_sections, "XLA_OPTIONS", options)
    monkeypatch.setattr(sdf, "NUM_VOLUME_POINTS", 2**16)
    for name in ("all_stages", "ceilings"):
        every = getattr(gpu_stages, name)
        few = lambda *a, every=every, **k: {key: v for key, v in every(*a, **k).items() if key in kept}  # noqa: E731
        monkeypatch.setattr(gpu_stages, name, few)
    scene = write_scene(tmp_path / "square")
    tiny = [
        "--override=field.encoding.num_levels=1",
        "--override=train.steps_per_dispatch=1",
        "--override=sampler.opaque_cells=0",
    ]
    run("--toy", f"--scene={scene}", "--eval_views=1", "--seconds=0.1", f"--output={tmp_path / 'out'}", *tiny)
    text = capsys.readouterr().out
    print(text)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not {"failed", "skipped"} & set(results)
    assert list(results["refused"]) == ["unknown"]
    assert "unknown: refused: JaxRuntimeError: INVALID_ARGUMENT: No such compile option: 'xla_gpu_no_such" in text
    assert set(results["seconds"]) == {"train", *(section.name for section in gpu_bench.SECTIONS)}
    assert all(check["passed"] for check in results["correctness"].values())
    assert results["profile"]["busy_us"] > 0
    assert "scatter" in " ".join(kernel["source"] for kernel in results["profile"]["kernels"])
    assert 0 < results["render"]["64x36"]["fill"] <= 1
    assert [run["psnr"] > 0 for run in results["psnr"]["runs"]] == [True]
    assert results["image"]["device"]["psnr"] > 10
    assert results["image"]["host"]["steps"] > 0
    assert results["sdf"]["frame_ms"] > 0
    assert "val split, 1 views of 24x24, white background, sRGB" in text
    assert (tmp_path / "out" / "trace.xplane.pb").exists()
    assert "| PSNR after 2 s, dB | - | 30.1 | not measured |" in text


# Which sections run.


def sections(calls: list[str], **seconds: float) -> list[Section]:
    """Sections that say that they ran; those in capitals are for the headline."""
    return [
        Section(name, lambda _, name=name: calls.append(name), needed, headline=name.isupper())  # type: ignore[misc]
        for name, needed in seconds.items()
    ]


def bench(folder: Path) -> Bench:
    """With nothing to measure."""
    return Bench(PRESETS["small"], gpu_bench.TOY, None, 1, 1.0, folder)


def test_what_does_not_fit_is_left_out_and_the_headline_last_of_all() -> None:
    given = sections([], a=10, b=20, C=30, d=5)
    assert gpu_run.plan(given, 65) == {"a", "b", "C", "d"}
    assert gpu_run.plan(given, 50) == {"a", "C", "d"}
    assert gpu_run.plan(given, 32) == {"C"}
    assert gpu_run.plan(given, 29) == {"a", "d"}
    assert gpu_run.plan(given, -1) == set()


def test_a_failure_and_a_lack_of_time_do_not_keep_the_next_section_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Bench) -> None:
        raise ValueError("of two\nlines " + 200 * "x")

    calls: list[str] = []
    given = [*sections(calls, a=10), Section("bad", fail, 1), *sections(calls, b=90, C=40)]
    task = bench(tmp_path)
    assert gpu_run.run_sections(task, given, time.monotonic() + 60) == ["bad"]
    assert calls == ["a", "C"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["seconds"]) == {"a", "bad", "C"}
    assert "in fail" in results["failed"]["bad"]
    assert set(results["skipped"]) == {"b"}
    failure = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED"))
    assert failure.startswith("FAILED: ValueError: of two lines xxx")
    assert len(failure) < 180


def test_a_section_ends_in_time_for_the_headline(tmp_path: Path) -> None:
    deadlines = []
    given = [Section("a", lambda b: deadlines.append(b.deadline), 1), *sections([], b=5, C=40, D=100)]
    end = time.monotonic() + 60
    gpu_run.run_sections(bench(tmp_path), given, end)
    assert deadlines == [end - 40]  # D does not fit in any case


def test_sections_are_chosen_with_the_training_that_they_need() -> None:
    names = [section.name for section in gpu_bench.choose_sections(["stages", "versions"], 60)]
    assert names == ["versions", "train", "stages"]
    assert [s.name for s in gpu_bench.choose_sections(["render"], 60)] == ["train", "render"]
    (psnr,) = gpu_bench.choose_sections(["psnr"], 60)
    assert psnr.seconds == 30 + 2 + 5 + 15 + 60
    with pytest.raises(InputError, match="unknown 'ncu'; there are versions, ceilings"):
        gpu_bench.choose_sections(["ncu"], 60)


def test_programs_that_fail_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = gpu_run.build_all(bench(tmp_path), {"good": lambda: 3, "bad": lambda: 1 // 0})
    assert made == {"good": 3}
    out = capsys.readouterr().out
    assert "bad: refused: ZeroDivisionError" in out
    assert "compiled 1 of 2" in out


def test_xla_flags_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b")
    gpu_bench.add_xla_flags("--xla_a=2", "--xla_c=3")
    assert gpu_bench.os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_b --xla_c=3"


# Tables.


def test_the_headline_compares_with_targets_whichever_way_is_better() -> None:
    assert str(gpu_bench.Headline("step, ms", 1.234567, 1.5)) == "| step, ms | 1.235 | 1.5 | met |"
    assert str(gpu_bench.Headline("step, ms", 1.6, 1.5)) == "| step, ms | 1.6 | 1.5 | missed |"
    assert str(gpu_bench.Headline("PSNR", 30.2, 30.1, more=True)) == "| PSNR | 30.2 | 30.1 | met |"
    assert str(gpu_bench.Headline("PSNR", None, 30.1)) == "| PSNR | - | 30.1 | not measured |"


def test_headlines_are_read_off_the_results() -> None:
    assert all(headline.value is None for headline in gpu_bench.headlines({}, "64x36"))
    results = {
        "step": {"ms": 1.2},
        "train": {"peak_bytes": 9e8, "compile_seconds": 12.0},
        "render": {"64x36": {"device_ms": 20.0}, "8x8": {"device_ms": 1.0}},
        "psnr": {"runs": [{"budget": b, "psnr": p} for b, p in ((2.0, 30.0), (5.0, 33.0), (15.0, 35.7))]},
    }
    values = [headline.value for headline in gpu_bench.headlines(results, "64x36")]
    assert values == [1.2, 900.0, 20.0, 12.0, 30.0, 33.0, 35.7, None]


def test_there_is_a_run_for_every_target_up_to_the_longest() -> None:
    assert gpu_sections.psnr_budgets(60.0) == [2, 5, 15, 60]
    assert gpu_sections.psnr_budgets(6.0) == [2, 5, 6]
    assert gpu_sections.psnr_budgets(0.5) == [0.5]


def test_a_stage_stands_beside_what_was_predicted_for_its_work() -> None:
    prediction = gpu_stages.Prediction((0.1, 0.3), (1.0, 3.0), 100).scaled(50)
    assert gpu_stages.Prediction((0.05, 0.15), (0.5, 1.5), 50) == prediction
    assert (
        gpu_sections.stage_line("pack", 2.0, prediction) == "| pack | 2.000 | 0.050-0.150 | 20.0 | 0.500-1.500 | 2.0 |"
    )
    assert gpu_sections.stage_line("draw", 2.0, None).count("|") == 7


# The profile.


def plane(name: str, **lines: list[SimpleNamespace]) -> SimpleNamespace:
    named = [SimpleNamespace(name=key.replace("_", " "), events=value) for key, value in lines.items()]
    return SimpleNamespace(name=name, lines=named)


def event(name: str, start: float, duration: float, op: str = "") -> SimpleNamespace:
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=[("hlo_op", op)] if op else [])


def test_the_kernels_of_a_gpu_are_those_of_its_streams() -> None:
    host = plane("/host:CPU", python=[event("call", 0, 9, "fusion.1")])
    device = plane(
        "/device:GPU:0", Stream_1=[event("fusion_1", 0, 5, "fusion.1"), event("copy", 6, 1)], Ops=[event("x", 0, 9)]
    )
    assert [e.name for e in gpu_profile.events_of([host, device])] == ["fusion_1", "copy"]
    assert [e.name for e in gpu_profile.events_of([host, plane("/host:metadata")])] == ["call"]


def test_a_profile_is_a_table_of_kernels_without_what_ran_inside_them() -> None:
    events = [
        Event("while", "while.1", "a", 0, 10_000),
        Event("fusion_2", "fusion.2", "a", 1000, 3000),
        Event("fusion_2", "fusion.2", "a", 5000, 2000),
        Event("gemm", "", "b", 12_000, 4000),
        Event("fusion_2", "fusion.2", "b", 20_000, 1000),
    ]
    table = gpu_profile.kernel_table(events, num_steps=2, sources={"fusion_2": "jit(f)/while/body/add"})
    found = [(kernel.name, kernel.us, kernel.count, kernel.source) for kernel in table]
    assert found == [
        ("fusion_2", 3.0, 1.5, "jit(f)/while/body/add"),
        ("while", 2.5, 0.5, ""),
        ("gemm", 2.0, 0.5, ""),
    ]
    assert gpu_profile.occupation(events, num_steps=2) == gpu_profile.Occupation(7.5, 3.0)
    assert gpu_profile.occupation([], num_steps=2) == gpu_profile.Occupation(0.0, 0.0)


def test_instructions_are_traced_to_what_they_come_from() -> None:
    text = jax.jit(lambda x: jnp.sin(x).at[1].add(2.0)).lower(jnp.ones(3)).compile().as_text()
    assert any("scatter-add" in source for source in gpu_profile.hlo_sources(text).values())
    line = '  %loop_add-fusion.2 = f32[3]{0} fusion(%p), metadata={op_name="jit(f)/while/body/mul" id=7}, x={"y":1}'
    assert gpu_profile.hlo_sources(line) == {"loop_add_fusion_2": "jit(f)/while/body/mul"}
    assert gpu_profile.short_source("jit(f)/while/body/a/b/closed_call/c/d") == "b/c/d"


# Programs and references.

GRID = HashGridConfig(num_levels=3, num_features=2, table_size=2**8, min_resolution=4, max_resolution=40)


def encoding(grid: HashGridConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    position = timing.points_on_rays(jax.random.key(0), 50)
    return (
        init_table(jax.random.key(1), grid=grid),
        position,
        jax.random.normal(jax.random.key(2), (50, grid.num_outputs)),
    )


@pytest.mark.parametrize("order", gpu_stages.ORDERS.values())
@pytest.mark.parametrize("per_level", [False, True])
def test_every_shape_of_scatter_gives_the_gradient_of_the_table(order: str, per_level: bool) -> None:
    table, position, gradient = encoding(GRID)
    (expected,) = jax.vjp(lambda t: hash_encode(t, position, grid=GRID), table)[1](gradient)
    function = functools.partial(gpu_stages.table_gradient, grid=GRID, order=order, per_level=per_level)
    assert_allclose(jax.jit(function)(gradient, position), expected, atol=1e-5)


@pytest.mark.parametrize("change", [{}, {"half_voxel_offset": True, "smoothstep": True}, {"dense_levels": False}])
def test_the_encoding_in_float64(change: dict[str, Any]) -> None:
    grid = replace(GRID, **change)
    table, position, gradient = encoding(grid)
    features, vjp = jax.vjp(lambda t, x: hash_encode(t, x, grid=grid), table, position)
    truth = float64.encode(*map(np.asarray, (table, position, gradient)), grid=grid)
    for ours, expected in zip((features, *vjp(gradient)), truth.values(), strict=True):
        assert float64.check("", ours, expected, tolerance=1e-5).passed


def test_a_check_passes_by_the_norm_and_never_what_is_no_number() -> None:
    truth = np.array([3.0, 4.0])
    found = float64.check("x", np.array([3.0, 4.5]), truth, tolerance=0.1)
    assert_allclose([found.error, found.largest], [0.1, 0.125])
    assert float64.check("x", np.array([3.0, 4.5]), truth, tolerance=0.101).passed
    assert not float64.check("x", np.array([3.0, 4.6]), truth, tolerance=0.1).passed
    assert not float64.check("x", np.array([3.0, np.nan]), truth, tolerance=0.1).passed
    with pytest.raises(ValueError, match="x has shape"):
        float64.check("x", np.zeros(3), truth, tolerance=0.1)


def test_light_before_a_sample_starts_anew_with_each_ray() -> None:
    density, dt, ray = np.array([1.0, 2.0, 3.0, 4.0]), np.full(4, 0.5), np.array([0, 0, 2, 2])
    assert_allclose(float64.light_before(density, dt, ray), np.exp([0, -0.5, 0, -1.5]))
