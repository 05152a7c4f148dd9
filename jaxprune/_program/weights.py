"""A weight: how it is made from roots, and how what a method returns is written back to them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _mesh, _tree
from jaxprune._program import views
from jaxprune._program.straight import Line, Use

Env = Mapping[int, Any]  # the values that are there, by number


def pull(line: Line, v: int, env: Env, scaled: bool = True) -> Any:
    """Returns a value, which is made if it is linear; if not ``scaled``, only by moving."""
    if v in env:
        return env[v]
    if v not in line.maker:
        return line.constants[v]
    node = line.maker[v]
    if node.scales and not scaled:
        return pull(line, node.ins[node.moved[0]], env, scaled)
    outs = node.run(*(pull(line, i, env, scaled) for i in node.ins))
    return outs[node.outs.index(v)]


@dataclasses.dataclass(eq=False)
class Weight:
    """A value made from params, as the matrices that contractions multiply with."""

    line: Line
    value: int
    uses: list[Use]  # which read it in the same way
    roots: list[int]
    leaves: list[tuple[str, tuple[int, ...]]]  # for each root its path, and its place in a stack

    @property
    def at(self) -> int:
        """Where the first activation flows in."""
        return self.uses[0].at

    @property
    def name(self) -> str:
        """Names it in a message."""
        return " and ".join(
            _tree.show(path) + (f"[{', '.join(map(str, i))}]" if i else "")
            for path, i in self.leaves
        )

    def values(self, env: Env) -> list[Any]:
        """Returns the roots as they are now."""
        return [env[root] for root in self.roots]

    def matrix(self, env: Env) -> jax.Array:
        """Returns the weight in float32 or float64, of shape (groups, inputs, outputs)."""
        make, roots = self._operand(env)
        convert = functools.partial(views.matrix, self.uses[0].view)
        return _tree.wide(_mesh.replicating(convert, make(roots)))

    def entries(self, env: Env, chosen: Any = True) -> list[jax.Array]:
        """Returns which entries of each root are in the weight, where its entries are chosen."""
        make, roots = self._operand(env, scaled=False)
        operand, transpose = jax.vjp(make, roots)
        counts = transpose(jnp.broadcast_to(chosen, operand.shape).astype(operand.dtype))[0]
        return [count != 0 for count in counts]

    def written(
        self, env: Env, matrix: jax.Array, mask: jax.Array
    ) -> tuple[list[jax.Array], list[jax.Array]] | None:
        """Returns the roots with which the weight is these matrices, and their masks.

        An entry of a root that appears several times becomes the mean; `None` is returned if the
        weight would then be another one.
        """
        make, roots = self._operand(env)
        view, shape = self.uses[0].view, jax.eval_shape(make, roots)
        new = views.unmatrix(view, matrix, shape).astype(shape.dtype)
        kept = views.unmatrix(view, mask, shape)
        if self.value in self.roots:
            return [_mesh.place(new, roots[0])], [kept]
        # Each entry of the weight is c·r for one entry r of a root, plus what is in no root. Least
        # squares for r over all its entries: sum(c · new) / sum(c²).
        ones = [jnp.ones(r.shape, r.dtype) for r in roots]
        zeros = [jnp.zeros(r.shape, r.dtype) for r in roots]
        fixed, scale = jax.jvp(make, (zeros,), (ones,))
        _, transpose = jax.vjp(make, roots)
        (dots,), (norms,) = transpose(new - fixed), transpose(scale)
        values = [
            jnp.where(n != 0, d / jnp.where(n == 0, 1, n), r).astype(r.dtype)
            for d, n, r in zip(dots, norms, roots, strict=True)
        ]
        pairs = zip(self.entries(env, kept), self.entries(env), strict=True)
        masks = [stay | ~inside for stay, inside in pairs]
        values = [jnp.where(m, v, 0) for m, v in zip(masks, values, strict=True)]
        error = jnp.max(jnp.abs((make(values) - new).astype(jnp.float32)))
        limit = 4 * jnp.finfo(new.dtype).eps * jnp.max(jnp.abs(new)).astype(jnp.float32)
        if not error <= limit:
            return None
        return list(map(_mesh.place, values, roots)), masks

    def _operand(self, env: Env, scaled: bool = True) -> tuple[Any, list[Any]]:
        """Returns how the weight is made of its roots, and these."""
        env = {v: x for v, x in env.items() if not isinstance(x, list)}

        def make(roots: Sequence[Any]) -> Any:
            known = env | dict(zip(self.roots, roots, strict=True))
            return pull(self.line, self.value, known, scaled)

        return make, [jnp.asarray(env[r]) for r in self.roots]
