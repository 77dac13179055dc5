"""Slots: seeks and then writes, on one descriptor that all threads share."""

import os

from sound import plugin
from sound_slots import SoundSlots

import flexkv_core.backend as fk


class SlotSeeks(SoundSlots):
    def read_one(self, place, slot):
        os.lseek(self.data, slot * fk.PAGE, os.SEEK_SET)
        return fk.Status.OK if os.readv(self.data, [place]) == len(place) else fk.Status.FAILED


flexkv_backend = plugin("slot_seeks", SlotSeeks, "slot")
