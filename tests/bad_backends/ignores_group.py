"""Stores by key alone."""

from sound import Sound, plugin


class IgnoresGroup(Sound):
    def name(self, key, group):
        return f"{key.hex()}.0"


flexkv_backend = plugin("ignores_group", IgnoresGroup)
