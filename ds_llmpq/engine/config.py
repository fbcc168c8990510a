"""Configuration group `engine`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_llmpq.errors import UserError, quote


@dataclass
class ComputeConfig:
    """What a plan depends on."""

    dtype: str = "auto"  # auto | float32 | bfloat16 | float16: arithmetic, KV cache and unquantized weights
    refill: bool = True  # a finished sequence's slot takes the next request; false: a request group runs to its end
    # a request's greedy answer does not depend on which others it runs with: full decode micro-batches always, prefill
    # one by one
    batch_invariant: bool = False
    # a prefix that most prompts begin with, as a system prompt, is computed once; not with batch_invariant
    share_prefix: bool = True
    # slots: every sequence has positions of its own for the longest prompt and answer | paged: sequences share all of
    # them block by block, more run in the same memory, and when it ends the youngest is preempted and computed again
    kv_cache: str = "slots"
    # decode passes are captured once for each shape and replayed: as CUDA graphs; null: where a stage is a GPU. true
    # without a GPU replays a trace, which proves that a model's passes can be captured and gains no speed
    decode_graphs: bool | None = None

    @property
    def is_paged(self) -> bool:
        """`UserError`: `kv_cache` is neither."""
        if self.kv_cache not in ("slots", "paged"):
            raise UserError(f"engine.kv_cache is {quote(self.kv_cache)} but must be slots or paged.")
        return self.kv_cache == "paged"

    @property
    def shares_prefix(self) -> bool:
        return self.share_prefix and not self.batch_invariant

    def captures(self, kinds: Iterable[str]) -> bool:
        """Whether decode passes of stages on devices of these kinds are captured: the same on all stages, whose
        micro-batches are the same."""
        return "cuda" in kinds if self.decode_graphs is None else self.decode_graphs


@dataclass
class EngineConfig(ComputeConfig):
    """How a plan is run."""

    # decoder blocks are compiled for decode passes (torch.compile), once when a stage loads; null: where CUDA graphs
    # capture them and Triton is there
    compile_blocks: bool | None = None
    timeout_seconds: float = 1800.0  # a stage that hears nothing for so long gives up; loading counts
    master_port: int | None = None
    check_memory: bool = True  # before loading: is as much free on every device as the plan needs there
    # most prompt tokens in a prefill pass; a longer prompt passes in chunks of so many, and decode goes on meanwhile;
    # null: as planned
    prefill_tokens: int | None = None
    # decode rounds that a free slot waits for others, to be refilled in one prefill pass; null: 8, but 0 where stages
    # are graphs, whose prefill costs the same a token for one row as for many
    patience_rounds: int | None = None
