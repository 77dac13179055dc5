"""Deletes a key in all groups."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class DeleteTooMuch(Sound):
    def delete(self, batch):
        for path, _ in self.blocks(batch):
            for each in self.root.glob(f"{path.name.split('.')[0]}.*"):
                each.unlink(missing_ok=True)
        return [fk.Status.OK] * len(batch)


flexkv_backend = plugin("delete_too_much", DeleteTooMuch)
