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
# # Quickstart
#
# You learn to remove nine tenths of a trained Flax network's weights, to look at what is left, and
# to fine-tune it while the pruned weights stay at zero.

# %%
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprune as jp

# %% [markdown]
# ## A trained network
#
# The data are 8×8 images of digits; 360 of them are held out. `jp.nnx.split` gives an nnx module as
# a pure function and its params.

# %%
images, labels = load_digits(return_X_y=True)
split = train_test_split(images.astype("float32") / 16, labels, test_size=360, random_state=0)
x_train, x_test, y_train, y_test = map(jnp.asarray, split)


def network(key):
    rngs = nnx.Rngs(key)
    return nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs))


apply_fn, initial = jp.nnx.split(network(jax.random.key(0)))

# %% [markdown]
# The train function takes masks: `jp.enforce` wraps any optax optimizer, and keeps the weights
# whose mask is false at zero. To train the dense network, the masks keep everything.


# %%
def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()


@functools.partial(jax.jit, static_argnames="steps")
def train(params, masks, key, steps=300):
    tx = jp.enforce(optax.adam(2e-3), masks)

    def step(carry, index):
        params, state = carry
        grads = jax.grad(loss)(params, x_train[index], y_train[index])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = jax.random.randint(key, (steps, 64), 0, len(x_train))
    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


@jax.jit
def accuracy(params):
    return jnp.mean(apply_fn(params, x_test).argmax(-1) == y_test)


everything = jp.select(jp.scores.magnitude(initial), 0.0)
trained = train(initial, everything, jax.random.key(1))
print(f"dense: {accuracy(trained):.1%} of the test images are right")

# %% [markdown]
# ## Scores, then masks
#
# A score says how important each weight is; higher is kept. Here it is the weight's magnitude.
# `select` keeps the best tenth of all weights. A mask is an array of bools beside its weights,
# `True` for kept; biases have none, and are never pruned.

# %%
scores = jp.scores.magnitude(trained)
masks = jp.select(scores, 0.9)
jp.summary(trained, masks)

# %% [markdown]
# One threshold cuts the scores of all leaves in two.

# %%
axes = jp.plot.scores(scores, masks)

# %% [markdown]
# The layers do not lose the same fraction.

# %%
axes = jp.plot.sparsity(masks)

# %% [markdown]
# The mask of the first layer has a row for each of the 64 pixels. Among the empty rows are those of
# pixels that are blank in every image: nothing has trained their weights.

# %%
mask = masks["layers"][0]["kernel"]
print("blank pixels:", jnp.flatnonzero(x_train.max(0) == 0))
print("empty rows:  ", jnp.flatnonzero(~mask.any(1)))
axes = jp.plot.mask(mask)

# %% [markdown]
# ## Fine-tuning
#
# Without most of its weights the network is worse. More training repairs it, and the pruned weights
# stay at zero.

# %%
pruned = jp.apply_masks(trained, masks)
tuned = train(pruned, masks, jax.random.key(2))
print(f"pruned:     {accuracy(pruned):.1%}")
print(f"fine-tuned: {accuracy(tuned):.1%}")
kernels = [w for w in jax.tree.leaves(tuned) if w.ndim > 1]
print(f"nonzero weights: {sum(int(jnp.count_nonzero(w)) for w in kernels):,}")

# %% [markdown]
# ## A small curve
#
# One sparsity and one seed say little about a method. `jp.curves.sweep` runs methods × sparsities ×
# seeds, with random and magnitude pruning always among them. SNIP, which prunes before training, is
# added here. The sweep is tiny: few points, one seed, hardly any training. To compare methods takes
# more of each.

# %%
snip = jp.curves.method(jp.scores.snip(loss), x_train[:512], y_train[:512], trained=False)
table = jp.curves.sweep(
    {"SNIP": snip},
    sparsities=[0.8, 0.95],
    seeds=[0],
    train=train,
    evaluate=accuracy,
    init=lambda key: jp.nnx.split(network(key))[1],
    apply_fn=apply_fn,
    inputs=(x_test,),
)
jp.curves.summary(table)

# %%
axes = jp.plot.curves(table)

# %% [markdown]
# The column `time` is measured: zeros alone make nothing faster. The notebook on structured pruning
# makes networks that are.
