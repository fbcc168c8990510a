"""Serve large language models offline on heterogeneous devices, with a plan that can be trusted.

    from ds_llmpq import LLM, SamplingParams

Importing the package loads almost nothing: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_llmpq.api import LLM, CompletionOutput, RequestOutput
    from ds_llmpq.errors import InfeasibleError, UserError
    from ds_llmpq.plan import Plan
    from ds_llmpq.scheduler.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "InfeasibleError",
    "Plan",
    "RequestOutput",
    "SamplingParams",
    "UserError",
    "__version__",
]

_WHERE = {
    "LLM": "api",
    "CompletionOutput": "api",
    "RequestOutput": "api",
    "SamplingParams": "scheduler.sampling_params",
    "InfeasibleError": "errors",
    "UserError": "errors",
    "Plan": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
