"""What a compiled program does, read from HLO text: made by hand, and of real compilers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vflax.hlo import BETWEEN_SLICES, Program, largest_bytes, shape_bytes

# A loop of 3 turns inside one of 5, a branch, a call, and a fusion's own cycles; as the TPU compiler prints them.
LOOPS = """\
HloModule jit_f, is_scheduled=true

%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128] parameter(0)
  %c = f32[8,128] convolution(%p, %p), dim_labels=bf_io->bf
  ROOT %n = f32[8,128] negate(%c), backend_config={"estimated_cycles":"9999"}
}

%inner_body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]) parameter(0)
  %x = f32[8,128] fusion(%t), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %r = (s32[], f32[8,128]) tuple(%t, %x)
}

%inner_condition (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%t, %limit), direction=LT
}

%compare (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %five = s32[]{:T(128)} constant(5)
  ROOT %less.1 = pred[] compare(%a, %five), direction=LT
}

%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]) parameter(0)
  %w = (s32[], f32[8,128]) while(%t), condition=%inner_condition, body=%inner_body
  %y = f32[8,128] fusion(%w), calls=%fused, metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"100"}
  ROOT %r = (s32[], f32[8,128]) tuple(%t, %y)
}

%condition (t: (s32[], f32[8,128])) -> pred[] {
  %t = (s32[], f32[8,128]) parameter(0)
  ROOT %f = pred[] fusion(%t), kind=kLoop, calls=%compare
}

%left (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128] parameter(0)
  ROOT %l = f32[8,128] fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1000"}
}

%right (p: f32[8,128]) -> f32[8,128] {
  ROOT %p = f32[8,128] parameter(0)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128] parameter(0)
  %w.1 = (s32[], f32[8,128]) while(%a), condition=%condition, body=%body
  %k = f32[8,128] custom-call(%a), custom_call_target="tpu_custom_call", kernel_metadata={
}}
  %b = f32[8,128] conditional(%a, %a, %a), branch_computations={%left, %right}
  ROOT %out = f32[8,128] copy(%b), backend_config={"estimated_cycles":"7"}
}
"""
# The same format: operands by name alone.
COLLECTIVES = """\
HloModule jit_g

%scatter_fusion (p: f32[64,128]) -> f32[16,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %ar = f32[64,128]{1,0:T(8,128)} all-reduce(%p), channel_id=3, to_apply=%add
  ROOT %s = f32[16,128]{1,0:T(8,128)} dynamic-slice(%ar, %zero), dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[16,128], b: f32[64,128]) -> f32[16,128] {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,128]{1,0:T(8,128)} parameter(1)
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=1, dimensions={0}
  %st = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-gather-start(%a), channel_id=2
  %dn = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%st)
  %f = f32[16,128]{1,0:T(8,128)} fusion(%b), kind=kCustom, calls=%scatter_fusion
  %rs = f32[16,128]{1,0:T(8,128)} reduce-scatter(%b), channel_id=4, dimensions={0}, to_apply=%add
  ROOT %r = f32[16,128]{1,0:T(8,128)} all-reduce(%rs), channel_id=5, to_apply=%add
}
"""
# Two permutes on one channel.
PERMUTE = "(bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)})"
PERMUTES = f"""\
HloModule jit_p

ENTRY %main (a: bf16[16,128]) -> bf16[16,128] {{
  %a = bf16[16,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %st = {PERMUTE} collective-permute-start(%a), channel_id=1
  %dn = bf16[16,128]{{1,0:T(8,128)(2,1)}} collective-permute-done(%st)
  %st.1 = {PERMUTE} collective-permute-start(%dn), channel_id=1
  ROOT %dn.1 = bf16[16,128]{{1,0:T(8,128)(2,1)}} collective-permute-done(%st.1)
}}
"""
# A reduction over two slices and a callback to the host, as the TPU compiler prints them.
SENT = "f32[16,128]{1,0:T(8,128)}"
MEGASCALE = (
    '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
)
SENDS = f"""\
HloModule jit_s

ENTRY %main (a: f32[16,128]) -> f32[16,128] {{
  %a = {SENT} parameter(0)
  %after-all = token[] after-all()
  %send = ({SENT}, u32[], token[]) send(%a, %after-all), is_host_transfer=true, frontend_attributes={{{MEGASCALE}}}
  %recv = ({SENT}, u32[], token[]) recv(%after-all), is_host_transfer=true, frontend_attributes={{{MEGASCALE}}}
  %send-done = token[] send-done(%send), is_host_transfer=true, frontend_attributes={{{MEGASCALE}}}
  %recv-done = ({SENT}, token[]) recv-done(%recv), is_host_transfer=true, frontend_attributes={{{MEGASCALE}}}
  %send.1 = ({SENT}, u32[], token[]) send(%a, %after-all), is_host_transfer=true, frontend_attributes={{handler="x"}}
  ROOT %r = {SENT} get-tuple-element(%recv-done), index=0
}}
"""
# A loop of 5 turns with the first peeled off, whose all-gather starts before another loop, goes on in it and ends after
# it, while that of a later turn starts and ends in its turn; their channels are the same.
PEELED = """\
HloModule jit_h

%begin (p: bf16[16,128]) -> (bf16[16,128], bf16[64,128]) {
  %p = bf16[16,128] parameter(0)
  %ag = bf16[64,128] all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[16,128], bf16[64,128]) tuple(%p, %ag)
}

