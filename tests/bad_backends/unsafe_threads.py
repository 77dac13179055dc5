"""Collects a block in one buffer that all threads share."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class UnsafeThreads(Sound):
    def read_one(self, path, place):
        try:
            self.buffer = path.read_bytes()
        except FileNotFoundError:
            return fk.Status.MISSING
        if len(self.buffer) != len(place):
            return fk.Status.FAILED
        place[:] = self.buffer
        return fk.Status.OK


flexkv_backend = plugin("unsafe_threads", UnsafeThreads)
