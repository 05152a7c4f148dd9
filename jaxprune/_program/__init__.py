"""The traced program: what is removed together, what it costs, and how to run it without a part.

::

    apply_fn, params, inputs ──jaxpr.trace──▶ jaxpr ──walk (rules, atoms)──▶ Program (values)
                                                │                               │ structure.analyse
                                                │                               ▼
         [Contraction] ◀──cost.contractions─────┴───────────────────────── Structure: all atoms
                                                                                │
                          Flat: runs it, keeps every value ◀────────────────────┴──▶ Cut: runs it
                                                                            smaller, with ghosts

    jaxpr ──Line (roots, uses)──▶ Walk: runs it on all batches, and stops at each weight

``freeze`` compiles a function as it is now, ``uses`` says how the program uses its params.

``jaxpr.py`` alone touches JAX's internals. A new primitive needs a rule, in ``rules/``.
"""

from jaxprune._program.atoms import Merge
from jaxprune._program.calibrate import Walk, add
from jaxprune._program.cost import (
    Contraction,
    Cost,
    contractions,
    contractions_of_units,
    loops,
    most_expensive,
    total,
    warn_of_loops,
)
from jaxprune._program.cut import Cut, take
from jaxprune._program.flat import Flat
from jaxprune._program.frozen import freeze, inlined
from jaxprune._program.jaxpr import bind, inner
from jaxprune._program.structure import Structure, analyse, check_inputs, trace
from jaxprune._program.uses import uses
from jaxprune._program.values import ProgramMismatch
from jaxprune._program.weights import Weight

__all__ = (
    ["Contraction", "Cost", "Cut", "Flat", "Merge", "ProgramMismatch", "Structure", "Walk"]
    + ["Weight", "add", "analyse", "bind", "check_inputs", "contractions", "contractions_of_units"]
    + ["freeze", "inlined", "inner", "loops", "most_expensive", "take", "total", "trace", "uses"]
    + ["warn_of_loops"]
)
