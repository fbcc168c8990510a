"""Channels over real gloo connections between threads of this process."""

import threading
import time
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ds_llmpq.cost.memory import IN_FLIGHT_MESSAGES
from ds_llmpq.engine import channels
from ds_llmpq.engine.channels import ActivationChannel, TokenChannel
from ds_llmpq.scheduler.micro_batch import MicroBatch
from tests.recorded_streams import RecordedStreams

PATIENCE_SECONDS = 20.0


def micro_batch(number, rows):
    return MicroBatch(number, "prefill", tuple(range(rows)), tuple(range(rows)))


class Gloo:
    """What the channels use of torch.distributed, for ranks that are threads: `group` is the rank's own connection."""

    Work = dist.Work
    ProcessGroup = dist.ProcessGroup
    default: dist.ProcessGroup | None = None

    @classmethod
    def isend(cls, message, dst, group=None):
        return (group or cls.default).send([message], dst, 0)

    @classmethod
    def irecv(cls, buffer, src, group=None):
        return (group or cls.default).recv([buffer], src, 0)


@pytest.fixture
def pair(monkeypatch):
    """Two connected gloo groups, of ranks 0 and 1."""
    store, groups = dist.HashStore(), [None, None]

    def connect(rank):
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=PATIENCE_SECONDS)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, options)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(channels, "dist", Gloo)
    return groups


def eventually(condition):
    limit = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_tokens_that_have_come_are_seen_without_waiting(pair):
    last = TokenChannel(pair[1], source=1, others=[0])
    first = TokenChannel(pair[0], source=1, others=[])
    batches = [micro_batch(0, 2), micro_batch(1, 3)]
    for batch in batches:
        first.post_receive(batch)
    assert first.receive(wait=False) is None
    last.send(torch.tensor([5, 6]), torch.tensor([0, 1]))
    taken = []
    eventually(lambda: taken.append(first.receive(wait=False)) or taken[-1])
    assert taken[-1] == (batches[0], [5, 6], [0, 1])
    assert first.receive(wait=False) is None
    last.send(torch.tensor([7, 8, 9]), torch.tensor([2, 0, 3]))
    assert first.receive(wait=True) == (batches[1], [7, 8, 9], [2, 0, 3])
    assert first.receive(wait=True) is None, "nothing more was expected"
    last.flush()
    first.flush()
    assert "tokens" not in {thread.name for thread in threading.enumerate()}
    first.post_receive(batches[0])  # a further group
    last.send(torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert first.receive(wait=True) == (batches[0], [1, 2], [0, 0])
    first.flush()
    last.flush()


def test_a_lost_connection_is_said_where_tokens_are_taken(monkeypatch):
    class Broken:
        def wait(self):
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(channels, "dist", types.SimpleNamespace(irecv=lambda *args, **kwargs: Broken()))
    channel = TokenChannel(None, source=1, others=[])
    channel.post_receive(micro_batch(0, 1))
    with pytest.raises(RuntimeError, match="Connection closed"):
        channel.receive(wait=True)


def test_hidden_states_arrive_as_posted(pair, monkeypatch):
    monkeypatch.setattr(Gloo, "default", pair[0])
    sender = ActivationChannel(None, 1, torch.float32, torch.device("cpu"))
    receiver = ActivationChannel(0, None, torch.float32, torch.device("cpu"))
    sent = [torch.randn(2, 3, 4), torch.randn(3, 1, 4).transpose(0, 1)]
    for hidden in sent:
        sender.send(hidden)
    monkeypatch.setattr(Gloo, "default", pair[1])
    batches = [micro_batch(0, 2), micro_batch(1, 3)]
    for batch, hidden in zip(batches, sent, strict=True):
        receiver.post_receive(batch, tuple(hidden.shape))
        receiver.post_receive(batch, tuple(hidden.shape))  # a second time changes nothing
    for batch, hidden in zip(batches, sent, strict=True):
        assert torch.equal(receiver.wait(batch), hidden)
    sender.flush()


class Sent:
    """A send as gloo has it: complete only once waited for."""

    def __init__(self, log, message):
        self.log, self.message = log, message
        log.append(("send", message))

    def is_completed(self):
        return False

    def wait(self):
        self.log.append(("wait", self.message))


def test_no_more_messages_are_under_way_than_the_cost_model_reserves(monkeypatch):
    log = []
    fake = types.SimpleNamespace(isend=lambda message, dst, group: Sent(log, int(message)))
    monkeypatch.setattr(channels, "dist", fake)
    channel = ActivationChannel(None, 1, torch.float32, torch.device("cpu"))
    for index in range(10):
        channel.send(torch.tensor(index))
    under_way = 0
    for kind, _ in log:
        under_way += 1 if kind == "send" else -1
        assert under_way <= IN_FLIGHT_MESSAGES
    # the room for a message is made before it is sent: whoever waits for its answer must already have asked for it
    assert log[IN_FLIGHT_MESSAGES : IN_FLIGHT_MESSAGES + 2] == [("wait", 0), ("send", IN_FLIGHT_MESSAGES)]
    channel.flush()
    assert [message for kind, message in log if kind == "wait"] == list(range(10))


class Transfer:
    """A transfer as nccl has it: its wait holds up the current stream, and comes back at once."""

    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def wait(self):
        self.streams.log.append(("await", self.streams.stream, self.name))


def test_transfers_hold_up_no_stream_that_need_not_wait(monkeypatch):
    """Receives are asked for beside the main stream, which waits for them alone; what is sent is computed by the main
    stream, and that it has gone is waited for by the host."""
    streams = RecordedStreams()

    def irecv(buffer, src, group):
        streams.log.append(("receive", streams.stream, group))
        return Transfer(streams, "received")

    def isend(message, dst, group):
        streams.log.append(("send", streams.stream, group))
        return Transfer(streams, "sent")

    monkeypatch.setattr(channels, "dist", types.SimpleNamespace(irecv=irecv, isend=isend))
    channel = ActivationChannel(0, 2, torch.float32, torch.device("cpu"), ("from 0", "to 2"), streams)
    batch = micro_batch(0, 2)
    channel.post_receive(batch, (2, 1, 4))
    hidden = channel.wait(batch)
    for _ in range(IN_FLIGHT_MESSAGES + 1):
        channel.send(hidden)
    send = ("send", "main", "to 2")
    assert streams.log == [
        ("receive", "side", "from 0"), ("await", "main", "received"), ("lend", "main"),
        *[send] * IN_FLIGHT_MESSAGES,
        ("await", "side", "sent"), ("mark", "side", 1), ("host waits", "side", 1), send,
    ]  # fmt: skip
