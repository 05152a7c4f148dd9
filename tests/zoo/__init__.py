"""Small networks of every shape that structured pruning must handle, with what may leave them.

Each row names leaves that must have removable units and leaves that must have none; nothing here
knows `jaxprune`. Parameters are drawn from a fixed key, running statistics, scales and biases too,
so that a mistake in any of them shows in the output.
"""

from . import (  # noqa: F401
    attention,
    channels,
    conv,
    dense,
    ghosts,
    language,
    rare,
    recurrent,
    transformed,
    vision,
)
from ._build import NETWORKS, Net  # noqa: F401
