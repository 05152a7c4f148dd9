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
# # Pruning before training
#
# This notebook prunes an untrained network with SNIP, GraSP and SynFlow. It compares how much each
# method keeps of each layer, and at which compression a layer becomes empty.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprune as jp

images, labels = load_digits(return_X_y=True)
split = train_test_split(images.astype("float32") / 16, labels, test_size=360, random_state=0)
x_train, x_test, y_train, y_test = map(jnp.asarray, split)

# %% [markdown]
# The network becomes narrower towards the output, so that its layers differ in size.

# %%
WIDTHS = (64, 256, 128, 64, 32, 10)


def init(key):
    normal = jax.nn.initializers.he_normal()
    layers = {}
    for i, (n, m) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        kernel = normal(jax.random.fold_in(key, i), (n, m))
        layers[f"layer{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
    return layers


def apply_fn(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss(params, x, y, temperature=1.0):
    logits = apply_fn(params, x) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


params = init(jax.random.key(0))
one = jax.ShapeDtypeStruct((1, 64), jnp.float32)
jp.metrics.layers(apply_fn, params, one)

# %% [markdown]
# ## Five criteria
#
# SNIP estimates how much the loss changes without a weight, and GraSP how much the norm of the
# gradient changes; both need data. SynFlow needs none: it sends ones through the network of
# absolute weights. It scores again after each of many small rounds, which `select_iteratively`
# runs.

# %%
batch = x_train[:512], y_train[:512]
snip = jp.scores.snip(loss)
grasp = jp.scores.grasp(functools.partial(loss, temperature=200.0))
synflow = jp.scores.synflow(apply_fn)

methods = {
    "random": lambda p, s: jp.select(jp.scores.random(p, jax.random.key(1)), s),
    "magnitude": lambda p, s: jp.select(jp.scores.magnitude(p), s),
    "SNIP": lambda p, s: jp.select(snip(p, *batch), s),
    "GraSP": lambda p, s: jp.select(grasp(p, *batch), s),
    "SynFlow": lambda p, s: jp.select_iteratively(synflow, p, s, one, rounds=100),
}

# %% [markdown]
# All methods prune the same number of weights, but from different layers.

# %%
SPARSITY = 0.95
masks = {name: method(params, SPARSITY) for name, method in methods.items()}
figure, panels = plt.subplots(5, 1, figsize=(7, 12), layout="constrained")
for panel, (name, selected) in zip(panels, masks.items(), strict=True):
    jp.plot.sparsity(selected, axes=panel).set_title(name)

# %% [markdown]
# ## Layer collapse
#
# An empty layer passes no signal: the network has the same output for all images, and training
# cannot repair it. At which compression does this happen? Each method prunes the initial network to
# different numbers of weights. The table lists the number of weights in the smallest layer.


# %%
def smallest(masks):
    return min(int(mask.sum()) for mask in jax.tree.leaves(masks))


compressions = [3, 10, 30, 100, 300, 1000]
pruned = {
    name: {c: method(params, 1 - 1 / c) for c in compressions} for name, method in methods.items()
}
left = {name: [smallest(masks) for masks in row.values()] for name, row in pruned.items()}
total = sum(mask.size for mask in jax.tree.leaves(masks["SNIP"]))
print(f"{'weights kept':<14}" + "".join(f"{round(total / c):>8,}" for c in compressions))
for name, row in left.items():
    print(f"{name:<14}" + "".join(f"{n:>8,}" for n in row))

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, row), marker in zip(left.items(), "xosD^", strict=True):
    axes.plot(compressions, row, marker=marker, label=name)
axes.set_xscale("log")
axes.minorticks_off()
axes.set_yscale("symlog")
axes.set_ylim(bottom=-0.3)
axes.set_xticks(compressions, [f"{c}×" for c in compressions])
axes.set_xlabel("compression (weights / kept weights)")
axes.set_ylabel("weights in the smallest layer")
_ = axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
# %%
for name, row in left.items():
    empty = [c for c, n in zip(compressions, row, strict=True) if n == 0]
    print(f"{name}: " + (f"a layer is empty at {empty[0]}×" if empty else "no layer is empty"))

# %% [markdown]
# Magnitude empties a layer first. Before training, the magnitude of a weight depends only on the
# number of inputs of its layer: the second layer has the most inputs, and therefore the smallest
# weights. SynFlow empties a layer last, or never: when a layer loses weights, the same flow passes
# through fewer of them, and their scores rise before the next round.
#
# ## Effect on training
#
# Each network is now trained for 300 steps from the same initial weights. One seed and a short
# training do not rank the methods; they show which networks cannot learn.


# %%
@jax.jit
def accuracy_after_training(params, masks, key):
    tx = jp.enforce(optax.adam(2e-3), masks)

    def step(carry, index):
        params, state = carry
        grads = jax.grad(loss)(params, x_train[index], y_train[index])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = jax.random.randint(key, (300, 64), 0, len(x_train))
    params = jp.apply_masks(params, masks)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return jnp.mean(apply_fn(params, x_test).argmax(-1) == y_test)


key = jax.random.key(2)
dense = accuracy_after_training(params, methods["magnitude"](params, 0.0), key)
print(f"dense: test accuracy {dense:.1%}")
print(f"{'':<12}" + "".join(f"{f'{c}×':>8}" for c in (10, 30, 100)))
for name, row in pruned.items():
    accuracies = [accuracy_after_training(params, row[c], key) for c in (10, 30, 100)]
    print(f"{name:<12}" + "".join(f"{accuracy:>8.1%}" for accuracy in accuracies))
