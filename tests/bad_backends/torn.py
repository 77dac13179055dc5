"""Makes the file as long as it has to be and fills it in place: a kill leaves half a block of the right length."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class Torn(Sound):
    def write_one(self, path, place):
        try:
            with path.open("wb", buffering=0) as file:
                file.truncate(len(place))
                for at in range(0, len(place), 16384):
                    self.put(file, place[at : at + 16384])
        except OSError:
            path.unlink(missing_ok=True)
            return fk.Status.FAILED
        return fk.Status.OK


flexkv_backend = plugin("torn", Torn)
