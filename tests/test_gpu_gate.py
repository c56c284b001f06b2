"""What a GPU would run: the reading of XLA's texts, and bounds on the programs as XLA compiles them for an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import gpu_gate, hlo
from experiments.hlo import Array, Traffic
from jaxngp.config import InputError
from jaxngp.device import FAST_SCATTER_JAXLIB, jaxlib_version
from jaxngp.presets import PRESETS
from jaxngp.rendering import GPU_BATCHING

# Bounds for an H100, by preset and program: kernels in one round of the loop and outside, MB of temporaries, and how
# often the loops run, which rays alone decide. Of 100 views of 800x800, an image of 4096x4096, a frame of 1920x1080.
BOUNDS: dict[str, dict[str, tuple[int, int, int, list[int | None]]]] = {
    "base": {"train": (110, 36, 375, [16]), "render": (36, 32, 700, [None])},
    "image": {"train": (36, 12, 600, [16])},
    "sdf": {"train": (36, 14, 420, [16]), "trace": (100, 8, 180, [None] * 3)},
}
ATOMICS = {"base": "atom.global.v4.f32.add", "image": "atom.global.v2.f32.add", "sdf": "atom.global.v2.f32.add"}
NUM_SUMS = 5  # that a ray's samples are added up to

# HLO.

MODULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,2]{1,0})->f32[8,2]{1,0}}

FileNames
1 "f (g) = h.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_gather (p0: f32[1000,4], p1: s32[16,1], p2: f32[16,1,4]) -> f32[16,4] {
  %p0 = f32[1000,4]{1,0} parameter(0)
  %p1 = s32[16,1]{1,0} parameter(1)
  %p2 = f32[16,1,4]{2,1,0} parameter(2)
  %rows = f32[16,1,4]{2,1,0} gather(%p0, %p1), offset_dims={1,2}, slice_sizes={1,4}
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

%fused_slice (p0: f32[100,4], p1: s32[]) -> (f32[1,4], f64[2]) {
  %p0 = f32[100,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
  %wide = f64[2]{0} constant({1, 2})
  ROOT %pair = (f32[1,4]{1,0}, f64[2]{0}) tuple(%slice, %wide)
}

%body (carry: (s32[], f32[1000,4])) -> (s32[], f32[1000,4]) {
  %carry = (s32[], /*index=1*/f32[1000,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %table = f32[1000,4]{1,0} get-tuple-element(%carry), index=1
  %rows.1 = s32[16,1]{1,0} custom-call(%i), custom_call_target="f"
  %gathered = f32[16,4]{1,0} fusion(%table, %rows.1, %rows.1), kind=kLoop, calls=%fused_gather
  %scattered.2 = f32[1000,4]{1,0} fusion(%table, %rows.1, %gathered), kind=kInput, calls=%fused_scatter, \
metadata={op_name="jit(f)/while/body/scatter-add" stack_frame_id=3}
  ROOT %next = (s32[], f32[1000,4]{1,0}) tuple(%i, %scattered.2)
}

%condition (carry: (s32[], f32[1000,4])) -> pred[] {
  %carry = (s32[], f32[1000,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

%branch (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0} parameter(0)
  ROOT %copy.1 = f32[64,64]{1,0} copy(%p)
}

ENTRY %main.1 (table: f32[1000,4], weights: f32[64,64], which: s32[]) -> (s32[], f32[1000,4]) {
  %table = f32[1000,4]{1,0} parameter(0), metadata={op_name="table"}
  %weights = f32[64,64]{1,0} parameter(1)
  %which = s32[] parameter(2)
  %start = (s32[], f32[1000,4]{1,0}) tuple(%which, %table)
  %matmul = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%weights, %weights), custom_call_target="__cublas$gemm"
  %product = f32[64,64]{1,0} get-tuple-element(%matmul), index=0
  %chosen = f32[64,64]{1,0} conditional(%which, %product, %product), branch_computations={%branch, %branch}
  %copy-start.1 = (f32[64,64]{1,0:S(5)}, f32[64,64]{1,0}, u32[]) copy-start(%chosen)
  %copy-done.1 = f32[64,64]{1,0:S(5)} copy-done(%copy-start.1)
  ROOT %loop = (s32[], f32[1000,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"16"},"known_init_step":{"init":"0","step":"1"}}'
TABLE, ROWS, INDICES, SQUARE = 16_000, 256, 64, 16_384  # bytes


def module(text: str = MODULE) -> hlo.Module:
    return hlo.parse_module(text)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("f32[8,2]{1,0}", 64), ("bf16[3]", 6), ("pred[5]", 5), ("f32[]", 4), ("f8e4m3fn[7]", 7), ("c64[2]", 16)]
    + [("token[]", 0), ("s8[0,4]", 0)],
)
def test_the_size_of_an_array(text: str, num_bytes: int) -> None:
    (array,) = hlo.parse_arrays(text)
    assert array.num_bytes == num_bytes
    assert text.startswith(str(array))


def test_a_tuple_is_several_arrays() -> None:
    text = "(s32[], (f32[2]{0:S(5)}, /*index=2*/u8[3,4]{1,0:T(8,128)(4,1)}), pred[1])"
    assert [str(array) for array in hlo.parse_arrays(text)] == ["s32[]", "f32[2]", "u8[3,4]", "pred[1]"]


def test_an_instruction() -> None:
    line = (
        "  ROOT %a-b.1 = (f32[2]{0:S(5)}, (s32[])) fusion(f32[2] %x.1, /*index=1*/%y), kind=kLoop, calls=%f.2, "
        'metadata={op_name="jit(f)/mul" scheduling_name="a"}'
    )
    instruction = hlo.parse_instruction(line)
    assert instruction is not None
    assert (instruction.name, instruction.opcode, instruction.is_root) == ("a-b.1", "fusion", True)
    assert instruction.operands == ("x.1", "y")
    assert instruction.num_bytes == 12
    assert instruction.op_name == "jit(f)/mul"
    assert instruction.called("calls") == ["f.2"]
    assert instruction.called("body", "to_apply") == []
    assert instruction.trip_count is None


def test_what_is_no_instruction_is_passed_over() -> None:
    assert hlo.parse_instruction("}") is None
    assert hlo.parse_instruction("1 {file_name_id=1 line=7 end_line=7}") is None
    with pytest.raises(ValueError, match="unbalanced"):
        hlo.parse_instruction("  %a = f32[] add(%b, %c")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse_module("HloModule empty\n")


def test_a_module_is_its_computations() -> None:
    parsed = module()
    assert parsed.entry == "main.1"
    called = ("add", "fused_gather", "fused_scatter", "fused_slice", "body", "condition", "branch")
    assert tuple(parsed.computations) == (*called, "main.1")
    assert list(parsed.computations["condition"]) == ["carry", "i", "less"]
    assert hlo.count_float64(parsed) == 2  # the constant and the tuple


def names(text: str, *, in_loop: bool) -> list[str]:
    return [kernel.instruction.name for kernel in hlo.kernels(module(text)) if kernel.in_loop == in_loop]


def test_kernels_are_what_is_launched() -> None:
    assert names(MODULE, in_loop=True) == ["less", "rows.1", "gathered", "scattered.2"]
    # Of a conditional all branches, of an asynchronous copy its start.
    assert names(MODULE, in_loop=False) == ["matmul", "copy.1", "copy.1", "copy-start.1"]


def test_the_condition_of_a_loop_is_launched_unless_its_trips_are_known() -> None:
    known = MODULE.replace("body=%body", "body=%body" + TRIPS)
    assert [loop.trip_count for loop in hlo.loops(module())] == [None]
    assert [loop.trip_count for loop in hlo.loops(module(known))] == [16]
    assert names(known, in_loop=True) == ["rows.1", "gathered", "scattered.2"]


def test_a_loop_in_a_loop_is_part_of_it() -> None:
    inner = "  %inner = (s32[], f32[1000,4]{1,0}) while(%carry), condition=%condition, body=%inner_body\n"
    at = MODULE.index("%body ("), MODULE.index("%condition (")
    body = MODULE[slice(*at)]
    text = MODULE[: at[0]] + body.replace("%body", "%inner_body") + body.replace("  ROOT", inner + "  ROOT")
    text += MODULE[at[1] :]
    assert len(hlo.loops(module(text))) == 1
    assert names(text, in_loop=True) == [
        *("less", "rows.1", "gathered", "scattered.2"),
        *("less", "rows.1", "gathered", "scattered.2"),
    ]
    assert names(text, in_loop=False) == names(MODULE, in_loop=False)


def traffic_of(name: str, text: str = MODULE) -> Traffic:
    return next(kernel.traffic for kernel in hlo.kernels(module(text)) if kernel.instruction.name == name)


def test_traffic_counts_the_elements_of_gathers_and_scatters_and_no_workspace() -> None:
    assert traffic_of("gathered") == Traffic(streamed=INDICES + ROWS + ROWS, scattered=ROWS)
    assert traffic_of("scattered.2") == Traffic(streamed=INDICES + ROWS, scattered=ROWS)
    assert traffic_of("matmul") == Traffic(streamed=2 * SQUARE)  # the operand that comes twice is read once
    assert traffic_of("copy.1") == Traffic(streamed=2 * SQUARE)


def test_an_array_that_is_gathered_from_and_read_whole_is_read_whole() -> None:
    other = "  %all = f32[] reduce(%p0, %p1), dimensions={0,1}, to_apply=%add\n  %product"
    text = MODULE.replace("  %product", other, 1)
    assert traffic_of("gathered", text) == Traffic(streamed=TABLE + INDICES + ROWS + ROWS)


def test_elements_are_gathered_from_what_is_made_of_an_array_too() -> None:
    shifted = "  %twice = f32[1000,4]{1,0} add(%p0, %p0)\n  %rows = f32[16,1,4]{2,1,0} gather(%twice, %p1)"
    text = MODULE.replace("  %rows = f32[16,1,4]{2,1,0} gather(%p0, %p1)", shifted)
    assert traffic_of("gathered", text) == traffic_of("gathered")


def test_an_array_that_is_only_renamed_is_read_and_written() -> None:
    text = """
