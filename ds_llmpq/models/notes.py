"""Notes on a checkpoint that a user should see before it serves. No torch."""

from __future__ import annotations

from pathlib import Path

from ds_llmpq.errors import make_printable
from ds_llmpq.models.description import read_config, read_description
from ds_llmpq.models.families import describe
from ds_llmpq.models.generation import read_generation


def list_notes(path: str | Path) -> list[str]:
    """One line per fact; none for an ordinary checkpoint. `UserError`: its configuration files are not usable."""
    config = read_config(path)
    spec, notes = read_description(path).spec, []
    if describe(config).spec.tied and not spec.tied:
        notes.append(
            "config.json ties lm_head to the embedding, but another lm_head.weight is stored: that one is used"
        )
    for _, rotary in spec.rotary:
        if rotary.kind == "longrope":
            notes.append(
                f"rope type longrope: a row that exceeds {rotary.original_positions:.0f} tokens while it is generated "
                "takes the long factors from there on, where generate computes its first tokens again"
            )
    return notes + read_generation(path, config, spec.vocab).lines()


def describe_notes(path: str | Path) -> list[str]:
    """`list_notes` as lines for a screen."""
    return [f"model: {make_printable(note, keep='')}" for note in list_notes(path)]
