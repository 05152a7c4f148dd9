"""Rules of the primitives: how the axes of their operands and results belong together.

A rule takes the walk, the equation and the values of the operands, and returns the values of the
results. Where the equation has sizes among its parameters, it also returns how to run it when cut.
A new primitive needs a function, and a row in the table of its file.
"""

from jaxprune._program.rules import contracting, elementwise, indexing, moving

RULES = {**elementwise.RULES, **moving.RULES, **contracting.RULES, **indexing.RULES}