%fused (p: f32[8]) -> f32[2,4] {
  %p = f32[8]{0} parameter(0)
  ROOT %renamed = f32[2,4]{1,0} bitcast(%p)
}

ENTRY %main (x: f32[8]) -> f32[2,4] {
  %x = f32[8]{0} parameter(0)
  ROOT %copied = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
}
"""
    assert traffic_of("copied", text) == Traffic(streamed=32 + 32)


def test_of_a_slice_and_of_a_tuple_of_results() -> None:
    text = MODULE.replace(
        "  %rows.1 = s32[16,1]{1,0} custom-call(%i), custom_call_target",
        "  %rows.1 = (f32[1,4]{1,0}, f64[2]{0}) fusion(%table, %i), calls=%fused_slice, ignored",
    )
    assert traffic_of("rows.1", text) == Traffic(streamed=16 + 4 + 16 + 16)
    updated = text.replace(
        "  %wide = f64[2]{0} constant({1, 2})",
        "  %wide = f32[100,4]{1,0} dynamic-update-slice(%p0, %slice, %p1, %zero)",
    )
    assert traffic_of("rows.1", updated) == Traffic(streamed=16 + 4 + 16 + 16)


# Memory.

BUFFERS = """BufferAssignment:
allocation 0: size 46990640, parameter 6, shape |f32[2936915,4]| at ShapeIndex {}, maybe-live-out:
 value: <12 table @0> (size=46990640,offset=0): f32[2936915,4]{1,0}
