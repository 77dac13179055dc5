"""Slots: rounds a write up to 16 KiB, into the neighbour."""

import os

from sound import plugin
from sound_slots import SoundSlots

import flexkv_core.backend as fk


class SlotSpills(SoundSlots):
    def write_one(self, key, group, place, slot):
        os.pwrite(self.data, bytes(-len(place) % 16384), slot * fk.PAGE + len(place))
        return super().write_one(key, group, place, slot)


flexkv_backend = plugin("slot_spills", SlotSpills, "slot")
