"""LightSeq: against a softmax in float64, and balance, bytes, memory, overlap of its programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import layout, mesh_of

from efficient.errors import UserError
from efficient.parallel.lightseq import Ring, ring_attention
from efficient.parallel.ring_plan import plan, zigzag
from efficient.parallel.ulysses import ulysses_attention
from efficient.planning.collectives import find_collectives
from efficient.planning.hardware import Target
from efficient.planning.hlo import Module
from pallas_kernels.attention import Causal, Full, Heads, Prefix, Window, attention

B, T, H = 2, 64, 8
EPS = float(np.finfo(np.float32).eps)


def one_head(q, k, v, dout, seen, softcap, dtype):
    """(out, dq, dk, dv) of [T, H] arrays by the definition."""
    scale = dtype(q.shape[1] ** -0.5)
    x = q @ k.T * scale
    bent = dtype(1)
    if softcap is not None:
        x = np.tanh(x / dtype(softcap))
        x, bent = dtype(softcap) * x, 1 - x * x
    e = np.exp(np.where(seen, x, -np.inf) - np.where(seen, x, -np.inf).max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    dp = dout @ v.T
    dx = p * (dp - (p * dp).sum(1, keepdims=True)) * bent * scale
    return p @ v, dx @ k, dx.T @ q, p.T @ dout


def softmax_attention(q, k, v, dout, seen, softcap=None, dtype=np.float64):
    """(out, dq, dk, dv); seen [B, T, T]; key head n // (N / K) serves query head n."""
    q, k, v, dout = (np.asarray(x, dtype) for x in (q, k, v, dout))
    found = [np.zeros_like(x) for x in (q, q, k, v)]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        m = n * k.shape[2] // q.shape[2]
        parts = one_head(
            q[b, :, n], k[b, :, m], v[b, :, m], dout[b, :, n], seen[b], softcap, dtype
        )  # fmt: skip
        for total, x, head in zip(found, parts, (n, n, m, m), strict=True):
            total[b, :, head] += x
    return found


def arrays(N, K, shape=(B, T), seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(*shape, n, H)), jnp.float32) for n in (N, K, K, N)]


@functools.partial(jax.jit, static_argnames=("sharding", "mask", "order", "softcap"))
def both(q, k, v, dout, ids=None, *, sharding, mask, order, softcap=None):
    """(out, dq, dk, dv) of a ring."""
    q, k, v, dout = (jax.lax.with_sharding_constraint(x, sharding) for x in (q, k, v, dout))
    out, pull = jax.vjp(
        lambda q, k, v: ring_attention(
            q, k, v, sharding=sharding, mask=mask, segment_ids=ids, softcap=softcap, order=order
        ),
        q, k, v,
    )  # fmt: skip
    return out, *pull(dout)


