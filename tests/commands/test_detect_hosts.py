"""`detect hostfile=` with a stand-in for ssh on the PATH, and `merge` of real files."""

import os
import socket

import pytest
import yaml

from ds_llmpq.cluster.cluster import Cluster
from ds_llmpq.config import read_cluster

# What ssh does, less the network: the other side's shell reads the last argument. Hosts answer by their names.
SSH = """#!/bin/sh
echo "$@" >> {folder}/asked
for word; do command=$word; done
case "$*" in
  *"-- away "*) echo "ssh: connect to host away port 22: No route to host" >&2; exit 255;;
  *"-- bare "*) echo "/usr/bin/python3: No module named ds_llmpq" >&2; exit 1;;
  *"-- slow "*) exec sleep 60;;
  *"-- odd "*) echo "Welcome!"; echo "no answer"; exit 0;;
esac
echo "Last login: today"
exec sh -c "$command"
"""
SMI = """#!/bin/sh
[ -e {folder}/gpus ] || exit 9
echo "0, 00000000:01:00.0, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9"
echo "1, 00000000:02:00.0, NVIDIA GeForce RTX 4090, 24564, 24000, 8.9"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in (("ssh", SSH), ("nvidia-smi", SMI)):
        (bin / name).write_text(text.format(folder=tmp_path))
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return tmp_path


def detect(call, folder, text, *more):
    (folder / "hostfile").write_text(text)
    return call("detect", f"hostfile={folder / 'hostfile'}", f"out={folder / 'out'}", "measure=false", *more)


def test_hosts_of_a_hostfile_are_asked_and_joined(call, folder):
    code, shown, _ = detect(call, folder, f"{socket.gethostname()} slots=1\none slots=1\ntwo slots=1\n")
    assert code == 0
    cluster = Cluster.from_config(read_cluster(folder / "out" / "cluster.yaml"))
    assert [device.name for device in cluster.devices] == [f"{socket.gethostname()}:0", "one:0", "two:0"]
    assert "two:0" in shown
    asked = (folder / "asked").read_text().splitlines()
    assert len(asked) == 2, "this host needs no ssh"
    assert all(line.startswith("-o BatchMode=yes -o ConnectTimeout=5 -- ") for line in asked)


@pytest.mark.parametrize(("name", "notes"), [("NVIDIA L4", 0), ("NVIDIA GeForce RTX 7777", 1)])
def test_rates_that_are_assumed_have_a_line_of_their_own(call, tmp_path, name, notes):
    (saved := tmp_path / "gpus.csv").write_text(f"0, 00000000:01:00.0, {name}, 24564, 24000, 8.9\n")
    code, _, err = call("detect", f"gpus={saved}", "host=box", f"out={tmp_path / 'out'}")
    assert code == 0
    assert err.count(f"assumed: {name} is not a known type, so the rates are those of t4") == notes


def test_a_host_offers_as_many_gpus_as_it_has_slots(call, folder):
    (folder / "gpus").touch()
    assert detect(call, folder, "one slots=2\ntwo slots=1\n")[0] == 0
    cluster = Cluster.from_config(read_cluster(folder / "out" / "cluster.yaml"))
    assert [(device.name, device.type.name) for device in cluster.devices] == [
        ("one:0", "rtx_4090"),
        ("one:1", "rtx_4090"),
        ("two:0", "rtx_4090"),
    ]
    code, _, said = detect(call, folder, "one slots=3\n")
    assert (code, "one: it has 2 GPUs, fewer than its 3 slots" in said) == (1, True)


def test_every_host_that_gives_no_answer_is_named_with_its_reason(call, folder):
    hosts = "one slots=1\naway slots=1\nbare slots=1\nslow slots=1\nodd slots=1\n"
    code, _, said = detect(call, folder, hosts, "timeout_seconds=20")
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith("error: 4 of 5 hosts gave no answer (away: ssh cannot reach it (ssh: connect to host away")
    assert "bare: /usr/bin/python3: No module named ds_llmpq; slow: nothing within 20 s; odd: what it printed" in said
    assert not (folder / "out" / "cluster.yaml").exists()


@pytest.mark.parametrize("key", ["cpu_stages=2", "host=a", "gpus=x.csv"])
def test_a_hostfile_says_all_there_is_to_say(call, folder, key):
    code, _, said = detect(call, folder, "one slots=1\n", key)
    assert (code, "hostfile=FILE names hosts" in said) == (1, True)


def write_host(file, name, intra, source="datasheet: x"):
    kind = {"kind": "cuda", "memory_bytes": 1 << 34, "memory_bandwidth_bytes_per_second": 1e11,
            "flops_per_second": {"float16": 1e13}, "source": source}  # fmt: skip
    link = {"latency_seconds": 1e-5, "bandwidth_bytes_per_second": intra}
    devices = [{"type": "card", "slot": 0}, {"type": "card", "slot": 1}]
    file.write_text(
        yaml.safe_dump(
            {
                "name": name,
                "device_types": {"card": kind},
                "hosts": [{"name": name, "devices": devices}],
                "links": {"intra_host": link, "inter_host": link},
            }
        )
    )
    return file


def test_files_are_merged_with_their_own_rates_and_links(call, tmp_path):
    one = write_host(tmp_path / "one, of two.yaml", "a", 1e10)
    two = write_host(tmp_path / "two.yaml", "b", 5e10, "measured: there")
    code, _, said = call("merge", str(one), str(two), f"out={tmp_path / 'all'}")
    assert (code, said) == (0, "")
    cluster = Cluster.from_config(read_cluster(tmp_path / "all" / "cluster.yaml"))
    assert [device.type.name for device in cluster.devices] == ["card", "card", "card_b", "card_b"]
    assert cluster.link("a:0", "a:1").bandwidth_bytes_per_second == 1e10
    assert cluster.link("b:1", "b:0").bandwidth_bytes_per_second == 5e10
    assert cluster.link("a:0", "b:0").bandwidth_bytes_per_second == 1e10
    code, _, said = call("merge", str(one), str(one), f"out={tmp_path / 'all'}")
    assert (code, "host a is in two of the files" in said) == (1, True)


def test_merge_says_what_is_wrong_with_a_file(call, tmp_path):
    assert "nothing to merge" in call("merge", f"out={tmp_path}")[2]
    assert "cannot be read" in call("merge", str(tmp_path / "gone.yaml"), f"out={tmp_path}")[2]
    (tmp_path / "empty.yaml").write_text("name: x\n")
    assert "has no devices" in call("merge", str(tmp_path / "empty.yaml"), f"out={tmp_path}")[2]
