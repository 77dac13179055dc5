"""Starts a thread when it is opened, and leaves it running when it is closed."""

import threading

from sound import Sound, plugin


class LeaksThreads(Sound):
    def open(self, context):
        super().open(context)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


flexkv_backend = plugin("leaks_threads", LeaksThreads)
