"""What pruning costs: time and memory of selecting, enforcing and iterating, against plain JAX.

Each ratio compares with a reference in the same process: a global sort for `jp.select`, plain Adam
for `jp.enforce` and `jp.gradual`, one gradient for a score. Figures are medians, of interleaved
pairs for steps (with donated state) and scores.

    python examples/benchmarks.py --millions 25 100
    python examples/benchmarks.py --tiny
"""

import argparse
import os
import platform
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import optax

import jaxprune as jp


def seconds(f, *args):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def median_seconds(f, *args, repeats):
    seconds(f, *args)  # compiles
    return statistics.median(seconds(f, *args) for _ in range(repeats))


def memory(f, *args):
    """Bytes of temporaries and outputs, as XLA plans them."""
    found = jax.jit(f).lower(*args).compile().memory_analysis()
    return found.temp_size_in_bytes, found.output_size_in_bytes


def by_sorting(scores):
    """The reference: sorts all scores, then compares with the threshold (ties all go)."""
    flat = jnp.sort(jnp.concatenate([s.ravel() for s in scores]))
    threshold = flat[round(0.9 * flat.size) - 1]
    return [s > threshold for s in scores]


def normal_arrays(n, count=20):
    side = max(n // count // 256, 1)
    make = jax.jit(lambda key: jax.random.normal(key, (side, 256)))
    return [make(jax.random.key(i)) for i in range(count)]


def bench_select(n, repeats):
    params = normal_arrays(n)
    scores = [jnp.abs(w) for w in params]
    ties = [jnp.ones_like(w) for w in params]
    size = sum(w.size for w in params)
    print(f"\nselect, {size:,} float32 in {len(params)} arrays, sparsity 0.9")

    def select(scores):
        return jp.select(scores, 0.9)

    def by_layer(scores):
        return jp.select(scores, 0.9, scope="layer")

    def fused(params):
        return jp.select(jp.scores.magnitude(params), 0.9)

    reference = jax.jit(by_sorting)
    reference = median_seconds(reference.lower(scores).compile(), scores, repeats=1)
    rows = [("global", select, scores), ("global, all tied", select, ties)]
    rows += [("global, in jit with magnitude", jax.jit(fused), params), ("layer", by_layer, scores)]
    for name, f, args in rows:
        took = median_seconds(f, args, repeats=repeats)
        print(f"  {name:<30} {took:9.4f} s   {reference / took:4.0f} x faster than the sort")
    print(f"  {'sort and compare':<30} {reference:9.4f} s")
    for name, f in [("global", select), ("fused with magnitude", fused), ("sort", by_sorting)]:
        temp, output = memory(f, params if f is fused else scores)
        print(
            f"  {name:<30} {(temp + output) / size:9.2f} bytes a param "
            f"({temp / size:.2f} temporary, {output / size:.2f} masks)"
        )


def mlp_params(key, widths):
    pairs = zip(jax.random.split(key, len(widths)), widths[:-1], widths[1:], strict=False)
    return [
        {"w": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "b": jnp.zeros(b)} for k, a, b in pairs
    ]


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def conv_params(key, widths):
    keys = jax.random.split(key, len(widths) + 1)
    kernels = [
        jax.random.normal(k, (3, 3, n, m)) * (2 / (9 * n)) ** 0.5
        for k, n, m in zip(keys, (3, *widths), widths, strict=False)
    ]
    return {"kernels": kernels, "out": jax.random.normal(keys[-1], (widths[-1], 10)) * 0.1}


def convs(params, x):
    for kernel in params["kernels"]:
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["out"]


def squared_error(apply_fn):
    def loss(params, x, y):
        return jnp.mean((apply_fn(params, x) - y) ** 2)

    return loss


loss = squared_error(mlp)


def whole_step(tx):
    def step(carry, x, y):
        params, state = carry
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def update_only(tx):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def paired_ratio(step, plain, carries, args, pairs):
    """Times both in turn, with the order swapped each time; returns the median of the ratios."""
    steps = [step, plain]
    ratios, plain_seconds = [], []
    for i in range(pairs + 3):
        took = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            carries[j] = jax.block_until_ready(steps[j](carries[j], *args))
            took[j] = time.perf_counter() - start
        if i >= 3:
            ratios.append(took[0] / took[1])
            plain_seconds.append(took[1])
    return statistics.median(ratios), statistics.median(plain_seconds)


def bench_optimizers(widths, step_pairs, update_pairs):
    params = mlp_params(jax.random.key(0), widths)
    size = sum(p.size for p in jax.tree.leaves(params))
    x = jax.random.normal(jax.random.key(1), (64, widths[0]))
    y = jax.random.normal(jax.random.key(2), (64, widths[-1]))
    grads = jax.jit(jax.grad(loss))(params, x, y)
    masks = jp.select(jp.scores.magnitude(params), 0.9)
    schedule = jp.schedules.cubic(0.9, begin=10**6, end=2 * 10**6)  # not due while we measure
    plain = optax.adam(1e-3)
    links = {
        "enforce": jp.enforce(optax.adam(1e-3), masks),
        "gradual": jp.gradual(optax.adam(1e-3), jp.scores.magnitude, schedule, every=100),
    }
    print(f"\nAdam on an MLP of {size:,} params, batch 64: ratios to plain Adam")
    kinds = [
        ("whole step", whole_step, (x, y), step_pairs),
        ("optimizer only", update_only, (grads,), update_pairs),
    ]
    for name, tx in links.items():
        for kind, make, args, pairs in kinds:
            compiled, carries, temps = [], [], []
            for each in (tx, plain):
                carry = jax.tree.map(jnp.copy, (params, each.init(params)))
                step = jax.jit(make(each), donate_argnums=0).lower(carry, *args).compile()
                temps.append(step.memory_analysis().temp_size_in_bytes / 1e6)
                compiled.append(step)
                carries.append(carry)
            ratio, took = paired_ratio(*compiled, carries, args, pairs)
            print(
                f"  {name}, {kind:<15} {ratio:6.3f} x {took * 1e3:8.2f} ms   median of {pairs} "
                f"pairs   temporary {temps[0]:.2f} MB, plain {temps[1]:.2f} MB"
            )


def bench_scores(name, apply_fn, params, x, examples, pairs):
    """Times a score beside one gradient of the same batch, and the Fisher beside one an example."""
    loss = squared_error(apply_fn)
    y = jnp.ones_like(apply_fn(params, x))
    key = jax.random.key(3)
    gradient = jax.jit(jax.grad(loss))
    groups = jp.find_groups(apply_fn, params, x)
    every = {
        "gradient": jp.scores.gradient(loss),
        "taylor": jp.scores.taylor(loss),
        "snip": jp.scores.snip(loss),
        "synflow, one round, batch 1": lambda p, x, y: jp.scores.synflow(apply_fn)(p, x[:1]),
        "units.taylor_gates": jp.units.taylor_gates(groups, loss),
        "units.activation": lambda p, x, y: jp.units.activation(groups, apply_fn)(p, x),
        "grasp": jp.scores.grasp(loss),
    }
    samples = 10
    hutchinson = jp.scores.obd_hutchinson(loss, samples)
    single = {
        "fisher": jp.scores.fisher(loss),
        "woodfisher, blocks of 50": jp.scores.woodfisher(loss),
        "units.taylor": jp.units.taylor(groups, loss),
    }
    count = sum(p.size for p in jax.tree.leaves(params))
    print(f"\nscores on {name} of {count:,} params: ratios to one gradient, batch {len(x)}")

    def show(name, score, args, plain_args, times=1):
        ratio, _ = paired_ratio(
            lambda _: score(*args), lambda _: gradient(*plain_args), [None, None], (), pairs
        )
        print(f"  {name:<30} {ratio / times:6.2f} x")

    batch = params, x, y
    for name, score in every.items():
        show(name, jax.jit(score), batch, batch)
    show("obd_hutchinson, a sample", hutchinson, (params, key, x, y), batch, samples)
    print(f"  of {examples} examples: ratios to {examples} gradients, each of one")
    few, one = (params, x[:examples], y[:examples]), (params, x[:1], y[:1])
    for name, score in single.items():
        show(name, score, few, one, examples)


def bench_iteratively(widths, rounds):
    params = mlp_params(jax.random.key(0), widths)
    size = sum(p.size for p in jax.tree.leaves(params))
    x = jnp.ones((1, widths[0]))
    score = jp.scores.synflow(mlp)
    print(f"\nselect_iteratively, SynFlow, {size:,} params, sparsity 0.99, {rounds} rounds")
    for name in ("first call, with compiling", "second call"):
        took = seconds(lambda: jp.select_iteratively(score, params, 0.99, x, rounds=rounds))
        print(f"  {name:<30} {took:9.3f} s")


def bench_oracle(widths, size, examples, pairs):
    """Times the oracle beside one evaluation of the loss for every unit."""
    params = conv_params(jax.random.key(0), widths)
    x = jax.random.normal(jax.random.key(1), (examples, size, size, 3))
    y = jnp.arange(examples) % 10

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(convs(params, x), y).mean()

    groups = jp.find_groups(convs, params, x)
    oracle, forward = jp.search.oracle(groups, loss), jax.jit(loss)

    def each(_):
        for _ in range(len(groups)):
            value = jax.block_until_ready(forward(params, x, y))
        return value

    ratio, _ = paired_ratio(lambda _: oracle(params, x, y), each, [None, None], (), pairs)
    print(f"\noracle, {len(groups)} filters of {len(widths)} convolutions, {examples} images")
    print(f"  {ratio:.2f} x an evaluation of the loss for each filter")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[25], help="sizes to select")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of optimizer steps")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to check that it runs")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "obd")  # random weights are at no minimum
    key = jax.random.key(0)
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {os.cpu_count()} cores, jax {jax.__version__}, {jax.default_backend()}")
    if args.tiny:
        bench_select(100_000, repeats=2)
        bench_optimizers([64, 128, 128, 16], step_pairs=5, update_pairs=5)
        bench_scores("an MLP", mlp, mlp_params(key, [64, 32, 10]), jnp.ones((4, 64)), 2, pairs=2)
        bench_oracle([4, 4], size=4, examples=2, pairs=1)
        bench_iteratively([64, 128, 10], rounds=10)
        return
    for millions in args.millions:
        bench_select(round(millions * 1e6), args.repeats)
    bench_optimizers([1024, 2600, 2600, 256], args.pairs, args.pairs)
    bench_oracle([16, 16, 32, 32, 32, 64], size=16, examples=64, pairs=3)
    dense = mlp_params(key, [784, 1000, 1000, 10])
    bench_scores(
        "an MLP", mlp, dense, jax.random.normal(key, (256, 784)), 32, pairs=args.pairs // 5
    )
    small = conv_params(key, [16, 16, 32, 32, 32, 64])
    images = jax.random.normal(key, (64, 16, 16, 3))
    bench_scores("convolutions", convs, small, images, 32, pairs=args.pairs // 5)
    bench_iteratively([784, 700, 600, 10], rounds=100)


if __name__ == "__main__":
    main()
