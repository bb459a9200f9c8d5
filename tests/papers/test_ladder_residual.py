"""Ladder Residual: the recurrence in NumPy, and the TPU's schedule of its sums."""

import re

import jax
import numpy as np
import pytest
import tiny

from configs import common
from efficient import model as model_lib
from efficient.planning.hardware import Target
from efficient.scope import Context, Rules, Scope
from efficient.training import step as step_lib
from efficient.training.run import Run

WIDTH, DEPTH = 8, 3
BLOCKS = 4
SUM = r"= bf16\[8,2048,2048\]\S*"
# By default this compiler leaves every all-reduce synchronous.
ASYNCHRONOUS = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}


def stack(wirings):
    """Blocks whose sublayers are linear maps by matrices of their own."""
    rules = Rules([
        *({"at": f"{i}", "use": name} for i, name in enumerate(wirings)),
        {"at": r"\d+/mixer", "use": "attention", "heads": 2},
        {"at": r"\d+/channel", "use": "mlp", "hidden": 12},
        {"at": r"\d+/(mixer|channel)_norm", "use": "rms_norm"},
    ])  # fmt: skip
    scope = Scope(rules)
    blocks = [scope.fill("wiring", str(i), WIDTH, True) for i in range(len(wirings))]
    module = model_lib.Stack(blocks)
    arrays = model_lib.init(module, jax.random.key(0))
    return model_lib.bind(module, arrays), {p: np.asarray(a, np.float64) for p, a in arrays.items()}


def sublayers(arrays, i):
    """(attention, feed-forward) of block i after their norms, in float64."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * arrays[f"{i}/{name}/scale"]

    def attention(x):
        x = norm(x, "mixer_norm")
        q, k, v = (x @ arrays[f"{i}/mixer/{n}/kernel"] for n in "qkv")
        out = np.zeros_like(q)
        for h in (slice(0, 4), slice(4, 8)):
            scores = q[:, h] @ k[:, h].T / 2
            scores[np.triu_indices(len(x), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h]
        return out @ arrays[f"{i}/mixer/out/kernel"]

    def feed_forward(x):
        h = norm(x, "channel_norm") @ arrays[f"{i}/channel/up/kernel"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return h @ arrays[f"{i}/channel/down/kernel"]

    return attention, feed_forward


@pytest.mark.parametrize("standard", [0, 1])
def test_the_stream_against_numpy(standard):
    """x_{i+1} = x_i + h_{i+1}(x_{i-1}); also with a standard block between ladders."""
    wirings = ["ladder_residual"] * DEPTH
    if standard:
        wirings[1] = "pre_norm"
    module, arrays = stack(wirings)
    x = np.random.default_rng(0).normal(size=(1, 5, WIDTH))
    found, _ = module(np.float32(x), Context())

    stream = x[0]
    before = stream
    for i, wiring in enumerate(wirings):
        for h in sublayers(arrays, i):
            read = before if wiring == "ladder_residual" else stream
            before, stream = stream, stream + h(read)
        following = wirings[i + 1 : i + 2] or [None]
        if wiring != following[0]:
            before = stream  # the stream is whole between wirings
    np.testing.assert_allclose(found[0], stream, rtol=0, atol=3e-6 * np.abs(stream).max())
    plain, _ = stack(["pre_norm"] * DEPTH)
    other, _ = plain(np.float32(x), Context())
    assert np.abs(other[0] - stream).max() > 1e-2 * np.abs(stream).max()


def scheduled(wiring):
    """The scheduled program of a forward pass on four v5e, a sublayer split over all."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    phase = common.phase(1, optimizer={"name": "sgd", "learning_rate": 1.0}, clip=None)
    rules = [{"at": r"blocks/\d+", "use": wiring}, *common.llama(16, 16, hidden=8192)]
    plain = [{"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}]
    config = tiny.config(phase, rules=rules, mesh={"data": 1, "tensor": 4}, placement=plain)
    config.model = {**config.model, "width": 2048, "depth": BLOCKS, "max_length": 2048}
    config.data = {**config.data, "length": 2048}
    config.batch_size, config.compute_dtype = 8, "bfloat16"
    hardware = Target.parse("v5e:2x2")
    run = Run(config, hardware.devices)
    phase = run.phases[0]
    evaluate = step_lib.make_eval_step(phase, run.placement, run.dtype)
    state = step_lib.abstract_state(phase, run.placement)
    lowered = evaluate.trace(state["params"], state["state"], run.abstract_batch()).lower(
        lowering_platforms=("tpu",)
    )
    return lowered.compile(compiler_options=ASYNCHRONOUS).as_text()


def beside_products(text):
    """(products between start and end of each asynchronous sum, how many sums are synchronous)."""
    entry = text[text.index("ENTRY ") :].splitlines()
    opened, found = {}, []
    for line in entry:
        name = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
        if name is None:
            continue
        if name[1].startswith("async-collective-start"):
            opened[name[1].replace("start", "done")] = []
        elif name[1] in opened:
            found.append(opened.pop(name[1]))
        elif multiplies(text, line):
            for products in opened.values():
                products.append(name[1])
    synchronous = [line for line in entry if re.search(rf"{SUM} all-reduce\(", line)]
    return found, len(synchronous)


def multiplies(text, line):
    """Whether the instruction is an attention kernel or a fusion around a product."""
    called = re.search(r" fusion\(.*calls=%([^\s,]+)", line)
    if called is None:
        return "tpu_custom_call" in line
    body = text[text.index(f"%{called[1]} (") :]
    return " convolution(" in body[: body.index("\n}")]


@pytest.mark.slow
def test_sums_run_beside_products():
    """Of nine sums, one a sublayer and the embedding's, a standard residual waits for each."""
    found, waited_for = beside_products(scheduled("pre_norm"))
    assert (found, waited_for) == ([], 2 * BLOCKS + 1)
    found, waited_for = beside_products(scheduled("ladder_residual"))
    assert len(found) + waited_for == 2 * BLOCKS + 1
    assert len(found) > BLOCKS and all(found)
