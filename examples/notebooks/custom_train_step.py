# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A train step of your own
#
# You learn to prune inside a train step that you have already: in bare JAX, with a linen
# `TrainState`, and with an `nnx.Optimizer`; and to swap the masks while training goes on.
#
# The library has no trainer and no callbacks. `jp.enforce(optimizer, masks)` is an optax
# transformation like any other, and the rest of the step stays as it is.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprune as jp

images, labels = load_digits(return_X_y=True)
split = train_test_split(images.astype("float32") / 16, labels, test_size=360, random_state=0)
x_train, x_test, y_train, y_test = map(jnp.asarray, split)


def batches(steps, seed=0):
    for index in np.random.default_rng(seed).integers(len(x_train), size=(steps, 64)):
        yield x_train[index], y_train[index]


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def show(name, apply_fn, params):
    accuracy = jnp.mean(apply_fn(params, x_test).argmax(-1) == y_test)
    nonzero = sum(jnp.count_nonzero(w) for w in jax.tree.leaves(params) if w.ndim > 1)
    print(f"{name}: {accuracy:.1%} of the test images are right, {nonzero:,} nonzero weights")


# %% [markdown]
# ## Bare JAX
#
# The params are a dict of arrays. Half of the weights leave before training, by magnitude.


# %%
def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"])
    return hidden @ params["out"]


def init(key):
    keys = jax.random.split(key)
    normal = jax.nn.initializers.lecun_normal()
    return {
        "in": normal(keys[0], (64, 128)),
        "bias": jnp.zeros(128),
        "out": normal(keys[1], (128, 10)),
    }


def loss(params, x, y):
    return cross_entropy(apply_fn(params, x), y)


params = init(jax.random.key(0))
masks = jp.select(jp.scores.magnitude(params), 0.5)
params = jp.apply_masks(params, masks)
tx = jp.enforce(optax.adamw(2e-3), masks)
state = tx.init(params)

# %% [markdown]
# The step is the one of the optax tutorial. `update` needs the params, as it does for every
# optimizer with weight decay.


# %%
traces = []


@jax.jit
def train_step(params, state, x, y):
    traces.append("a trace")  # runs when the step is traced, not when it is called
    grads = jax.grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


for x, y in batches(200):
    params, state = train_step(params, state, x, y)
show("bare JAX", apply_fn, params)

# %% [markdown]
# The masks are a part of the optimizer's state, so that whatever carries the state carries them: a
# scan, a checkpoint, a mesh. `get_masks` finds them there, however deep.

# %%
jp.summary(params, jp.get_masks(state))

# %% [markdown]
# `set_masks` swaps them. What the compiled step gets has the same shapes as before, so nothing is
# traced or compiled again. Here the network is pruned further, within the masks that it has.

# %%
for sparsity in (0.7, 0.8, 0.9):
    masks = jp.select(jp.scores.magnitude(params), sparsity, within=jp.get_masks(state))
    state = jp.set_masks(state, masks)
    for x, y in batches(50):
        params, state = train_step(params, state, x, y)
    show(f"sparsity {sparsity}", apply_fn, params)
print(f"traced {len(traces)} time for {200 + 3 * 50} steps")

# %% [markdown]
# ## Linen: a TrainState
#
# `apply_gradients` hands the params to the optimizer, so that `tx=` is the one line that changes.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


model = Network()
params = model.init(jax.random.key(0), x_test[:1])["params"]
masks = jp.select(jp.scores.magnitude(params), 0.5)
state = TrainState.create(
    apply_fn=model.apply,
    params=jp.apply_masks(params, masks),
    tx=jp.enforce(optax.adam(2e-3), masks),
)


@jax.jit
def train_step(state, x, y):
    def loss(params):
        return cross_entropy(state.apply_fn({"params": params}, x), y)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


for x, y in batches(200):
    state = train_step(state, x, y)
show("linen", lambda params, x: model.apply({"params": params}, x), state.params)

# %% [markdown]
# Swap the masks with `state.replace`.

# %%
masks = jp.select(jp.scores.magnitude(state.params), 0.9, within=jp.get_masks(state.opt_state))
state = state.replace(opt_state=jp.set_masks(state.opt_state, masks))
for x, y in batches(100):
    state = train_step(state, x, y)
show("linen at 0.9", lambda params, x: model.apply({"params": params}, x), state.params)

# %% [markdown]
# ## Flax nnx: an Optimizer
#
# An nnx module holds its params. `nnx.state(model, nnx.Param)` gives them as a tree, from which
# masks are made; `nnx.update` puts a masked tree back.


# %%
class Module(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


model = Module(nnx.Rngs(0))
params = nnx.state(model, nnx.Param)
masks = jp.select(jp.scores.magnitude(params), 0.5)
nnx.update(model, jp.apply_masks(params, masks))
optimizer = nnx.Optimizer(model, jp.enforce(optax.adam(2e-3), masks), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss(model):
        return cross_entropy(model(x), y)

    optimizer.update(model, nnx.grad(loss)(model))


def apply_module(params, x):
    return nnx.merge(nnx.graphdef(model), params)(x)


for x, y in batches(200):
    train_step(model, optimizer, x, y)
show("nnx", apply_module, nnx.state(model, nnx.Param))

# %% [markdown]
# An nnx optimizer wraps the arrays of its state in variables. `nnx.as_pure` takes them out for
# `get_masks` and `set_masks`.

# %%
state = nnx.as_pure(optimizer.opt_state)
params = nnx.state(model, nnx.Param)
masks = jp.select(jp.scores.magnitude(params), 0.9, within=jp.get_masks(state))
nnx.update(optimizer.opt_state, nnx.state(jp.set_masks(state, masks)))
for x, y in batches(100):
    train_step(model, optimizer, x, y)
show("nnx at 0.9", apply_module, nnx.state(model, nnx.Param))

# %% [markdown]
# ## What `enforce` does
#
# It masks the gradients before the optimizer sees them, and replaces the update of a pruned weight
# by its negative, so that the sum is exactly zero. Even a weight that was not zero before is zero
# after one step:

# %%
masks = {"in": jnp.arange(4) > 1}
params = {"in": jnp.ones(4)}
tx = jp.enforce(optax.adam(0.1), masks)
updates, _ = tx.update({"in": jnp.ones(4)}, tx.init(params), params)
optax.apply_updates(params, updates)
