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
# # Gradual pruning
#
# This notebook prunes a network while it trains. A schedule sets the sparsity of each step, and one
# optax transformation does the rest. The last section looks at the masks.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprune as jp

images, labels = load_digits(return_X_y=True)
split = train_test_split(images.astype("float32") / 16, labels, test_size=360, random_state=0)
x_train, x_test, y_train, y_test = map(jnp.asarray, split)

# %% [markdown]
# ## Schedules
#
# A schedule maps a step to a sparsity. The cubic schedule prunes most weights early, while many are
# redundant, and slows down towards the end.

# %%
STEPS, SPARSITY = 600, 0.95
schedules = {
    "cubic": jp.schedules.cubic(SPARSITY, begin=100, end=400),
    "linear": jp.schedules.linear(SPARSITY, begin=100, end=400),
    "one shot": jp.schedules.one_shot(SPARSITY, begin=400),
}
steps = np.arange(STEPS)
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, schedule in schedules.items():
    axes.plot(steps, jax.vmap(schedule)(steps), label=name)
axes.set_xlabel("step")
axes.set_ylabel("sparsity")
_ = axes.legend(frameon=False)

# %% [markdown]
# ## Training
#
# `jp.gradual` wraps an optimizer. Every 20 steps it scores the weights and prunes to the sparsity
# of the schedule. Pruned weights stay at zero. The train function also records the sparsity of each
# step, which it reads from the masks in the optimizer state.


# %%
def init(key):
    keys = jax.random.split(key)
    normal = jax.nn.initializers.lecun_normal()
    return {
        "in": normal(keys[0], (64, 128)),
        "bias": jnp.zeros(128),
        "out": normal(keys[1], (128, 10)),
    }


def apply_fn(params, x):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"])
    return hidden @ params["out"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()


@functools.partial(jax.jit, static_argnames="schedule")
def train(key, schedule):
    tx = jp.gradual(optax.adam(2e-3), jp.scores.magnitude, schedule, every=20)

    def step(carry, index):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, x_train[index], y_train[index])
        updates, state = tx.update(grads, state, params)
        sparsity = jp.metrics.sparsity(jp.get_masks(state))
        return (optax.apply_updates(params, updates), state), (value, sparsity)

    init_key, key = jax.random.split(key)
    params = init(init_key)
    batches = jax.random.randint(key, (STEPS, 64), 0, len(x_train))
    (params, state), history = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, state, history


def accuracy(params):
    return jnp.mean(apply_fn(params, x_test).argmax(-1) == y_test)


params, state, (losses, sparsities) = train(jax.random.key(0), schedules["cubic"])
masks = jp.get_masks(state)
print(f"test accuracy {accuracy(params):.1%}")
jp.summary(params, masks)

# %%
axes = jp.plot.training(steps, sparsities, losses)

# %% [markdown]
# The sparsity follows the schedule in steps of 20. The loss rises while the last weights are
# pruned, and falls again. It rises more if all weights are pruned in one step:

# %%
_, _, (losses, sparsities) = train(jax.random.key(0), schedules["one shot"])
axes = jp.plot.training(steps, sparsities, losses)

# %% [markdown]
# In both runs the remaining weights are trained for 200 steps after pruning. The test accuracy of
# all schedules, over three seeds:

# %%
for name, schedule in schedules.items():
    seeds = [float(accuracy(train(jax.random.key(seed), schedule)[0])) for seed in range(3)]
    print(f"{name:<10}{np.mean(seeds):.1%} ± {np.std(seeds, ddof=1):.1%}")

# %% [markdown]
# With three seeds and 360 test images, differences of a few points are noise.
#
# ## A look at the masks
#
# One threshold separates the scores of kept and pruned weights, across all layers. The layers do
# not lose the same fraction.

# %%
axes = jp.plot.sparsity(masks)

# %% [markdown]
# The mask of the first layer has one row for each of the 64 pixels. Pixels that are blank in each
# image have empty rows, because no gradient has ever reached their weights.

# %%
print("blank pixels:", jnp.flatnonzero(x_train.max(0) == 0))
print("empty rows:  ", jnp.flatnonzero(~masks["in"].any(1)))
axes = jp.plot.mask(masks["in"])