CASES = {
    "causal, zigzag, eight ranks": ({"sequence": 8}, 2, 2, Causal(), "zigzag", None),
    "causal, zigzag, segments": ({"data": 2, "sequence": 4}, 4, 1, Causal(), "zigzag", None),
    "causal, contiguous, tensor": (
        {"sequence": 2, "tensor": 2, "data": 2}, 4, 1, Causal(), "contiguous", 2.0,
    ),
    "window, contiguous": ({"sequence": 8}, 2, 1, Window(11), "contiguous", None),
    "two-sided window, zigzag": ({"data": 2, "sequence": 4}, 2, 2, Window(9, 7), "zigzag", None),
    "full": ({"data": 2, "sequence": 4}, 4, 2, Full(), "contiguous", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    """Errors up to twice those of the definition in float32, a rounding a step, four last bits."""
    sizes, N, K, mask, order, softcap = CASES[case]
    given, sharding = arrays(N, K), layout(mesh_of(**sizes))
    t, s = np.arange(T)[:, None], np.arange(T)
    seen, ids = np.broadcast_to(mask.element(0, t, s), (B, T, T)), None
    if N == 4:  # three packed sequences, that meet within what a rank holds
        ids = np.searchsorted([13, 43], np.arange(T), side="right") + np.arange(B)[:, None]
        seen = seen & (ids[:, :, None] == ids[:, None])
    moved, moved_ids, back = given, ids, np.arange(T)
    if order == "zigzag":
        there = zigzag(T, sizes["sequence"])
        moved, back = [x[:, there] for x in given], np.argsort(there)
        moved_ids = None if ids is None else ids[:, there]
    found = both(*moved, moved_ids, sharding=sharding, mask=mask, order=order, softcap=softcap)
    right, naive = (
        softmax_attention(*given, seen, softcap, dtype) for dtype in (np.float64, np.float32)
    )
    for name, value, exact, near in zip(
        ("out", "dq", "dk", "dv"), found, right, naive, strict=True
    ):
        largest = np.abs(exact).max()
        assert largest > 0.1
        allowed = 2 * np.abs(near - exact).max()
        allowed += (4 + sizes["sequence"]) * EPS * max(largest, 1)
        error = np.abs(np.asarray(value, np.float64)[:, back] - exact).max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_zigzag():
    order = zigzag(24, 3)
    expected = [[0, 1, 2, 3, 20, 21, 22, 23], [4, 5, 6, 7, 16, 17, 18, 19], [*range(8, 16)]]
    np.testing.assert_array_equal(order.reshape(3, 8), expected)
    for length, near in ((26, 24), (2, 6), (33, 36)):
        with pytest.raises(UserError, match=rf"length of {length} .* nearest that does is {near}$"):
            zigzag(length, 3)


def work(mask, ways, order, length=64):
    """Scores that are computed, and that are seen, [steps, ways]; checks that the plan is right."""
    tokens = np.arange(length)
    if order == "zigzag":
        tokens = zigzag(length, ways)
    tokens = tokens.reshape(ways, -1)
    covered = np.zeros((length, length), int)
    computed, useful = [], []
    for step in plan(mask, length, ways, order):
        rows = []
        for rank, job in enumerate(step.jobs):
            area = seen = 0
            for (top, bottom), (left, right), rest in job:
                t, s = tokens[rank, top:bottom, None], tokens[rank - step.number, None, left:right]
                local = rest.element(0, np.arange(bottom - top)[:, None], np.arange(right - left))
                local = np.broadcast_to(local, (bottom - top, right - left))
                np.testing.assert_array_equal(local, local & mask.element(0, t, s))
                covered[t, s] += local
                area, seen = area + local.size, seen + local.sum()
            rows.append((area, seen))
        computed.append([area for area, _ in rows])
        useful.append([seen for _, seen in rows])
    t, s = np.arange(length)[:, None], np.arange(length)
    np.testing.assert_array_equal(covered, np.broadcast_to(mask.element(0, t, s), covered.shape))
    return np.array(computed), np.array(useful)


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_work_is_balanced(ways):
    """Every rank sees as many scores in every step, and after the first one computes no others."""
    chunk = 64 // (2 * ways)
    computed, useful = work(Causal(), ways, "zigzag")
    assert useful.shape == (ways, ways)
    assert (useful[0] == chunk * (chunk + 1) + chunk**2).all()
    assert (useful[1:] == 2 * chunk**2).all() and (computed[1:] == useful[1:]).all()
    # Tokens in their order: the last rank has all keys to attend to, the first one its own.
    computed, useful = work(Causal(), ways, "contiguous")
    assert (useful > 0).sum(0).tolist() == list(range(1, ways + 1))
    assert (computed[1:] == useful[1:]).all()


@pytest.mark.parametrize(
    ("mask", "order", "steps"),
    [
        (Full(), "contiguous", [0, 1, 2, 3, 4, 5, 6, 7]),
        (Full(), "zigzag", [0, 1, 2, 3, 4, 5, 6, 7]),
        (Window(11), "contiguous", [0, 1, 2]),
        (Window(9, 8), "contiguous", [0, 1, 7]),
        (Window(5), "zigzag", [0, 1, 7]),
        (Causal() & Window(20, None), "zigzag", [0, 1, 2, 3, 4, 5, 6, 7]),
        (Window(2, 0, block=4), "contiguous", [0, 1]),
    ],
    ids=repr,
)
def test_plans_see_what_the_mask_does_in_no_more_steps_than_needed(mask, order, steps):
    work(mask, 8, order)
    found = [step.number for step in plan(mask, 64, 8, order)]
    assert found == steps


def abstract(mesh, N, K):
    """q, k, v and dout of one sequence."""
    place = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=layout(mesh))
    return [place((1, T, n, H)) for n in (N, K, K, N)]


def permuted_bytes(mesh, run, *given):
    """Bytes that a device sends in the compiled program; checks that it sends nothing else."""
    text = jax.jit(run).lower(*given).compile().as_text()
    found = find_collectives(Module(text), Target.parse("h200:8"), mesh)
    assert {c.kind for c in found} == {"collective-permute"}
    return sum(c.wire for c in found)


@pytest.mark.parametrize(
    ("mask", "order", "sends"),
    # A window sends its keys as far as they are seen; gradients come home at once.
    [(Causal(), "zigzag", (7, 8)), (Window(9, 8), "contiguous", (2, 3))],
    ids=["causal", "window"],
)
def test_bytes_are_those_of_the_formula(mask, order, sends):
    """(P - 1) 2 K (T / P) H elements; backward again, and the gradients of keys P times."""
    mesh, K = mesh_of(sequence=8), 1
    q, k, v, dout = abstract(mesh, 2, K)
    attend = functools.partial(ring_attention, sharding=layout(mesh), mask=mask, order=order)
    once = 2 * K * (T // 8) * H * 4
    assert permuted_bytes(mesh, attend, q, k, v) == sends[0] * once
    pull = jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], q, k, v)
    assert permuted_bytes(mesh, lambda pull, x: pull(x), pull, dout) == sum(sends) * once


