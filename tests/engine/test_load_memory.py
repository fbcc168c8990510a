"""A rank's resident memory while it loads: near its share, whatever the checkpoint's size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# what Python, torch, transformers and DeepSpeed hold, and the tensors in flight; 0.46 GB and 0.1 to 0.2 GB measured
OVERHEAD_BYTES = 800_000_000


def run_ranks(path: Path, *options: str) -> list[dict]:
    script = ROOT / "scripts" / "bench" / "load_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path), *options], check=True, capture_output=True, text=True
    )
    decoder, text, found = json.JSONDecoder(), done.stdout, []
    while text := text.strip():  # two processes write: their lines may meet
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return sorted(found, key=lambda rank: rank["rank"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """850 MB in five shards: loaded whole, both ranks would be far above their bounds."""
    from scripts.make_checkpoint import make_checkpoint

    size = {"layers": 20, "hidden": 1280, "heads": 20, "kv_heads": 4, "intermediate": 3584, "vocab": 32000}
    path = make_checkpoint(tmp_path_factory.mktemp("large"), tokenizer=None, shard_size="200MB", **size)
    yield path
    for file in path.glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_peak_is_near_the_share(checkpoint, bits):
    whole = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    ranks = run_ranks(checkpoint, "--cut", "5", "--bits", str(bits))
    assert [rank["layers"] for rank in ranks] == [[0, 5], [5, 20]]
    for rank in ranks:
        assert rank["held_bytes"] == rank["share_bytes"] < whole
        assert rank["peak_bytes"] < rank["share_bytes"] + OVERHEAD_BYTES, rank
    assert ranks[0]["peak_bytes"] < whole, "the first rank, with a quarter of the layers, has read them all"


def test_the_peak_is_this_process_s_own():
    """Not that of the process that started it, which the kernel's resource usage would count in."""
    child = "import torch; from ds_llmpq.engine.device_memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    parent = (
        "import subprocess, sys\n"
        "held = b'x' * 1_000_000_000\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], check=True, capture_output=True, text=True).stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True, cwd=ROOT)
    assert 50e6 < int(done.stdout) < 0.8e9
