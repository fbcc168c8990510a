"""The shipped demonstration input is valid and mixed, and the shipped defaults are the schema's."""

from dataclasses import asdict
from pathlib import Path

import yaml

from ds_llmpq.batch.config import BatchConfig
from ds_llmpq.batch.reader import read_requests

ROOT = Path(__file__).parents[2]


def test_demo_prompts_are_all_served():
    file = read_requests(ROOT / "launch" / "demo_prompts.jsonl", BatchConfig())
    assert (len(file.requests), file.errors) == (32, [])
    assert {request.is_chat for request in file.requests} == {True, False}
    assert {request.params.greedy for request in file.requests} == {True, False}
    assert any(request.params.stop for request in file.requests)
    assert all(16 <= request.params.max_tokens <= 64 for request in file.requests)


def test_default_yaml_is_the_schema():
    assert yaml.safe_load((ROOT / "conf" / "batch" / "default.yaml").read_text()) == asdict(BatchConfig())
