"""A pipeline over simulated ranks in NumPy: the loop that the tables of a schedule describe."""

import random

import numpy as np

from efficient.parallel.schedule_ops import Op, Schedule, needs
from efficient.parallel.schedule_table import slots, ticks


def forward(w, x):
    return np.tanh(x @ w)


def backward(w, x, dy):
    """The gradients of x and w, from x alone: what is inside is computed again."""
    dz = dy * (1 - np.tanh(x @ w) ** 2)
    return dz @ w.T, x.T @ dz


def direct(weights, data, targets):
    """Outputs, gradients of weights and data of 0.5 |y - target|^2, one chunk after the other."""
    xs = [data]
    for w in weights:
        xs.append(forward(w, xs[-1]))
    dy, grads = xs[-1] - targets, []
    for w, x in zip(weights[::-1], xs[-2::-1]):
        dx = dy * (1 - np.tanh(x @ w) ** 2)
        grads.append(np.einsum("mbi,mbj->ij", x, dx))
        dy = dx @ w.T
    return xs[-1], grads[::-1], dy


def run(schedule, weights, data, targets):
    """The same by the tables; a rank sees its own buffers, and its neighbours' by the permutes.

    Unused buffers and what idle ranks send are NaN, so that no wrong read goes unnoticed.
    """
    p, v = schedule.stages, schedule.chunks
    table = ticks(schedule)
    slot = slots(table)
    nothing = np.full_like(data[0], np.nan)
    buffers = [
        [[nothing] * int(count[s]) for s in range(p)]
        for count in (slot.activations, slot.kept, slot.gradients)
    ]
    activations, kept, gradients = buffers
    grads = [np.zeros_like(w) for w in weights]
    outputs, data_grads = np.full_like(data, np.nan), np.full_like(data, np.nan)
    from_previous, from_next = [nothing] * p, [nothing] * p
    for t in range(len(table)):
        y, dx = [nothing] * p, [nothing] * p
        for s in range(p):
            if slot.activation_store[t, s] >= 0:
                activations[s][slot.activation_store[t, s]] = from_previous[s]
            if slot.gradient_store[t, s] >= 0:
                gradients[s][slot.gradient_store[t, s]] = from_next[s]
            if (i := table.forward_microbatch[t, s]) >= 0:
                place = table.forward_chunk[t, s] * p + s
                read = slot.activation_read[t, s]
                assert (read < 0) == (place == 0)
                x = activations[s][read] if read >= 0 else data[i]
                kept[s][slot.kept_store[t, s]] = x
                y[s] = forward(weights[place], x)
                if place == p * v - 1:
                    outputs[i] = y[s]
            if (i := table.backward_microbatch[t, s]) >= 0:
                place = table.backward_chunk[t, s] * p + s
                read = slot.gradient_read[t, s]
                assert (read < 0) == (place == p * v - 1)
                x = kept[s][slot.kept_read[t, s]]
                dy = gradients[s][read] if read >= 0 else forward(weights[place], x) - targets[i]
                dx[s], dw = backward(weights[place], x, dy)
                grads[place] += dw
                if place == 0:
                    data_grads[i] = dx[s]
        from_previous = [y[(s - 1) % p] for s in range(p)]
        from_next = [dx[(s + 1) % p] for s in range(p)]
    return outputs, grads, data_grads


def compare(schedule, seed=0, batch=2, width=3):
    """Asserts that the pipeline gives what the chain gives."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(schedule.stages * schedule.chunks, width, width))
    data, targets = rng.normal(size=(2, schedule.microbatches, batch, width))
    right = direct(list(weights), data, targets)
    for found, expected in zip(run(schedule, list(weights), data, targets), right, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def random_schedule(p, m, v, seed):
    """Any order in which a pipeline could have run."""
    rng = random.Random(seed)
    left = [
        (s, op, needs(op, s, p, v))
        for s in range(p)
        for op in (Op(k, i, c) for k in "FB" for i in range(m) for c in range(v))
    ]
    done, ops = set(), [[] for _ in range(p)]
    while left:
        step = rng.choice([step for step in left if done.issuperset(step[2])])
        left.remove(step)
        done.add(step[:2])
        ops[step[0]].append(step[1])
    return Schedule("random", p, m, v, tuple(map(tuple, ops)))
