"""The gate sees products that read operands which only another branch has computed.

ptxas has made such code of a relay whose PTX was right: on a GPU some tiles lacked a step of K.
"""

from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from gate_sass import stale_descriptors
from sass_runs import stale_products

TWO_BRANCHES = """
        /*0000*/                   ULDC UR4, c[0x0][0x5ec] ;
        /*0010*/              @!P0 BRA 0x60 ;
        /*0020*/                   UIADD3.64 UR12, UR4, 0x2, URZ ;
        /*0030*/                   UMOV UR14, UR4 ;
        /*0040*/                   UMOV UR15, 0x40000040 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   NOP ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0080*/                   EXIT ;
"""


def test_a_register_set_in_one_branch_alone_is_found() -> None:
    found = stale_descriptors(TWO_BRANCHES)
    assert [line.split(": ")[1] for line in found] == [
        f"UR{register} is set by {place}, none"
        for register, place in ((12, "0x20"), (13, "0x20"), (14, "0x30"), (15, "0x40"))
    ]


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("NOP ;", "BRA 0x20 ;"),  # all ways pass the branch that sets them
        ("R24, gdesc[UR12]", "R24, R8, gdesc[UR2]"),  # it reads UR4, which all ways set, and UR5
        ("0x60 ;", "0x80 ;"),  # the other branch makes no product
    ],
)
def test_nothing_else_is_found(text: str, instead: str) -> None:
    assert not stale_descriptors(TWO_BRANCHES.replace(text, instead))


def test_two_branches_may_each_set_them_unless_it_is_to_be_one() -> None:
    sets = "UIADD3.64 UR12, UR4, 0x2, URZ"
    both = TWO_BRANCHES.replace("NOP", sets)
    places = [line.split(": ")[1] for line in stale_descriptors(both)][:2]
    assert places == ["UR12 is set by 0x20, 0x60", "UR13 is set by 0x20, 0x60"]
    assert len(stale_descriptors(both)) == 4
    assert [line.split(": ")[1] for line in stale_descriptors(both, single=False)] == [
        "UR14 is set by 0x30, none",
        "UR15 is set by 0x40, none",
    ]


def test_a_branch_that_writes_under_a_predicate_does_not_count() -> None:
    maybe = TWO_BRANCHES.replace("NOP", "@UP0 UIADD3.64 UR12, UR4, 0x2, URZ")
    assert "UR12 is set by 0x20, 0x60, none" in stale_descriptors(maybe)[0]


def test_code_behind_an_indirect_jump_is_reached() -> None:
    jump = TWO_BRANCHES.replace("@!P0 BRA 0x60", "BRX R6 -0x1e0")
    assert len(stale_descriptors(jump)) == 4


@pytest.mark.cpu("what is compiled without a GPU")
@pytest.mark.parametrize("rows", [77, 8192])
def test_the_relay_without_its_cure_is_seen(beside: ProcessPoolExecutor, rows: int) -> None:
    """And with it nothing is found: both as ptxas makes it here."""
    cure = "empty, here(index), phase, steps"
    submit = beside.submit(stale_products, rows, cure, "empty, index, phase, steps")
    assert submit.result(600)
    assert not beside.submit(stale_products, rows, cure, cure).result(600)
