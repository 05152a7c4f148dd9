"""Two networks on digits and how they are trained: LeNet-300-100 and a small CNN.

quickstart.py, prune_retrain.py and lottery.py use LeNet-300-100; curves.py and criteria.py use the
CNN. A trainer takes `link`, which makes an optimizer from whatever a method varies: its masks, or
its sparsity. That is an argument of the compiled step, so that nothing is compiled again.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from _common import parser
from _data import epoch_order, load_images
from flax import nnx

import jaxprune as jp


class LeNet(nnx.Module):
    """LeNet-300-100: a multilayer perceptron with 300 and 100 hidden units."""

    def __init__(self, inputs, rngs):
        sizes = inputs, 300, 100, 10
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nnx.List(nnx.Linear(n, m, rngs=rngs) for n, m in pairs)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def lenet(inputs, seed):
    """Returns LeNet-300-100 as a pure function, and its initial params."""
    graphdef, params = nnx.split(LeNet(inputs, nnx.Rngs(seed)))
    return lambda params, x: nnx.merge(graphdef, params)(x), params


class CNN(nn.Module):
    """Two convolutions and two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def cross_entropy(apply_fn, temperature=1.0):
    """Returns loss(params, x, y)."""

    def loss(params, x, y):
        logits = apply_fn(params, x) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def accuracy_on(apply_fn, x, y):
    """Returns accuracy(params)."""

    @jax.jit
    def accuracy(params):
        return jnp.mean(jnp.argmax(apply_fn(params, x), -1) == y)

    return accuracy


def epoch_trainer(apply_fn, link, x, y, size=64):
    """Returns fit(params, state, sparsity, epochs, seed), with the optimizer link(sparsity)."""
    loss = cross_entropy(apply_fn)

    @jax.jit
    def epoch(params, state, sparsity, order):
        tx = link(sparsity)

        def step(carry, index):
            params, state = carry
            grads = jax.grad(loss)(params, x[index], y[index])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    def fit(params, state, sparsity, epochs, seed):
        for i in range(epochs):
            order = epoch_order(len(x), (seed, i), size)
            params, state = epoch(params, state, jnp.float32(sparsity), order)
        return params, state

    return fit


def step_trainer(loss, link, x, y, steps, size=64):
    """Returns fit(params, chosen, key) -> (params, state), with the optimizer link(chosen).

    The loop runs in Python, because XLA on CPUs runs convolutions in a `scan` ten times slower.
    """

    @jax.jit
    def step(params, state, chosen, key):
        batch = jax.random.randint(key, (size,), 0, len(x))
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, state = link(chosen).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def fit(params, chosen, key):
        state = link(chosen).init(params)
        for step_key in jax.random.split(key, steps):
            params, state = step(params, state, chosen, step_key)
        return params, state

    return fit


def problem(data, epochs):
    """Returns what all methods share: data, network, training, evaluation and groups."""
    x, y, x_test, y_test = load_images(data)
    x, x_test, y = jnp.asarray(x), jnp.asarray(x_test), jnp.asarray(y)
    model = CNN()
    apply_fn = jax.jit(model.apply)
    loss = cross_entropy(apply_fn)
    adam = optax.adam(2e-3)
    steps = max(epochs * len(x) // 64, 1)
    fit = step_trainer(loss, lambda masks: jp.enforce(adam, masks), x, y, steps)
    init = jax.jit(lambda key: model.init(key, x[:1]))
    return types.SimpleNamespace(
        x=x,
        y=y,
        data={"x": x, "y": y, "x_test": x_test, "y_test": y_test},
        apply_fn=apply_fn,
        loss=loss,
        adam=adam,
        steps=steps,
        train=lambda params, masks, key: fit(params, masks, key)[0],
        evaluate=accuracy_on(apply_fn, x_test, y_test),
        init=init,
        groups=jp.find_groups(apply_fn, init(jax.random.key(0)), x[:1]),
    )


def sweep_options(description, compressions, seeds):
    """Reads the command line of an example that sweeps methods."""
    options = parser(description, seeds)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--compressions", type=float, nargs="+", default=compressions)
    options.add_argument("--methods", nargs="+", metavar="NAME", help="measure only these rows")
    return options.parse_args()


def sweep(net, methods, args, store):
    """Measures methods on the problem; returns the table of `jp.curves.sweep`."""
    sparsities = [1 - 1 / c for c in args.compressions]
    methods = {name: methods[name] for name in args.methods or methods}
    return jp.curves.sweep(
        methods,
        sparsities,
        range(args.seeds),
        net.train,
        net.evaluate,
        init=net.init,
        apply_fn=net.apply_fn,
        inputs=[net.x[:256]],
        store=store,
    )
