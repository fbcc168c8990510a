"""Rows that a stage cannot run: found, blamed and reported, while the others are served.

Rows of a micro-batch do not depend on one another. When a pass raises, the stage first runs a row of nobody's: if that
raises too, the program or the machine is at fault and the exception ends the rank. Else the pass is made by halves, and
a row that raises alone is blamed. What is no number goes on in its place, so the last stage ends it as broken, as it
does with logits that are no numbers; the reason stays here until the driver asks all stages for it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ds_llmpq.engine.kv_cache import KVStore
from ds_llmpq.errors import make_printable
from ds_llmpq.models.step import Step

_MESSAGE_CHARACTERS = 300
_MOST_TRACES = 20  # kinds of exception whose frames are printed
_NEUTRAL_PROMPT = 2  # tokens


@dataclass(frozen=True)
class Fault:
    """Why a row was given up: on which stage, in which phase, the exception's type and its message, made printable."""

    stage: int
    phase: str
    kind: str
    message: str
    out_of_memory: bool = False


def describe_error(error: BaseException) -> str:
    """The exception's message on one line, fit for a terminal."""
    try:
        return make_printable(error, _MESSAGE_CHARACTERS, keep="")
    except Exception:  # whatever an exception's own __str__ raises
        return "(its message cannot be read)"


class FaultLog:
    """The faults of one stage by the rows' keys, until they are taken; each is also said on standard error, which the
    launcher's log keeps, with the frames of the first of its kind."""

    def __init__(self, stage: int):
        self.stage = stage
        self._faults: dict[int, Fault] = {}
        self._traced: set[str] = set()

    def note(self, key: int, phase: str, error: BaseException, out_of_memory: bool = False) -> None:
        fault = Fault(self.stage, phase, type(error).__name__, describe_error(error), out_of_memory)
        self._faults.setdefault(key, fault)
        frames = ""
        if fault.kind not in self._traced and len(self._traced) < _MOST_TRACES:
            self._traced.add(fault.kind)
            frames = "".join(traceback.format_tb(error.__traceback__))
        sys.stderr.write(
            f"{frames}ds-llmpq: stage {self.stage} gives up a row in {phase}: {fault.kind}: {fault.message}\n"
        )

    def __contains__(self, key: int) -> bool:
        return key in self._faults

    def take(self, keys: Iterable[int]) -> list[list[Any]]:
        """[key, fault as plain data] of those of `keys` that have one; they are forgotten here. Another row's fault
        stays: its end is not known everywhere yet, and what is left of its prompt must not pass."""
        return [[key, asdict(self._faults.pop(key))] for key in keys if key in self._faults]


def find_first_faults(reports: Sequence[Sequence[Sequence[Any]]]) -> dict[int, Fault]:
    """The faults that all stages have taken, by key: that of the first stage, since what comes behind it follows."""
    found: dict[int, Fault] = {}
    for key, fields in (entry for report in reports for entry in report):
        fault = Fault(**fields)
        if key not in found or fault.stage < found[key].stage:
            found[key] = fault
    return found


class Suspects:
    """The rows of one pass that raise alone, in `failed`. `neutral()` makes the pass of nobody's row, `instead()` gives
    a blamed row's result."""

    def __init__(self, neutral: Callable[[], None], instead: Callable[[], Any]):
        self.failed: dict[int, Exception] = {}
        self._neutral = neutral
        self._instead = instead
        self._cleared = False

    def check(self, error: Exception) -> None:
        """Raises `error` if it is no row's own fault."""
        if self._cleared:
            return
        try:
            self._neutral()
        except Exception:
            raise error from None
        self._cleared = True

    def blame(self, row: int, error: Exception) -> Any:
        self.failed[row] = error
        return self._instead()


class NeutralRow:
    """A row of nobody's, with a cache of its own: a short prompt and one token after it, through one stage alone.

    `tokens`: what its prompt may consist of, on the first stage; on the others its hidden states are zeros.
    """

    def __init__(
        self, module: nn.Module, store: KVStore, positional: Callable[[Step], None], hidden: torch.Tensor | None,
        tokens: Sequence[int],
    ):  # fmt: skip
        self.module = module
        self.positional = positional
        self.hidden = hidden
        self.tokens = tokens
        self._store = store

    @property
    def device(self) -> torch.device:
        return self._store.device

    def run(self) -> None:
        """Raises what the stage raises, with each of the tokens."""
        store = self._store.like(_NEUTRAL_PROMPT + 1)
        for place, token in enumerate(self.tokens):
            try:
                self._run(store, token)
                return
            except Exception:
                if place + 1 == len(self.tokens):
                    raise

    def _run(self, store: KVStore, token: int) -> None:
        device = store.device
        positions = torch.arange(_NEUTRAL_PROMPT, device=device)[None]
        last = torch.tensor([_NEUTRAL_PROMPT - 1], device=device)
        self._pass(Step(positions, store.prefill([0]), _NEUTRAL_PROMPT, True, last=last), token)
        at = torch.tensor([_NEUTRAL_PROMPT], device=device)
        cache = store.decode(0, 1, at, _NEUTRAL_PROMPT + 1)
        self._pass(Step(at[:, None], cache, _NEUTRAL_PROMPT + 1, True), token)

    def _pass(self, step: Step, token: int) -> None:
        step.prepare = self.positional
        if self.hidden is None:
            step.token_ids = torch.full_like(step.positions, token)
        else:
            step.hidden = self.hidden.expand(1, step.positions.shape[1], -1).clone()
        self.module(step)