def count(jaxpr, name):
    """How often an operation runs in a program."""
    found = 0
    for equation in jaxpr.eqns:
        within = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        )
        inner = sum(count(each, name) for each in within if hasattr(each, "eqns"))
        found += (equation.primitive.name == name) + inner * equation.params.get("length", 1)
    return found


def test_a_checkpoint_of_the_output_spares_the_second_pass():
    """Counted by what is sent: keys and values 7 times, again backward, and gradients 8 times."""
    mesh = mesh_of(sequence=8)
    attend = functools.partial(ring_attention, sharding=layout(mesh), mask=Causal(), order="zigzag")

    def loss(q, k, v, dout):
        # Something before and after it to compute again, as in a block of a model.
        return (jnp.sin(attend(jnp.cos(q), k, v)) * dout).sum()

    def sent(function):
        program = jax.make_jaxpr(function)(*abstract(mesh, 2, 1))
        return count(program.jaxpr, "ppermute"), count(program.jaxpr, "cos")

    def gradients(policy):
        return sent(jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2)))

    policies = jax.checkpoint_policies
    named = policies.save_only_these_names("attention_out", "attention_lse")
    forward, both_passes = 2 * 7, 2 * (7 + 7 + 8)
    assert sent(loss) == (forward, 1)
    assert sent(jax.grad(loss, (0, 1, 2)))[0] == both_passes
    assert gradients(policies.nothing_saveable)[0] == both_passes + forward
    permutes, cosines = gradients(named)
    assert permutes == both_passes
    assert cosines == 3, "what comes before attention is computed again; and the derivative of sin"


@pytest.mark.slow
def test_memory_falls_with_the_devices():
    """Temporaries of a device, both passes: eleven arrays like its queries at most, of any part.

    Of two devices none sends in a loop, which takes some of them.
    """
    found, length, size = [], 2**17, 128
    for ways in (2, 4, 8):
        sharding = layout(mesh_of(sequence=ways))
        given = [jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32, sharding=sharding)] * 4
        run = functools.partial(both.__wrapped__, sharding=sharding, mask=Causal(), order="zigzag")
        compiled = jax.jit(run).lower(*given).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes)
        assert found[-1] * ways / (length * size * 4) < 11
    assert found[0] / found[2] > 2.5 and 1.9 < found[1] / found[2] < 2.1


def test_what_cannot_be_cut_is_refused():
    sharding = layout(mesh_of(data=2, sequence=4))
    attend = functools.partial(ring_attention, sharding=sharding)
    q, k, v, _ = arrays(4, 4)
    for mask in (Prefix(4) | Causal(), Heads([Causal()] * 4)):
        with pytest.raises(UserError, match=r"lightseq: (Prefix|Heads) is no mask .* ulysses"):
            attend(q, k, v, mask=mask)
    with pytest.raises(UserError, match="do not divide the 16 tokens of a chunk; ulysses"):
        attend(q, k, v, mask=Window(2, 0, block=3))
    with pytest.raises(UserError, match="did you mean 'zigzag'"):
        attend(q, k, v, order="zig-zag")
    with pytest.raises(UserError, match="take 'blockwise'"):
        attend(q, k, v, implementation="reference")
    with pytest.raises(UserError, match="4 heads do not divide into 3 kv_heads"):
        attend(q, k[:, :, :3], v[:, :, :3])
    q, k, v, _ = arrays(4, 4, (2, 36))
    attend(q, k, v)
    with pytest.raises(
        UserError, match=r"length of 36 .* 8 parts .*sequence=4 .* nearest .* is 32"
    ):
        attend(q, k, v, order="zigzag")


