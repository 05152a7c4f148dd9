"""The traced program: what belongs together, what it costs, and how to run it without a part.

::

    fn, params, inputs ──jaxpr.trace──▶ jaxpr ──walk (rules, atoms)──▶ Program
                                                                          │ structure.analyse
                                                                          ▼
        cost.contractions ◀──────── Structure: the atoms of every axis ──────▶ Cut: runs it smaller
                                                │
                                                └──▶ Flat: runs it, keeps every value

``jaxpr.py`` alone touches JAX's internals. This room imports ``_tree`` and nothing else.
"""

from jaxprune._program.atoms import Merge
from jaxprune._program.cost import (
    Contraction,
    Cost,
    contractions,
    contractions_of_units,
    dearest,
    loops,
    total,
    warn_of_loops,
)
from jaxprune._program.cut import Cut, take
from jaxprune._program.flat import Flat
from jaxprune._program.jaxpr import bind, inner
from jaxprune._program.structure import Structure, analyse, check_inputs, trace
from jaxprune._program.values import ProgramMismatch

__all__ = [
    "Contraction",
    "Cost",
    "Cut",
    "Flat",
    "Merge",
    "ProgramMismatch",
    "Structure",
    "analyse",
    "bind",
    "check_inputs",
    "contractions",
    "contractions_of_units",
    "dearest",
    "inner",
    "loops",
    "take",
    "total",
    "trace",
    "warn_of_loops",
]
