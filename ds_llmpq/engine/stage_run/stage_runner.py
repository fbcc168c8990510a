"""A micro-batch through the layers of one stage: in as few parts as can be, without the rows that it cannot run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

import torch
from torch import nn

from ds_llmpq.engine.runner.captured_decode import CapturedDecode
from ds_llmpq.engine.runner.fusion import Fusion
from ds_llmpq.engine.stage_run.faults import FaultLog, NeutralRow, Suspects, describe_error
from ds_llmpq.engine.stage_run.oom_split import MicroBatchSplitter
from ds_llmpq.launch.failures import is_out_of_memory
from ds_llmpq.models.step import Step

Output = tuple[torch.Tensor, torch.Tensor | None]  # hidden states, and logits on the last stage


class StageRunner:
    """`hidden_size`: features of the hidden states between stages, which are of `dtype`. `captured`: runs whole decode
    passes, where it is given; parts of them run eagerly. `fusion`: for eager decode passes."""

    def __init__(
        self, module: nn.Module, splitter: MicroBatchSplitter, faults: FaultLog, neutral: NeutralRow,
        dtype: torch.dtype, hidden_size: int, is_last: bool, captured: CapturedDecode | None = None,
        fusion: Fusion | None = None,
    ):  # fmt: skip
        self.module = module
        self.splitter = splitter
        self.faults = faults
        self.neutral = neutral
        self.dtype = dtype
        self.hidden_size = hidden_size
        self.is_last = is_last
        self.captured = captured
        self.fusion = fusion

    def run(self, phase: str, step: Step) -> Output:
        """Any exception ends it."""
        return self._join(self._run_parts(phase, step, None))

    def run_together(self, steps: Sequence[Step]) -> list[Output] | None:
        """Several steps in one call of the layers that take them so; None if anything raises: steps that pass apart
        show whose fault that is."""
        steps = [step.rows(0, len(step.positions)) for step in steps]
        try:
            for layer in self.module.forward_funcs:
                for part in [steps] if getattr(layer, "joins_steps", False) else steps:
                    layer(part)
        except Exception:
            return None
        return [(step.hidden, step.logits) for step in steps]

    def run_rows(self, phase: str, step: Step, keys: Sequence[int | None]) -> Output:
        """Rows that raise alone are given up, and noted by their key; None is that of a row that nobody asks for. The
        others pass as if those had been sound."""
        rows, tokens = step.positions.shape
        suspects = Suspects(self.neutral.run, lambda: self.fill_with_nan(1, tokens))
        done = self._run_parts(phase, step, suspects)
        for row, error in suspects.failed.items():
            if keys[row] is not None:
                self.faults.note(keys[row], phase, error)
        if 0 < len(suspects.failed) < rows:
            again = self._run_without(phase, step, sorted(suspects.failed))
            return again or self._join(done)
        return self._join(done)

    def fill_with_nan(self, rows: int, tokens: int) -> Output:
        """In the place of what could not be computed: the last stage ends such rows as broken."""
        hidden = torch.full((rows, tokens, self.hidden_size), torch.nan, dtype=self.dtype, device=self.neutral.device)
        return hidden, hidden[:, 0, :1] if self.is_last else None

    def _run_parts(self, phase: str, step: Step, suspects: Suspects | None) -> list[Output]:
        rows = len(step.positions)

        def work(start: int, stop: int) -> Output:
            if self.captured is not None and phase == "decode" and stop - start == rows:
                return self._replay(step)
            with self.fusion.use() if self.fusion and phase == "decode" else contextlib.nullcontext():
                part = self.module(step.rows(start, stop))
            return part.hidden, part.logits

        return self.splitter.run(phase, *step.positions.shape, work, suspects)

    def _replay(self, step: Step) -> Output:
        """Whatever a capture raises, but for want of memory, is said once; from then on passes are eager."""
        try:
            hidden, logits = self.captured.run(step)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            sys.stderr.write(
                f"ds-llmpq: stage {self.faults.stage} cannot capture its decode passes ({type(error).__name__}: "
                f"{describe_error(error)}) and runs them eagerly, which is slower\n"
            )
            self.captured = None
            done = self.module(step.rows(0, len(step.positions)))
            return done.hidden, done.logits
        # the graph's own memory is written over by the next pass, maybe before these states have been sent
        return hidden.clone(), logits

    def _run_without(self, phase: str, step: Step, failed: list[int]) -> Output | None:
        """The pass once more, in the shape it would have had: what a row yields may hang on how many pass together. A
        sound row's states take the place of those that failed. None if that raises too."""
        sound = next(row for row in range(len(step.positions)) if row not in failed)
        try:
            outputs = self._join(self._run_parts(phase, step.exchange_rows(dict.fromkeys(failed, sound)), None))
        except Exception:
            return None
        for output in outputs:
            if output is not None:
                output[failed] = torch.nan
        return outputs

    def _join(self, done: list[Output]) -> Output:
        """Rows of all parts. Logits of those that were given up are as wide as the others'."""
        hidden = [part for part, _ in done]
        logits = [part for _, part in done]
        if len(done) == 1 or logits[0] is None:
            return (hidden[0] if len(done) == 1 else torch.cat(hidden)), logits[0]
        widest = max(logits, key=torch.Tensor.numel)
        full = [
            part if part.shape[1:] == widest.shape[1:] else widest.new_full((len(part), *widest.shape[1:]), torch.nan)
            for part in logits
        ]
        return torch.cat(hidden), torch.cat(full)
