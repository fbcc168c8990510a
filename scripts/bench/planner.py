"""Time, objective, bound and gap of the planner on paper-like clusters and random ones.

    python scripts/bench/planner.py [--set paper|random|large|bounded|all] [--solver auto|search|highs|gurobi]

Instances are roofline-synthetic: layer times follow from datasheet peak rates (assumed efficiencies below), not from
measurement. What is measured is the planner.
"""

import argparse
import json
import random
import sys
import time

from ds_llmpq.errors import UserError
from ds_llmpq.planner import Problem, evaluate, solve

GIB = 2**30
# name: (fp16 TFLOP/s, memory GB/s, usable GiB); datasheet peaks, usable memory as the paper reports it.
DEVICES = {
    "t4": (65, 320, 14.76),
    "p100": (19, 732, 11.91),
    "v100": (125, 900, 31.74),
    "a100-40": (312, 1555, 39.4),
    "a100-80": (312, 2039, 79.0),
    "a10": (125, 600, 22.5),
    "l4": (121, 300, 22.5),
    "h100": (990, 3350, 79.0),
}
# name: (layers, hidden size, vocabulary)
MODELS = {
    "opt-13b": (40, 5120, 50272),
    "opt-30b": (48, 7168, 50272),
    "opt-66b": (64, 9216, 50272),
    "bloom-176b": (70, 14336, 250880),
}
# number: (model, [(count, device), ...] one entry a node, (B, s, n))
PAPER = {
    "1": ("opt-13b", [(1, "v100")], (32, 512, 100)),
    "2": ("opt-13b", [(1, "a100-40")], (32, 512, 100)),
    "3": ("opt-30b", [(3, "t4"), (1, "v100")], (32, 512, 100)),
    "4": ("opt-30b", [(3, "p100"), (1, "v100")], (32, 512, 100)),
    "5": ("opt-66b", [(4, "t4"), (2, "v100")], (32, 512, 100)),
    "6": ("opt-66b", [(2, "v100"), (2, "a100-40")], (32, 512, 100)),
    "7": ("bloom-176b", [(4, "v100"), (4, "a100-40")], (32, 512, 100)),
    "8": ("bloom-176b", [(4, "v100"), (2, "a100-80")], (32, 512, 100)),
    "9": ("opt-30b", [(4, "t4")], (32, 512, 100)),
    "10": ("opt-66b", [(4, "v100")], (32, 512, 100)),
    "11": ("bloom-176b", [(4, "a100-80")], (32, 512, 100)),
    "1lat": ("opt-13b", [(1, "v100")], (32, 128, 200)),
    "4lat": ("opt-30b", [(3, "p100"), (1, "v100")], (32, 128, 200)),
    "6lat": ("opt-66b", [(2, "v100"), (2, "a100-40")], (32, 128, 200)),
}
EFFICIENCY = 0.6  # of peak arithmetic and bandwidth, assumed
DEQUANTIZATION = {2: 1.2, 3: 1.25, 4: 1.12, 8: 1.05, 16: 1.0}  # prefill cost factor of unpacking, assumed
LAUNCH_SECONDS = 60e-6  # fixed cost of a layer, assumed
METADATA_BITS = 0.5  # 16-bit scale and zero for every 64 weights


