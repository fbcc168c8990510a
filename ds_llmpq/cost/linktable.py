"""links.csv: measured message times between devices, and the latency and bandwidth they give."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ds_llmpq.cluster.devices import Link
from ds_llmpq.errors import UserError


@dataclass(frozen=True)
class Message:
    """One size over one channel between two devices (`host:slot`). Half a round trip, so both directions count alike.

    channel: `activation` (accelerator's communicator) or `token` (gloo side group).
    """

    source: str
    target: str
    channel: str
    size_bytes: int
    repeats: int
    median_seconds: float
    minimum_seconds: float


def write_links(path: Path, messages: Iterable[Message]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(entry.name for entry in fields(Message))
        writer.writerows(astuple(message) for message in messages)


def read_links(path: Path) -> list[Message]:
    """`UserError` for a file that is not one of `write_links`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Message(
                    row["source"],
                    row["target"],
                    row["channel"],
                    int(row["size_bytes"]),
                    int(row["repeats"]),
                    float(row["median_seconds"]),
                    float(row["minimum_seconds"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table of links ({error}); profile again") from None


def fit_link(messages: Sequence[Message]) -> Link:
    """Latency and bandwidth of the activation channel: least squares on relative errors of the minima, neither
    negative. Minima, because other processes can only add time."""
    import numpy
    from scipy.optimize import nnls

    used = [message for message in messages if message.channel == "activation"]
    if len({message.size_bytes for message in used}) < 2:
        raise UserError("links need messages of at least two sizes; profile again with profiling.links=true")
    if not all(0 < message.minimum_seconds < math.inf and 0 <= message.size_bytes < 2**63 for message in used):
        raise UserError("links need positive times and sizes; profile again with profiling.links=true")
    seconds = numpy.array([message.minimum_seconds for message in used])
    rows = numpy.array([[1.0, message.size_bytes] for message in used]) / seconds[:, None]
    scale = numpy.abs(rows).max(axis=0)
    latency, per_byte = nnls(rows / scale, numpy.ones(len(used)))[0] / scale
    return Link(float(latency), 1.0 / max(float(per_byte), 1e-15))
