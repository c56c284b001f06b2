"""What a GPU would run: the reading of XLA's text, and bounds on the programs as XLA compiles them for an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.gpu import gate, hlo
from jaxngp.config import InputError
from jaxngp.device import FAST_SCATTER_JAXLIB, jaxlib_version

# For an H100, by preset and program: most kernels in one round of the loop and outside, MB of temporaries, MB that a
# round streams; and the trip counts of the loops, None where rays alone decide.
BOUNDS = {
    "base": {"train": (150, 40, 200, 1500, [16]), "render": (36, 32, 725, 750, [None])},
    "image": {"train": (36, 12, 600, 2100, [16])},
    "sdf": {"train": (36, 14, 420, 1700, [16]), "trace": (100, 8, 180, 520, [None] * 3)},
}
ATOMICS = {"base": "atom.global.v4.f32.add", "image": "atom.global.v2.f32.add", "sdf": "atom.global.v2.f32.add"}
RAY_SUMS = ",5] "  # the shape of what a ray's samples are added up to, (R, 5)

MODULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,2]{1,0})->f32[8,2]{1,0}}

%fused_gather (p0: f32[1000,4], p1: s32[16,1], p2: f32[16,1,4]) -> f32[16,4] {
  %p0 = f32[1000,4]{1,0} parameter(0)
  %p1 = s32[16,1]{1,0} parameter(1)
  %p2 = f32[16,1,4]{2,1,0} parameter(2)
  %twice = f32[1000,4]{1,0} add(%p0, %p0)
  %rows = f32[16,1,4]{2,1,0} gather(%twice, %p1), offset_dims={1,2}, slice_sizes={1,4}
  %product = f32[16,1,4]{2,1,0} multiply(%rows, %p2)
  ROOT %flat = f32[16,4]{1,0} bitcast(%product)
}

%fused_scatter (p0: f32[1000,4], p1: s32[16,1], p2: f32[16,4]) -> f32[1000,4] {
  %p0 = f32[1000,4]{1,0} parameter(0)
  %p1 = s32[16,1]{1,0} parameter(1)
  %p2 = f32[16,4]{1,0} parameter(2)
  %updates = f32[16,1,4]{2,1,0} bitcast(%p2)
  ROOT %scatter = f32[1000,4]{1,0} scatter(%p0, %p1, %updates), to_apply=%add
}

%fused_slice (p0: f32[1000,4], p1: s32[]) -> (f32[1,4], f64[2]) {
  %p0 = f32[1000,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %slice = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,4}
  %wide = f64[2]{0} constant({1, 2})
  ROOT %pair = (f32[1,4]{1,0}, f64[2]{0}) tuple(%slice, %wide)
}

%body (carry: (s32[], f32[1000,4])) -> (s32[], f32[1000,4]) {
  %carry = (s32[], /*index=1*/f32[1000,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element((s32[], f32[1000,4]{1,0:S(5)}) %carry), index=0
  %table = f32[1000,4]{1,0} get-tuple-element(%carry), index=1
  %rows.1 = s32[16,1]{1,0} custom-call(%i), custom_call_target="f"
  %sliced = (f32[1,4]{1,0}, f64[2]{0}) fusion(%table, %i), kind=kLoop, calls=%fused_slice
  %gathered = f32[16,4]{1,0} fusion(%table, %rows.1, %rows.1), kind=kLoop, calls=%fused_gather
  %scattered = f32[1000,4]{1,0} fusion(%table, %rows.1, %gathered), kind=kInput, calls=%fused_scatter, \
metadata={op_name="jit(f)/while/body/scatter-add" stack_frame_id=3}
  ROOT %next = (s32[], f32[1000,4]{1,0}) tuple(%i, %scattered)
}

%condition (carry: (s32[], f32[1000,4])) -> pred[] {
  %carry = (s32[], f32[1000,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

ENTRY %main.1 (table: f32[1000,4], weights: f32[64,64], which: s32[]) -> (s32[], f32[1000,4]) {
  %table = f32[1000,4]{1,0} parameter(0), metadata={op_name="table"}
  %weights = f32[64,64]{1,0} parameter(1)
  %start = (s32[], f32[1000,4]{1,0}) tuple(%weights, %table)
  %matmul = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%weights, %weights), custom_call_target="__cublas$gemm"
  %copy-start.1 = (f32[64,64]{1,0:S(5)}, f32[64,64]{1,0}, u32[]) copy-start(%weights), control-predecessors={%matmul}
  %copy-done.1 = f32[64,64]{1,0:S(5)} copy-done(%copy-start.1)
  ROOT %loop = (s32[], f32[1000,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"16"},"known_init_step":{"init":"0","step":"1"}}'
ROWS, INDICES, SQUARE = 256, 64, 16_384  # bytes of 16 rows, of their numbers, of a matrix


def test_kernels_are_found_with_what_they_stream() -> None:
    module = hlo.parse_module(MODULE)
    found = {k.instruction.name: (k.in_loop, k.streamed) for k in hlo.kernels(module)}
    assert found == {
        "matmul": (False, 2 * SQUARE),  # an operand that comes twice is read once; the workspace does not count
        "copy-start.1": (False, 3 * SQUARE + 4),
        "rows.1": (True, INDICES + 4),
        "sliced": (True, 16 + 4 + 16 + 16),
        "gathered": (True, INDICES + ROWS + ROWS),  # from what is made of an array element by element
        "scattered": (True, INDICES + ROWS),
        "less": (True, 4 + 1),
    }
    assert hlo.num_float64(module) == 3  # a constant, a tuple of it, and the fusion
    assert module.computations["body"]["scattered"].op_name == "jit(f)/while/body/scatter-add"


def test_a_known_trip_count_needs_no_condition() -> None:
    module = hlo.parse_module(MODULE.replace("body=%body", "body=%body" + TRIPS))
    assert [loop.trip_count for loop in hlo.loops(module)] == [16]
    assert "less" not in [kernel.instruction.name for kernel in hlo.kernels(module)]


def test_what_is_not_hlo_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an HLO instruction"):
        hlo.parse_module(MODULE.replace("compare(", "compare"))
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse_module("HloModule empty\n")


def test_arrays_have_the_size_of_their_elements() -> None:
    (token, *arrays) = hlo.parse_arrays("(token[], f32[8,2]{1,0}, (bf16[3], pred[5]), f32[], c64[2])")
    assert [array.num_bytes for array in arrays] == [64, 6, 5, 4, 16]
    assert (token.num_bytes, str(arrays[0])) == (0, "f32[8,2]")


def test_corner_arrays_are_known_by_their_axes() -> None:
    found = [(1000, 16, 8), (8, 1000, 16), (16, 8, 1, 1000), (8, 1000, 16, 4)]
    others = [(1000, 16, 4), (1000, 8, 4), (1000, 128), (8, 16), ()]  # features, one level, activations
    for dims in found + others:
        array = hlo.Array("f32", dims)
        assert hlo.is_corner_array(array, num_levels=16, num_features=4) == (dims in found), array


def test_atomics_are_found_with_their_kernels() -> None:
    ptx = """.visible .entry input_scatter_fusion_1(
	@%p1 atom.relaxed.sys.global.cas.b32 	%r5, [%rd3], %r13, %r12;
	redux.sync.add.s32 %r1, %r2, %r3;
.visible .entry loop_add_fusion(
	@!%p2 red.global.add.f32 	[%rd3], %f1;
"""
    first = (hlo.ptx_name("input_scatter-fusion.1"), "atom.relaxed.sys.global.cas.b32")
    assert hlo.parse_atomics(ptx) == [first, ("loop_add_fusion", "red.global.add.f32")]


@pytest.mark.slow
@pytest.mark.parametrize("preset", BOUNDS)
def test_programs_for_an_h100_stay_in_bounds(preset: str, tmp_path: Path) -> None:
    try:
        gate.check_plugin()
    except InputError as error:
        pytest.skip(str(error))
    output, bounds = tmp_path / "gate.json", BOUNDS[preset]
    flags = [f"--preset={preset}", f"--output={output}", f"--programs={','.join(bounds)}"]
    # In a process of its own, which loads the plugin, and without the options of XLA that these tests set.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "experiments.gpu.gate", *flags]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text(encoding="utf-8"))["programs"]
    for name, (in_a_round, outside, temporaries, streamed, rounds) in bounds.items():
        row = rows[name]
        assert row["kernels in a round"] <= in_a_round, done.stdout
        assert row["kernels outside"] <= outside, done.stdout
        assert row["temporaries, MB"] <= temporaries, done.stdout
        assert row["streamed in a round, MB"] <= streamed, done.stdout
        assert row["rounds"] == rounds, done.stdout
        assert row["corner arrays"] == [], done.stdout
        assert row["float64"] == 0, done.stdout
        # An old jaxlib adds up rays, few and in order, by compare-and-swap; the table it must not.
        old = jaxlib_version() < FAST_SCATTER_JAXLIB
        slow = [k for k in row["compare-and-swap loops"] if not (old and RAY_SUMS in k and "scatter-add" in k)]
        assert slow == [], done.stdout
    assert rows["train"]["vector atomics"] == {ATOMICS[preset]: 1}  # rows of the table are added to whole
