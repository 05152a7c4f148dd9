"""Layer by layer, without training: which methods keep the accuracy of a trained network?

An MLP learns digits. Then `jp.reconstruct` prunes it with each method and 1,000 training images as
calibration rows, and nothing is trained again. The control by magnitude uses no data.

    python examples/layerwise.py
    python examples/layerwise.py --data mnist/
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import markdown, mean_std, parser
from _data import load
from flax import linen as nn
from tqdm import tqdm

import jaxprune as jp

METHODS = ["magnitude", "wanda", "ria", "dsnot", "sparsegpt", "alps"]
BUDGETS = ["owl", "allocate"]  # of SparseGPT
SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9]


def train(model, x, y, key, steps):
    """Returns trained params."""
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, x, y):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            updates, state = adam.update(jax.grad(loss)(params, x, y), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, adam.init(params)), length=steps)[0][0]

    return fit(model.init(key, x[:1]))


def compare(args):
    """Returns accuracies in % by method and sparsity; 0 is dense, "2:4" the pattern."""
    x, y, x_test, y_test = (jnp.asarray(a) for a in load(args.data))
    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
    results = collections.defaultdict(lambda: collections.defaultdict(list))

    @jax.jit
    def accuracy(params):
        return 100 * jnp.mean(jnp.argmax(model.apply(params, x_test), -1) == y_test)

    for seed in tqdm(range(args.seeds), ncols=80):
        params = train(model, x[:5000], y[:5000], jax.random.key(seed), args.steps)
        rows = np.random.default_rng(seed).choice(len(x), 1000, replace=False)
        batches = list(x[rows].reshape(4, 250, -1))
        results["dense"][0].append(float(accuracy(params)))
        for name in METHODS:
            method = getattr(jp.layerwise, name)
            for s in args.sparsities:
                pruned, _ = jp.reconstruct(model.apply, params, batches, s, method=method)
                results[name][s].append(float(accuracy(pruned)))
            if name != "dsnot":  # a swap would break the pattern
                options = {"method": method, "pattern": jp.patterns.n_of_m(2, 4)}
                pruned, _ = jp.reconstruct(model.apply, params, batches, **options)
                results[name]["2:4"].append(float(accuracy(pruned)))
        stats = jp.calibrate(model.apply, params, batches, gram=True)
        for name in BUDGETS:
            for s in args.sparsities:
                scope = getattr(jp.layerwise, name)(stats, params, s)
                pruned, _ = jp.reconstruct(model.apply, params, batches, scope=scope)
                results[f"sparsegpt, {name}"][s].append(float(accuracy(pruned)))
    return results


def main():
    """Prints the table."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=300, help="of training")
    options.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    args = options.parse_args()
    results = compare(args)
    print(f"dense: {mean_std(results.pop('dense')[0], 1)} %; accuracy in %:\n")
    columns = [*args.sparsities, "2:4"]
    rows = [
        (name, *(mean_std(found[c], 1) if found[c] else "" for c in columns))
        for name, found in results.items()
    ]
    print(markdown(["method", *(c if c == "2:4" else f"{c:.0%}" for c in columns)], rows))


if __name__ == "__main__":
    main()
