"""A stage that gets only a share of its processor, so that different speeds can be had on one machine.

What a control group's CPU quota does, done from inside where no such group can be made: after each pipeline layer the
process sleeps until the layer has taken its processor time divided by the share. It emulates a slower processor, not
another kind of device: memory and caches keep their speed while it works, and the time between layers is not stretched.
"""

from __future__ import annotations

import time

from torch import nn
from torch.utils.hooks import RemovableHandle

_SHORTEST_SLEEP_SECONDS = 2e-4  # a sleep overshoots by about 0.1 ms; shorter debts are carried on


class CpuShare:
    """Stretches the forward passes of pipeline layers to processor time / share."""

    def __init__(self, share: float):
        self.share = share
        self._debt_seconds = 0.0
        self._cpu = self._wall = 0.0

    def attach(self, module: nn.Module) -> None:
        """To each of the module's children, which are the pipeline layers of a stage."""
        for layer in module.children():
            self.attach_layer(layer)

    def attach_layer(self, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]

    def _begin(self, *_: object) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def _end(self, *_: object) -> None:
        used, passed = time.thread_time() - self._cpu, time.perf_counter() - self._wall
        # a layer that waited for its processor has had part of its pause already
        self._debt_seconds += max(0.0, used / self.share - max(passed, used))
        if self._debt_seconds > _SHORTEST_SLEEP_SECONDS:
            start = time.perf_counter()
            time.sleep(self._debt_seconds)
            self._debt_seconds -= time.perf_counter() - start
