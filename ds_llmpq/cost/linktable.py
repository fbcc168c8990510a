"""links.csv: measured message times between devices, and the latency and bandwidth they give."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ds_llmpq.cluster.devices import Link
from ds_llmpq.errors import UserError
from ds_llmpq.files import read_csv, read_text
from ds_llmpq.validation import Count, Name, Seconds, one_of, validate_cells

_SHORTEST_SECONDS = 1e-12  # light goes a third of a millimetre in it


@dataclass(frozen=True)
class Message:
    """One size over one channel between two devices (`host:slot`). Half a round trip, so both directions count alike.

    channel: `activation` (accelerator's communicator) or `token` (gloo side group).
    """

    source: Name
    target: Name
    channel: one_of("activation", "token")
    size_bytes: Count
    repeats: Count
    median_seconds: Seconds
    minimum_seconds: Seconds


def write_links(path: Path, messages: Iterable[Message]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(entry.name for entry in fields(Message))
        writer.writerows(astuple(message) for message in messages)


def read_links(path: Path) -> list[Message]:
    """`UserError` for a file that is not one of `write_links`."""
    where, remedy = f"table of links {path}", "profile again"
    names = [entry.name for entry in fields(Message)]
    rows = read_csv(read_text(path, "table of links", remedy), where, remedy, names)
    return [
        validate_cells(Message, {name: row[name] for name in names}, f"{where} line {number}", remedy)
        for number, row in rows
    ]


def fit_link(messages: Sequence[Message]) -> Link:
    """Latency and bandwidth of the activation channel: least squares on relative errors of the minima, neither
    negative. Minima, because other processes can only add time."""
    import numpy
    from scipy.optimize import nnls

    used = [message for message in messages if message.channel == "activation"]
    if len({message.size_bytes for message in used}) < 2:
        raise UserError("links need messages of at least two sizes; profile again with profiling.links=true")
    if not all(message.minimum_seconds >= _SHORTEST_SECONDS for message in used):
        raise UserError("links need positive times; profile again with profiling.links=true")
    seconds = numpy.array([message.minimum_seconds for message in used])
    rows = numpy.array([[1.0, message.size_bytes] for message in used]) / seconds[:, None]
    scale = numpy.abs(rows).max(axis=0)
    latency, per_byte = nnls(rows / scale, numpy.ones(len(used)))[0] / scale
    return Link(float(latency), 1.0 / max(float(per_byte), 1e-15))
