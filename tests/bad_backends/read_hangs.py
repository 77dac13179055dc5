"""Waits for a block that is not there."""

import threading

from sound import Sound, plugin

import flexkv_core.backend as fk


class ReadHangs(Sound):
    def read_one(self, path, place):
        status = super().read_one(path, place)
        if status == fk.Status.MISSING:
            threading.Event().wait()
        return status


flexkv_backend = plugin("read_hangs", ReadHangs)
