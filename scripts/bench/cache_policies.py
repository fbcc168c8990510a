"""What other ways to divide the KV cache would gain: slots of one capacity, extents of each request's own need, pages.

    python scripts/bench/cache_policies.py

A simulation of one stage whose decode pass takes all rows; the prefill of a request stands in its way. Lengths are
log-normal as ShareGPT's, every request asks for max_tokens=512, and the pool is that of 8, 32 or 128 slots as planned
by default. Times are a constant, a share for each row and one for each cached token that attention reads, fitted to
what was measured on an H200 (8B, 16 bits) and on two cores (850M, 4 bits). Prints a table.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

MOST_TOKENS, BLOCK, REQUESTS = 512, 32, 1000
# seconds: of a decode pass, for each of its rows, for each cached token it reads; of a prompt token
DEVICES = {"H200, 8B": (6.1e-3, 7e-6, 4.9e-8, 1 / 30_000), "two cores, 850M": (28e-3, 4e-3, 1e-7, 1 / 400)}


@dataclass
class Row:
    prompt: int
    answer: int
    generated: int = 0
    start: int = 0

    @property
    def context(self) -> int:
        return self.prompt + self.generated

    @property
    def need(self) -> int:
        return -(-(self.prompt + MOST_TOKENS) // BLOCK) * BLOCK


class Slots:
    """Today: the longest prompt and answer a slot. Attention reads all rows of a pass as far as the longest one."""

    def __init__(self, positions: int, capacity: int):
        self.free = positions // capacity

    def admit(self, row: Row) -> bool:
        if not self.free:
            return False
        self.free -= 1
        return True

    def release(self, row: Row) -> None:
        self.free += 1

    def read(self, rows: list[Row]) -> int:
        return len(rows) * max(row.context for row in rows)


class OwnTokens(Slots):
    """Slots as today, where attention reads of each row what it has."""

    def read(self, rows: list[Row]) -> int:
        return sum(row.context for row in rows)


class Extents:
    """Each row the neighbouring positions that it may need, the first gap that is wide enough."""

    def __init__(self, positions: int, capacity: int):
        self.gaps = [(0, positions)]

    def admit(self, row: Row) -> bool:
        for index, (start, size) in enumerate(self.gaps):
            if size >= row.need:
                row.start = start
                self.gaps[index : index + 1] = [(start + row.need, size - row.need)] if size > row.need else []
                return True
        return False

    def release(self, row: Row) -> None:
        joined: list[tuple[int, int]] = []
        for start, size in sorted([*self.gaps, (row.start, row.need)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self.gaps = joined

    def read(self, rows: list[Row]) -> int:
        return sum(row.context for row in rows)


class Pages(Extents):
    """A row has the pages of its tokens so far; the youngest gives its own back where none is free."""

    def __init__(self, positions: int, capacity: int):
        self.pages = positions // BLOCK

    def admit(self, row: Row) -> bool:
        wanted = row.context // BLOCK + 1
        if self.pages - wanted < 0:
            return False
        self.pages -= wanted
        return True

    def release(self, row: Row) -> None:
        self.pages += row.context // BLOCK + 1

    def grow(self, rows: list[Row], waiting: deque[Row]) -> None:
        """The next token of each row."""
        while (wanted := sum((row.context + 1) % BLOCK == 0 for row in rows)) > self.pages:
            self.release(rows[-1])
            waiting.appendleft(rows.pop())
        self.pages -= wanted


def draw(seed: int) -> list[Row]:
    dice = random.Random(seed)
    lengths = ((120, 1024), (180, MOST_TOKENS))
    return [
        Row(*(max(1, min(most, round(median * dice.lognormvariate(0, 1.0)))) for median, most in lengths))
        for _ in range(REQUESTS)
    ]


def run(policy: type, slots: int, device: str, seed: int) -> tuple[float, float, float]:
    """(share of the pool that holds tokens, by time; mean rows of a pass; output tokens/s)."""
    fixed, each_row, each_read, each_prompt = DEVICES[device]
    requests = draw(seed)
    capacity = max(row.prompt for row in requests) + MOST_TOKENS
    cache, waiting, running = policy(slots * capacity, capacity), deque(requests), []
    seconds = used = passes = rows = 0.0
    while waiting or running:
        while waiting and cache.admit(waiting[0]):
            row = waiting.popleft()
            running.append(row)
            seconds += each_prompt * row.context
        if policy is Pages:
            cache.grow(running, waiting)
        took = fixed + each_row * len(running) + each_read * cache.read(running)
        seconds, passes, rows = seconds + took, passes + 1, rows + len(running)
        used += took * sum(row.context for row in running)
        for row in running:
            row.generated += 1
            if row.generated >= row.answer:
                row.generated -= policy is Pages  # its last token has no page
                cache.release(row)
                row.generated = row.answer
        running = [row for row in running if row.generated < row.answer]
    total = sum(row.answer for row in requests)
    return used / seconds / (slots * capacity), rows / passes, total / seconds


def main() -> None:
    policies = {"slots": Slots, "slots, own tokens read": OwnTokens, "extents": Extents, "pages of 32": Pages}
    print(f"| device | slots | {' | '.join(policies)} |\n|{'-|' * (2 + len(policies))}")
    for device in DEVICES:
        for slots in (8, 32, 128):
            found = [run(policy, slots, device, 0) for policy in policies.values()]
            cells = [f"{share:.0%}, {rows:.0f} rows, {rate / found[0][2]:.2f}x" for share, rows, rate in found]
            print(f"| {device} | {slots} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
