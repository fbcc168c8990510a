"""Random planning problems for tests, small enough for brute force or as large as asked; all modes and oddities."""

import itertools
import random


def random_problem(
    seed: int, *, layers=None, devices=None, widths=None, sizes=None, types=None, mode=None, alone=False
) -> dict:
    """A `problem.json` object. Some have tied heads, per-layer bytes, missing latencies, pair links, a fixed order.
    `alone`: devices are faster where a plan has one stage."""
    rng = random.Random(seed)
    layers = layers or rng.randint(1, 5)
    bits = sorted(rng.sample([2, 3, 4, 8, 16], widths or rng.randint(1, 3)))
    etas = sorted(rng.sample([1, 2, 4, 8], sizes or rng.randint(1, 2)))
    xis = sorted(rng.sample([2, 4, 8, 16], sizes or rng.randint(1, 2)))
    names = [f"t{i}" for i in range(types or rng.randint(1, 2))]
    kinds = {name: _device_type(rng, bits, etas, xis) for name in names}
    weight = {b: b * rng.uniform(0.9, 1.1) * 1e6 for b in bits}
    listed = [
        {"name": f"n{i}:0", "type": rng.choice(names), "memory_bytes": 0}
        for i in range(devices or rng.randint(1, 3))
    ]  # fmt: skip
    total = layers * weight[bits[len(bits) // 2]] * rng.uniform(0.9, 3.0) + 8e6
    capacity = {name: total / len(listed) * rng.uniform(0.7, 1.6) for name in names}
    for device in listed:
        device["memory_bytes"] = round(capacity[device["type"]] * (1 if rng.random() < 0.7 else rng.uniform(0.6, 1.4)))
    slope = sorted((rng.uniform(0, 1) for _ in bits), reverse=True)
    problem = {
        "schema": 1,
        "layers": layers,
        "bits": bits,
        "workload": {
            "sequences": rng.choice([1, 4, 8, 16]),
            "prompt_tokens": rng.choice([8, 64]),
            "generated_tokens": rng.choice([1, 2, 5, 20]),
        },
        "micro_batches": {"prefill": etas, "decode": xis},
        "device_types": kinds,
        "devices": listed,
        "device_order": "fixed" if rng.random() < 0.2 else "free",
        "memory": {
            "layer_bytes": {str(b): _layer_bytes(rng, weight[b], layers) for b in bits},
            "kv_bytes_per_sequence_layer": rng.choice([0, 2e4, 1e5]),
            "embed_bytes": rng.choice([0, 1e6, 3e6]),
            "head_bytes": rng.choice([0, 1e6, 3e6]),
            "tied_head": rng.random() < 0.4,
            "workspace_bytes": {
                "prefill": {str(e): 2e5 * e for e in etas},
                "decode": {str(x): 1e5 * x for x in xis},
            },
        },
        "links": _links(rng, [device["name"] for device in listed]),
        "sensitivity": [[s * rng.uniform(0.3, 1.7) for s in slope] for _ in range(layers)],
        "objective": _objective(rng, mode or rng.choice(["theta", "max_quality_loss", "max_latency"]), layers),
    }
    for kind in kinds.values() if alone else ():
        kind |= {f"{phase}_alone_share": rng.choice([1.0, rng.uniform(0.3, 1.0)]) for phase in ("prefill", "decode")}
        kind["contention_seconds"] = rng.choice([0.0, rng.uniform(0.001, 0.05)])
        for phase, part in itertools.product(("prefill", "decode"), ("embed", "head")):
            ends = kind[f"{phase}_{part}_seconds"]
            ends.update({size: seconds + kind["contention_seconds"] for size, seconds in ends.items()})
    return problem


def _device_type(rng, bits, etas, xis) -> dict:
    fast = rng.uniform(0.3, 2)

    def table(sizes, base) -> dict:
        entries = {}
        for b in bits:
            factor = rng.uniform(0.5, 1.5)
            entries[str(b)] = {str(s): fast * base * factor * (0.5 + s * rng.uniform(0.2, 0.4)) for s in sizes}
            for s in sizes:
                if rng.random() < 0.05:
                    entries[str(b)][str(s)] = rng.choice([None, float("inf")])
        return entries

    feasible = [b for b in bits if rng.random() < 0.85] or bits[:1]
    return {
        "bits": feasible,
        "prefill_layer_seconds": table(etas, 0.5),
        "decode_layer_seconds": table(xis, 0.02),
        "prefill_embed_seconds": {str(e): rng.choice([0.0, 0.1]) for e in etas},
        "prefill_head_seconds": {str(e): rng.choice([0.0, 0.3]) for e in etas},
        "decode_embed_seconds": {str(x): rng.choice([0.0, 0.002]) for x in xis},
        "decode_head_seconds": {str(x): rng.choice([0.0, 0.02]) for x in xis},
    }


def _layer_bytes(rng, weight, layers):
    return weight if rng.random() < 0.7 else [weight * rng.uniform(0.8, 1.2) for _ in range(layers)]


def _links(rng, names) -> dict:
    pairs = [
        {"from": a, "to": b, "latency_seconds": rng.choice([0.0, 0.3]), "seconds_per_byte": rng.choice([0.0, 1e-6])}
        for a in names
        for b in names
        if a != b and rng.random() < 0.3
    ]
    return {
        "default": {"latency_seconds": rng.choice([0.0, 0.01]), "seconds_per_byte": rng.choice([0.0, 1e-7])},
        "pairs": pairs,
        "hidden_bytes_per_token": 1000,
        "token_bytes": 8,
    }


def _objective(rng, mode, layers) -> dict:
    if mode == "theta":
        return {"mode": mode, "theta": rng.choice([0.0, 0.1, 1.0, 10.0])}
    if mode == "max_quality_loss":
        limit = layers * rng.uniform(0.2, 1.0)
        return {"mode": mode, "limit": limit, "theta": rng.choice([0.0, 0.0, 0.1, 1.0, 10.0])}
    return {"mode": mode, "limit": layers * rng.uniform(1, 16)}
