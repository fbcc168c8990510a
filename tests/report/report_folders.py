"""A small plan, and the folder that a run of it would leave, for tests of reports."""

import json

from ds_llmpq.engine.config import EngineConfig
from ds_llmpq.plan import write_plan
from ds_llmpq.planner import Problem, solve
from ds_llmpq.serving.prediction import simulate_workload, write_predicted_trace

_SIZES = (1, 2, 4)
_TIMES = {width: {size: seconds * size for size in _SIZES} for width, seconds in ((16, 0.004), (8, 0.003), (4, 0.005))}
_PART = dict.fromkeys(map(str, _SIZES), 0.001)


def problem(memory=(60.0, 40.0), layers=6):
    times = {str(width): {str(size): t for size, t in row.items()} for width, row in _TIMES.items()}
    kind = {
        "bits": [4, 8, 16],
        "prefill_layer_seconds": times,
        "decode_layer_seconds": times,
        **{f"{phase}_{part}_seconds": _PART for phase in ("prefill", "decode") for part in ("embed", "head")},
    }
    record = {
        "schema": 1,
        "layers": layers,
        "bits": [4, 8, 16],
        "workload": {"sequences": 4, "prompt_tokens": 8, "generated_tokens": 6},
        "micro_batches": {"prefill": list(_SIZES), "decode": list(_SIZES)},
        "device_types": {"core": kind},
        "devices": [{"name": f"here:{i}", "type": "core", "memory_bytes": room} for i, room in enumerate(memory)],
        "memory": {
            "layer_bytes": {"4": 4, "8": 8, "16": 16},
            "kv_bytes_per_sequence_layer": 0.5,
            "embed_bytes": 3,
            "head_bytes": 3,
            "workspace_bytes": {"prefill": dict.fromkeys(_PART, 2), "decode": dict.fromkeys(_PART, 2)},
        },
        "links": {
            "default": {"latency_seconds": 1e-4, "seconds_per_byte": 0.0},
            "hidden_bytes_per_token": 16,
            "token_bytes": 8,
        },
        "sensitivity": [[0.02 + i / 1000, 0.001, 0.0] for i in range(layers)],
        "objective": {"mode": "theta", "theta": 1.0},
    }
    return Problem.from_json(record)


def write_planned(folder, **options):
    """plan.json and predicted_trace.json, as `plan` leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = problem(**options)
    plan = solve(made, solver="search")
    write_plan(folder / "plan.json", plan)
    write_predicted_trace(plan, simulate_workload(plan, EngineConfig()), folder)
    return plan


def write_run(folder):
    """What a run adds: metrics.json, and a trace.json of the same form as the predicted one."""
    plan = write_planned(folder)
    (folder / "trace.json").write_text((folder / "predicted_trace.json").read_text())
    stages = []
    for index, stage in enumerate(plan.stages):
        memory = stage.memory_bytes.by_part()
        stages.append(
            {
                "stage": index,
                "device": stage.device,
                "seconds": {"prefill": 0.1, "decode": 0.2, "sample": 0.01, "wait_tokens": 0.05},
                "passes": {"prefill": 2, "decode": 5, "sample": 7},
                "tokens": {},
                "memory_bytes": {
                    "predicted": memory | {"total": sum(memory.values())},
                    "measured": {"weights": memory["weights"], "kv": memory["kv"], "peak_growth": 50},
                    "budget": stage.memory_budget_bytes,
                },
                "pass_seconds": {
                    phase: {"predicted": getattr(stage, f"{phase}_seconds"), "measured": 0.05}
                    for phase in ("prefill", "decode")
                },
            }
        )
    pair = {"predicted": 0.5, "measured": 0.6, "ratio": 1.2}
    metrics = {
        "schema": 2,
        "counts": {"total": 4, "completed": 4, "failed": 0},
        "measured": {
            "startup_seconds": 1.0,
            "serving_seconds": 0.6,
            "rows": 4,
            "prompt_tokens": 16,
            "generated_tokens": 24,
            "prefill_tokens_per_second": 10.0,
            "decode_tokens_per_second": 20.0,
            "throughput_tokens_per_second": 40.0,
        },
        "predicted_against_measured": {f"{name}_seconds": pair for name in ("latency", "prefill", "decode")},
        "stages": stages,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return plan
