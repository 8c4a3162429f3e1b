"""Collectives read from HLO text, in the forms that XLA writes for CPUs and for TPUs."""

from __future__ import annotations

import pytest

from kafjax.parallel.hlo import Collective, bytes_by_kind, collectives

NOTED = """HloModule step

%body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %g = f32[16,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = (s32[], f32[16,8]) all-reduce(%a, %g), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%cond (p: (s32[], f32[16,8])) -> pred[] {
  ROOT %c = pred[] custom-call(%p)
}

ENTRY %main (a: f32[16,8]) -> f32[16,8] {
  %w = (s32[], f32[16,8]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%k), replica_groups=[1,8]<=[8], dimensions={0}
  %d = bf16[16,8]{1,0} all-gather-done(%s)
  ROOT %p = f32[16,8]{1,0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}
"""

# Without a note of how long a loop is, and with groups by mesh axes.
NAMED = """HloModule step

%body.1 (p: (s32[], bf16[4,4])) -> (s32[], bf16[4,4]) {
  %r = bf16[4,4]{1,0:T(8,128)(2,1)} reduce-scatter(%x), replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={0}
  ROOT %t = (s32[]{:T(128)}, bf16[4,4]{1,0}) all-to-all(%r), replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1':(2)4}
}

%cond.1 (p: (s32[], bf16[4,4])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(12)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.5), direction=LT, metadata={op_name="while/cond/lt"}
}

ENTRY %main.2 (a: bf16[4,4]) -> bf16[4,4] {
  ROOT %w = (s32[], bf16[4,4]{1,0}) while(%t), condition=%cond.1, body=%body.1
}
"""

# One gather that begins in one fusion, goes on beside a product, and is waited for in a third.
SPREAD = """HloModule step

%fused.1 (p: bf16[2,8]) -> (bf16[2,8], bf16[16,8], u32[]) {
  %g.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %s = (bf16[2,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: bf16[2,8]) -> (f32[4,4], bf16[16,8]) {
  %g.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (f32[4,4]{1,0}, bf16[16,8]{1,0}) tuple(%product, %g.2)
}

%fused.3 (p: bf16[2,8]) -> bf16[16,8] {
  %g.3 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = bf16[16,8]{1,0} custom-call(%p, %g.3), custom_call_target="AsyncCollectiveDone"
}

%body.1 (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  ROOT %f = (f32[4,4]{1,0}, bf16[16,8]{1,0}) fusion(%p), kind=kOutput, calls=%async_collective_fusion.2
}

ENTRY %main.3 (a: bf16[2,8]) -> bf16[16,8] {
  %f.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%fused.1
  %w = (s32[], f32[4,4]{1,0}) while(%t), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"4"}}
  %other = bf16[16,8]{1,0} all-gather(%a), channel_id=8, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %f.3 = bf16[16,8]{1,0} fusion(%f.1), kind=kCustom, calls=%fused.3
}
"""


def test_loops_groups_and_asynchronous_pairs():
    assert collectives(NOTED) == [
        Collective("all-gather", "f32[16,8]", 512, 512, 4, 3),
        Collective("all-reduce", "f32[16,8]", 512, 516, 8, 3),
        Collective("all-gather", "bf16[16,8]", 256, 256, 8, 1),
        Collective("collective-permute", "f32[16,8]", 512, 512, 2, 1),
    ]


def test_a_scan_whose_length_is_only_in_its_condition():
    assert collectives(NAMED) == [
        Collective("reduce-scatter", "bf16[4,4]", 32, 32, 8, 12),
        Collective("all-to-all", "bf16[4,4]", 32, 36, 8, 12),
    ]


def test_a_collective_spread_over_fusions_counts_once():
    assert collectives(SPREAD) == [Collective("all-gather", "bf16[16,8]", 256, 256, 8, 1)] * 2


@pytest.mark.parametrize(
    ("kind", "sent"),
    # A ring of four: every device passes three quarters on; a reduction is a scatter and a gather.
    [
        ("all-gather", 75),
        ("all-reduce", 150),
        ("reduce-scatter", 300),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_bytes_that_a_ring_sends(kind, sent):
    one = Collective(kind, "u8[100]", 100, 100, 4, 1)
    assert one.sent == sent
    twice = Collective(kind, "u8[100]", 100, 100, 4, 2)
    assert bytes_by_kind([one, twice]) == {kind: {"count": 3, "bytes": 300, "sent": 3 * sent}}
