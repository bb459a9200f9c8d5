"""`train.py --plan`: a config's own train step on hardware that is not here, as text and JSON."""

import json

import pytest

import train as train_script
from efficient.planning.plan import Plan

SMOKE = "--config=configs/quickstart.py:smoke"


@pytest.fixture(autouse=True)
def libtpu():
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")


def planned(capsys, *flags) -> str:
    capsys.readouterr()
    train_script.main(["train.py", *flags])
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_as_json(capsys):
    """The two-layer model of the smoke run, 64 wide, on 4 chips: what it holds, by hand."""
    text = planned(capsys, SMOKE, "--plan=v5e:2x2", "--json")
    found, said = Plan.from_json(text), json.loads(text)["report"]
    assert (found.target, found.devices, found.mesh["data"], found.fits) == ("v5e:2x2", 4, 4, True)
    block = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 2 * 2 * 64
    parameters = 256 * 64 + 64 * 64 + 2 * block + 2 * 64
    assert found.memory.labelled["parameters"] == 4 * parameters  # copies: the mesh is data alone
    moments = found.memory.labelled["optimizer"] - 2 * 4 * parameters
    assert 0 <= moments <= 64  # beside the two moments, counters
    assert found.memory.labelled["batch"] == 2 * 4 * 64  # one row of tokens and targets a device
    products = 4 * 64 * 64 + 2 * 64 * 256  # of a block
    tokens = 4 * 64  # of a batch
    dense = 3 * 2 * tokens * (2 * products + 256 * 64)
    assert dense <= found.flops.model - found.flops.kernels < 1.001 * dense
    assert found.flops.kernels > 0  # attention is the TPU's, as it would be there
    assert {c.kind for c in found.collectives} == {"all-reduce"}  # of gradients
    assert sum(c.payload * c.runs for c in found.collectives) >= 4 * parameters
    assert 0 < found.roofline.overlapped <= found.roofline.serial
    assert said["verdict"].startswith("FITS") and "not a measurement" in said["prediction"]["note"]
    least = said["prediction"]["all_overlapped"]
    assert least["seconds"] == found.roofline.overlapped
    at_peak = found.flops.model / (4 * found.peak_flops)
    assert least["mfu"] == pytest.approx(at_peak / least["seconds"]) and least["mfu"] < 1
    assert [row["kind"] for row in said["collectives"]] == ["all-reduce"]


def test_a_plan_that_does_not_fit_says_so_and_exits_with_3(capsys):
    with pytest.raises(SystemExit) as ended:
        planned(capsys, SMOKE, "--config.batch_size=1048576", "--plan=v5e:1x1")
    assert ended.value.code == 3
    text = capsys.readouterr().out
    assert "verdict: DOES NOT FIT" in text and "of 15.75 GiB" in text
    assert "largest values of the step" in text
