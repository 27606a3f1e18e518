"""What a compiled program does, read from HLO text: made by hand, and of real compilers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vflax.hlo import Program, largest_bytes, shape_bytes

# A loop of 3 turns inside one of 5, a branch, a call, and a fusion's own cycles; as the TPU compiler prints them.
LOOPS = """\
HloModule jit_f, is_scheduled=true

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128] parameter(0)
  %c = f32[8,128] convolution(f32[8,128] %p, f32[8,128] %p), dim_labels=bf_io->bf
  ROOT %n = f32[8,128] negate(f32[8,128] %c), backend_config={"estimated_cycles":"9999"}
}

%inner_body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]) parameter(0)
  %x = f32[8,128] fusion(f32[8,128] %t), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %r = (s32[], f32[8,128]) tuple(%t, %x)
}

%inner_condition (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(s32[] %t, s32[] %limit), direction=LT
}

%compare (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %five = s32[]{:T(128)} constant(5)
  ROOT %less.1 = pred[] compare(s32[] %a, s32[] %five), direction=LT
}

%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]) parameter(0)
  %w = (s32[], f32[8,128]) while((s32[], f32[8,128]) %t), condition=%inner_condition, body=%inner_body
  %y = f32[8,128] fusion(%w), calls=%fused, metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"100"}
  ROOT %r = (s32[], f32[8,128]) tuple(%t, %y)
}

%condition (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  ROOT %f = pred[] fusion(s32[] %t), kind=kLoop, calls=%compare
}

%left (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128] parameter(0)
  ROOT %l = f32[8,128] fusion(f32[8,128] %p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1000"}
}

%right (p: f32[8,128]) -> f32[8,128] {
  ROOT %p = f32[8,128] parameter(0)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128] parameter(0)
  %w.1 = (s32[], f32[8,128]) while((s32[], f32[8,128]) %a), condition=%condition, body=%body
  %k = f32[8,128] custom-call(f32[8,128] %a), custom_call_target="tpu_custom_call", kernel_metadata={
}}
  %b = f32[8,128] conditional(pred[] %a, f32[8,128] %a, f32[8,128] %a), branch_computations={%left, %right}
  ROOT %out = f32[8,128] copy(f32[8,128] %b), backend_config={"estimated_cycles":"7"}
}
"""
COLLECTIVES = """\
HloModule jit_g

%scatter_fusion (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %ar = f32[64,128]{1,0} all-reduce(f32[64,128]{1,0} %p), channel_id=4, to_apply=%add
  ROOT %s = f32[16,128]{1,0} dynamic-slice(f32[64,128]{1,0} %ar)
}

%piece (p: bf16[16,128]) -> bf16[64,128] {
  %p = bf16[16,128]{1,0} parameter(0)
  ROOT %ag = bf16[64,128]{1,0} all-gather(bf16[16,128]{1,0} %p), channel_id=2, dimensions={0}
}

ENTRY %main (a: bf16[16,128]) -> f32[16,128] {
  %a = bf16[16,128]{1,0} parameter(0)
  %g = bf16[64,128]{1,0} all-gather(bf16[16,128]{1,0} %a), channel_id=1, dimensions={0}
  %f.1 = bf16[64,128]{1,0} fusion(bf16[16,128]{1,0} %a), kind=kCustom, calls=%piece
  %f.2 = bf16[64,128]{1,0} fusion(bf16[16,128]{1,0} %a), kind=kCustom, calls=%piece
  %st = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(bf16[16,128]{1,0} %a), channel_id=3, dimensions={0}
  %dn = bf16[64,128]{1,0} all-gather-done((bf16[16,128]{1,0}, bf16[64,128]{1,0}) %st)
  %f.3 = f32[16,128]{1,0} fusion(f32[64,128]{1,0} %f.2), kind=kCustom, calls=%scatter_fusion
  %rs = f32[16,128]{1,0} reduce-scatter(f32[64,128]{1,0} %f.2), channel_id=5, dimensions={0}
  ROOT %r = f32[16,128]{1,0} all-reduce(f32[16,128]{1,0} %rs), channel_id=6, to_apply=%add
}
"""


def test_cycles_of_loops_are_multiplied_out_and_those_inside_fusions_left_out():
    assert Program(LOOPS).cycles == 5 * (100 + 3 * 10) + 1000 + 7


def test_a_loop_turns_as_often_as_its_condition_says_be_it_inside_a_fusion():
    program = Program(LOOPS)
    assert (program.trips("condition"), program.trips("inner_condition")) == (5, 3)
    assert program.trips("left") == 1


def test_the_outermost_loops_are_told_with_what_a_turn_costs():
    ((instruction, turns, cycles, nested),) = Program(LOOPS).loops()
    assert (instruction.name, turns, cycles, nested) == ("w.1", 5, 130, True)


def test_the_slowest_come_first_with_how_often_they_run():
    first, second, *_ = Program(LOOPS).slowest()
    assert (first[0], first[1], first[2].name) == (1000, 1, "l")
    assert (second[0], second[1], second[2].op_name) == (500, 5, "jit(f)/mul")


def test_a_kernels_own_text_does_not_end_a_computation():
    program = Program(LOOPS)
    assert program.kernels() == {"tpu_custom_call": 1}
    assert program.computations["main"][-1].name == "out"


def test_shapes_are_found_inside_fusions():
    assert list(Program(LOOPS).shapes("convolution")) == [(8, 128)]


def test_bytes_of_collectives_by_kind_each_channel_once():
    gathered, reduced = 64 * 128 * 2, 64 * 128 * 4
    assert Program(COLLECTIVES).collective_bytes() == {
        # channel 1, channel 2 that two fusions share, channel 3 that is started and done
        "all-gather": 3 * gathered,
        # one by its opcode, one that is an all-reduce of which a slice is kept
        "reduce-scatter": 2 * reduced,
        "all-reduce": 16 * 128 * 4,
    }


@pytest.mark.parametrize(
    ("shape", "size", "largest"),
    [
        ("f32[2,3]{1,0}", 24, 24),
        ("(bf16[4], pred[3], s32[])", 8 + 3 + 4, 8),
        ("f8e4m3fn[16]{0:T(256)}", 16, 16),
        ("s4[8]", 4, 4),
    ],
)
def test_bytes_of_a_type(shape: str, size: int, largest: int):
    assert (shape_bytes(shape), largest_bytes(shape)) == (size, largest)


def test_a_real_scan_on_a_cpu_is_found_with_its_turns():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 16)), jnp.ones((6, 16, 16))
    program = Program(jax.jit(f).lower(x, w).compile().as_text())
    assert [(turns, nested) for _, turns, _, nested in program.loops()] == [(6, False)]
    assert program.cycles == 0  # only the TPU's compiler estimates


def test_a_real_scan_on_a_tpu_costs_its_body_times_its_turns(tpu_compiler):
    from vflax import aot

    (device,) = aot.find_target("v5e-1").devices
    where = jax.sharding.SingleDeviceSharding(device)

    def cycles(length: int) -> int:
        def f(x, w):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length)[0]

        x, w = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in ((512, 512), (512, 512))
        )
        return Program(jax.jit(f).lower(x, w).compile().as_text()).cycles

    assert cycles(40) / cycles(20) == pytest.approx(2, rel=0.1)
