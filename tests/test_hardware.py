"""Names of hardware, its figures, its compile-only devices."""

import importlib.util
import types

import jax
import numpy as np
import pytest

from efficient.errors import UserError
from efficient.planning.hardware import CHIPS, Target, peak_flops
from pallas_kernels.lab import chips as laboratory


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:3x5", r"did you mean v5e:4x4\? Valid: 1x1, 2x2, 2x4, 4x4"),
        ("v5e", "Valid: 1x1"),
        ("v5e:4x4x4", "Valid: 1x1"),
        ("v5e:axb", "Valid: 1x1"),
        ("v5p:8x8x15", r"did you mean v5p:8x8x16\?"),
        ("v5p:16x8x8", "Valid: 1x1x1"),
        ("v5p:0x4x4", "Valid: 1x1x1"),
        ("v5:2x2", "did you mean 'v5"),
        ("h200:9", "h200:N"),
        ("h200:2x", "h200:N"),
    ],
)
def test_bad_targets_get_one_line(name, says):
    with pytest.raises(UserError, match=says) as caught:
        Target.parse(name)
    assert "\n" not in str(caught.value)


def test_good_targets():
    assert Target.parse("V5E:16x16").device_count == 256
    assert Target.parse("v5p:4x4x12").topology == (4, 4, 12)
    assert Target.parse("tpu7x:2x2x1").device_count == 8
    assert Target.parse("h200").topology == (1, 1)
    assert str(Target.parse("h200:8")) == "h200:1x8"
    assert Target.parse("h200:2x8").platform == "cuda"


def test_devices_are_shaped_by_the_torus():
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    for name in ("v5e:4x8", "v5p:2x2x4", "tpu7x:2x2x1"):
        devices = Target.parse(name).devices
        for place in np.ndindex(devices.shape):
            assert tuple(devices[place].coords)[:2] == place[:2]
        assert len(set(devices.flat)) == devices.size == Target.parse(name).device_count


@pytest.mark.parametrize(
    ("name", "package", "says"),
    [("v5e:2x2", "libtpu", r"\.\[lab\]"), ("h200", "jax_cuda13_plugin", "make lab-gpu")],
)
def test_missing_compiler_is_one_line(monkeypatch, name, package, says):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == package else found(n, *a)
    )
    with pytest.raises(UserError, match=says):
        Target.parse(name).devices  # noqa: B018


def test_peak_flops_by_device_kind():
    def peak(kind):
        return peak_flops(types.SimpleNamespace(device_kind=kind))

    assert peak("TPU v5 lite") == 197e12
    assert peak("TPU v5") == peak("TPU v5p") == 459e12
    assert peak("TPU v6 lite") == 918e12
    assert peak("TPU v4") == 275e12  # megacore: a device is a chip
    assert peak("TPU7x") == 2307e12 / 2  # a device is half a chip
    assert peak("NVIDIA H200") == 989.5e12
    assert peak_flops(jax.devices()[0]) is None


def test_plans_and_the_laboratory_have_the_same_chips():
    for kind, chip in laboratory.CHIPS.items():
        assert chip.peak_flops == CHIPS[kind].peak_flops
        assert chip.hbm_bandwidth == CHIPS[kind].hbm_bandwidth
