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
# # Structured pruning
#
# You learn to find out which filters and neurons of a network leave together, to choose among them,
# and to get the smaller network, with its optimizer state, as an ordinary function.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprune as jp

images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
split = train_test_split(images, labels, test_size=360, random_state=0)
x_train, x_test, y_train, y_test = map(jnp.asarray, split)

# %% [markdown]
# ## A network with a residual connection


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), 2, name="stem")(x))
        y = nn.relu(nn.Conv(64, (3, 3), name="first")(x))
        x = nn.relu(x + nn.Conv(32, (3, 3), name="second")(y))
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="out")(x)


model = Network()
params = model.init(jax.random.key(0), x_test[:1])["params"]


def apply_fn(params, x):
    return model.apply({"params": params}, x)


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


tx = optax.adam(1e-3)


def train(apply_fn, params, state, steps):
    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda params: cross_entropy(apply_fn(params, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for index in np.random.default_rng(0).integers(len(x_train), size=(steps, 64)):
        params, state = step(params, state, x_train[index], y_train[index])
    return params, state


def accuracy(apply_fn, params):
    return jnp.mean(apply_fn(params, x_test).argmax(-1) == y_test)


trained, state = train(apply_fn, params, tx.init(params), steps=150)
print(f"dense: {accuracy(apply_fn, trained):.1%} of the test images are right")

# %% [markdown]
# ## What leaves together
#
# `find_groups` traces the function; there is nothing to register. A unit is what leaves at once.
# The residual connection adds the outputs of the stem and of the second convolution, so a filter of
# one cannot leave without that of the other. After the `reshape` it holds one row of the dense
# layer for each of the 16 pixels.

# %%
groups = jp.find_groups(apply_fn, trained, x_test)
groups

# %%
axes = jp.plot.groups(groups)

# %% [markdown]
# What does filter 5 of the stem take with it? `groups.unit` names the unit of every index of every
# axis, counted from 1, and `groups.masks` gives the masks that keep some units.

# %%
unit = groups.unit["stem/kernel"][3][5]
one_gone = groups.masks(np.arange(1, len(groups) + 1) != unit)
jp.summary(trained, one_gone)

# %% [markdown]
# In the dense layer these are the same rows for each pixel:

# %%
rows = np.flatnonzero(~one_gone["hidden"]["kernel"].any(1))
print(rows)

# %%
axes = jp.plot.mask(one_gone["second"]["kernel"])

# %% [markdown]
# ## Choosing
#
# `groups.select` scores a unit by the scores of its members. With `cost="flops"` the sparsity is a
# fraction of the work, not of the units. Here half of it goes, evenly from all layers.

# %%
scores = jp.scores.taylor(lambda params, x, y: cross_entropy(apply_fn(params, x), y))
masks = groups.select(
    scores(trained, x_train[:512], y_train[:512]), 0.5, cost="flops", scope="layer"
)
axes = jp.plot.mask(masks["second"]["kernel"])

# %% [markdown]
# ## Shrinking
#
# Masked filters still take time. `shrink` cuts them out. The plan says what became of every leaf.

# %%
small_fn, small, plan = jp.shrink(apply_fn, trained, masks, x_test)
plan

# %% [markdown]
# The small function gives what the dense one gives with masked params, and the plan knows of no
# place where it would not.

# %%
masked = apply_fn(jp.apply_masks(trained, masks), x_test)
print(f"largest difference of the logits: {jnp.abs(small_fn(small, x_test) - masked).max():.1e}")
print("inexact:", plan.inexact)

# %% [markdown]
# ## Fine-tuning
#
# Adam has a momentum and a second moment for each weight. `plan.take` cuts the optimizer's state as
# it cut the params, so that training goes on where it was.

# %%
small_state = plan.take(state)
tuned, _ = train(small_fn, small, small_state, steps=100)
print(f"dense:      {accuracy(apply_fn, trained):.1%}")
print(f"shrunk:     {accuracy(small_fn, small):.1%}")
print(f"fine-tuned: {accuracy(small_fn, tuned):.1%}")

# %% [markdown]
# ## Is it faster?
#
# FLOPs are counted, time is measured, on the machine that runs this and at two batch sizes. FLOPs
# are not time: a network as small as this one may gain less than the count promises, or nothing
# where the call itself takes longest.

# %%
flops = [jp.metrics.flops(f, p, x_test[:1]) for f, p in ((apply_fn, trained), (small_fn, small))]
print(f"FLOPs of one image: {flops[0]:,.0f} -> {flops[1]:,.0f}, {flops[0] / flops[1]:.2f}× fewer")
jp.metrics.latency({"dense": (apply_fn, trained), "shrunk": (small_fn, tuned)}, x_test)
