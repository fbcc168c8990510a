"""Reading ahead: the same tensors, in buffers that are written again only after the copy before is done."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.models.read_ahead import ReadAhead, drop_pages, will_need
from scripts.make_checkpoint import make_checkpoint
from tests.recorded_streams import RecordedStreams

CPU = torch.device("cpu")


def read_from(tensors):
    return lambda names: ((name, tensors[name]) for name in names)


def upload_to_host(read, streams):
    """Copies as for a GPU, into memory of the host."""
    ahead = ReadAhead(read, CPU, streams)
    ahead._uploads = True
    return ahead


def test_pieces_give_the_tensor_and_a_buffer_is_reused_only_after_its_copy():
    streams = RecordedStreams()
    ahead = ReadAhead(read_from({}), CPU, streams, buffer_bytes=64)
    tensor = torch.arange(250, dtype=torch.float32).bfloat16().view(10, 25)  # 500 bytes: eight pieces
    copy, mark = ahead.upload(tensor)
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    assert mark.number == 9
    # the third piece takes the first buffer, after the first copy, and so on
    assert [entry[2] for entry in streams.log if entry[0] == "host waits"] == [1, 2, 3, 4, 5, 6]
    assert {entry[1] for entry in streams.log} == {"side"}


def test_a_tensor_that_was_expected_is_waited_for_and_lent_on_the_main_stream():
    streams = RecordedStreams()
    tensors = {"a": torch.randn(3, 5)}
    ahead = upload_to_host(read_from(tensors), streams)
    ahead.expect(["a"])
    ahead.expect(["a"])  # a second time changes nothing
    found = ahead.take("a")
    assert torch.equal(found, tensors["a"])
    assert found.data_ptr() != tensors["a"].data_ptr()
    assert streams.log[-2:] == [("wait", "main", 2), ("lend", "main")]
    assert ahead.take("a") is None
    ahead.close()


def test_what_cannot_be_read_ahead_is_left_to_the_reader():
    def read(names):
        for name in names:
            if name == "b":
                raise OSError("damaged")
            yield name, torch.zeros(2)

    ahead = ReadAhead(read, CPU)
    ahead.expect(["a", "b", "c"])
    assert [ahead.take(name) for name in "abcd"] == [None] * 4
    ahead.close()


@pytest.mark.parametrize("count", [1, 5000])
def test_advice_on_pages_changes_no_value(tmp_path, count):
    values = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    save_file({"x": values, "y": values + 1}, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        view = file.get_tensor("x")
        will_need(view)
        assert torch.equal(view, values)
        drop_pages(view)
        assert torch.equal(view, values)
        assert torch.equal(file.get_tensor("y"), values + 1)


def test_a_checkpoint_gives_the_same_tensors_read_ahead_or_not(tmp_path):
    path = make_checkpoint(tmp_path / "model", layers=2, hidden=32, heads=2, vocab=64, tokenizer=None)
    checkpoint = Checkpoint(path)
    names = list(checkpoint.decoder.layer_tensors(1).values())
    plain = dict(checkpoint.tensors(names))
    checkpoint.read_ahead("model.layers.1.", CPU)
    for copy in (False, True):
        found = dict(checkpoint.tensors(names, copy))
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in names)
    streams = RecordedStreams()
    checkpoint._ahead = upload_to_host(checkpoint._view_tensors, streams)
    checkpoint.read_ahead("model.layers.1.", CPU)
    found = dict(checkpoint.tensors(names))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in names)
    assert sum(entry[0] == "lend" for entry in streams.log) == len(names)
    checkpoint.end_read_ahead()
