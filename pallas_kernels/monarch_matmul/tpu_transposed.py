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
    """y [M, K p] of x [M, L s].

    Where the plan keeps them, words [M / packed, width] too: "z", of the inner features as
    `first_back` has them, and "x_apart", of x block by block.
    """

    def body(refs, plan):
        collect_all(refs["x"], refs["x_apart"], plan)
        yield
        second_back(refs, "x_apart", None, plan, precision)
        yield
        exchange_all(refs["z"], plan)
        yield
        first_back(refs, None, "y", plan, precision)

    arrays = {"x": x, "right": right, "left": left}
    words = {"z": plan.inner, "x_apart": plan.outputs}
    leaving = tuple(words) if plan.kept else ()
    name, result = "monarch_dx" if plan.kept else "monarch_t_fwd", ("y", plan.inputs)
    return call(body, name, arrays, result, words, plan, interpret, leaving)


def backward(x, right, left, dy, plan: Plan, precision, interpret=False):
    """dx [M, L s], dright [cores, K, p, q], dleft [cores, L, r, s]: see `call`."""

    def body(refs, plan):
        collect_all(refs["x"], refs["x_apart"], plan)
        yield
        first_product(refs, "dy", plan, precision)
        yield
        exchange_all(refs["z"], plan)
        yield

        def store(block, column, product):
            put(refs["dx_apart"], block * plan.s + column, product, x.dtype)

        second_product(refs, plan, precision, store)
        second_back(refs, "x_apart", "z", plan, precision)
        yield
        spread_all(refs["dx_apart"], refs["dx"], plan)
        exchange_all(refs["z"], plan)
        yield
        first_back(refs, "dy", None, plan, precision)

    arrays = {"x": x, "right": right, "left": left, "dy": dy}
    words = {"z": plan.inner, "x_apart": plan.outputs, "dx_apart": plan.outputs}
    found = call(body, "monarch_t_bwd", arrays, ("dx", plan.outputs), words, plan, interpret)
    return found["dx"], found["dright"], found["dleft"]
