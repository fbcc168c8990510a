"""A random checkpoint and one launched run of it, shared by the tests that look at what came of it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launching import BUDGETS, PRECISE, TEXT, WORKLOAD, completion, run, write_cluster, write_rows


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from scripts.make_checkpoint import make_checkpoint

    shape = {"layers": 6, "hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocab": 2048}
    return make_checkpoint(tmp_path_factory.mktemp("random"), "llama", **shape, seed=11)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Rows of unequal lengths, three of them bad, each in another way."""
    chat = completion("chat", "", 12)
    chat["url"] = "/v1/chat/completions"
    chat["body"] = {"model": "random", "messages": [{"role": "user", "content": "What is a stage?"}], "max_tokens": 12}
    rows = [completion(f"row-{index}", TEXT[index * 3 : index * 9 + 5], 4 + 2 * index) for index in range(9)]
    too_long = completion("too-long", "x" * 5000)
    no_prompt = completion("no-prompt", "")
    del no_prompt["body"]["prompt"]
    return write_rows(tmp_path_factory.mktemp("input") / "rows.jsonl", [*rows, "{not json", too_long, chat, no_prompt])


@pytest.fixture(scope="session")
def local_run(tmp_path_factory, checkpoint, prompts):
    """`ds-llmpq run` over two ranks of this machine: its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("local")
    cluster = write_cluster(folder / "cluster.yaml", {"localhost": list(BUDGETS)})
    out = folder / "out"
    ended = run(
        "run", f"model.path={checkpoint}", f"cluster_file={cluster}", f"input={prompts}", f"out={out}",
        *PRECISE, *WORKLOAD,
    )  # fmt: skip
    return SimpleNamespace(out=out, ended=ended)
