"""Crashes on blocks of more than a MiB."""

import os

from sound import Sound, plugin


class DiesOnLarge(Sound):
    def write_one(self, path, place):
        if len(place) > 1 << 20:
            os.abort()
        return super().write_one(path, place)


flexkv_backend = plugin("dies_on_large", DiesOnLarge)
