import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(hnp.arrays(bool, hnp.array_shapes(max_dims=3, max_side=9)))
def test_packing_round_trip(mask):
    packed = jp.masks.pack(jnp.array(mask))
    assert packed.nbytes == -(-mask.size // 8)
    assert (jp.masks.unpack(packed, jnp.zeros(mask.shape)) == mask).all()


def test_unpacking_for_other_params_is_an_error():
    packed = {"w": jp.masks.pack(jnp.ones(9, bool))}
    with pytest.raises(ValueError, match="v: packed masks have no entry"):
        jp.masks.unpack(packed, {"v": jnp.ones(9)})
    with pytest.raises(
        ValueError, match="w: packed masks have an entry here, the params have none"
    ):
        jp.masks.unpack(packed, {"a": None})
    with pytest.raises(ValueError, match="^w: packed masks must be uint8 .* got float32 of"):
        jp.masks.unpack({"w": jnp.ones(8)}, {"w": jnp.ones((4, 6))})
    with pytest.raises(ValueError, match="^w: packed masks must be uint8 of shape .3,. for"):
        jp.masks.unpack(packed, {"w": jnp.ones((4, 6))})


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_packing_a_whole_state_on_a_mesh(kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    params = {"w": jax.random.normal(jax.random.key(0), (64, 32)), "b": jnp.ones(16)}
    params["w"] = jax.device_put(params["w"], NamedSharding(mesh, spec))
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    state = jp.enforce(optax.adam(0.1), masks).init(params)
    packed = jp.masks.pack(state)
    assert packed.masks["w"].nbytes == 64 * 32 // 8 and packed.inner is not state.inner
    assert packed.masks["w"].sharding.is_equivalent_to(state.masks["w"].sharding, 2)
    like = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), state
    )
    unpacked = jp.masks.unpack(packed, like)
    assert jax.tree.structure(unpacked) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), unpacked, state))
    mask = unpacked.masks["w"]
    assert mask.dtype == bool and mask.sharding == state.masks["w"].sharding


def test_packing_a_round():
    last = jp.recipes.Round(1, 0.5, {"w": jnp.ones(1)}, {"w": jnp.array([True])})
    packed = jp.masks.pack(last)
    assert packed.masks["w"].tolist() == [128] and jp.masks.unpack(packed, last) == last
    assert jp.masks.unpack(packed.masks, last.params) == last.masks


def test_pruned_nan_and_infinity_become_zero():
    w, m = jnp.array([jnp.nan, jnp.inf, 2.0]), jnp.array([False, False, True])
    assert jp.apply_masks(w, m).tolist() == [0.0, 0.0, 2.0]


def test_straight_through_is_masked_forward_and_the_identity_backward():
    w, m = jnp.array([3.0, 4.0]), jnp.array([True, False])
    value, pull = jax.vjp(lambda w: jp.masks.straight_through(w, m), w)
    assert value.tolist() == [3.0, 0.0] and pull(jnp.ones(2))[0].tolist() == [1.0, 1.0]


def test_summary_flags_stacks_of_biases():
    params = {"bias": jnp.ones((3, 4)), "kernel": jnp.ones((3, 4, 4))}
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    assert "stacked=" in str(jp.summary(params, masks)).splitlines()[2]
    assert jp.select(jp.scores.magnitude(params), 0.5, stacked=lambda p: True)["bias"] is None


SCHEDULES = {  # a new schedule adds one row here
    "one_shot": jp.schedules.one_shot(0.9, begin=3),
    "linear": jp.schedules.linear(0.9, begin=3, end=13),
    "exponential": jp.schedules.exponential(0.9, begin=3, end=13),
    "cubic": jp.schedules.cubic(0.9, begin=3, end=13),
    "stepwise": jp.schedules.stepwise(0.9, begin=3, end=13, steps=4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_rises_to_its_end(name):
    values = jax.jit(jax.vmap(SCHEDULES[name]))(jnp.arange(20))
    assert values[0] == values[2] == 0 and (values[13:] == jnp.float32(0.9)).all()
    assert (jnp.diff(values) >= 0).all()
    assert [float(SCHEDULES[name](i)) for i in range(20)] == pytest.approx(values.tolist())


@pytest.mark.parametrize("name", ["linear", "exponential", "cubic"])
def test_schedule_needs_begin_before_end(name):
    with pytest.raises(ValueError, match="needs begin < end"):
        getattr(jp.schedules, name)(0.5, begin=3, end=3)
    with pytest.raises(ValueError, match="final must be in"):
        getattr(jp.schedules, name)(1.0, begin=3, end=4)
