r"""Scores of units, one criterion a file: a float32 number per unit of ``find_groups``.

Higher is kept. The scores go where scores of params go, ``groups.select(scores, sparsity)``. They
are arrays, so they can be added:
``units.taylor(groups, loss)(params, *batch) - 1e-3 * units.flops(groups) / 1e6``.

The gate of a unit is a number that multiplies what the unit computes. The derivative of the loss
with respect to the gate, at 1, needs no change of the network. Where leaves :math:`G_u` enter
linearly, as the kernel and the bias of a layer do, it is

.. math:: \frac{\partial L}{\partial \text{gate}_u} = \sum_{i \in G_u} w_i
    \frac{\partial L}{\partial w_i} = \sum_\text{positions} z_u \frac{\partial L}{\partial z_u}

where :math:`z_u` is the output of the layer for the unit. A gate after a ReLU has the same
derivative.

>>> import jax, jax.numpy as jnp
>>> import jaxprune as jp
>>> params = {"in": jnp.eye(3, 4), "bias": jnp.ones(4), "out": jnp.arange(8.0).reshape(4, 2)}
>>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]
>>> groups = jp.find_groups(apply_fn, params, jnp.ones((5, 3)))
>>> scores = taylor(groups, lambda p, x: jnp.sum(apply_fn(p, x)))(params, jnp.ones((5, 3)))
>>> print(scores, groups.select(scores, 0.5)["bias"])
[ 2. 10. 18. 13.] [False False  True  True]
"""

from jaxprune.units._activation import activation
from jaxprune.units._flops import flops
from jaxprune.units._reduce import reduce
from jaxprune.units._taylor import taylor
from jaxprune.units._taylor_gates import taylor_gates

__all__ = ["activation", "flops", "reduce", "taylor", "taylor_gates"]
