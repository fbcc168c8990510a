"""HQQ imported without torch's compiler backend.

HQQ decorates three methods with `torch.compile`, which loads inductor (1 CPU second and 41 MB a process) although none
of them is ever called here. While HQQ's module runs, and only then, the decorator leaves functions as they are. A
finder does this, whoever imports it first: transformers does, for its caches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

_SLOW = "hqq.core.quantize"


def _left_as_it_is(function: Callable | None = None, **options: Any) -> Callable:
    """`torch.compile(f)`, `@torch.compile` and `@torch.compile(...)`, without compiling."""
    return function if function is not None else lambda later: later


@contextmanager
def without_compiling() -> Iterator[None]:
    """`torch.compile` does nothing inside; it is put back in any case."""
    import torch

    original = torch.compile
    torch.compile = _left_as_it_is
    try:
        yield
    finally:
        torch.compile = original


class _QuickLoader(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        with without_compiling():
            self._loader.exec_module(module)


class _QuickFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _SLOW:
            return None
        sys.meta_path.remove(self)  # once; the others find it
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _QuickLoader(spec.loader)
        return spec


def install() -> None:
    """Does nothing where HQQ is imported already: it has cost what it costs."""
    if _SLOW not in sys.modules:
        sys.meta_path.insert(0, _QuickFinder())
