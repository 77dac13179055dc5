"""Keeps the last block that it read and compares only the first half of the key: returns another key's bytes."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class OtherKey(Sound):
    last = (b"", 0, b"")

    def read(self, batch):
        statuses = []
        for key, group, (path, place) in zip(batch.keys, batch.groups, self.blocks(batch), strict=True):
            half, kept_group, kept = (*self.last,)
            if key.tobytes()[:16] == half and int(group) == kept_group and len(kept) == len(place):
                place[:] = kept
                statuses.append(fk.Status.OK)
                continue
            statuses.append(self.read_one(path, place))
            if statuses[-1] == fk.Status.OK:
                self.last = (key.tobytes()[:16], int(group), bytes(place))
        return statuses


flexkv_backend = plugin("other_key", OtherKey)
