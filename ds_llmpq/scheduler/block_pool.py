"""Blocks of the KV cache that rows share: a row holds as many as its tokens need. Pure state, the same on all ranks."""

from __future__ import annotations

from ds_llmpq.errors import UserError

# A row is admitted if, with it, all rows have blocks for so many tokens more each. Of less, rows are preempted and
# computed again; of more, memory lies idle (docs/decisions.md has both).
HORIZON_TOKENS = 32


class BlockPool:
    """`blocks` of `block_tokens` positions for the rows in `slots`. `tables[slot]`: the numbers of a row's blocks, in
    the order of its tokens; a fresh pool hands them out in ascending order.

    What is said of a row's tokens leaves a shared prefix out, whose blocks are not of the pool.
    """

    def __init__(self, slots: int, blocks: int, block_tokens: int):
        self.blocks, self.block_tokens = blocks, block_tokens
        self.tables: list[list[int]] = [[] for _ in range(slots)]
        self._free = list(range(blocks - 1, -1, -1))
        self._stored = [0] * slots
        self._most = [0] * slots

    @property
    def free(self) -> int:
        return len(self._free)

    def stored(self, slot: int) -> int:
        """Tokens for which the row has places."""
        return self._stored[slot]

    def most(self, slot: int) -> int:
        """Tokens that the row can come to."""
        return self._most[slot]

    def check(self, most: int) -> None:
        """`UserError`: a row that can come to so many tokens does not fit."""
        if most > self.blocks * self.block_tokens:
            raise UserError(
                f"a request needs {most} positions of the KV cache, which has {self.blocks * self.block_tokens}; plan "
                "for a larger workload."
            )

    def has_room(self, tokens: int, most: int) -> bool:
        """Whether a row of so many tokens may come in, which can come to `most`."""
        if self.free == self.blocks:
            return True
        wanted = sum(self._count_ahead(*row) for row in zip(self._stored, self._most, strict=True) if row[0])
        return wanted + self._count_ahead(tokens, most) <= self.blocks

    def admit(self, slot: int, tokens: int, most: int) -> None:
        """A row takes the slot, and blocks for its first tokens: `has_room` was true."""
        self._stored[slot], self._most[slot] = 0, most
        if not self.extend(slot, tokens):
            raise ValueError(f"{tokens} tokens, but {self.free} of {self.blocks} blocks are free")

    def extend(self, slot: int, tokens: int = 1) -> bool:
        """Places for so many tokens more; False, and nothing changes, if too few blocks are free."""
        table, stored = self.tables[slot], self._stored[slot] + tokens
        wanted = self._count(stored) - len(table)
        if wanted > self.free:
            return False
        table.extend(self._free.pop() for _ in range(wanted))
        self._stored[slot] = stored
        return True

    def has_place(self, slot: int) -> bool:
        """Whether the row's next token needs no further block."""
        return self._stored[slot] < len(self.tables[slot]) * self.block_tokens

    def reserve(self, slot: int) -> None:
        """The block of the row's next token, if there can be one, it needs a block and one is free."""
        if self._free and self._stored[slot] < self._most[slot] and not self.has_place(slot):
            self.tables[slot].append(self._free.pop())

    def release(self, slot: int) -> None:
        """The row has left."""
        self._free.extend(reversed(self.tables[slot]))
        self.tables[slot] = []
        self._stored[slot] = 0

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _count_ahead(self, stored: int, most: int) -> int:
        return self._count(min(stored + HORIZON_TOKENS, max(stored, most)))
