"""Plans of small programs for hardware that is not here, against figures worked out by hand."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient.errors import UserError
from efficient.planning import plan as plan_lib
from efficient.planning.flops import FlopCount
from efficient.planning.hardware import CHIPS, Target
from efficient.planning.memory import device_bytes, refused_bytes
from efficient.planning.plan import Plan, plan
from efficient.planning.roofline import NOT_COUNTED, read_work
from pallas_kernels import tpu_chip

P = PartitionSpec
B, D, F, L = 512, 1024, 2048, 6


@pytest.fixture(scope="module")
def target():
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    return Target.parse("v5e:2x2")


@pytest.fixture(scope="module")
def mesh(target):
    return Mesh(target.devices, ("fsdp", "tensor"))


def _on(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


@pytest.fixture(scope="module")
def train(target, mesh):
    """A donated step of SGD with momentum through a scan of checkpointed blocks."""

    def block(x, w):
        h = jnp.tanh(x @ w["up"].astype(x.dtype))
        y = jnp.tanh(h @ w["down"].astype(x.dtype))
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("fsdp"))), None

    def loss(weights, x):
        return jax.lax.scan(jax.checkpoint(block), x, weights)[0].astype(jnp.float32).mean()

    def step(state, x):
        grads = jax.grad(loss)(state["weights"], x)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
        weights = jax.tree.map(lambda w, m: w - m, state["weights"], momentum)
        return {"weights": weights, "momentum": momentum}

    def weights():
        return {
            "up": _on(mesh, (L, D, F), None, "fsdp", "tensor"),
            "down": _on(mesh, (L, F, D), None, "tensor", "fsdp"),
        }

    state = {"weights": weights(), "momentum": weights()}
    x = _on(mesh, (B, D), "fsdp", dtype=jnp.bfloat16)
    labels = {"parameters": state["weights"], "optimizer": state["momentum"]}
    args = (state, x)
    return plan(jax.jit(step, donate_argnums=0), args, target=target, mesh=mesh, labels=labels)


def test_memory_of_arguments_is_exact(train):
    weights = 2 * L * D * F * 4 // 4  # float32, over fsdp 2 x tensor 2
    batch = B * D * 2 // 2  # bfloat16, over fsdp 2
    assert train.memory.labelled == {"parameters": weights, "optimizer": weights}
    assert train.memory.other_arguments == batch
    # Multiples of the (8, 128) tile: the compiler pads nothing.
    assert train.memory.arguments == 2 * weights + batch
    assert train.memory.aliased == 2 * weights
    assert train.fits
    assert train.memory.total < train.memory.available == CHIPS["v5e"].hbm_bytes


def test_flops_of_the_train_step_are_exact(train):
    forward = L * 2 * (2 * B * D * F)
    assert train.flops.model == 3 * forward
    assert train.flops.recomputed == forward
    assert train.flops.notes == ()
    # The last product of the forward loop feeds only the value, which nobody asked for, yet the
    # loop must run it; so the compiled program executes exactly what the jaxpr says.
    assert train.device_flops * 4 == train.flops.total


def test_fsdp_gathers_weights_and_scatters_gradients(train):
    gathers = [c for c in train.collectives if c.kind == "all-gather" and c.axes == ("fsdp",)]
    shard = D * F * 2 // 4  # bfloat16: cast before it is sent
    assert {c.group for c in gathers} == {2}
    # Up and down, in the forward loop, again in the backward loop.
    assert sum(c.runs for c in gathers) == 2 * 2 * L
    assert sum(c.wire for c in gathers) == 2 * 2 * L * shard
    scattered = [c for c in train.collectives if c.kind == "reduce-scatter"]
    assert sum(c.wire for c in scattered) == 2 * L * shard


def test_roofline_is_peak_rates(train):
    roof, chip = train.roofline, CHIPS["v5e"]
    assert roof.compute == pytest.approx(train.flops.total / 4 / chip.peak_flops)
    assert roof.memory == train.hbm_bytes / chip.hbm_bandwidth
    assert roof.interconnect == pytest.approx(sum(c.seconds for c in train.collectives))
    assert roof.overlapped == max(roof.compute, roof.memory, roof.interconnect)
    assert roof.serial == roof.compute + roof.memory + roof.interconnect
    assert max(roof.compute, roof.memory) <= roof.operations * (1 + 1e-9)
    used = train.utilization(roof.compute, recomputed=True)
    assert used == pytest.approx(1.0)


def test_json_round_trip(train):
    assert Plan.from_json(train.to_json()) == train
    other = dataclasses.replace(train, hbm_bytes=train.hbm_bytes + 1)
    assert Plan.from_json(other.to_json()) != train


def test_text_says_what_matters(train):
    text = train.to_text()
    assert "verdict: FITS" in text
    assert "PREDICTION" in text
    assert "parameters" in text
    assert "reduce-scatter" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_gpus_share_of_the_flops_is_not_called_compiled(train):
    text = jax.jit(jnp.dot).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile().as_text()
    flops, mesh = FlopCount(96, 0, 0, ()), Mesh(np.array(jax.devices()[:1]), ("data",))
    work = read_work(text, flops, Target.parse("h200"), mesh)
    assert (work.flops, work.notes) == (96, (NOT_COUNTED,))
    assert "of executed" in train.to_text()
    assert "of executed" not in dataclasses.replace(train, notes=work.notes).to_text()


def test_psum_in_a_scan_inside_shard_map(target, mesh):
    turns = 7

    def body(x):
        def turn(x, _):
            return jnp.tanh(jax.lax.psum(x, "tensor")), None

        return jax.lax.scan(turn, x, None, length=turns)[0]

    spec = P("fsdp", "tensor")
    fn = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    found = plan(fn, (_on(mesh, (B, D), *spec),), target=target, mesh=mesh).collectives
    assert [(c.kind, c.axes, c.group, c.runs) for c in found] == [
        ("all-reduce", ("tensor",), 2, turns)
    ]
    local = (B // 2) * (D // 2) * 4
    assert found[0].payload == local
    assert found[0].wire == turns * local  # 2 (n-1)/n of it, n = 2
    link = CHIPS["v5e"].link_bandwidth
    assert found[0].seconds == pytest.approx(turns * local / link)


def test_kernels_know_the_target_while_it_is_traced(target, mesh):
    """A v5e has one core and twice the memory of a v5p's; outside of it nothing is known.

    240 FLOPs of 197e12 take as long as a byte of 819e9."""
    seen = []

    @jax.jit
    def step(x):
        seen.append(tpu_chip.chip())
        return x + 1

    plan(step, (_on(mesh, (8, 128)),), target=target, mesh=mesh)
    assert seen == [tpu_chip.Chip(128 * 2**20, 1, 128, pytest.approx(240, rel=0.01))]
    assert tpu_chip.chip() == tpu_chip.Chip(64 * 2**20, 2, 128, None)
    assert [tpu_chip.Chip().shares(n) for n in (8, 7)] == [2, 1]


def test_hbm_bytes_of_an_elementwise_step(target, mesh):
    size = 64 * 2**20  # more than fits on the chip's vector memory
    a, b = (_on(mesh, (size // 1024, 1024), "fsdp", "tensor") for _ in range(2))
    found = plan(jax.jit(lambda a, b: a * b + a), (a, b), target=target, mesh=mesh)
    assert found.hbm_bytes == 3 * size * 4 // 4
    assert found.device_flops == 0


def test_hbm_bytes_of_a_loop_are_multiplied(target, mesh):
    rows, columns, turns = 16384, 16384, 5  # 268 MB a device: more than its vector memory
    x = _on(mesh, (rows, columns), "fsdp", "tensor")
    w = _on(mesh, (turns, rows, columns), None, "fsdp", "tensor")
    fn = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x) * w, None), x, w)[0])
    found = plan(fn, (x, w), target=target, mesh=mesh)
    local = rows * columns * 4 // 4
    # A turn reads x and its own slice of w, and writes x; one copy may precede the loop.
    assert 3 * turns * local <= found.hbm_bytes <= (3 * turns + 2) * local * 1.01


def test_replicated_compute_shows(target, mesh):
    x, w = _on(mesh, (B, D)), _on(mesh, (D, F))
    found = plan(jax.jit(lambda x, w: x @ w), (x, w), target=target, mesh=mesh)
    assert found.flops.total == 2 * B * D * F
    assert found.device_flops == 2 * B * D * F  # each of four devices does all of it
    assert "computed on several devices" in found.to_text()


@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_out_of_memory_is_a_verdict(name):
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    target = Target.parse(name)
    mesh = Mesh(target.devices.reshape(2, 2), ("fsdp", "tensor"))
    x = _on(mesh, (2**17, 2**17), "fsdp")
    found = plan(
        jax.jit(lambda x: (x @ x.T) @ x), (x,), target=target, mesh=mesh, labels={"batch": x}
    )
    assert not found.fits
    # The compiler prints two decimals; the table of chips holds the same figure.
    assert found.memory.available == pytest.approx(CHIPS[target.kind].hbm_bytes, rel=1e-3)
    assert found.memory.labelled["batch"] == 2**34 * 4 // 2
    assert found.memory.total >= 2 * found.memory.labelled["batch"]
    assert found.flops.total == 2 * 2 * 2**51
    assert found.roofline is None
    text = found.to_text()
    assert "DOES NOT FIT" in text
    assert "131072,131072" in found.largest[0]
    assert Plan.from_json(found.to_json()) == found


def test_refusals_are_read():
    new = "total memory required for HLO temporaries (18.00G) exceeds available HBM (15.75G). HLO"
    old = "Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm"
    assert refused_bytes(new) == (18 * 2**30, int(15.75 * 2**30))
    assert refused_bytes(old) == (int(17.5 * 2**30), int(15.75 * 2**30))
    assert refused_bytes("something else") == (0, 0)


def test_other_failures_are_not_swallowed(target, mesh):
    half = Mesh(target.devices[0], ("x",))
    with pytest.raises(UserError, match="mesh has 2 devices"):
        plan(jax.jit(jnp.sin), (_on(half, (8, 128)),), target=target, mesh=half)
    with pytest.raises(UserError, match="no abstract argument lies on"):
        plan(jax.jit(jnp.sin), (jax.ShapeDtypeStruct((8,), float),), target=target, mesh=mesh)


def test_batched_products_are_counted_in_the_compiled_program(target, mesh):
    q, k = (_on(mesh, (8, 256, 4, 128), "fsdp", dtype=jnp.bfloat16) for _ in range(2))
    fn = jax.jit(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k))
    found = plan(fn, (q, k), target=target, mesh=mesh)
    assert found.flops.total == 2 * 8 * 4 * 256 * 256 * 128
    assert found.device_flops == found.flops.total // 2  # over fsdp; tensor repeats it


def test_unprintable_program_is_compiled_again_and_says_so():
    """jaxlib may refuse to print what a newer libtpu made."""
    options = []

    class Unprintable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands")

    class Lowered:
        def __init__(self, result):
            self.result = result

        def compile(self, compiler_options):
            options.append(compiler_options)
            return self.result

    printable = types.SimpleNamespace(as_text=lambda: "HloModule m")
    text, notes = plan_lib._text(Lowered(printable), Unprintable())
    assert text == "HloModule m"
    assert "second compilation" in notes[0]
    assert len(options) == 1
    text, notes = plan_lib._text(Lowered(Unprintable()), Unprintable())
    assert text == ""
    assert "no roofline" in notes[0]
    assert plan_lib._text(None, printable) == ("HloModule m", ())


def test_bytes_of_a_device(mesh):
    assert device_bytes(_on(mesh, (8, 6), "fsdp", "tensor")) == 4 * 3 * 4
    assert device_bytes(_on(mesh, (8, 6), "fsdp", dtype=jnp.int4)) == 4 * 6 // 2
    assert device_bytes(jax.ShapeDtypeStruct((3,), jnp.bfloat16)) == 6
    assert device_bytes(jax.eval_shape(lambda: jax.random.key(0))) == 8
    assert device_bytes(1.0) == 4
