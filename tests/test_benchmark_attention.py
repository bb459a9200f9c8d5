"""The benchmark of attention: its check can fail, its rows say why, and no GPU is no error."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention as benchmark
from pallas_kernels.attention import attention

SHAPE = benchmark.Shape("small", 1, 64, 4, 2, 16, True)


def test_without_a_gpu_it_says_so(capsys):
    assert benchmark.main(["--quick"]) == 0
    assert capsys.readouterr().out.startswith("skipped: no GPU here")


def test_an_unknown_shape_is_refused(capsys):
    assert benchmark.main(["--only", "causal_4k"]) == 2
    assert "no shape causal_4k; one of: full_512_h64" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.0, 0.0, 1.1])
def test_the_check_passes_what_is_right_alone(monkeypatch, factor):
    def scaled(q, k, v, *, implementation, mask):
        factor_here = factor if implementation == "blockwise" else 1.0
        return attention(q, k, v, mask=mask, implementation=implementation) * factor_here

    monkeypatch.setattr(benchmark, "attention", scaled)
    assert benchmark.check(SHAPE, "blockwise")["passed"] == (factor == 1.0)


def test_rows_of_what_runs_and_of_what_cannot():
    rows = {row["by"]: row for row in benchmark.measure(SHAPE, ["blockwise", "gpu"], 1, 0.001)}
    assert rows["blockwise"]["forward_s"] > 0 and "reason" not in rows["blockwise"]
    assert "needs a GPU" in rows["gpu"]["reason"]
    assert not benchmark.check(SHAPE, "gpu")["passed"]


def test_the_check_of_repeats_sees_one_bit(monkeypatch, capsys):
    right = benchmark.check_repeats(SHAPE, "blockwise")
    assert right == {"case": "small", "calls": 5, "differ": [], "passed": True}
    of_jax, calls = benchmark.of_jax, []

    def wandering(shape, implementation):
        forward, step = of_jax(shape, implementation)

        def one_bit_off(*arrays):
            calls.append(step(*arrays))
            found = list(calls[-1])
            if len(calls) == 4:
                bits = jax.lax.bitcast_convert_type(found[2], jnp.uint16)
                found[2] = jax.lax.bitcast_convert_type(bits.at[0, 5, 1, 3].add(1), jnp.bfloat16)
            return found

        return forward, one_bit_off

    monkeypatch.setattr(benchmark, "of_jax", wandering)
    found = benchmark.check_repeats(SHAPE, "blockwise")
    benchmark.say_repeats(found)
    assert len(calls) == 5 and found["differ"] == ["dk"] and not found["passed"]
    assert "FAILED  arrays whose bits differ: dk" in capsys.readouterr().out
    monkeypatch.undo()
    assert "needs a GPU" in benchmark.check_repeats(SHAPE, "gpu")["reason"]
