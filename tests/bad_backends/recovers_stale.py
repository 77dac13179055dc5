"""Slots: recovers every note that it ever took, also of slots that were written again."""

from sound import plugin
from sound_slots import SoundSlots


class RecoversStale(SoundSlots):
    def kept(self, notes):
        return list(notes)


flexkv_backend = plugin("recovers_stale", RecoversStale, "slot")