def synthetic(layers, hidden, vocabulary, nodes, workload, *, seed, bits=(3, 4, 8, 16), sizes=None, kinds=None) -> dict:
    """A `problem.json` object. `nodes`: (count, device type) each; links of 12 GB/s inside, 1.2 GB/s between."""
    rng = random.Random(seed)
    sequences, prompt, generated = workload
    etas, xis = sizes or ([1, 2, 4, 8], [1, 2, 4, 8, 16, 32])
    kinds = kinds or DEVICES
    devices = [
        {"name": f"node{i}:{j}", "type": kind, "memory_bytes": int(kinds[kind][2] * GIB)}
        for i, (count, kind) in enumerate(nodes)
        for j in range(count)
    ]
    parameters = 12 * hidden**2
    sensitivity = [rng.uniform(0.5, 1.5) * (1 + 2 * abs(i / layers - 0.5)) for i in range(layers)]
    inside = [
        {"from": a["name"], "to": b["name"], "latency_seconds": 1e-5, "seconds_per_byte": 1 / 12e9}
        for a in devices
        for b in devices
        if a is not b and a["name"].split(":")[0] == b["name"].split(":")[0]
    ]
    widest = max(bits)
    return {
        "schema": 1,
        "layers": layers,
        "bits": list(bits),
        "workload": {"sequences": sequences, "prompt_tokens": prompt, "generated_tokens": generated},
        "micro_batches": {"prefill": etas, "decode": xis},
        "device_types": {
            name: _device_type(spec, parameters, hidden, vocabulary, workload, bits, etas, xis)
            for name, spec in kinds.items()
            if any(kind == name for _, kind in nodes)
        },
        "devices": devices,
        "device_order": "free",
        "memory": {
            "layer_bytes": {str(b): int(parameters * (b + (METADATA_BITS if b < widest else 0)) / 8) for b in bits},
            "kv_bytes_per_sequence_layer": 4 * hidden * (prompt + generated),
            "embed_bytes": 2 * vocabulary * hidden,
            "head_bytes": 2 * vocabulary * hidden,
            "tied_head": True,
            "workspace_bytes": {
                "prefill": {str(e): e * prompt * hidden * 2 * 8 for e in etas},
                "decode": {str(x): x * (hidden * 16 + vocabulary * 4) for x in xis},
            },
        },
        "links": {
            "default": {"latency_seconds": 5e-5, "seconds_per_byte": 1 / 1.2e9},
            "pairs": inside,
            "hidden_bytes_per_token": 2 * hidden,
            "token_bytes": 8,
        },
        "sensitivity": [[w * _loss(b) / layers for b in bits] for w in sensitivity],
        "objective": {"mode": "theta", "theta": 20.0},
    }


def _loss(bits: int) -> float:
    """Falls fourfold a bit, one on average at three bits; nothing at sixteen."""
    return 0.0 if bits >= 16 else 4.0 ** (3 - bits)


def _device_type(spec, parameters, hidden, vocabulary, workload, bits, etas, xis) -> dict:
    flops, bandwidth = spec[0] * 1e12 * EFFICIENCY, spec[1] * 1e9 * EFFICIENCY
    _, prompt, generated = workload

    def prefill(b, eta):
        work = 2 * parameters * eta * prompt + 4 * eta * prompt**2 * hidden
        return work / flops * DEQUANTIZATION.get(b, 1.1) + LAUNCH_SECONDS

    def decode(b, xi):
        read = parameters * (b + METADATA_BITS) / 8 + 4 * hidden * xi * (prompt + generated / 2)
        return max(read / bandwidth, 2 * parameters * xi / flops) + LAUNCH_SECONDS

    def head(size):
        return 2 * vocabulary * hidden * max(size / flops, 1 / bandwidth)

    return {
        "bits": list(bits),
        "prefill_layer_seconds": {str(b): {str(e): prefill(b, e) for e in etas} for b in bits},
        "decode_layer_seconds": {str(b): {str(x): decode(b, x) for x in xis} for b in bits},
        "prefill_embed_seconds": {str(e): e * prompt * hidden * 4 / bandwidth for e in etas},
        "prefill_head_seconds": {str(e): head(e) for e in etas},
        "decode_embed_seconds": {str(x): x * hidden * 4 / bandwidth for x in xis},
        "decode_head_seconds": {str(x): head(x) for x in xis},
    }


def paper_instances():
    for number, (model, nodes, workload) in PAPER.items():
        yield f"paper {number}", synthetic(*MODELS[model], nodes, workload, seed=0)


