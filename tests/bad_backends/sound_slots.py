"""A slot-addressed backend that is right: one file of slots, one of notes that says what lies where."""

import os
import threading

import numpy as np
from sound import plugin

import flexkv_core.backend as fk

NOTE = 64


class SoundSlots(fk.Backend):
    capabilities = fk.Capabilities(addressing="slot", persistent=True, concurrency=4, max_batch_blocks=64)

    def __init__(self, config):
        self.root = config.root

    def open(self, context):
        self.host, self.lock = context.host, fk.DirectoryLock(self.root)
        self.data = os.open(self.root / "slots", os.O_RDWR | os.O_CREAT, 0o600)
        self.notes = os.open(self.root / "notes", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.noting = threading.Lock()

    def close(self):
        data, notes, self.data, self.notes = self.data, self.notes, -1, -1
        os.close(data)
        os.close(notes)
        self.lock.release()

    def blocks(self, batch):
        rows = zip(batch.keys, batch.groups, batch.offsets, batch.lengths, batch.slots, strict=True)
        for key, group, start, size, slot in rows:
            yield key.tobytes(), int(group), self.host[start : start + size], int(slot)

    def read(self, batch):
        return [self.read_one(place, slot) for _, _, place, slot in self.blocks(batch)]

    def read_one(self, place, slot):
        return fk.Status.OK if os.preadv(self.data, [place], slot * fk.PAGE) == len(place) else fk.Status.FAILED

    def write(self, batch):
        return [self.write_one(*block) for block in self.blocks(batch)]

    def write_one(self, key, group, place, slot):
        note = np.zeros(NOTE, np.uint8)
        note[:32], note[32] = np.frombuffer(key, np.uint8), group
        note[40:56] = np.array([len(place), slot], np.int64).view(np.uint8)
        try:
            if os.pwrite(self.data, place, slot * fk.PAGE) != len(place):
                return fk.Status.FAILED
            with self.noting:
                if os.write(self.notes, note) != NOTE:
                    return fk.Status.FAILED
        except OSError:
            return fk.Status.FAILED
        return fk.Status.OK

    def kept(self, notes):
        return {int(note[48:56].view(np.int64)[0]): note for note in notes}.values()

    def recover(self):
        notes = np.fromfile(self.root / "notes", np.uint8)
        found = np.array([*self.kept(notes[: len(notes) // NOTE * NOTE].reshape(-1, NOTE))], np.uint8).reshape(-1, NOTE)
        nothing = np.zeros((len(found), 32), np.uint8)
        lengths, slots = found[:, 40:56].copy().view(np.int64).T
        yield fk.Recovered(
            nothing, found[:, :32], nothing, np.zeros(len(found), np.int64), found[:, 32], lengths, slots
        )


flexkv_backend = plugin("sound_slots", SoundSlots, "slot")
