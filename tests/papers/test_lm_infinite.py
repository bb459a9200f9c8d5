"""LM-Infinite: the mixer against NumPy, its limits, and flat perplexity beyond the training length.

Also the command that shows it: `eval.py --lengths`.
"""

import json

import jax
import jax.numpy as jnp
import mixer_numpy
import numpy as np
import pytest
import tiny

import eval as eval_script
from configs import lm_infinite
from efficient import data as data_lib
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.planning.flops import count_flops
from efficient.scope import Context
from efficient.training import lengths

ARGUMENTS = {"window": 6, "sinks": 3, "rope": 50.0}


def test_mixer_equals_numpy():
    mixer = mixer_numpy.build("lm_infinite", heads=4, kv_heads=2, **ARGUMENTS)

    def reference(x, values):
        return mixer_numpy.numpy_mixer(
            x, values, 4, 2,
            seen=lambda n, t, s: s <= t and (t - s < 6 or s < 3),
            distance=lambda t, s: min(t - s, 6),
            theta=50.0,
        )  # fmt: skip

    mixer_numpy.check_values_and_gradients(mixer, reference, mixer_numpy.inputs(23))


@pytest.mark.parametrize("length", [6, 8])
def test_up_to_the_window_it_is_rotary_attention(length):
    """Bit for bit up to `window` tokens, to rounding where a key is at the limit, then no more."""
    ours = mixer_numpy.build("lm_infinite", heads=2, **ARGUMENTS)
    theirs = mixer_numpy.build("attention", heads=2, rope=50.0)
    values, x = mixer_numpy.draw(ours), mixer_numpy.inputs(length)
    found, expected = (
        jax.jit(lambda x, m=m: mixer_numpy.run(m, values, x))(x) for m in (ours, theirs)
    )
    np.testing.assert_array_equal(found[:, :6], expected[:, :6])
    if length == 8:
        np.testing.assert_allclose(found[:, 6], expected[:, 6], atol=5e-6)
        assert np.abs(found[:, 7] - expected[:, 7]).max() > 1e-3


def test_work_and_cache_are_linear_in_length():
    mixer = mixer_numpy.build("lm_infinite", heads=1, width=64, window=512, sinks=16)

    def flops(name_of, length):
        x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)

        def forward(values, x):
            return model_lib.bind(name_of, values)(x, Context())

        return count_flops(forward, model_lib.abstract(name_of), x)

    growth = [flops(mixer, 2 * n) - flops(mixer, n) for n in (4096, 8192, 16_384)]
    assert 0 < 4 * growth[0] == 2 * growth[1] == growth[2]
    full = mixer_numpy.build("attention", heads=1, width=64)
    assert flops(full, 16_384) > 6 * flops(mixer, 16_384)
    for length, slots in ((8, 16), (100, 116), (512, 528), (100_000, 528)):
        state = jax.eval_shape(lambda n=length: mixer.init_state(1, n, jnp.float32))
        assert state[0].shape == (1, min(slots, length + min(length, 16)), 1, 64)


class Counting:
    """A source whose tokens are their own place in the text."""

    spec, facts = {}, {"vocab_size": 1000}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        tokens = np.arange(64, dtype=np.int32) + 64 * index
        return {"tokens": tokens, "targets": tokens + 1}


def test_every_length_scores_the_same_tokens():
    for length in (8, 16, 64):
        source = lengths.Endings(Counting(), length, scored=4)
        assert len(source) == 3
        for index, batch in enumerate(data_lib.eval_batches(source, 1)):
            end = 64 * (index + 1)
            np.testing.assert_array_equal(batch["tokens"][0], np.arange(end - length, end))
            scored = batch["targets"][0][batch["weights"][0] == 1]
            np.testing.assert_array_equal(scored, np.arange(end - 3, end + 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [([64, 32], "ascending"), ([], "ascending"), ([1, 2], "at least 2")],
)
def test_lengths_that_make_no_sense_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        lengths.evaluate(lm_infinite.get_config("smoke"), "nowhere", given, "x")


def test_models_of_one_length_are_refused():
    config = lm_infinite.get_config("smoke")
    config.rules = [{"at": "position", "use": "learned"}, *config.rules]
    with pytest.raises(UserError, match="learned positions end at model.max_length=64"):
        lengths.evaluate(config, "nowhere", [32, 128], "x")
    config.data = {"name": "digits"}
    with pytest.raises(UserError, match="for language models"):
        lengths.evaluate(config, "nowhere", [32, 64], "x")
    with pytest.raises(UserError, match="mixer='windows'; did you mean 'window'"):
        lm_infinite.get_config("mixer=windows")


def test_command_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for flag, message in (
        ("--lengths=32,many", "--lengths=32,many: give numbers"),
        ("--config=configs/lm_infinit.py", "did you mean 'configs/lm_infinite.py'?"),
    ):
        with pytest.raises(SystemExit):
            eval_script.main(["eval.py", f"--workdir={tmp_path}", flag])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_flat_beyond_the_training_length_where_attention_fails(tmp_path):
    """A tiny model trained on 32 bytes reads 512, through the commands."""
    file, workdir = tmp_path / "tiny_lm.py", tmp_path / "run"
    file.write_text(TINY)

    def run(script, *flags):
        status, out, err = tiny.finish(tiny.command(script, f"--workdir={workdir}", *flags))
        assert status == 0, err
        return out

    run(tiny.TRAIN, f"--config={file}")
    out = run(tiny.EVAL, "--lengths=32,64,512")
    run(tiny.EVAL, "--lengths=32,64,512", f"--config={file}:mixer=attention")
    record = json.loads((workdir / "lengths.json").read_text())
    assert (record["trained"], record["scored"]) == (32, 16) and record["contexts"] > 200
    ours, full = record["curves"].values()
    assert ours["32"] == full["32"]
    printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert printed == [{"length": n, "bits_per_byte": ours[str(n)]} for n in (32, 64, 512)]
    # Flat from 2 to 16 times the training length, and better than counting pairs of bytes (3.58
    # bits), where the same parameters with full attention end up worse than that.
    assert abs(ours["512"] - ours["64"]) < 0.05 * (full["512"] - full["64"])
    assert ours["512"] - ours["32"] < 0.2 * (full["512"] - full["32"])
    assert max(ours.values()) < 3.58 < full["512"]
    assert (workdir / "lengths.png").stat().st_size > 5000


TINY = """
from configs import lm_infinite


def get_config(arg=None):
    config = lm_infinite.get_config(f"smoke,{arg or 'mixer=lm_infinite'}")
    config.data.length = config.model.max_length = 32
    for rule in config.rules:
        if "window" in rule:
            rule["window"] = 32
    config.phases[0]["steps"] = 400
    config.log_every = 100
    config.batch_size = 32
    config.plot = False
    return config
"""
