"""Compares twenty-one other criteria on the problem of curves.py, by the same rules.

Criteria of a trained network start from one trained for --epochs. Penalties, trained scores and
gates act during the first --epochs. All methods are fine-tuned for --epochs more. Criteria of units
remove filters and neurons until the given share of the params is removed.

Finished points are stored in OUT/criteria.csv and are not measured again. Delete the file to start
from the beginning.

    python examples/criteria.py
    python examples/criteria.py --data mnist/ --epochs 1
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
from _training import problem, step_trainer, sweep, sweep_options

import jaxprune as jp


def kernels(params, fill):
    """Returns an array for each kernel, and `None` for each bias."""
    return jax.tree.map(lambda w: jnp.full(w.shape, fill) if w.ndim > 1 else None, params)


def joint_trainer(net, objective, rate):
    """Returns fit(params, others, sparsity, key), which trains params and other arrays together.

    The objective maps ((params, others), step, sparsity, key, x, y) to a scalar; `rate` is the
    learning rate of the other arrays.
    """
    tx = optax.partition({"params": net.adam, "others": optax.adam(rate)}, ("params", "others"))

    @jax.jit
    def step(i, trained, state, sparsity, key):
        batch = jax.random.randint(key, (64,), 0, len(net.x))
        args = i, sparsity, key, net.x[batch], net.y[batch]
        updates, state = tx.update(jax.grad(objective)(trained, *args), state, trained)
        return optax.apply_updates(trained, updates), state

    def fit(params, others, sparsity, key):
        trained = params, others
        state = tx.init(trained)
        for i, step_key in enumerate(jax.random.split(key, net.steps)):
            trained, state = step(i, trained, state, jnp.float32(sparsity), step_key)
        return trained

    return fit


def trained_scores(net):
    """Returns movement pruning, on a cubic schedule, and L0 gates."""

    def sparse_loss(trained, i, sparsity, key, x, y):
        cubic = jp.schedules.cubic(sparsity, begin=0, end=net.steps)
        masks = jp.select(trained[1], cubic(i))
        return net.loss(jp.movement.apply(*trained, masks), x, y)

    def gate(params, gates):
        return jax.tree.map(lambda w, z: w if z is None else w * z, params, gates)

    def gated_loss(trained, i, sparsity, key, x, y):
        params, log_alpha = trained
        gated = gate(params, jp.gates.sample(log_alpha, key))
        return net.loss(gated, x, y) + 1e-5 * jp.gates.penalty(log_alpha)

    fit_moving = joint_trainer(net, sparse_loss, 1e-2)
    fit_gates = joint_trainer(net, gated_loss, 1e-1)

    def movement(params, sparsity, key, train):
        params, scores = fit_moving(params, kernels(params, 0.0), sparsity, key)
        return params, jp.select(scores, sparsity)

    def gates(params, sparsity, key, train):
        params, log_alpha = fit_gates(params, kernels(params, 2.0), sparsity, key)
        # Open gates end at exactly 1; only their logits still differ, so these are ranked.
        return gate(params, jp.gates.mean(log_alpha)), jp.select(log_alpha, sparsity)

    return {"movement": movement, "L0 gates": gates}


def penalties(net, filters):
    """Returns group lasso, and growing regularisation in the second half of the first epochs."""
    half = max(net.steps // 2, 1)
    fit = functools.partial(step_trainer, net.loss, x=net.x, y=net.y)
    lasso = optax.chain(jp.regularizers.group_lasso(net.groups, 1e-3), net.adam)
    with_lasso = fit(lambda masks: lasso, steps=net.steps)
    plainly = fit(lambda masks: net.adam, steps=half)
    # After the rescaling of Adam, so that the penalty outgrows the loss within `half` steps.
    with_penalty = fit(
        lambda masks: optax.chain(
            optax.scale_by_adam(),
            jp.regularizers.growing(masks, 0.1, every=5, limit=100.0),
            optax.scale(-2e-3),
        ),
        steps=half,
    )

    def group_lasso(params, sparsity, key, train):
        params, _ = with_lasso(params, None, key)
        return params, filters(jp.scores.magnitude(params), sparsity)

    def growing(params, sparsity, key, train):
        first, second = jax.random.split(key)
        params, _ = plainly(params, None, first)
        masks = filters(jp.scores.magnitude(params), sparsity)
        return with_penalty(params, masks, second)[0], masks

    return {"group lasso, filters": group_lasso, "growing, filters": growing}


def of_weights(net):
    """Returns criteria, scopes and patterns of single weights."""
    method, scores, sample = jp.curves.method, jp.scores, (net.x[:512], net.y[:512])
    select = functools.partial(functools.partial, jp.select)

    def hutchinson(params, sparsity, key, train):
        params = train(params)
        score = scores.obd_hutchinson(net.loss, samples=100)
        return params, jp.select(score(params, key, *sample), sparsity)

    def adapted(params, sparsity, key, train):
        params = train(params)
        masks = jp.select(scores.woodfisher(net.loss, damping=1e-5)(params, *sample), sparsity)
        update = scores.woodfisher_update(net.loss, damping=1e-5)
        return update(params, masks, *sample), masks

    def one_of_m(params, sparsity, key, train):
        params = train(params)
        pattern = jp.patterns.n_of_m(1, round(1 / (1 - sparsity)), pad=True)
        return params, jp.select(scores.magnitude(params), pattern=pattern)

    return {
        "gradient": method(scores.gradient(net.loss), *sample),
        "Taylor": method(scores.taylor(net.loss), *sample),
        "Fisher": method(scores.fisher(net.loss), *sample),
        "Hutchinson": hutchinson,
        "WoodFisher": adapted,
        "LAMP": method(scores.lamp),
        "standardized magnitude": method(scores.standardized_magnitude),
        "ERK": method(scores.magnitude, select=select(scope="erk")),
        "1:m": one_of_m,
        "blocks": method(scores.magnitude, select=select(pattern=jp.patterns.block((4, 4)))),
    }


def of_units(net, filters):
    """Returns criteria of filters and neurons."""
    method, sample = jp.curves.method, (net.x[:512], net.y[:512])
    select = functools.partial(functools.partial, filters)
    score = {
        "oracle": jp.search.oracle(net.groups, net.loss, absolute=True),
        "Taylor of maps": jp.units.taylor(net.groups, net.loss),
        "Taylor gates": jp.units.taylor_gates(net.groups, net.loss),
    }

    def particles(params, sparsity, key, train):
        params = train(params)
        result = jp.search.particle_filter(
            net.groups,
            net.loss,
            params,
            1 - (1 - sparsity) ** 0.5,  # of the units, which hold about `sparsity` of the params
            key,
            *sample,
            rounds=5,
            batch_size=1,
        )
        return params, filters(result.scores, sparsity)

    def by_relative_score(scores, sparsity):
        """Compares units of all layers by their score over the mean of their group."""
        return filters(jp.units.reduce(net.groups, scores, normalize="mean"), sparsity)

    return {
        "FPGM, filters": method(jp.scores.fpgm, select=select(scope="layer", reduce="first")),
        "isomorphic, filters": method(jp.scores.magnitude, select=select(scope="isomorphic")),
        **{f"{name}, filters": method(s, *sample, select=filters) for name, s in score.items()},
        "mean activation, filters": method(
            jp.units.activation(net.groups, net.apply_fn, "mean"),
            net.x[:512],
            select=by_relative_score,
        ),
        "particle filter, filters": particles,
    }


def main():
    args = sweep_options(__doc__, [2, 4, 8, 16, 32], seeds=3)
    warnings.filterwarnings("ignore", "round_to")  # one for each width that rounding changes
    warnings.filterwarnings("ignore", "obd")  # a network trained for epochs is not at a minimum
    net = problem(args.data, args.epochs)
    filters = functools.partial(net.groups.select, cost="params", round_to=4)
    methods = of_weights(net) | of_units(net, filters) | trained_scores(net)
    methods |= penalties(net, filters)
    table = sweep(net, methods, args, args.out / "criteria.csv")
    print(jp.curves.summary(table))
    print(f"wrote criteria.csv in {args.out}")


if __name__ == "__main__":
    main()