def random_instances(count: int = 8):
    """Up to 80 layers on 16 devices of 4 types, with 4 widths; memory drawn so that it binds."""
    rng = random.Random(1)
    for i in range(count):
        layers, total = rng.choice([48, 64, 80]), rng.choice([8, 12, 16])
        names = rng.sample(sorted(DEVICES), 4)
        share = [total // 4] * 4
        hidden = rng.choice([8192, 9216, 12288])
        weights = 12 * hidden**2 * 2 * layers
        other = 32 * 612 * 4 * hidden * layers + 2 * 50272 * hidden + total * 4096 * hidden * 16
        room = sum(DEVICES[name][2] * n * GIB for name, n in zip(names, share, strict=True))
        factor = (weights * rng.uniform(0.35, 0.8) + other) / room
        kinds = {name: (spec[0], spec[1], spec[2] * factor) for name, spec in DEVICES.items()}
        yield (
            f"random {i}: {layers} x {total}",
            synthetic(layers, hidden, 50272, list(zip(share, names, strict=True)), (32, 512, 100), seed=i, kinds=kinds),
        )


def large_instances():
    """128 layers on 64 devices of 8 types, with 5 widths."""
    for i in range(2):
        hidden, layers = 12288, 128
        nodes = [(8, name) for name in DEVICES]
        weights = 12 * hidden**2 * 2 * layers
        other = 64 * 612 * 4 * hidden * layers + 2 * 50272 * hidden + 64 * 2048 * hidden * 16
        room = 8 * GIB * sum(spec[2] for spec in DEVICES.values())
        factor = (weights * (0.5, 0.9)[i] + other) / room
        kinds = {name: (spec[0], spec[1], spec[2] * factor) for name, spec in DEVICES.items()}
        yield (
            f"large {i}: 128 x 64",
            synthetic(layers, hidden, 50272, nodes, (64, 512, 100), seed=i, bits=(2, 3, 4, 8, 16), kinds=kinds,
                      sizes=([1, 2, 4], [1, 2, 4, 8, 16, 32, 64])),
        )  # fmt: skip


def bounded_instances():
    """The paper's mixed clusters with a hard bound on quality loss or on latency."""
    for number in ("3", "5", "6", "8"):
        model, nodes, workload = PAPER[number]
        obj = synthetic(*MODELS[model], nodes, workload, seed=0)
        yield f"paper {number}, loss <= 0.1", {**obj, "objective": {"mode": "max_quality_loss", "limit": 0.1}}
        fast = solve({**obj, "objective": {"mode": "theta", "theta": 0.0}}, baselines=False)
        limit = 1.3 * fast.predicted.latency_seconds
        yield f"paper {number}, latency <= 1.3 x least", {**obj, "objective": {"mode": "max_latency", "limit": limit}}


SETS = {
    "paper": paper_instances,
    "random": random_instances,
    "large": large_instances,
    "bounded": bounded_instances,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="all", choices=[*SETS, "all"])
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'instance':<34}{'seconds':>9}{'CPU s':>8}{'objective':>12}{'bound':>12}{'gap %':>8}{'tokens/s':>10}"
        "  solver, status"
    )
    for name in SETS if arguments.set == "all" else [arguments.set]:
        for label, obj in SETS[name]():
            started, cpu = time.perf_counter(), time.process_time()
            try:
                plan = solve(
                    obj,
                    solver=arguments.solver,
                    gap=arguments.gap,
                    time_limit_seconds=arguments.seconds,
                    baselines=False,
                )
            except UserError as error:
                print(f"{label:<34}{time.perf_counter() - started:>9.2f}  {error}")
                continue
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            problem = Problem.from_json(obj)
            again = evaluate(problem, plan.assignment())
            assert abs(again.latency_seconds - plan.predicted.latency_seconds) < 1e-9
            report, speed = plan.solver, plan.predicted.throughput_tokens_per_second
            gap = 100 * report.gap if report.gap is not None else float("nan")
            print(
                f"{label:<34}{seconds:>9.2f}{cpu:>8.2f}{report.objective:>12.4f}{report.bound:>12.4f}{gap:>8.2f}{speed:>10.1f}"
                f"  {report.name}, {report.status}, {len(plan.stages)} stages"
            )
            sys.stdout.flush()
            outcome = {"objective": report.objective, "bound": report.bound, "gap": report.gap, "status": report.status}
            rows.append({"instance": label, "seconds": seconds, "cpu_seconds": cpu, "solver": report.name, **outcome})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
