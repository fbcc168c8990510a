"""Splits a micro-batch that memory has no room for, or that raises for one of its rows, into parts of fewer rows.

Rows do not depend on one another, so a stage may cut its own work without telling the others: it takes the whole
micro-batch's hidden states and gives the whole micro-batch's. What is spared is the workspace between them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from ds_llmpq.engine import device_memory
from ds_llmpq.launch.failures import is_out_of_memory
from ds_llmpq.wording import pluralize

Result = TypeVar("Result")


class Blame(Protocol):
    """What becomes of a pass that raises for another reason than memory."""

    def check(self, error: Exception) -> None:
        """Called for each failure; raises what is no row's own fault."""

    def blame(self, row: int, error: Exception) -> Any:
        """The result in the place of a row that raised alone."""


class MicroBatchSplitter:
    """How many tokens a pass of each phase may hold on one stage: all, until memory ran out, then half as many as there
    were. It stays so as long as the process lives, since what took the memory is not known.

    `warnings`: one entry for each time that memory ran out, as plain data.
    """

    def __init__(self, stage: int, device: torch.device):
        self.stage = stage
        self.device = device
        self.warnings: list[dict[str, Any]] = []
        self._most: dict[str, int] = {}

    def run(
        self, phase: str, rows: int, tokens: int, work: Callable[[int, int], Result], rule: Blame | None = None
    ) -> list[Result]:
        """Results of `work(start, stop)` over parts of the rows, each row once and in order; `tokens` of each row. What
        `work` raises passes for want of memory for a single row, and in all other cases if there is no `rule`; with
        one, the pass is made by halves until the row that raises is alone."""
        done, results = 0, []
        ends = [rows]  # of all that is to be done, and of the halves that a failure has cut it into
        while done < rows:
            while ends[-1] == done:
                ends.pop()
            stop = min(ends[-1], done + self._bound_rows(phase, rows, tokens))
            try:
                results.append(work(done, stop))
                done = stop
                continue
            except Exception as error:
                failure = None if is_out_of_memory(error) else error
                if (failure is None and stop - done == 1) or (failure is not None and rule is None):
                    raise
            # outside of the handler, where the traceback no longer holds what the failed attempt took
            if failure is None:
                self._halve(phase, stop - done, tokens)
                continue
            rule.check(failure)
            if stop - done > 1:
                ends.append(done + (stop - done) // 2)
            else:
                results.append(rule.blame(done, failure))
                done = stop
            failure = None
        return results

    def drop_row(self, phase: str, tokens: int) -> None:
        """A single row had no room, and is dropped."""
        self._warn({"stage": self.stage, "phase": phase, "rows": 1, "tokens": tokens, "rows_now": 0})

    def _bound_rows(self, phase: str, rows: int, tokens: int) -> int:
        return max(1, self._most.get(phase, rows * tokens) // tokens)

    def _halve(self, phase: str, rows: int, tokens: int) -> None:
        self._most[phase] = rows // 2 * tokens
        self._warn({"stage": self.stage, "phase": phase, "rows": rows, "tokens": tokens, "rows_now": rows // 2})

    def _warn(self, entry: dict[str, Any]) -> None:
        self.warnings.append(entry)
        rest = (
            f"goes on with at most {pluralize(entry['rows_now'], 'row')} at a time"
            if entry["rows_now"]
            else "gives the row up"
        )
        sys.stderr.write(
            f"ds-llmpq: stage {entry['stage']} ran out of memory in {entry['phase']} of "
            f"{pluralize(entry['rows'], 'row')} of {pluralize(entry['tokens'], 'token')} and {rest}\n"
        )
        device_memory.release_cached(self.device)
