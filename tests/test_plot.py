import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, python
from matplotlib import pyplot

import jaxprune as jp


@functools.cache
def scores():
    return jp.scores.magnitude(normal({"conv": (3, 3, 1, 4), "dense": (36, 2)}))


@functools.cache
def masks(sparsity=0.75):
    return jp.select(scores(), sparsity)


def network(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(x).reshape(len(x), -1) @ params["dense"]


def table(sparsities=5, seeds=3):
    points = [("dense", 0.0, s) for s in range(seeds)]
    points += [
        (m, 1 - 0.5**i, s)
        for m in ("random", "magnitude", "a", "b")
        for i in range(1, sparsities + 1)
        for s in range(seeds)
    ]
    columns = dict(
        zip(("method", "sparsity", "seed"), map(np.array, zip(*points, strict=True)), strict=True)
    )
    ratio = 1 / (1 - columns["sparsity"])
    columns |= dict.fromkeys(jp.curves.MEASURES, ratio)
    columns |= {"after": 0.9 - 0.01 * ratio + 0.01 * columns["seed"]}
    return columns | {"error": np.array([""] * len(points))}


PLOTS = {  # a new picture adds one row here
    "curves": lambda **k: jp.plot.curves(table(), **k),
    "curves, bytes": lambda **k: jp.plot.curves(table(), "stored_bytes", "change", **k),
    "curves, sparsity": lambda **k: jp.plot.curves(table(), "sparsity", "before", **k),
    "sparsity": lambda **k: jp.plot.sparsity(masks(), before=masks(0.1), **k),
    "mask": lambda **k: jp.plot.mask(masks()["conv"], **k),
    "scores": lambda **k: jp.plot.scores(scores(), masks(), **k),
    "groups": lambda **k: jp.plot.groups(
        jp.find_groups(network, scores(), jnp.ones((1, 5, 5, 1))), **k
    ),
    "training": lambda **k: jp.plot.training([0, 1], [0.0, 0.5], [2.0, 1.0], **k),
}


@pytest.fixture(autouse=True)
def close():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("name", PLOTS)
def test_plot_contract(name, style, tmp_path):
    with pyplot.style.context(style):
        given = pyplot.figure(layout="constrained").subplots()
        assert PLOTS[name](axes=given) is given
        axes = PLOTS[name]()
        assert axes.get_xlabel()
        axes.figure.savefig(tmp_path / "picture.svg")
        ground = axes.figure.get_facecolor()[:3]
        texts = [t for t in axes.figure.findobj(pyplot.Text) if t.get_text()]
        outside = [t for t in texts if t.axes is None or t not in axes.texts]
        assert all(
            t.get_color() not in ("black" if sum(ground) == 0 else "white",) for t in outside
        )
    box = axes.figure.get_tightbbox()
    width, height = axes.figure.get_size_inches()
    assert box.x0 > -0.05 and box.y0 > -0.05, "text is cut off"
    assert box.x1 < width + 0.05 and box.y1 < height + 0.05, "text is cut off"


def test_curves_show_means_and_spread():
    axes = jp.plot.curves(table())
    (line,) = [line for line in axes.lines if line.get_label() == "magnitude"]
    np.testing.assert_allclose(line.get_xdata(), [2, 4, 8, 16, 32])
    np.testing.assert_allclose(line.get_ydata(), 0.91 - 0.01 * np.array([2, 4, 8, 16, 32]))
    styles = {(str(x.get_color()), x.get_linestyle(), x.get_marker()) for x in axes.lines}
    assert len(styles) == len(axes.lines)


@pytest.mark.parametrize(
    "sparsities, seeds, says", [(5, 3, ""), (4, 3, "4 spars"), (5, 2, "2 seeds")]
)
def test_curves_say_when_there_are_too_few_points(sparsities, seeds, says):
    title = jp.plot.curves(table(sparsities, seeds)).get_title(loc="left")
    assert says in title and bool(says) == bool(title)


def test_curves_say_what_failed():
    failed = table()
    rows = failed["method"] == "a"
    failed["error"] = np.where(rows, "ValueError: no", "")
    axes = jp.plot.curves(failed)
    assert axes.get_title(loc="left") == "failed points: 15"
    assert "a" not in [line.get_label() for line in axes.lines]


def test_curves_refuse_unknown_columns():
    with pytest.raises(ValueError, match="x and y must be among compression, .* got 'speed'"):
        jp.plot.curves(table(), "speed")


@pytest.mark.parametrize(
    "shape", [(7,), (5, 3), (4, 5, 3), (3, 2, 5, 4), (2, 3, 3, 5, 4), (3000, 2000)]
)
def test_mask_shows_every_weight_once(shape):
    mask = np.random.default_rng(0).random(shape) < 0.3
    image = jp.plot.mask(mask).images[0].get_array()
    assert max(image.shape) <= 1024 or image.size == mask.size
    np.testing.assert_allclose(image.mean(), mask.mean(), atol=0.01)
    if image.size == mask.size:
        assert image.sum() == mask.sum()


def test_mask_puts_filters_in_cells():
    mask = np.zeros((3, 2, 5, 4), bool)
    mask[2, 1, 3, 0] = True
    image = jp.plot.mask(mask).images[0].get_array()
    assert np.argwhere(image).tolist() == [[3 * 3 + 2, 0 * 2 + 1]]


def test_scores_draw_the_threshold_only_where_there_is_one():
    lines = jp.plot.scores(scores(), masks()).lines
    assert any("threshold" in line.get_label() for line in lines)
    by_layer = jp.select(scores(), 0.75, scope="layer")
    assert not jp.plot.scores(scores(), by_layer).lines
    signed = {"w": np.linspace(-1, 1, 40)}
    axes = jp.plot.scores(signed, {"w": signed["w"] > 0})
    assert axes.get_xscale() == "linear" and axes.lines
    jp.plot.scores({"w": np.zeros(4)}, {"w": np.arange(4) > 1})


def test_matplotlib_is_imported_late_and_missed_clearly():
    code = """
import sys
import jaxprune as jp
jp.plot
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    jp.plot.mask([[True]])
except ImportError as error:
    print(error)
"""
    assert 'pip install "jaxprune[plot]"' in python("-c", code)
