"""Keeps its index of names in memory and writes it down when it is closed: a kill loses what came since."""

from sound import Sound, plugin

import flexkv_core.backend as fk


class ForgetsLate(Sound):
    def open(self, context):
        super().open(context)
        index = self.root / "index"
        self.known = set(index.read_text().split()) if index.exists() else set()
        for path in self.root.glob("*.kv"):
            if path.name not in self.known:
                path.unlink()

    def write_one(self, path, place):
        status = super().write_one(path, place)
        if status == fk.Status.OK:
            self.known.add(path.name)
        return status

    def close(self):
        (self.root / "index").write_text("\n".join(list(self.known)))
        super().close()


flexkv_backend = plugin("forgets_late", ForgetsLate)
