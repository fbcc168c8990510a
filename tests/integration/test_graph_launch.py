"""`ds-llmpq run` where each stage is one OpenVINO graph: all answers come, memory is as planned, mistakes are said."""

import contextlib
import importlib.util
import json

import psutil
import pytest
from launching import (
    PRECISE,
    WORKLOAD,
    Command,
    completion,
    error_sentence,
    read_rows,
    run,
    wait_for_results,
    write_cluster,
    write_rows,
)

from ds_llmpq.plan import read_plan
from ds_llmpq.quant.onednn_linear import computes_in_bfloat16

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(
        not importlib.util.find_spec("openvino") or not computes_in_bfloat16(),
        reason="needs OpenVINO, and a processor with bfloat16 arithmetic",
    ),
]
GRAPH = ("engine.dtype=bfloat16", "quant.optimize=false", "quant.bits=[4,8,16]", "quant.kernel=openvino_graph")
GRAPH += ("quant.lm_head_bits=8", "quant.zeros=real")


def test_a_run_of_two_graphs_answers_every_row(checkpoint, tmp_path):
    text = "The planner counts layers. "
    rows = [completion(f"row-{index}", text * (1 + index % 4), 3 + index) for index in range(20)]
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    cluster = write_cluster(tmp_path / "cluster.yaml", {"localhost": [65, 66]})
    out = tmp_path / "out"
    asked = (f"model.path={checkpoint}", f"cluster_file={cluster}", f"input={prompts}", f"out={out}", *WORKLOAD)
    ended = run("run", *asked, *GRAPH)
    assert ended.returncode == 0, ended.stderr
    results = read_rows(out / "results.jsonl")
    answers = {name: row["response"]["body"]["usage"]["completion_tokens"] for name, row in results.items()}
    assert answers == {f"row-{index}": 3 + index for index in range(20)}
    plan, metrics = read_plan(out / "plan.json"), json.loads((out / "metrics.json").read_text())
    assert len(plan.stages) == 2
    for stage, measured in zip(plan.stages, metrics["stages"], strict=True):
        assert stage.kernel == "openvino_graph"
        held = measured["memory_bytes"]["measured"]
        assert held["kv"] == stage.memory_bytes.kv
        parts = [getattr(stage.memory_bytes, part) for part in ("weights", "embed", "head")]
        assert held["weights"] == sum(parts)
    assert plan.quant.lm_head_bits == 8
    again = run("run", *asked, *GRAPH, f"plan={out / 'plan.json'}", "resume=force", "engine.batch_invariant=true")
    assert again.returncode == 1
    assert "plan with quant.kernel=openvino" in error_sentence(again)


@pytest.mark.parametrize("kernel", ["openvino_graph", "dequantize"])
def test_killed_rows_that_share_a_cache_too_small_for_them_come_once_and_are_the_same(checkpoint, tmp_path, kernel):
    rows = [completion(f"row-{index}", "planner " * (1 + 7 * index % 29), 5 + 37 * index % 120) for index in range(24)]
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    cluster = write_cluster(tmp_path / "cluster.yaml", {"localhost": [60, 61]})
    asked = ("run", f"model.path={checkpoint}", f"cluster_file={cluster}", f"input={prompts}", *PRECISE)
    asked += (f"quant.kernel={kernel}", "workload.sequences=8")
    out = tmp_path / "paged"
    paged = Command((*asked, f"out={out}", "engine.kv_cache=paged", "workload.pool_positions=32"))
    with paged.start() as started:
        wait_for_results(out / "results.jsonl", started)
        for process in paged.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        started.communicate()
    for command in (paged, Command((*asked, f"out={tmp_path / 'slots'}"))):
        ended = command.run()
        assert ended.returncode == 0, ended.stderr
    found, expected = (
        {name: row["response"]["body"]["choices"] for name, row in read_rows(folder / "results.jsonl").items()}
        for folder in (out, tmp_path / "slots")
    )
    assert len(found) == 24
    assert found == expected
    plan, metrics = read_plan(out / "plan.json"), json.loads((out / "metrics.json").read_text())
    held = plan.workload.cache_positions(plan.cache_block)
    assert held == plan.row_positions  # what one request needs; there are eight at a time
    for stage, report in zip(plan.stages, metrics["stages"], strict=True):
        assert report["memory_bytes"]["measured"]["kv"] == stage.memory_bytes.kv
