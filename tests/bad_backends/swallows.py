"""Answers OK whatever the medium said."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class Swallows(Sound):
    def write_one(self, path, place):
        super().write_one(path, place)
        return fk.Status.OK


flexkv_backend = plugin("swallows", Swallows)
