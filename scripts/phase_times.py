"""Why phases and devices want different bit widths: time of one layer by phase, width and device, by both cost sources.

    python scripts/phase_times.py --out runs/motivation +experiment=motivation

All further arguments are overrides of `ds-llmpq plan`: the cluster's device types, the model and the workload are its.
Writes phase_times.csv and phase_times.png and prints the table; nothing here is measured.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster, choose_dtype
from ds_llmpq.cost.latency import RooflineCosts
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape, read_shape
from ds_llmpq.report import figures
from ds_llmpq.report.plan_table import format_table
from ds_llmpq.research.published_costs import PublishedCosts
from ds_llmpq.serving.config import PlanConfig

BATCH = 8
COLOURS = {16: figures.STAGES[0], 8: figures.STAGES[1], 4: figures.STAGES[2], 3: figures.STAGES[3]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments, overrides = parser.parse_known_args()
    try:
        rows = times(config.load_cluster(config.to_object(config.compose_settings("plan", overrides), PlanConfig)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "phase_times.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.out / "phase_times.png")
    cells = [[str(row[key]) if key != "milliseconds" else f"{row[key]:.3g}" for key in row] for row in rows]
    print(format_table(list(rows[0]), cells))
    print(f"plot: {arguments.out / 'phase_times.png'}")
    return 0


def times(settings: PlanConfig) -> list[dict]:
    """One row a source, phase, device type and width: milliseconds of one layer, BATCH sequences."""
    cluster = Cluster.from_config(config.choose_cluster(settings))
    path, workload = settings.model.path, settings.workload
    shape = read_shape(path) if path else ModelShape.from_config(settings.model.shape)
    dtype = choose_dtype(cluster, settings.engine.dtype)
    prompt, past = workload.prompt_tokens, workload.prompt_tokens + workload.generated_tokens / 2
    rows = []
    for name, device in cluster.device_types.items():
        costs = {"roofline": RooflineCosts(device, shape, dtype)}
        if device.kind == "cuda":
            costs["published"] = PublishedCosts(device, shape, dtype)
        for source, made in costs.items():
            for bits in settings.quant.bits:
                for phase, seconds in (
                    ("prefill", made.prefill_seconds(bits, BATCH, prompt)),
                    ("decode", made.decode_seconds(bits, BATCH, past)),
                ):
                    if seconds is not None:
                        place = {"source": source, "phase": phase, "device": name, "bits": bits}
                        rows.append(place | {"milliseconds": 1e3 * seconds})
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """A row of panels a source, a column a phase; bars by device, coloured by width, on a logarithmic axis."""
    sources, phases, devices, widths = (list(dict.fromkeys(row[k] for row in rows)) for k in list(rows[0])[:4])
    figure, axes = figures.make_figure(len(sources), len(phases), width=10, height=3.2 * len(sources))
    found = {(row["source"], row["phase"], row["device"], row["bits"]): row["milliseconds"] for row in rows}
    for line, source in zip(axes, sources, strict=True):
        for axis, phase in zip(line, phases, strict=True):
            for index, width in enumerate(widths):
                values = [found.get((source, phase, device, width), 0.0) for device in devices]
                places = [i + 0.2 * index for i in range(len(devices))]
                axis.bar(places, values, 0.18, label=f"{width} bits", color=COLOURS.get(width, figures.OTHER))
            axis.set_xticks([i + 0.3 for i in range(len(devices))], devices)
            axis.set(yscale="log", title=f"{phase}, {source}", ylabel="ms a layer")
    axes[0][0].legend(frameon=False, fontsize=8)
    figures.save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
