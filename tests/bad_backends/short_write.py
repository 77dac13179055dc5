"""Does not look at how much the kernel took."""

from sound import Sound, plugin


class ShortWrite(Sound):
    def put(self, file, place):
        file.write(place)


flexkv_backend = plugin("short_write", ShortWrite)
