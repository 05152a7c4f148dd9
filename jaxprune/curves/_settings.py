"""The settings of the points of a sweep, so that a store holds points of one setting."""

from collections.abc import Mapping
from typing import Any

from jaxprune._fingerprint import fingerprint


def by_method(shared: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[str, str]:
    """Returns ``train=1f0c2a9b … method=…`` for each method; for ``""`` only what all share."""
    text = " ".join(f"{name}={fingerprint(x)}" for name, x in shared.items())
    own = {name: f"{text} method={fingerprint(prune)}" for name, prune in methods.items()}
    return {"": text, **own}


def differing(a: str, b: str) -> list[str]:
    """Lists the names of settings that differ."""
    before, after = (dict(part.split("=") for part in text.split()) for text in (a, b))
    return [name for name in after if before.get(name) != after[name]]
