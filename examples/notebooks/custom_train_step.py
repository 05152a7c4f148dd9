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
# This notebook prunes inside an existing train step: in plain JAX, with a linen `TrainState`, and
# with an `nnx.Optimizer`. It also replaces the masks while training continues.
#
# The library has no trainer and no callbacks. `jp.enforce(optimizer, masks)` is an ordinary optax
# transformation, and the rest of the train step does not change.

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
    print(f"{name}: test accuracy {accuracy:.1%}, {nonzero:,} nonzero weights")


# %% [markdown]
# ## Plain JAX
#
# The params are a dict of arrays. Half of the weights are pruned before training, by magnitude.


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
# The step is that of the optax tutorial. `update` needs the params, as with any optimizer that has
# weight decay.


# %%
traces = []


@jax.jit
def train_step(params, state, x, y):
    traces.append("trace")  # runs when the step is traced, not when it is called
    grads = jax.grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


for x, y in batches(200):
    params, state = train_step(params, state, x, y)
show("plain JAX", apply_fn, params)

# %% [markdown]
# The masks are part of the optimizer state. Whatever carries the state carries them: a scan, a
# checkpoint, a mesh. `get_masks` finds them at any depth.

# %%
jp.summary(params, jp.get_masks(state))

# %% [markdown]
# `set_masks` replaces them. The shapes do not change, so that nothing is traced or compiled again.
# Here the network is pruned further, within its present masks.

# %%
for sparsity in (0.7, 0.8, 0.9):
    masks = jp.select(jp.scores.magnitude(params), sparsity, within=jp.get_masks(state))
    state = jp.set_masks(state, masks)
    for x, y in batches(50):
        params, state = train_step(params, state, x, y)
    show(f"sparsity {sparsity}", apply_fn, params)
print(f"traced {len(traces)} time for {200 + 3 * 50} steps")

# %% [markdown]
# ## Select masks inside the step
#
# Scores and selection are pure functions, so that they can be part of the step. Here `lax.cond`
# selects new masks every 20 steps, to a sparsity that follows a schedule, and all steps run in one
# `lax.scan`.
#
# The loss uses `jp.masks.straight_through`, which prunes in the forward pass alone. The gradient
# reaches pruned weights too, so that they are trained further, and come back if they have grown by
# the next selection. The masks are applied for good at the end.

# %%
STEPS = 300
schedule = jp.schedules.cubic(0.9, begin=0, end=200)
tx = optax.adam(2e-3)


@jax.jit
def train(params, masks, batches):
    def step(carry, batch):
        params, masks, state = carry
        i, x, y = batch
        due = (i % 20 == 0) & (i <= 200)
        masks = jax.lax.cond(
            due, lambda: jp.select(jp.scores.magnitude(params), schedule(i)), lambda: masks
        )
        grads = jax.grad(lambda p: loss(jp.masks.straight_through(p, masks), x, y))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), masks, state), masks

    return jax.lax.scan(step, (params, masks, tx.init(params)), batches)


initial = init(jax.random.key(0))
everything = jp.select(jp.scores.magnitude(initial), 0.0)
x, y = map(jnp.stack, zip(*batches(STEPS), strict=True))
(params, masks, _), history = train(initial, everything, (jnp.arange(STEPS), x, y))
show("straight through", apply_fn, jp.apply_masks(params, masks))
came_back = ~history["in"][100] & history["in"][-1]
print(f"{jnp.count_nonzero(came_back)} weights pruned at step 100 are kept at the end")

# %% [markdown]
# ## Linen: a TrainState
#
# `apply_gradients` passes the params to the optimizer, so that only the line with `tx=` changes.


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
# `state.replace` replaces the masks.

# %%
masks = jp.select(jp.scores.magnitude(state.params), 0.9, within=jp.get_masks(state.opt_state))
state = state.replace(opt_state=jp.set_masks(state.opt_state, masks))
for x, y in batches(100):
    state = train_step(state, x, y)
show("linen at 0.9", lambda params, x: model.apply({"params": params}, x), state.params)

# %% [markdown]
# ## Flax nnx: an Optimizer
#
# An nnx module contains its params. `nnx.state(model, nnx.Param)` returns them as a tree, from
# which masks are selected. `nnx.update` writes a masked tree back.


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
# An nnx optimizer wraps the arrays of its state in variables. `nnx.as_pure` unwraps them for
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
# `enforce` masks the gradients before the optimizer sees them, and replaces the update of a pruned
# weight by the negative of the weight, so that the sum is exactly zero. A pruned weight that was
# not zero before is zero after one step:

# %%
masks = {"in": jnp.arange(4) > 1}
params = {"in": jnp.ones(4)}
tx = jp.enforce(optax.adam(0.1), masks)
updates, _ = tx.update({"in": jnp.ones(4)}, tx.init(params), params)
optax.apply_updates(params, updates)