def test_strategy():
    assert (
        Ring().order_of(24, 3, False) is None
        and Ring(order="contiguous").order_of(24, 3, True) is None
    )
    there = Ring().order_of(T, 4, True)
    np.testing.assert_array_equal(there, zigzag(T, 4))
    (q, k, v, _), sharding = arrays(2, 1), layout(mesh_of(data=2, sequence=4))
    how = {"mask": Causal(), "segment_ids": None, "softcap": None, "implementation": None}
    run = jax.jit(functools.partial(Ring(), sharding=sharding, permuted=True, **how))
    out = run(*(x[:, there] for x in (q, k, v)))[:, np.argsort(there)]
    seen = np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))
    right = softmax_attention(q, k, v, q, seen)[0]
    np.testing.assert_allclose(out, right, rtol=0, atol=32 * EPS * np.abs(right).max())
    with pytest.raises(UserError, match="order='spiral'"):
        Ring(order="spiral")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "causal heads", "window"])
def test_long_sequences_are_those_of_one_device(kind):
    """Both passes, by ulysses too where heads are as many as devices.

    Of eight heads without a window the forward pass alone, and ulysses against the ring.

    A result is a sum of 64 blocks of 512 tokens, or of 8 parts of some of them, whose roundings add
    up like a random walk.
    """
    length, size = 2**15, 16
    mask, order = Causal(), "zigzag"
    if kind == "window":
        mask, order = Window(1024), "contiguous"
    heads, backward = 1 if kind == "causal" else 8, kind != "causal heads"
    there = zigzag(length, 8) if order == "zigzag" else np.arange(length)
    sharding, rng = layout(mesh_of(sequence=8)), np.random.default_rng(0)
    given = [jnp.asarray(rng.normal(size=(1, length, heads, size)), jnp.float32) for _ in range(4)]

    def results(attend, q, k, v, dout):
        attend = functools.partial(attend, mask=mask)
        if not backward:
            return [attend(q, k, v)]
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    ring = functools.partial(ring_attention, sharding=sharding, order=order)
    around = jax.jit(functools.partial(results, ring))(*(x[:, there] for x in given))
    found = [[np.asarray(x)[:, np.argsort(there)] for x in around]]
    if kind == "causal heads":
        expected = found.pop()
    else:
        expected = jax.jit(functools.partial(results, attention))(*given)
    if heads == 8:
        whole = functools.partial(ulysses_attention, sharding=sharding)
        found.append(jax.jit(functools.partial(results, whole))(*given))
    for some in found:
        for value, right in zip(some, expected, strict=True):
            largest = float(np.abs(right).max())
            assert largest > 1
            allowed = (64 + 8) ** 0.5 * EPS * largest
            np.testing.assert_allclose(np.asarray(value), np.asarray(right), rtol=0, atol=allowed)


def kernels(module, instruction):
    """Names of the kernels that an instruction runs; of a conditional those of every branch."""
    if instruction.opcode == "conditional":
        names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes).group(1)
        branches = [module.computations[name.strip(" %")] for name in names.split(",")]
        each = [
            set().union(*(kernels(module, i) for i in branch.instructions.values()))
            for branch in branches
        ]
        return set.intersection(*each)
    if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
        return {re.match(r"attention_[a-z]+|", instruction.name).group(0)} - {""}
    return set()


def meanwhile(module):
    """For each collective-permute: the kernels that are scheduled between its start and its end."""
    found = []
    for computation in module.computations.values():
        body = list(computation.instructions.values())
        for i, start in enumerate(body):
            if start.opcode == "collective-permute-start":
                end = next(j for j, each in enumerate(body) if start.name in each.operands)
                found.append(set().union(*(kernels(module, each) for each in body[i:end])))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("error:attention")  # not the kernels
def test_a_tpu_attends_while_keys_travel():
    """In the schedule of eight chips, first step, loop and last step, each of k and v or dk and dv.

    Keys travel in the first step and in the loop of both passes, their gradients in the loop and in
    the last step. When these go home there is nothing left to do.
    """
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    target = Target.parse("v5e:2x4")
    sharding = NamedSharding(Mesh(target.devices.reshape(8), ("sequence",)), P(None, "sequence"))
    place = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
    q, k = place((1, 2**15, 8, 128)), place((1, 2**15, 2, 128))
    run = functools.partial(both.__wrapped__, sharding=sharding, mask=Causal(), order="zigzag")
    lowered = jax.jit(run).trace(q, k, k, q).lower(lowering_platforms=("tpu",))
    found = meanwhile(Module(lowered.compile().as_text()))
    assert len(found) == 2 * (2 + 4 + 1)
    assert sum("attention_forward" in each for each in found) >= 2 * 2
    assert sum("attention_backward" in each for each in found) == 2 * 4
    assert sum(not each for each in found) == 2
