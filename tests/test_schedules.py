import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp

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
    with pytest.raises(ValueError, match="begin must be below end"):
        getattr(jp.schedules, name)(0.5, begin=3, end=3)
    with pytest.raises(ValueError, match="final must be in"):
        getattr(jp.schedules, name)(1.0, begin=3, end=4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_under_strict_settings(name):
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        for step in (5, jnp.int32(5), jnp.float32(5)):
            assert SCHEDULES[name](step) == pytest.approx(float(SCHEDULES[name](5)))


def test_stepwise_needs_two_steps():
    with pytest.raises(ValueError, match="stepwise: steps must be an integer of at least 2, got 1"):
        jp.schedules.stepwise(0.5, begin=0, end=4, steps=1)
