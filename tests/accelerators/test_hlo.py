"""What is read from a compiled program: cycles, bytes, loops, collectives, modules; and from a kernel's schedule."""

import pytest

from maxmap.accelerators import bundles, hlo, program
from maxmap.accelerators.hardware import HARDWARE, slice_of
from maxmap.errors import UserError

# As libtpu prints it, with what is not read left out.
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (p.0: bf16[64,32]) -> bf16[64,32] {
  %p.0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %tanh.0 = bf16[64,32]{1,0:T(8,128)(2,1)} tanh(%p.0)
}

%body.1 (arg: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %g.0 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %g.1 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %fusion.7 = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%g.1), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/jvp(Classifier)/Classifier.features/backbone/stem/while/body/tanh"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%g.0, %fusion.7)
}

%condition.1 (arg.2: (s32[], bf16[64,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %arg.2 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %g.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%g.2, %limit), direction=LT
}

ENTRY %main.2 (x: bf16[64,32], w: f32[32,1000]) -> f32[1000] {
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[32,1000]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%zero, %x)
  %while.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) while(%tuple.1), condition=%condition.1, body=%body.1
  %y = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  %fusion.8 = f32[1000]{0:T(1024)S(1)} fusion(%y, %w), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/transpose(jvp(Classifier))/head/heads_1/norm/reduce_sum"}, \
backend_config={"window_config":{"estimated_cycles":"2000"}}
  ROOT %all-reduce.1 = f32[1000]{0:T(1024)S(1)} all-reduce(%fusion.8), channel_id=3, to_apply=%fused, \
