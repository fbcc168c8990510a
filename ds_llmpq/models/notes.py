"""What a user should know of a checkpoint before it serves. No torch."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq.errors import printable, shown
from ds_llmpq.models.generation import read_generation
from ds_llmpq.models.shape import read_config, read_shape

_TIED = ("opt", "bloom", "gemma2", "gemma3_text")  # where config.json says nothing


def list_notes(path: str | Path) -> list[str]:
    """One line a fact, none for a checkpoint without surprises. `UserError`: its configuration files cannot be used."""
    config, shape = read_config(path), read_shape(path)
    notes = []
    if config.get("tie_word_embeddings", shape.architecture in _TIED) and not shape.tied_embeddings:
        notes.append(
            "config.json ties lm_head to the embedding, but another lm_head.weight is stored: that one is used"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
    if kind == "longrope":
        bound = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        notes.append(
            f"rope type longrope: a row that exceeds {shown(bound)} tokens while it is generated takes the long factors"
            " from there on, where generate computes its first tokens again"
        )
    return notes + read_generation(path, config, shape.vocab).lines()


def describe_notes(path: str | Path) -> list[str]:
    """`list_notes` as lines for a screen."""
    return [f"model: {printable(note, keep='')}" for note in list_notes(path)]
