"""That Pallas' interpreters see no race, in any kernel that a test runs."""

import contextlib
from unittest import mock

import jax


@contextlib.contextmanager
def no_races(interpreter=None):
    """Asserts that kernels ran within, with race detection, and that none of them has a race.

    Every kernel gets a state of its own, and an interpreter keeps that of the last one alone.

    Args:
      interpreter: the module that makes the states; None: that of TPUs.
    """
    if interpreter is None:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
    seen, make = [], interpreter.RaceDetectionState

    def state(*args, **how):
        seen.append(make(*args, **how))
        return seen[-1]

    with mock.patch.object(interpreter, "RaceDetectionState", state):
        yield
        jax.effects_barrier()
    # Reads and writes are recorded where they are looked at.
    assert seen and all(each.reads for each in seen)
    assert not any(each.races_found for each in seen)
