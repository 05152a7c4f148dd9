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
# # Coming from PyTorch
#
# This notebook lists what replaces each call of `torch.nn.utils.prune` and of Torch-Pruning, and
# the differences. The PyTorch code is shown, but not run.
#
# | | `torch.nn.utils.prune` | jaxprune |
# |---|---|---|
# | object | a parameter of a module, changed in place | a tree of params; returns a new tree |
# | place of the mask | the buffer `weight_mask` of the module | a tree next to the params |
# | pruned weight | `weight_orig * weight_mask`, by a hook before each call | zero |
# | values of a mask | 1 is kept | `True` is kept; `None` is never pruned |
# | amount | `amount`: the fraction pruned, or a number | `sparsity`: the fraction pruned |
# | second call | prunes a fraction of the remaining weights | `within=`: a fraction of all |
# | training | any optimizer | `jp.enforce(optimizer, masks)` |
# | weight of a linear layer | (outputs, inputs) | (inputs, outputs) |

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxprune as jp

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)


def init(key):
    keys = jax.random.split(key)
    normal = jax.nn.initializers.lecun_normal()
    return {
        "hidden": {"kernel": normal(keys[0], (64, 100)), "bias": jnp.zeros(100)},
        "out": {"kernel": normal(keys[1], (100, 10)), "bias": jnp.zeros(10)},
    }


def apply_fn(params, x):
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()


params = init(jax.random.key(0))

# %% [markdown]
# ## l1_unstructured
#
# ```python
# prune.l1_unstructured(model.hidden, name="weight", amount=0.3)
# prune.l1_unstructured(model.out, name="weight", amount=0.6)
# ```
#
# Scoring and selection are two steps. A dict of paths sets the sparsity of single leaves;
# `scope="layer"` applies the same sparsity to each. By default, leaves with one axis, such as
# biases, are not pruned.

# %%
scores = jp.scores.magnitude(params)
masks = jp.select(scores, scope={"hidden/kernel": 0.3, "out/kernel": 0.6})
jp.summary(params, masks)

# %% [markdown]
# ## random_unstructured
#
# ```python
# prune.random_unstructured(model.hidden, name="weight", amount=0.3)
# ```
#
# Random scores need a key. `where=` selects leaves by path; the other leaves have the mask `None`.

# %%
scores = jp.scores.random(params, jax.random.key(1))
masks = jp.select(scores, 0.3, where=lambda path, score: path == "hidden/kernel")
jp.summary(params, masks)

# %% [markdown]
# ## global_unstructured
#
# ```python
# prune.global_unstructured(
#     [(model.hidden, "weight"), (model.out, "weight")],
#     pruning_method=prune.L1Unstructured,
#     amount=0.8,
# )
# ```
#
# One threshold for all leaves is the default scope.

# %%
masks = jp.select(jp.scores.magnitude(params), 0.8)
jp.summary(params, masks)

# %% [markdown]
# ## weight_orig, weight_mask, and remove
#
# ```python
# dict(model.hidden.named_parameters()).keys()  # bias, weight_orig
# dict(model.hidden.named_buffers()).keys()     # weight_mask
# prune.remove(model.hidden, "weight")          # weight_orig and weight_mask become weight
# ```
#
# The params have the same structure with and without masks. Checkpoints do not change, and there is
# nothing to remove. `apply_masks` makes pruning permanent.

# %%
pruned = jp.apply_masks(params, masks)
print(jax.tree.structure(pruned) == jax.tree.structure(params))
print(f"{jnp.mean(pruned['hidden']['kernel'] == 0):.1%} of the first kernel is zero")

# %% [markdown]
# PyTorch keeps the old value of a pruned weight in `weight_orig`; `apply_masks` does not. To train
# pruned weights further, so that they may come back, mask them in the loss instead. The network
# then sees zeros, and the gradient still reaches the pruned weights.

# %%
grads = jax.grad(lambda p: loss(jp.masks.straight_through(p, masks), x, y))(params)
reached = (grads["out"]["kernel"] != 0) & ~masks["out"]["kernel"]
print(f"{jnp.count_nonzero(reached)} pruned weights of the last layer have a gradient")

# %% [markdown]
# ## custom_from_mask
#
# ```python
# prune.custom_from_mask(model.hidden, name="weight", mask=mask)
# ```
#
# Masks are ordinary boolean arrays in an ordinary tree, so that any code can create them.

# %%
checkerboard = (jnp.arange(64)[:, None] + jnp.arange(100)) % 2 == 0
custom = {"hidden": {"kernel": checkerboard, "bias": None}, "out": {"kernel": None, "bias": None}}
jp.summary(jp.apply_masks(params, custom), custom)

