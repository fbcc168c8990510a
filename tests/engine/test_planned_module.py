"""A user's own PipelineModule, cut by a plan: two processes train on uneven parts as one process does on the whole."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ds_llmpq.launch.launcher import find_free_port
from ds_llmpq.plan import (
    MicroBatches,
    Plan,
    PredictedTotals,
    SolverReport,
    Stage,
    StageMemory,
    Workload,
    write_plan,
)

_MEMORY = StageMemory(1.0, 1.0, 1.0, 1.0, 1.0)
_PREDICTED = PredictedTotals(1.0, 1.0, 1.0, 1.0, 1.0)


def plan(*cuts):
    """Stages between these cuts, one a rank."""
    stages = tuple(
        Stage(rank, None, f"d{rank}", "cpu", span, (16,) * (span[1] - span[0]), None, _MEMORY, 9.0, 1.0, 1.0)
        for rank, span in enumerate(pairwise(cuts))
    )
    solver = SolverReport("search", 1.0, 1.0, 0.0, 0.1, "optimal")
    return Plan(None, Workload(4, 8, 8), stages, MicroBatches(2, 2), _PREDICTED, solver)


def test_parts_count_what_lies_around_the_decoder_layers():
    assert plan(0, 3, 5, 6).parts() == [0, 3, 5, 6]
    assert plan(0, 3, 5, 6).parts(before=1, after=2) == [0, 4, 6, 9]
    assert plan(0, 4).parts(before=1, after=1) == [0, 6]


@pytest.mark.slow
def test_a_training_step_on_uneven_parts_has_the_loss_of_the_whole_model(tmp_path):
    import torch
    from torch import nn

    from tests.engine.planned_training import SIZE, batches, weights

    file, port = tmp_path / "plan.json", find_free_port()
    write_plan(file, plan(0, 1, 4))  # of six layers, two and four
    script = Path(__file__).with_name("planned_training.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(file)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(script.parents[2]),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = []
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        lines = [line for line in out.splitlines() if line.startswith("FOUND ")]
        assert lines, err[-3000:]
        found.append(json.loads(lines[0].removeprefix("FOUND ")))
    assert [each["layers"] for each in found] == [[0, 1], [2, 3, 4, 5]]

    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(6)))
    for index, layer in enumerate(model):
        layer.load_state_dict(weights(index))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        loss = torch.stack([nn.functional.mse_loss(model(inputs), labels) for inputs, labels in batches()]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for each in found:
        assert each["losses"] == pytest.approx(losses, rel=1e-5)
