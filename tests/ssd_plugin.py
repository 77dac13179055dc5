"""A plug-in that stands for the ssd backend: slot-addressed, in memory, with the config model that flat files need."""

SSD = """
    from pathlib import Path
    from typing import Annotated, Literal
    from pydantic import Field
    import flexkv_core.backend as fk

    class Config(fk.BackendConfig):
        directories: tuple[Path, ...]
        engine: Literal["io_uring", "threads", "gds"] = "io_uring"
        queue_depth: Annotated[int, Field(ge=1)] = 128
        segment_size: Annotated[int, Field(ge=4096)] | None = None

    class Ssd(fk.Backend):
        capabilities = fk.Capabilities(addressing="slot")

        def __init__(self, config):
            self.config = config

        def open(self, context):
            self.host = context.host

        def read(self, batch):
            return [fk.Status.MISSING] * len(batch)

        def write(self, batch):
            return [fk.Status.FAILED] * len(batch)

        def close(self):
            pass

    @fk.hookimpl
    def flexkv_backend():
        return fk.BackendSpec("ssd", Config, Ssd, contract_version=1, addressing="slot")
"""
