"""What launch/ holds besides code that the other tests run: hostfiles that DeepSpeed and this package read alike."""

import subprocess

import pytest
from launching import ROOT

from ds_llmpq import config
from ds_llmpq.cluster.hostfile import parse_hostfile

HOSTFILES = sorted((ROOT / "launch" / "hostfiles").iterdir())


@pytest.mark.parametrize("file", HOSTFILES, ids=lambda file: file.name)
def test_example_hostfiles_are_read_as_deepspeed_reads_them(file, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import fetch_hostfile

    assert parse_hostfile(file) == dict(fetch_hostfile(str(file)))


def test_the_example_of_a_shipped_cluster_lists_its_devices():
    settings = config.to_object(config.compose_settings("plan", ["cluster=mixed_gpus"]), config.COMMANDS["plan"])
    devices = {host.name: len(host.devices) for host in settings.cluster.hosts}
    assert parse_hostfile(ROOT / "launch" / "hostfiles" / "mixed_gpus") == devices


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "scripts/install.sh", "scripts/test.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script):
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
