"""Configuration group `calibration`."""

from __future__ import annotations

from dataclasses import dataclass

from ds_llmpq.fields import path_field


@dataclass
class CalibrationConfig:
    """Text and effort of `sensitivity`. Memory: one layer, and rows x tokens x hidden size x 4 bytes per variant."""

    text: str | None = path_field()  # a UTF-8 file; null: seven kinds of text that come with Python and the package
    rows: int = 28  # in all, taken from each kind of text in turn
    tokens: int = 512  # per row
    rows_at_once: int = 4
    state_bytes: int = 1 << 30  # hidden states that may be held while variants of the model are measured
    hessian_rows: int = 4
    hessian_estimate: str = "eigenvalue"  # eigenvalue | trace
