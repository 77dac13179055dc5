"""Waits on close for a thread that never ends."""

import threading

from sound import Sound, plugin


class CloseHangs(Sound):
    def close(self):
        threading.Event().wait()


flexkv_backend = plugin("close_hangs", CloseHangs)
