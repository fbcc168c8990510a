"""One decoder layer as a stage runs it, by kernel and width, in one process.

    python scripts/make_checkpoint.py --preset 850m MODEL
    GOMP_SPINCOUNT=10000 python scripts/bench/layers.py MODEL [--kernels openvino_graph openvino] [--bits 16 8 4]

Contenders take turns, so that a disturbance does not fall on one alone; medians of `--repeats` rounds, milliseconds a
layer, of a chain of `--layers`. Decode of each number of `--rows` behind a context of `--context` tokens, prefill of
that many prompts of `--prompt` tokens. GOMP_SPINCOUNT as a stage with OpenVINO sets it (`engine/openmp.py`); leave it
out to time torch's own unquantized layers as a stage of nothing else runs them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from ds_llmpq.cost.profile import Point
from ds_llmpq.models.shape import read_shape
from ds_llmpq.profiling.parts import Parts
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.report.plan_table import format_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kernels", nargs="+", default=["openvino_graph", "openvino"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    for name, default in (("bits", [16, 8, 4]), ("rows", [1, 8, 32])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    sizes = (("context", 160), ("prompt", 128), ("prompts", 4), ("threads", 2), ("repeats", 20), ("layers", 8))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    points = {f"decode of {rows}": ("decode", rows, options.context) for rows in options.rows}
    points[f"prefill of {options.prompts} x {options.prompt}"] = ("prefill", options.prompts, options.prompt)
    actions = {
        (kernel, bits): [action_of(parts, bits, *point) for point in points.values()]
        for kernel in options.kernels
        for parts in [parts_of(options, kernel)]
        for bits in options.bits
    }
    seconds = timed(actions, options.repeats)
    base = next(iter(actions))
    rows = [
        [
            f"{kernel} {bits} bits",
            *(f"{1e3 * own:.2f} ({first / own:.2f}x)" for own, first in zip(each, seconds[base], strict=True)),
        ]
        for (kernel, bits), each in seconds.items()
    ]
    print(f"{options.threads} threads, milliseconds a layer (speed against the first line)")
    print(format_table(["", *points], rows))


def parts_of(options: argparse.Namespace, kernel: str) -> Parts:
    quant = replace(QuantConfig(), optimize=False, kernel=kernel)
    most, capacity = max(*options.rows, options.prompts), max(options.context, options.prompt) + 1
    shape, cpu = read_shape(options.model), torch.device("cpu")
    return Parts(options.model, shape, options.bits, quant, options.dtype, cpu, most, capacity, options.layers)


def action_of(parts: Parts, bits: int, phase: str, rows: int, tokens: int) -> Callable[[], float]:
    """Seconds a layer of one call."""
    action, times = parts.action(Point("cpu_core", "layer", phase, bits, rows, tokens))

    def seconds() -> float:
        begin = time.perf_counter()
        action()
        return (time.perf_counter() - begin) / times

    return seconds


@torch.inference_mode()
def timed(actions: dict, repeats: int) -> dict:
    """Medians by contender and point; each point is run twice in a turn, and the second call counts."""
    found = {key: [[] for _ in each] for key, each in actions.items()}
    for _ in range(repeats):
        for key, each in actions.items():
            for place, action in enumerate(each):
                action()
                found[key][place].append(action())
    return {key: [median(times) for times in each] for key, each in found.items()}


if __name__ == "__main__":
    main()