metadata={op_name="jit(step)/reduce_sum"}
}
"""


def test_cycles_run_as_often_as_their_loop():
    found = program.report(TEXT, "tpu-v5e")
    assert found["cycles"] == 5 * 100 + 2000 and found["not_counted"] == []
    assert found["seconds"] == pytest.approx(2500 / 1.5e9)
    assert found["parts"][:2] == [
        {"module": "head/heads_1/norm", "pass": "backward", "share": 0.8},
        {"module": "backbone/stem", "pass": "forward", "share": 0.2},
    ]
    assert [(row["operation"], row["share"]) for row in found["operations"][:2]] == [("reduce_sum", 0.8), ("tanh", 0.2)]
    assert found["collectives"] == {"all-reduce": {"count": 1, "bytes": 4000}}


def test_bytes_are_padded_to_tiles_and_those_on_the_chip_do_not_count():
    inside, matrix = 64 * 128 * 2, 32 * 1024 * 4  # 32 columns fill 128 lanes, 1,000 fill 1,024
    assert program.report(TEXT, "tpu-v5e")["bytes"] == 5 * 2 * inside + inside + matrix


def test_a_gpu_moves_bytes():
    plain = TEXT.replace(":T(8,128)(2,1)", "").replace(":T(8,128)", "").replace(":T(1024)S(1)", "")
    found = program.report(plain, "h100-80")
    loop, rest = 5 * 2 * 64 * 32 * 2, 64 * 32 * 2 + 32 * 1000 * 4 + 4000 + 2 * 4000
    assert found["cycles"] is None and found["bytes"] == loop + rest
    assert found["seconds"] == pytest.approx((loop + rest) / 3.35e12)


def test_a_loop_that_does_not_say_how_often_it_runs_counts_once_and_is_told():
    found = program.report(TEXT.replace("direction=LT", "direction=NE"), "tpu-v5e")
    assert found["cycles"] == 2100 and "loop while.1 counts once" in found["not_counted"][0]
    known = TEXT.replace("body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"3"}}')
    assert program.report(known, "tpu-v5e")["cycles"] == 2300


@pytest.mark.parametrize(
    ("op_name", "module"),
    [
        (
            "jit(step)/jvp(Classifier)/Classifier.features/backbone/stem/norm1/reduce_sum",
            ("backbone/stem/norm1", "forward"),
        ),
        ("jit(step)/transpose(jvp(Classifier))/head/fc/dot_general", ("head/fc", "backward")),
        ("jit(step)/jvp(Classifier)/head/attn/Dropout_0/jit(_bernoulli)/lt", ("head/attn", "forward")),
        ("jit(step)/jit(_where)/select_n", ("", "other")),
        ("state.params['backbone']['stem']['bias']", ("", "other")),
        ("", ("", "other")),
    ],
)
def test_the_module_of_an_operation(op_name, module):
    assert hlo.module(op_name) == module


SCHEDULE = """\
     0   :  { %7 = vsyncpa [#allocation3], 0 }
   0x1   :  { %9 = vsyncpa [#allocation3 + $0x1], 0 }
   0x2 LB: > { %s594 = sadd.s32 1, %s1 }
   0x3   :  {}
   0x4 LB: >> { %v1 = vld [vmem:[%s1]] }
   0x5   : >> { %v2 = vadd %v1, %v1 }
   0x6   : > { %v3 = vld [vmem:[%s2]] }
   0x7   :  { %10 = vsyncpa 1 }
"""


def test_bundles_run_as_often_as_their_loops():
    outside, grid, loop = 3, 3, 2
    assert bundles.read(SCHEDULE, 16, [(1, 7)]) == bundles.Schedule(
        outside + 16 * (grid + 7 * loop), grid + 7 * loop, True
    )
    # What the schedule does not have, or what runs as often as its data say, counts once.
    for loops in ([(1, 7), (1, 2)], [(1, None)], []):
        assert bundles.read(SCHEDULE, 16, loops) == bundles.Schedule(outside + 16 * (grid + loop), grid + loop, False)


def test_a_loop_that_the_compiler_has_unrolled_is_counted():
    straight = SCHEDULE.replace("LB: >>", "  : >").replace(": >>", ": >")
    assert bundles.read(straight, 16, [(1, 7)]) == bundles.Schedule(3 + 16 * 5, 5, True)


def test_a_bundle_that_stands_as_if_outside_does_not_end_a_loop():
    """The compiler marks single bundles between an inner loop and what follows it as those of a shallower loop."""
    last = "   0x5   : >> { %v2 = vadd %v1, %v1 }\n"
    text = SCHEDULE.replace(last, f"   0x5 LB: >>> {{ %v3 = vld }}\n   0x5   : > {{ %v4 = vnop }}\n{last}")
    assert bundles.read(text, 16, [(1, 7), (2, 5)]) == bundles.Schedule(
        3 + 16 * (4 + 7 * (2 + 5)), 4 + 7 * (2 + 5), True
    )


@pytest.mark.parametrize(
    ("hardware", "devices", "name"),
    [("tpu-v5e", 16, "v5e:4x4"), ("tpu-v5e", 1, "v5e:1x1"), ("tpu-v4", 256, "v4:4x8x8"), ("h100-80", 16, "1x2x8")],
)
def test_the_slice_of_a_number_of_devices(hardware, devices, name):
    assert slice_of(hardware, devices) == name


@pytest.mark.parametrize(
    ("hardware", "devices", "near"),
    [("tpu-v5e", 6, "4 or 8"), ("tpu-v5e", 1000, "256"), ("tpu-v4", 3, "1 or 4"), ("h100-80", 12, "8 or 16")],
)
def test_a_number_of_devices_that_no_slice_has(hardware, devices, near):
    with pytest.raises(UserError, match=f"no group of {hardware} has {devices} devices .* --devices={near}.$"):
        slice_of(hardware, devices)


def test_the_makers_figures_fit_together():
    for name, machine in HARDWARE.items():
        assert (machine.clock is not None) == name.startswith("tpu"), name
        assert 100 < machine.flops / machine.memory_bandwidth < 600, name


def test_a_reduce_scatter_of_a_tpu_is_a_fusion_around_an_all_reduce():
    text = """\
%all-reduce-scatter.1 (p: bf16[8,128]) -> bf16[4,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.2 = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=4, replica_groups=[2,2]<=[4], to_apply=%add
  %at = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.2, %at, %at), dynamic_slice_sizes={4,128}
}

ENTRY %main (x: bf16[8,128]) -> bf16[4,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.1 = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = hlo.collectives(hlo.parse(text))
    assert (found.kind, found.devices, found.returned[0].bytes, found.whole[0].bytes) == (
        "reduce-scatter",
        2,
        1024,
        2048,
    )
    assert hlo.sent(hlo.parse(text)) == {"reduce-scatter": {"count": 1, "bytes": 2048}}
