"""Answers that it has deleted."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class DeleteNothing(Sound):
    def delete(self, batch):
        return [fk.Status.OK] * len(batch)


flexkv_backend = plugin("delete_nothing", DeleteNothing)
