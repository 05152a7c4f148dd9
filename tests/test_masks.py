import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import equal, explicit_and_slowly_auto, mesh, place
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
@explicit_and_slowly_auto
def test_packing_an_optimizer_state_on_a_mesh(kind, spec):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 32)), "b": jnp.ones(16)}
    params["w"] = place(params["w"], mesh(kind, x=4, y=2), spec)
    masks = jp.select(jp.scores.magnitude(params), 0.5)
    state = jp.enforce(optax.adam(0.1), masks).init(params)
    packed = jp.masks.pack(state)
    assert packed.masks["w"].nbytes == 64 * 32 // 8 and packed.inner is not state.inner
    assert packed.masks["w"].sharding.is_equivalent_to(state.masks["w"].sharding, 2)
    like = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), state
    )
    unpacked = jp.masks.unpack(packed, like)
    assert equal(unpacked, state)
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


def test_combining_masks():
    yes, no = jnp.array([True, True]), jnp.array([True, False])
    masks = {"a": yes, "b": None, "c": None}
    combined = jp.masks.combine(masks, {"a": no, "b": no, "c": None}, {"a": yes, "b": yes, "c": no})
    assert equal(combined, {"a": no, "b": no, "c": no})
    with pytest.raises(ValueError, match="^a: the other masks have no entry"):
        jp.masks.combine(masks, {"b": no, "c": no})
    with pytest.raises(ValueError, match="^d: the other masks have an entry here"):
        jp.masks.combine(masks, masks | {"d": no})
    with pytest.raises(ValueError, match=r"^a: the other masks have shape \(3,\) here, must have"):
        jp.masks.combine(masks, masks | {"a": jnp.ones(3, bool)})
