"""Streams that do nothing but note what is asked of them, in the place of a GPU's."""

import contextlib


class RecordedStreams:
    """`log`: what is asked, with the stream it is asked in."""

    def __init__(self):
        self.log, self.stream, self.marks = [], "main", 0

    @contextlib.contextmanager
    def beside(self):
        self.stream = "side"
        yield
        self.stream = "main"

    def mark(self):
        self.marks += 1
        self.log.append(("mark", self.stream, self.marks))
        return RecordedMark(self, self.marks)

    def wait(self, mark):
        self.log.append(("wait", self.stream, mark.number))

    def lend(self, tensor):
        self.log.append(("lend", self.stream))


class RecordedMark:
    def __init__(self, streams, number):
        self.streams, self.number = streams, number

    def synchronize(self):
        self.streams.log.append(("host waits", self.streams.stream, self.number))