# %% [markdown]
# ## Training
#
# ```python
# optimizer = torch.optim.Adam(model.parameters())  # the hooks do the rest
# ```
#
# There are no hooks. The optimizer keeps the pruned weights at zero.


# %%
@functools.partial(jax.jit, static_argnames="steps")
def train(params, masks, steps=100):
    tx = jp.enforce(optax.adam(3e-3), masks)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


tuned = train(pruned, masks)
print(f"loss: {loss(pruned, x, y):.2f} -> {loss(tuned, x, y):.2f}")
print(f"{jnp.mean(tuned['hidden']['kernel'] == 0):.1%} of the first kernel is zero")

# %% [markdown]
# ## Iterative pruning
#
# ```python
# for _ in range(3):
#     prune.l1_unstructured(model.hidden, name="weight", amount=0.5)  # of the remaining weights
#     train(model)
# ```
#
# `amount` of PyTorch is a fraction of the remaining weights: three rounds of one half keep an
# eighth. `sparsity` is a fraction of all weights, so that each round states its final sparsity.
# With `within=`, pruned weights stay pruned.

# %%
tuned, masks = params, None
for sparsity in (0.5, 0.75, 0.875):
    masks = jp.select(jp.scores.magnitude(tuned), sparsity, within=masks)
    tuned = train(jp.apply_masks(tuned, masks), masks)
    print(f"sparsity {jp.metrics.sparsity(masks):.1%}, loss {loss(tuned, x, y):.2f}")

# %% [markdown]
# ## ln_structured
#
# ```python
# prune.ln_structured(model.hidden, name="weight", amount=0.5, n=2, dim=0)
# ```
#
# PyTorch zeroes rows of this one tensor, but neither the biases of the layer nor the inputs of the
# next layer. Here a neuron is a unit that includes both, so that it can be removed.
# `reduce="first"` scores it by its incoming weights, as PyTorch does.

# %%
groups = jp.find_groups(apply_fn, params, x)
masks = groups.select(jp.scores.magnitude(params, p=2), 0.5, reduce="first")
jp.summary(params, masks)

# %%
norms = np.linalg.norm(params["hidden"]["kernel"], axis=0)
kept = np.asarray(masks["hidden"]["kernel"].any(0))
print(f"kept norms: from {norms[kept].min():.4f} to {norms[kept].max():.4f}")
print(f"removed norms: from {norms[~kept].min():.4f} to {norms[~kept].max():.4f}")

# %% [markdown]
# ## Torch-Pruning: DependencyGraph
#
# ```python
# DG = tp.DependencyGraph().build_dependency(model, example_inputs=x)
# group = DG.get_pruning_group(model.hidden, tp.prune_linear_out_channels, idxs=[2, 6, 9])
# group.prune()
# ```
#
# Torch-Pruning changes the modules in place, and `idxs` are the removed indices. Here the masks
# name the units to keep, and `shrink` returns a new, smaller network. The table of groups lists the
# slices that are removed together.

# %%
groups

# %% [markdown]
# `groups.unit` holds the number of the unit of each index of each axis; the first unit has number
# 1.

# %%
removed = groups.unit["hidden/kernel"][1][[2, 6, 9]]
masks = groups.masks(~np.isin(np.arange(1, len(groups) + 1), removed))
small_fn, small, plan = jp.shrink(apply_fn, params, masks, x)
plan

# %% [markdown]
# The small function computes what the dense one computes with masked params, up to rounding, and
# the plan lists the places where it would not.

# %%
masked = apply_fn(jp.apply_masks(params, masks), x)
print(f"largest difference: {jnp.abs(small_fn(small, x) - masked).max():.1e}")
print("inexact:", plan.inexact)

# %% [markdown]
# After pruning, Torch-Pruning needs a new optimizer. `plan.take` cuts the moments of Adam as it cut
# the params, so that training continues.

# %%
small_state = plan.take(optax.adam(1e-3).init(params))
jax.tree.map(jnp.shape, small_state[0].mu)

# %% [markdown]
# ## Torch-Pruning: a pruner
#
# ```python
# pruner = tp.pruner.MagnitudePruner(
#     model,
#     example_inputs=x,
#     importance=tp.importance.MagnitudeImportance(p=2),
#     pruning_ratio=0.5,
#     ignored_layers=[model.out],
# )
# pruner.step()
# ```
#
# The outputs of the network need no `ignored_layers`: they are pinned, as the table above states.
# `scope="layer"` removes half of each layer; the default scope compares all units.
# `jp.metrics.latency` measures whether the smaller network is faster.

# %%
masks = groups.select(jp.scores.magnitude(params, p=2), 0.5, scope="layer")
small_fn, small, plan = jp.shrink(apply_fn, params, masks, x)
print(small_fn(small, x).shape)
plan
