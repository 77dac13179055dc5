"""Takes a block off its shelf to read it."""

from sound import Sound, plugin


class ReadsOnce(Sound):
    def read_one(self, path, place):
        status = super().read_one(path, place)
        path.unlink(missing_ok=True)
        return status


flexkv_backend = plugin("reads_once", ReadsOnce)
