"""Arrival times: Poisson, Gamma and uniform gaps, or a trace in the form of Azure's LLM inference traces (2023)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_csv, read_text
from ds_llmpq.lengths.records import MOST_TOKENS

KINDS = ("poisson", "gamma", "uniform", "together", "trace")
_MOST_BYTES = 1 << 30
_MOST_SECONDS = 1e12
TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class ArrivalTrace:
    """Rows of a trace file: seconds since the first row, prompt and answer lengths."""

    arrival_seconds: np.ndarray
    prompt_tokens: np.ndarray
    generated_tokens: np.ndarray


def draw_arrival_times(kind: str, count: int, rate: float, cv: float, generator: np.random.Generator) -> np.ndarray:
    """Arrival seconds of `count` jobs at `rate` jobs a second.

    `gamma`: gaps with coefficient of variation `cv`; `poisson`: exponential gaps (cv 1); `uniform`: gaps from 0 to
    2 / rate; `together`: all at time 0. The gaps are independent. (The published simulator sorts them, so that its
    traffic starts with a burst and ebbs away.)
    """
    if count < 1:
        raise UserError(f"jobs is {count} but must be at least 1.")
    if kind == "together":
        return np.zeros(count)
    if not rate > 0:
        raise UserError(f"arrivals.rate is {rate} but must be above 0 jobs a second.")
    if kind == "poisson":
        gaps = generator.exponential(1 / rate, count)
    elif kind == "uniform":
        gaps = generator.uniform(0, 2 / rate, count)
    elif kind == "gamma":
        if not cv > 0:
            raise UserError(f"arrivals.cv is {cv} but must be above 0.")
        gaps = generator.gamma(1 / cv**2, cv**2 / rate, count)
    else:
        raise UserError(f"arrivals.kind is {kind!r} but must be one of {', '.join(KINDS)}.")
    return np.cumsum(gaps)


def read_trace(path: Path, start_row: int = 0, count: int | None = None, scale: float = 1.0) -> ArrivalTrace:
    """`count` rows from `start_row` on, with gaps `scale` times as long. `UserError`: another kind of file, or no
    rows."""
    if start_row < 0 or not scale > 0:
        raise UserError(f"arrivals.start_row is {start_row} and arrivals.scale is {scale}; give at least 0, above 0.")
    where, remedy = f"trace {path}", "give an Azure inference trace"
    rows = read_csv(read_text(path, "trace", remedy, _MOST_BYTES), where, remedy, TRACE_COLUMNS)
    chosen = list(islice(rows, start_row, None if count is None else start_row + count))
    read = [_row(row, f"{where} line {number}") for number, row in chosen]
    seconds = np.array([row[0] for row in read])
    lengths = [np.array([row[place] for row in read], dtype=np.int64) for place in (1, 2)]
    if not len(seconds):
        raise UserError(f"{path} has no row {start_row}; give a smaller arrivals.start_row.")
    return ArrivalTrace((seconds - seconds[0]) * scale, lengths[0], np.maximum(lengths[1], 1))


def _row(row: dict[str, str], where: str) -> tuple[float, int, int]:
    """Seconds, prompt and answer tokens. `UserError`: out of range, or no numbers."""
    try:
        seconds, tokens = _seconds(row["TIMESTAMP"]), [int(row[name]) for name in TRACE_COLUMNS[1:]]
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where} cannot be read as a trace ({error}); remove that line.") from None
    if not abs(seconds) <= _MOST_SECONDS or not all(0 <= length <= MOST_TOKENS for length in tokens):
        raise UserError(f"{where} has a time or length out of range; remove that line.")
    return (seconds, *tokens)


def _seconds(text: str) -> float:
    """Seconds of a timestamp as in the trace (up to 7 decimals of a second), or of a plain number."""
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.strip().partition(".")
        # times without a zone count as UTC, because daylight saving time would make a jump
        stamp = datetime.fromisoformat(whole + ("" if whole.endswith("Z") or "+" in whole else "+00:00"))
        return stamp.timestamp() + (float("0." + fraction) if fraction.isdigit() else 0.0)
