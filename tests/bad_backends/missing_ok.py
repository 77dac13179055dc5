"""Takes a file that is not there for an empty block."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class MissingOk(Sound):
    def read_one(self, path, place):
        status = super().read_one(path, place)
        return fk.Status.OK if status == fk.Status.MISSING else status


flexkv_backend = plugin("missing_ok", MissingOk)
