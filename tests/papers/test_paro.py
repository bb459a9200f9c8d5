"""PaRO: redundancy within groups of devices against traffic between them.

The programs are those of `test_amsp`: a step on sixteen chips, four groups of four.
"""

import pytest
from test_amsp import (
    ALL,
    BLOCKS,
    GROUP,
    GROUPS,
    HEAD,
    OF_TABLE,
    SMALL,
    SUMMED,
    TABLE,
    between,
    by_blocks,
    planned,
    sent,
)

from configs import paro
from efficient.parallel.scope_costs import Job, cost
from efficient.parallel.scopes import LAYOUTS, Scopes

MICROBATCHES = 4


def across(found):
    """Bytes that a device sends to other groups alone."""
    return sum(size for (_, axes), size in found.items() if axes == ("data",))


@pytest.mark.slow
def test_redundancy_buys_traffic_between_groups():
    """With all states kept whole in a group, or with parameters and several microbatches."""
    full, mics = by_blocks("zero_3"), by_blocks("mics")
    assert across(sent(mics)) < across(sent(full))
    states = {s: planned(s).memory.labelled for s in (full, mics)}
    for kind in ("parameters", "optimizer"):
        assert 3.9 < states[mics][kind] / states[full][kind] < GROUPS

    mixed = by_blocks("mixed")
    found = {s: across(sent(s, MICROBATCHES)) for s in (full, mixed)}
    once = between(4 * ALL)  # the updated parameters, float32
    assert found[mixed] == MICROBATCHES * between(SUMMED) + once
    # Under `global` blocks are gathered in each of both passes, and what is outside of them once.
    read = MICROBATCHES * between(2 * 2 * BLOCKS) + between(2 * (TABLE + HEAD))
    assert found[full] == MICROBATCHES * between(SUMMED) + read
    assert found[mixed] < 0.6 * found[full]
    states = {s: planned(s, MICROBATCHES).memory.labelled for s in (full, mixed)}
    assert states[mixed]["optimizer"] == states[full]["optimizer"]
    assert 3.9 < states[mixed]["parameters"] / states[full]["parameters"] < GROUPS


@pytest.mark.slow
def test_each_collective_stays_within_groups_or_between_them():
    for name in ("zero_3", "mics"):
        found = sent(by_blocks(name))
        assert {key for key in found if key[1] not in (("fsdp",), ("data",))} == set(OF_TABLE)
    alone = [one for one in planned(LAYOUTS["zero_3"]).collectives if one.wire >= SMALL]
    assert any(one.axes == ("data", "fsdp") and one.kind == "all-gather" for one in alone)


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_what_redundant_parameters_save_between_groups(microbatches):
    """Every pass' gather of 2 bytes a parameter, for one of the float32 masters a step."""
    job = Job(1e9, GROUP, GROUPS, microbatches=microbatches)
    full = cost(Scopes("global", "global", "global"), job)
    mixed = cost(Scopes("group", "global", "global"), job)
    share = 1e9 / GROUP * (GROUPS - 1) / GROUPS
    assert full.within == mixed.within
    assert full.between == pytest.approx(share * 6 * microbatches)
    assert mixed.between == pytest.approx(share * (2 * microbatches + 4))
    extra = 6e9 / GROUP - 6e9 / (GROUP * GROUPS)  # master weights and their copy
    assert mixed.total - full.total == pytest.approx(extra)


def test_the_config_is_one_of_the_layouts():
    config = paro.get_config("smoke,groups=2,gradients=group")
    assert Scopes.parse(config.scopes) == Scopes("group", "group", "global", "block")
    assert (config.mesh.data, config.mesh.fsdp) == (2, -1)
