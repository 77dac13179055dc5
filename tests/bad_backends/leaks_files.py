"""Leaves a file open when it has not the length that is asked for."""

import os

from sound import Sound, plugin

import flexkv_core.backend as fk


class LeaksFiles(Sound):
    def read_one(self, path, place):
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return fk.Status.MISSING
        if os.fstat(file).st_size != len(place):
            return fk.Status.FAILED
        size = os.readv(file, [place])
        os.close(file)
        return fk.Status.OK if size == len(place) else fk.Status.FAILED


flexkv_backend = plugin("leaks_files", LeaksFiles)
