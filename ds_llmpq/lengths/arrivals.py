"""When jobs come: Poisson, Gamma and uniform gaps, or a trace file as Azure published one of LLM inference in 2023."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from ds_llmpq.errors import UserError
from ds_llmpq.files import open_regular

KINDS = ("poisson", "gamma", "uniform", "together", "trace")
TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Trace:
    """Rows of a trace file: seconds since the first row, prompt and answer lengths."""

    arrival_seconds: np.ndarray
    prompt_tokens: np.ndarray
    generated_tokens: np.ndarray


def arrival_times(kind: str, count: int, rate: float, cv: float, generator: np.random.Generator) -> np.ndarray:
    """Arrival seconds of `count` jobs at `rate` jobs a second.

    `gamma`: gaps with coefficient of variation `cv`; `poisson`: exponential gaps (cv 1); `uniform`: gaps from 0 to
    2 / rate; `together`: all at time 0. Gaps are independent and in the order drawn (the published simulator sorts
    them, which makes traffic that starts as a burst and ebbs away).
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


def read_trace(path: Path, start_row: int = 0, count: int | None = None, scale: float = 1.0) -> Trace:
    """`count` rows from `start_row` on, with gaps `scale` times as long. `UserError`: not such a file, or no rows."""
    if start_row < 0 or not scale > 0:
        raise UserError(f"arrivals.start_row is {start_row} and arrivals.scale is {scale}; give at least 0, above 0.")
    try:
        with open_regular(path, "trace", "give an Azure inference trace") as stream:
            reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            missing = set(TRACE_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path} lacks the columns {', '.join(sorted(missing))} of an Azure inference trace.")
            rows = [row for row in reader][start_row : None if count is None else start_row + count]
            seconds = np.array([_seconds(row["TIMESTAMP"]) for row in rows])
            lengths = [np.array([int(row[name]) for row in rows], dtype=np.int64) for name in TRACE_COLUMNS[1:]]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a trace ({error}).") from None
    if not len(seconds):
        raise UserError(f"{path} has no row {start_row}; give a smaller arrivals.start_row.")
    return Trace((seconds - seconds[0]) * scale, lengths[0], np.maximum(lengths[1], 1))


def _seconds(text: str) -> float:
    """A timestamp as the trace writes it (up to 7 decimals of a second), or plain seconds."""
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.strip().partition(".")
        # times without a zone are taken for UTC: local summer time would make a jump
        stamp = datetime.fromisoformat(whole + ("" if whole.endswith("Z") or "+" in whole else "+00:00"))
        return stamp.timestamp() + (float("0." + fraction) if fraction.isdigit() else 0.0)