allocation 141: size 624806968, page 0, preallocated-temp:
 value: <6162 loop_add_fusion.14{} @0> (size=16,offset=624803072): (u32[1]{0}, u32[1]{0})
 value: <6164 loop_add_fusion.14{1} @0> (size=4,offset=623707648): u32[1]{0}
 value: <6171 custom-call.2 @0> (size=65536,offset=786432): pred[65536,1]{1,0}
allocation 142: size 4, thread-local:
 value: <7000 add.1 @0> (size=4,offset=0): f32[]

Total bytes used: 1093838576 (1.02GiB)
"""


def test_temporaries_are_the_arrays_of_the_temporary_allocation() -> None:
    assert hlo.parse_temporaries(BUFFERS) == [
        hlo.Temporary("loop_add_fusion.14", Array("u32", (1,))),
        hlo.Temporary("custom-call.2", Array("pred", (65536, 1))),
    ]
    assert hlo.parse_temporaries(BUFFERS.replace("preallocated-temp", "thread-local")) == []


@pytest.mark.parametrize(
    ("dims", "found"),
    [
        ((1000, 16, 8), True),
        ((8, 1000, 16), True),
        ((16, 8, 1, 1000), True),
        ((8, 1000, 16, 4), True),
        ((1000, 16, 4), False),  # features
        ((1000, 8, 4), False),  # of one level
        ((1000, 128), False),  # activations
        ((8, 16), False),
        ((), False),
    ],
)
def test_corner_arrays_are_told_by_their_axes(dims: tuple[int, ...], found: bool) -> None:
    array = Array("f32", dims)
    assert hlo.corner_arrays([array], num_levels=16, num_features=4) == [array] * found


# PTX.

PTX = """.version 8.5
.target sm_90a
.visible .entry input_scatter_fusion_1(
	.param .u64 .ptr .global .align 16 input_scatter_fusion_1_param_0
)
{
	ld.param::entry.b64 	%rd3, [input_scatter_fusion_1_param_0];
$L__BB0_2:
	@%p1 atom.relaxed.sys.global.cas.b32 	%r5, [%rd3], %r13, %r12;
	// begin inline asm
	atom.global.v4.f32.add {%r1, %r2, %r3, %r4}, [%rd1], {%r5, %r6, %r7, %r8};
	redux.sync.add.s32 %r1, %r2, %r3;
	ret;
}
.visible .entry loop_add_fusion(
{
	@!%p2 red.global.add.f32 	[%rd3], %f1;
	st.global.v4.b32 	[%rd2], {%r1, %r2, %r3, %r4};
}
"""


def test_atomics_are_found_with_their_kernels() -> None:
    cas, vector, scalar = hlo.parse_atomics(PTX)
    assert cas == hlo.Atomic(hlo.ptx_name("input_scatter_fusion.1"), "atom.relaxed.sys.global.cas.b32")
    assert scalar == hlo.Atomic("loop_add_fusion", "red.global.add.f32")
    assert [atomic.is_cas for atomic in (cas, vector, scalar)] == [True, False, False]
    assert [atomic.is_vector for atomic in (cas, vector, scalar)] == [False, True, False]


# The command.


def test_names_are_cut_to_what_tells() -> None:
    path = "jit(nerf_steps)/while/body/transpose(jvp(NerfField))/encoding/cond/branch_0_fun/scatter-add"
    assert gpu_gate.short_name(path) == "transpose(jvp(NerfField))/encoding/scatter-add"
    assert gpu_gate.short_name("") == ""


def test_what_a_user_gets_wrong_is_said() -> None:
    assert gpu_gate.parse_frame("1920x1080") == (1920, 1080)
    for text in ("1920", "0x5", "8x8x8", "ax5"):
        with pytest.raises(InputError, match="--frame"):
            gpu_gate.parse_frame(text)
    assert gpu_gate.parse_options(["xla_gpu_ftz=true", "a=1"]) == {"xla_gpu_ftz": True, "a": "1"}


def test_the_programs_are_called_with_the_shapes_of_a_run() -> None:
    programs = gpu_gate.make_programs(PRESETS["base"], num_views=3, image_size=40, frame=(1000, 500))
    assert set(programs) == {"train", "survey", "refresh", "render"}
    _, images, pixels, rates, _ = programs["train"].arguments
    assert images.rgba.shape == (3, 40, 40, 4)
    assert pixels.words.shape == (3 * 40 * 40 // 32,)
    assert rates.shape == (PRESETS["base"].train.steps_per_dispatch,)
    _, rays, _, _ = programs["render"].arguments
    assert rays.origin.shape == (500_000, 3)
    assert programs["render"].static["batching"] == GPU_BATCHING
    assert set(gpu_gate.make_programs(PRESETS["hundred_lines"], num_views=1, image_size=8, frame=(8, 8))) == {
        "train",
        "render",
    }


def test_the_other_primitives_have_programs_of_the_shapes_of_a_run() -> None:
    presets = gpu_gate.point_presets(40)
    programs = gpu_gate.make_point_programs(presets["image"], image_size=40, frame=(8, 8))
    assert programs["train"].arguments[1].pixels.shape == (40, 40, 3)
    programs = gpu_gate.make_point_programs(presets["sdf"], image_size=40, frame=(1000, 500))
    assert set(programs) == {"train", "trace"}
    assert programs["train"].arguments[1].distance.shape == (presets["sdf"].sdf.num_samples,)
    assert programs["trace"].arguments[1].origin.shape == (500_000, 3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", BOUNDS)
def test_the_programs_for_an_h100_stay_within_their_bounds(preset: str, tmp_path: Path) -> None:
    try:
        gpu_gate.check_plugin()
    except InputError as error:
        pytest.skip(str(error))
    output, bounds = tmp_path / "gate.json", BOUNDS[preset]
    command = [sys.executable, "-m", "experiments.gpu_gate", f"--preset={preset}", f"--output={output}"]
    if preset == "image":
        command.append("--image_size=4096")
    # In a process of its own, which loads the plugin, and without the options of XLA that these tests set.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, *(f"--program={name}" for name in bounds)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text(encoding="utf-8"))["programs"]
    assert set(rows) == set(bounds)
    for name, row in rows.items():
        looping, outside, megabytes, trip_counts = bounds[name]
        assert row["kernels"][0] <= looping, done.stdout
        assert row["kernels"][1] <= outside, done.stdout
        assert row["temporary_bytes"] <= megabytes * gpu_gate.MB, done.stdout
        assert row["corner_arrays"] == [], done.stdout
        assert row["trip_counts"] == trip_counts, done.stdout
        # An old jaxlib adds up rays, few and in order, by compare-and-swap; the table it must not.
        slow = [name for name in row["cas_loops"] if "scatter-add" not in name or f",{NUM_SUMS}]" not in name]
        assert slow == [] if jaxlib_version() < FAST_SCATTER_JAXLIB else row["cas_loops"] == {}, done.stdout
        assert row["float64_ops"] == 0, done.stdout
    assert rows["train"]["vector_atomics"] == {ATOMICS[preset]: 1}  # rows of the table are added to whole
