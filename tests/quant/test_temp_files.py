"""Files whose pages shall not take memory are kept off file systems that are in memory."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from ds_llmpq.errors import UserError
from ds_llmpq.quant import temp_files


@pytest.fixture
def mounted(monkeypatch, tmp_path):
    """`mounted(kinds)`: file systems by mount point, tmp_path/tmp being the system's folder; the folder chosen."""

    def chosen(kinds, tmpdir=None):
        found = [SimpleNamespace(mountpoint=str(point), fstype=kind) for point, kind in kinds.items()]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
        monkeypatch.setattr(temp_files.tempfile, "gettempdir", lambda: tmpdir or str(tmp_path / "tmp"))
        monkeypatch.setattr(temp_files, "_ON_DISK", str(tmp_path / "var"))
        monkeypatch.delenv("TMPDIR", raising=False)
        if tmpdir:
            monkeypatch.setenv("TMPDIR", tmpdir)
        temp_files.find_temp_folder.cache_clear()
        return temp_files.find_temp_folder()

    (tmp_path / "tmp").mkdir()
    (tmp_path / "var").mkdir()
    yield chosen
    temp_files.find_temp_folder.cache_clear()


def test_a_folder_in_memory_is_left_for_one_on_disk_unless_the_user_named_it(mounted, tmp_path):
    tmp, var = str(tmp_path / "tmp"), str(tmp_path / "var")
    assert mounted({"/": "ext4"}) == tmp
    assert mounted({"/": "ext4", tmp: "tmpfs"}) == var
    assert mounted({"/": "tmpfs"}) == tmp
    assert mounted({"/": "tmpfs", tmp: "xfs"}) == tmp
    assert mounted({"/": "ext4", tmp: "tmpfs", var: "ramfs"}) == tmp
    assert mounted({"/": "ext4", tmp: "tmpfs"}, tmpdir=tmp) == tmp
    assert mounted({}) == tmp


def test_a_folder_that_is_not_there_counts_as_the_one_above_it():
    assert temp_files.in_memory("/nowhere/at/all") == temp_files.in_memory("/")


def test_a_folder_without_room_is_named(mounted, tmp_path):
    pytest.importorskip("openvino")
    from ds_llmpq.quant.kernels.openvino_graph import constants

    mounted({"/": "ext4"}, tmpdir=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone has no room for .* set TMPDIR to a folder with room"):
        constants.hold_plain(torch.zeros(8, 8).bfloat16())
