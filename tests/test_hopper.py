"""A Hopper kernel through the real compiler in every run of the tests, where that compiler is.

The tests of each op compile all of its kernels, and are slow.
"""

import hopper_checks


def test_attention_compiles_for_an_h200_without_spills():
    names = {"attention_forward", "attention_backward_queries", "attention_backward_keys"}
    hopper_checks.compiles_without_spills("attention", "hopper_4k_h64", names, ["backward"])
