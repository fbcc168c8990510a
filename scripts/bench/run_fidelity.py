"""Predicted against measured latency of whole runs of random plans on heterogeneous CPU stages, and of their ranking.

    ds-llmpq profile model.path=MODEL workload=demo cluster=local_heterogeneous3 out=PROFILE
    python scripts/bench/run_fidelity.py MODEL PROFILE OUT [--cluster local_heterogeneous3] [--plans 12] [--waves 5]

Plans differ in the devices used and their order, in cuts, widths and micro-batches. Each runs under the real launcher
on waves of equal rows; the median of all but the first counts, each from the first stage's first pass to the last
stage's last token.
OUT keeps every run; one that is already there is not run again, so that an interrupted series goes on.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

from ds_llmpq.planner.simulation import simulate_plan
from scipy.stats import kendalltau

from ds_llmpq import config
from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.cost.fitted import profiled_kernel
from ds_llmpq.models.fingerprint import fingerprint
from ds_llmpq.models.shape import read_shape
from ds_llmpq.plan import Assignment, Plan, PlannedModel, SolverReport, StageAssignment, read_plan, write_plan
from ds_llmpq.planner import Problem, evaluate
from ds_llmpq.planner.build import prepare
from ds_llmpq.planner.cost_source import load_profile_costs
from ds_llmpq.planner.deploy import compose_plan, deploy
from ds_llmpq.quant.kernels.registry import find_kernel
from ds_llmpq.report.fidelity import TimePair, format_errors, scatter, verdict
from ds_llmpq.report.plan_table import format_bits, format_table

ROOM = 8 << 30  # budgets are not what is measured here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "profile", "out"):
        parser.add_argument(name)
    parser.add_argument("--cluster", default="local_heterogeneous3")
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--waves", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="of `ds-llmpq plan`, e.g. workload.generated_tokens=32")
    options = parser.parse_args()
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings, cluster, prepared = planning(options)
    requests = write_requests(out / "requests.jsonl", prepared.problem.workload, options.waves)
    rows = []
    for index, assignment in enumerate(random_assignments(prepared.problem, options.plans, options.seed)):
        folder = out / f"plan{index:02}"
        prediction = evaluate(prepared.problem, assignment)
        simulated = simulate_plan(prepared.problem, assignment)
        if not (folder / "metrics.json").is_file():
            run(plan_of(prepared, cluster, assignment, prediction, settings, options.model), folder, requests)
        rows.append(
            (assignment, prediction.latency_seconds, simulated.latency_seconds, measured_seconds(folder, options.waves))
        )
        print(describe(*rows[-1]), flush=True)
    report(rows, out)
    pairs = [pair for folder in sorted(out.glob("plan??")) for pair in pass_pairs(folder)]
    text = f"{format_errors(pairs)}\n{verdict(pairs, 'single passes (lower quartile of each stage)')}"
    print(text)
    (out / "passes.txt").write_text(text + "\n")
    scatter(pairs, out / "passes.png", "Passes of stages: plan against the lower quartile of a run's")


def planning(options):
    chosen = [f"cluster={options.cluster}", "workload=demo", f"model.path={options.model}", "quant.optimize=false"]
    composed = config.compose_settings("plan", [*chosen, f"planner.profile={options.profile}", *options.overrides])
    settings = config.to_object(composed, config.COMMANDS["plan"])
    for host in settings.cluster.hosts:
        for device in host.devices:
            device.memory_bytes = ROOM
    cluster, shape = Cluster.from_config(settings.cluster), read_shape(options.model)
    kernel = profiled_kernel(options.profile)
    settings.quant.kernel = kernel
    make_costs, cluster = load_profile_costs(
        settings.planner, settings.quant, cluster, shape, settings.engine.dtype, find_kernel(kernel)
    )  # fmt: skip
    prepared = prepare(cluster, shape, settings.workload, settings.quant, settings.planner, make_costs=make_costs)
    return settings, cluster, prepared


def random_assignments(problem: Problem, count: int, seed: int) -> list[Assignment]:
    """One to all devices in any order, cuts anywhere, one or two widths a stage, micro-batches of the candidates."""
    generator = random.Random(seed)
    found = []
    while len(found) < count:
        stages = generator.choice([2, 3, 3]) if len(problem.devices) > 2 else generator.choice([1, 2, 2])
        devices = generator.sample([device.name for device in problem.devices], stages)
        cuts = [0, *sorted(generator.sample(range(1, problem.layers), stages - 1)), problem.layers]
        parts = []
        for device, first, last in zip(devices, cuts, cuts[1:], strict=False):
            widths = sorted(generator.choices(problem.bits, k=2))
            turn = generator.randint(0, last - first)
            parts.append(
                StageAssignment(device, first, last, (widths[0],) * turn + (widths[1],) * (last - first - turn))
            )
        eta, xi = generator.choice(problem.micro_batches.prefill), generator.choice(problem.micro_batches.decode[1:])
        found.append(Assignment(tuple(parts), eta, xi))
    return found


def plan_of(prepared, cluster, assignment, prediction, settings, model) -> Plan:
    report = SolverReport("by hand", prediction.latency_seconds, None, None, 0.0, "checked")
    plan = compose_plan(prepared.problem, assignment, prediction, report)
    shape = read_shape(model)
    described = PlannedModel(str(Path(model).absolute()), shape.architecture, fingerprint(model))
    plan = deploy(plan, cluster, prepared, described, settings.quant, settings.quant.kernel)
    return replace(plan, baselines={})


def write_requests(file: Path, workload, waves: int) -> Path:
    """Waves of rows with exactly the workload's lengths."""
    rows = []
    for index in range(waves * workload.sequences):
        prompt = [(7 * index + 3 * place) % 97 + 3 for place in range(workload.prompt_tokens)]
        body = {"model": "m", "prompt": prompt, "max_tokens": workload.generated_tokens, "ignore_eos": True}
        rows.append({"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(plan: Plan, folder: Path, requests: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    write_plan(file, plan)
    line = [sys.executable, "-m", "ds_llmpq", "run", f"plan={file}", f"input={requests}", f"out={folder}"]
    line.append("engine.refill=false")  # so that the waves are apart
    with (folder.with_suffix(".log")).open("w") as log:
        subprocess.run([*line, f"model.path={plan.model_path}"], check=True, stdout=log, stderr=log)


def measured_seconds(folder: Path, waves: int) -> float:
    """Median over the waves but the first: first stage's first prefill pass to the last stage's last token."""
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    passes = sorted(event["ts"] for event in events if event["name"] == "prefill" and event["pid"] == 0)
    starts = [*passes[:: len(passes) // waves], float("inf")]
    last = max(event["pid"] for event in events)
    ends = [event["ts"] + event["dur"] for event in events if event["pid"] == last and event["name"] == "sample"]
    seconds = [max(end for end in ends if end < later) - start for start, later in itertools.pairwise(starts)]
    return median(seconds[1:]) / 1e6


def pass_pairs(folder: Path) -> list[TimePair]:
    """Each stage's planned pass beside the lower quartile of its passes in the trace: what other programs on the
    machine add to some passes does not move it. A last stage's sampling counts; time between spans is not in it."""
    plan = read_plan(folder.with_suffix(".json"))
    spans = defaultdict(list)
    for event in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        spans[event["pid"], event["name"]].append(event.get("dur", 0.0) / 1e6)  # a stage's name has none
    pairs = []
    for index, stage in enumerate(plan.stages):
        sampling = lower_quartile(spans.get((index, "sample"), [0.0]))
        bits = "/".join(map(str, sorted(set(stage.bits))))
        for phase in ("prefill", "decode"):
            measured = lower_quartile(spans[index, phase]) + sampling
            pairs.append(TimePair(stage.device_type, phase, bits, getattr(stage, f"{phase}_seconds"), measured))
    return pairs


def lower_quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


def describe(assignment: Assignment, formula: float, simulated: float, measured: float) -> str:
    stages = " | ".join(f"{stage.device} {format_bits(stage.bits)}" for stage in assignment.stages)
    return (
        f"{formula:.3f} s by formula, {simulated:.3f} s simulated, {measured:.3f} s measured "
        f"({formula / measured - 1:+.1%}, {simulated / measured - 1:+.1%}): {stages}, micro-batches "
        f"{assignment.prefill_micro_batch} and {assignment.decode_micro_batch}"
    )


def report(rows, out: Path) -> None:
    measured = [row[3] for row in rows]
    lines = []
    for name, column in (("formula", 1), ("simulation", 2)):
        predicted = [row[column] for row in rows]
        errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
        tau = kendalltau(predicted, measured).statistic
        lines.append([name, str(len(rows)), f"{median(errors):.1%}", f"{max(errors):.1%}", f"{tau:.3f}"])
    text = format_table(["prediction", "plans", "median error", "worst error", "Kendall tau"], lines)
    print(text)
    (out / "summary.txt").write_text("\n".join([*(describe(*row) for row in rows), text]) + "\n")


if __name__ == "__main__":
    main()
