"""Products with the transposed Monarch matrix on a TPU: the passes of the others, in other order.

x M^T is the gradient that `tpu_backward` hands to the inputs of M when dy is x. In its own backward
pass x and dy change places: M is applied to dy, and gradients of the factors are those of M at dy
for x, so that both kernels take the weights as `tpu_forward` has them.
"""

from pallas_kernels.monarch_matmul.tpu_backward import collect_all, first_back, second_back
from pallas_kernels.monarch_matmul.tpu_call import call
from pallas_kernels.monarch_matmul.tpu_forward import (
    exchange_all,
    first_product,
    put,
    second_product,
    spread_all,
)
from pallas_kernels.monarch_matmul.tpu_plan import Plan


def forward(x, right, left, plan: Plan, precision, interpret=False):
    """y [M, K p] of x [M, L s]."""

    def body(refs, state, plan):
        collect_all(refs["x"], state["x"], plan)
        second_back(state, "x", plan, precision)
        exchange_all(state["z"], plan)
        first_back(None, refs["y"], state, plan, precision)

    arrays = {"x": x, "right": right, "left": left}
    words = {"z": plan.inner, "x": plan.outputs}
    return call(body, "monarch_t_fwd", arrays, ("y", plan.inputs), words, plan, interpret)["y"]


def backward(x, right, left, dy, plan: Plan, precision, interpret=False):
    """dx [M, L s], dright [cores, K, p, q], dleft [cores, L, r, s]: see `call`."""

    def body(refs, state, plan):
        collect_all(refs["x"], state["x"], plan)
        first_product(refs["dy"], state, plan, precision)
        exchange_all(state["z"], plan)

        def store(block, column, product):
            put(state["dx"], block * plan.s + column, product, x.dtype)

        second_product(state, plan, precision, store)
        second_back(state, "x", plan, precision)
        spread_all(state["dx"], refs["dx"], plan)
        exchange_all(state["z"], plan)
        first_back(refs["dy"], None, state, plan, precision)

    arrays = {"x": x, "right": right, "left": left, "dy": dy}
    words = {"z": plan.inner, "x": plan.outputs, "dx": plan.outputs}
    found = call(body, "monarch_t_bwd", arrays, ("dx", plan.outputs), words, plan, interpret)
    return found["dx"], found["dright"], found["dleft"]