%go_on (p: bf16[16,128]) -> (bf16[16,128], bf16[64,128]) {
  %p = bf16[16,128] parameter(0)
  %ag.1 = bf16[64,128] all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[16,128], bf16[64,128]) tuple(%p, %ag.1)
}

%end (p: bf16[16,128]) -> bf16[64,128] {
  %p = bf16[16,128] parameter(0)
  ROOT %ag.2 = bf16[64,128] all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
}

%begin.1 (p: bf16[16,128]) -> (bf16[16,128], bf16[64,128]) {
  %p = bf16[16,128] parameter(0)
  %ag.3 = bf16[64,128] all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %t = (bf16[16,128], bf16[64,128]) tuple(%p, %ag.3)
}

%end.1 (p: bf16[16,128]) -> bf16[64,128] {
  %p = bf16[16,128] parameter(0)
  ROOT %ag.4 = bf16[64,128] all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="1"}
}

%other_body (t: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %t = (s32[], bf16[16,128]) parameter(0)
  %x = bf16[16,128] get-tuple-element(%t), index=1
  %piece = (bf16[16,128], bf16[64,128]) fusion(%x), kind=kCustom, calls=%go_on
  ROOT %r = (s32[], bf16[16,128]) tuple(%t, %x)
}

%other_condition (t: (s32[], bf16[16,128])) -> pred[] {
  %t = (s32[], bf16[16,128]) parameter(0)
  %limit = s32[]{:T(128)} constant(23)
  ROOT %less = pred[] compare(%t, %limit), direction=LT
}

%body (loop_peel_param: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %loop_peel_param = (s32[], bf16[16,128]) parameter(0)
  %x = bf16[16,128] get-tuple-element(%loop_peel_param), index=1
  %start.1 = (bf16[16,128], bf16[64,128]) fusion(%x), kind=kCustom, calls=%begin.1
  %done.1 = bf16[64,128] fusion(%x), kind=kCustom, calls=%end.1
  %ar.1 = bf16[64,128] all-reduce(%done.1), channel_id=2, to_apply=%add
  ROOT %r = (s32[], bf16[16,128]) tuple(%loop_peel_param, %x)
}

%condition (loop_peel_cond_param: (s32[], bf16[16,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %loop_peel_cond_param = (s32[], bf16[16,128]) parameter(0)
  ROOT %less = pred[] compare(%loop_peel_cond_param, %limit), direction=LT
}

ENTRY %main (a: bf16[16,128]) -> bf16[16,128] {
  %a = bf16[16,128] parameter(0)
  %start = (bf16[16,128], bf16[64,128]) fusion(%a), kind=kCustom, calls=%begin
  %w = (s32[], bf16[16,128]) while(%a), condition=%other_condition, body=%other_body
  %done = bf16[64,128] fusion(%a), kind=kCustom, calls=%end
  %ar = bf16[64,128] all-reduce(%done), channel_id=2, to_apply=%add
  %w.1 = (s32[], bf16[16,128]) while(%a), condition=%condition, body=%body
  ROOT %out = bf16[16,128] get-tuple-element(%w.1), index=1
}
"""


def test_cycles_of_loops_are_multiplied_out_and_those_inside_fusions_left_out():
    assert Program(LOOPS).cycles == 5 * (100 + 3 * 10) + 1000 + 7


def test_a_loop_turns_as_often_as_its_condition_says_be_it_inside_a_fusion():
    program = Program(LOOPS)
    assert (program.trips("condition"), program.trips("inner_condition")) == (5, 3)
    assert program.trips("left") == 1


def test_a_counter_may_be_unsigned():
    # As that of the loops that the compiler makes of a windowed einsum.
    program = Program(LOOPS.replace("%limit = s32[]", "%limit = u32[]"))
    assert program.cycles == Program(LOOPS).cycles


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


def test_bytes_are_the_result_of_an_all_gather_and_the_operand_of_the_others():
    gathered, reduced = 64 * 128 * 2, 64 * 128 * 4
    assert Program(COLLECTIVES).collective_bytes() == {
        "all-gather": 2 * gathered,  # one of them started and done
        # one by its opcode, one that is an all-reduce of which a slice is kept
        "reduce-scatter": 2 * reduced,
        "all-reduce": 16 * 128 * 4,
    }


def test_operands_may_be_printed_with_their_types():
    typed = COLLECTIVES.replace("reduce-scatter(%b)", "reduce-scatter(f32[64,128]{1,0:T(8,128)} %b)")
    assert typed != COLLECTIVES
    assert Program(typed).collective_bytes() == Program(COLLECTIVES).collective_bytes()


def test_each_permute_counts_its_operand_whatever_its_channel():
    assert Program(PERMUTES).collective_bytes() == {"collective-permute": 2 * 16 * 128 * 2}


def test_what_is_sent_to_other_slices_counts_once_and_a_callback_does_not():
    assert Program(SENDS).collective_bytes() == {BETWEEN_SLICES: 16 * 128 * 4}


def test_a_peeled_turn_and_the_loops_other_turns_count_together_as_all_turns():
    assert Program(PEELED).trips("condition") == 4
    assert Program(PEELED).collective_bytes()["all-reduce"] == (1 + 4) * 64 * 128 * 2


def test_a_chain_of_fusions_counts_once_for_each_start_though_a_loop_lies_before_its_end():
    assert Program(PEELED).collective_bytes()["all-gather"] == (1 + 4) * 64 * 128 * 2


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
