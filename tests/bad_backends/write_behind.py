"""Answers OK when the bytes are in a queue in memory; reads look there too, so nobody notices before a kill."""

import queue
import threading

from sound import Sound, plugin

import flexkv_core.backend as fk


class WriteBehind(Sound):
    def open(self, context):
        super().open(context)
        self.queued, self.waiting = queue.Queue(), {}
        self.thread = threading.Thread(target=self.drain, daemon=True)
        self.thread.start()

    def drain(self):
        while (path := self.queued.get()) is not None:
            super().write_one(path, memoryview(self.waiting[path]))
            self.waiting.pop(path, None)

    def write_one(self, path, place):
        self.waiting[path] = bytes(place)
        self.queued.put(path)
        return fk.Status.OK

    def settle(self):
        while self.waiting:
            threading.Event().wait(0.001)

    def read(self, batch):
        self.settle()
        return super().read(batch)

    def delete(self, batch):
        self.settle()
        return super().delete(batch)

    def probe(self, batch):
        self.settle()
        return super().probe(batch)

    def list(self):
        self.settle()
        return super().list()

    def close(self):
        self.queued.put(None)
        self.thread.join()
        super().close()


flexkv_backend = plugin("write_behind", WriteBehind)
