"""Rows that make a model's code raise, through the real command: they end as error rows, all others are served."""

import json

import pytest
from launching import Command, write_cluster, write_rows

pytestmark = pytest.mark.launcher

FIRST, LATER = 2040, 2041  # tokens that the embedding, and a layer of the second half, do not bear
# in every process of the run: torch's embedding and our block, where they are imported
SHIM = """
import importlib.machinery, sys

def embedding(module):
    whole = module.embedding
    def embed(tokens, weight, *args, **kwargs):
        if (tokens == 2040).any():
            raise ValueError("the embedding\\x1b[31m does not bear it")
        hidden = whole(tokens, weight, *args, **kwargs)
        hidden[..., 0] += 1e4 * (tokens == 2041)
        return hidden
    module.embedding = embed

def layer(module):
    whole = module.Block.forward
    def forward(self, step):
        if self.self_attn.index >= 6 and (step.hidden[..., 0] > 5e3).any():
            raise ArithmeticError("the layer does not bear it")
        return whole(self, step)
    module.Block.forward = forward

CHANGES = {"torch.nn.functional": embedding, "ds_llmpq.models.block": layer}

class Finder:
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load, change = spec.loader.exec_module, CHANGES.pop(name)
        spec.loader.exec_module = lambda module: (load(module), change(module))
        return spec

sys.meta_path.insert(0, Finder())
"""


def row(custom_id, tokens, max_tokens):
    body = {"prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    rows = [row(f"row-{k}", [100 + 7 * k + i for i in range(4 + k % 5)], 6 + k % 9) for k in range(21)]
    rows[3:3] = [row("first", [300, FIRST, 301], 12), row("later", [302, LATER, 303], 14), row("too", [FIRST] * 4, 9)]
    return write_rows(tmp_path_factory.mktemp("batch") / "rows.jsonl", rows)


def served(batch, out, stages):
    cluster = write_cluster(out.parent / f"{out.name}.yaml", {"localhost": [4096] * stages})
    sizes = ("workload.sequences=8", "planner.micro_batches.prefill=[4]", "planner.micro_batches.decode=[4]")
    exact = ("engine.dtype=float32", "quant.bits=[16]")
    done = Command(("run", f"input={batch}", f"out={out}", f"cluster_file={cluster}", *sizes, *exact)).run()
    found = {
        name: {json.loads(line)["custom_id"]: line for line in (out / f"{name}.jsonl").read_text().splitlines()}
        for name in ("results", "errors")
    }
    return done, found["results"], {name: json.loads(line)["error"] for name, line in found["errors"].items()}


@pytest.fixture(scope="module")
def expected(batch, tmp_path_factory):
    """The rows of a quiet run."""
    done, results, errors = served(batch, tmp_path_factory.mktemp("quiet") / "out", 1)
    assert (done.returncode, errors) == (0, {}), done.stderr
    return results


@pytest.mark.parametrize("stages", [1, 2])
def test_poison_costs_no_other_row(batch, expected, tmp_path, monkeypatch, stages):
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shim"))
    done, results, errors = served(batch, tmp_path / "out", stages)
    assert done.returncode == 3, done.stderr
    assert errors.keys() == {"first", "later", "too"}
    assert results == {name: line for name, line in expected.items() if name not in errors}
    assert {error["code"] for error in errors.values()} == {"execution_error"}
    for name in ("first", "too"):
        assert "stage 0, prefill: ValueError: the embedding\\x1b[31m does not bear it" in errors[name]["message"]
    assert f"stage {stages - 1}, prefill: ArithmeticError" in errors["later"]["message"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["restarts"]["restarts"] == 0
