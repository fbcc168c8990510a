"""Private parts of OmegaConf, which knows of a configuration what its dataclasses say."""

from dataclasses import dataclass, field
from typing import Any

LIBRARY = "omegaconf"
SEEN = ("2.3.0", "2.3.1")


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    missing: Inner | None = None
    open: Any = None
    table: dict[str, Inner] = field(default_factory=dict)


def test_types_of_nodes():
    """`node._metadata`, in overrides.py: `ref_type`, what a node was declared as, and `element_type`, what a
    dictionary was declared to hold."""
    from omegaconf import OmegaConf

    config = OmegaConf.structured(Outer)
    assert config._get_node("open")._metadata.ref_type is Any
    assert config._get_node("table")._metadata.element_type is Inner


def test_nodes_without_their_values():
    """`node._get_node(key)`, in overrides.py: the node itself, also where its value is None; `_is_none()` says so."""
    from omegaconf import DictConfig, OmegaConf

    config = OmegaConf.structured(Outer)
    inner, missing = config._get_node("inner"), config._get_node("missing")
    assert isinstance(inner, DictConfig)
    assert (inner._is_none(), missing._is_none()) == (False, True)
