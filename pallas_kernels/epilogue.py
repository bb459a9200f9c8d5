"""What follows a product in the same kernel: a bias and an activation."""

import jax

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def finish(y, bias, activation):
    """activation(y + bias), in y's dtype."""
    y = y if bias is None else y + bias
    return y if activation is None else ACTIVATIONS[activation](y)
