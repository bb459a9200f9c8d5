"""The benchmark of structured products: its check can fail, and without a GPU it is no error."""

import dataclasses

import pytest

from benchmarks import structured as benchmark

SHAPES = [
    benchmark.monarch(2, 8, 8, 2, 8, 8),
    benchmark.block_sparse(16, 16, 1, 2, 4),
    benchmark.block_diagonal(4, 8, 4, permuted=True),
    benchmark.butterfly(16, increasing=False),
]


def test_without_a_gpu_it_says_so(capsys):
    assert benchmark.main([]) == 0
    assert capsys.readouterr().out.startswith("skipped: no GPU here")


def test_what_is_unknown_is_refused(capsys):
    assert benchmark.main(["--only", "monarch"]) == 2
    assert "no shape monarch; one of: monarch_1024_1024_by_4" in capsys.readouterr().err
    assert benchmark.main(["--op", "dense"]) == 2
    assert "no op dense; of: monarch, block_sparse, block_diagonal" in capsys.readouterr().err


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("factor", [1.0, 0.0, 1.1])
def test_the_check_passes_what_is_right_alone(monkeypatch, shape, factor):
    def product(implementation, *arrays):
        if implementation == "gpu":
            return shape.product("blockwise", *arrays) * factor
        return shape.product(implementation, *arrays)

    scaled = dataclasses.replace(shape, product=product)
    assert benchmark.check(scaled, 8)["passed"] == (factor == 1.0)


def test_rows_of_what_runs_and_of_what_cannot(monkeypatch):
    monkeypatch.setattr(benchmark, "M", 8)
    rows = {row["by"]: row for row in benchmark.measure(SHAPES[0], 1, 0.001)}
    assert rows["blockwise"]["forward_s"] > 0 and rows["dense"]["forward_s"] > 0
    assert "cannot do this: p = 8 of the blocks" in rows["gpu"]["reason"]
    assert not benchmark.check(SHAPES[0], 8)["passed"]
