"""The bound on bandwidth counts what the streaming loop issues, and reports what fell."""

import pytest

pytest.importorskip("triton")

import bandwidth
from bandwidth import Loop, fallen, share, streaming_loop

LISTING = """
.text.rows_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0040*/                   LDS.128 R8, [R5] ;
        /*0050*/                   FFMA R9, R8, R9, R10 ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
        /*0070*/                   FMUL R9, R9, R11 ;
.L_x_2:
        /*0080*/                   SHFL.BFLY PT, R9, R9, 0x10, 0x1f ;
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def test_the_loop_is_the_one_that_copies_without_what_a_branch_skips():
    assert [name.split(".")[0] for name in streaming_loop(LISTING)] == ["LDGSTS", "LDS", "FFMA", "BRA", "SHFL", "BRA"]


# A tile of 1 KB and four warps, one a scheduler. An H100's multiprocessor has 1.85 cycles and 22.7 bytes a nanosecond.
@pytest.mark.parametrize(
    ("loop", "cycles"),
    [
        (Loop(100, 10, 512, 1024, 4, 64, 1, 2048), 100),  # issue
        (Loop(100, 60, 512, 1024, 4, 64, 1, 2048), 120),  # half the rate
        (Loop(100, 10, 128 * 50, 1024, 4, 64, 1, 2048), 200),  # four warps on one pipe
    ],
)
def test_the_busiest_unit_bounds_the_share(loop, cycles):
    per_nanosecond = 1024 / cycles * 1.85
    assert share(loop, "H100") == pytest.approx(100 * per_nanosecond / (3000 / 132))
    assert share(loop, "H200") == pytest.approx(share(loop, "H100") * 3000 / 4200)


def test_what_fell_by_more_than_the_tolerance_or_has_no_partner_is_a_problem():
    before = {"a": {"H100": 90, "H200": 80}, "b": {"H100": 90, "H200": 80}, "gone": {"H100": 1, "H200": 1}}
    now = {"a": {"H100": 87, "H200": 80}, "b": {"H100": 95, "H200": 76}, "new": {"H100": 1, "H200": 1}}
    assert fallen(before, before) == []
    assert fallen(now, before) == [
        "b: 76 % of the bandwidth of an H200, 80 % before",
        "gone: compiled no more; run with --write",
        "new: not in bandwidth.json; run with --write",
    ]


def test_every_case_is_committed():
    assert {f"{case.form} {case.width} {case.layout}" for case in bandwidth.CASES} == set(bandwidth.committed())
