"""A tier in Redis: a block is a string, named by prefix, key and group."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import redis
from pydantic import Field
from redis.backoff import NoBackoff
from redis.retry import Retry

import flexkv_core.backend as fk


class RedisConfig(fk.BackendConfig):
    url: str = "redis://127.0.0.1:6379/0"
    prefix: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "flexkv"  # a cache of its own within the database
    timeout: float = 2.0  # seconds for a connection, and for each answer


class RedisBackend(fk.Backend):
    capabilities = fk.Capabilities(addressing="key", persistent=True, concurrency=4, max_batch_blocks=64)

    def __init__(self, config: RedisConfig) -> None:
        self.config, self.prefix = config, f"{config.prefix}:".encode()

    def open(self, context: fk.OpenContext) -> None:
        self.host, self.log, wait = context.host, context.logger, self.config.timeout
        once = Retry(NoBackoff(), 0)  # redis-py's default tries a dead server for seconds
        options: dict[str, Any] = {"socket_timeout": wait, "socket_connect_timeout": wait, "retry": once}
        self.redis = redis.Redis.from_url(self.config.url, **options)
        self.redis.ping()

    def read(self, batch: fk.Batch) -> Sequence[fk.Status]:
        values = self.redis.mget([name for name, _ in self._blocks(batch)])
        return [self._take(value, place) for value, (_, place) in zip(values, self._blocks(batch), strict=True)]

    def write(self, batch: fk.Batch) -> Sequence[fk.Status]:
        answers = self._each("SET", self._blocks(batch))  # a full server answers an error: maxmemory, noeviction
        return [fk.Status.OK if answer in (True, b"OK") else fk.Status.FAILED for answer in answers]

    def close(self) -> None:
        self.redis.close()

    def probe(self, batch: fk.Batch) -> int:
        return [*self._each("EXISTS", ((name,) for name, _ in self._blocks(batch))), 0].index(0)

    def delete(self, batch: fk.Batch) -> Sequence[fk.Status]:
        self.redis.unlink(*(name for name, _ in self._blocks(batch)))
        return [fk.Status.OK] * len(batch)

    def list(self) -> Iterator[fk.Listing]:
        names = [*set(self.redis.scan_iter(self.prefix + b"*", count=1000))]  # a scan may return a name twice
        lengths = self._each("STRLEN", ((name,) for name in names))
        tails = [name[len(self.prefix) :] for name in names]
        yield fk.listing(b"".join(tail[:32] for tail in tails), [tail[32] for tail in tails], lengths)

    def _blocks(self, batch: fk.Batch) -> Iterator[tuple[bytes, memoryview]]:
        for key, group, start, length in zip(batch.keys, batch.groups, batch.offsets, batch.lengths, strict=True):
            yield self.prefix + key.tobytes() + group.tobytes(), self.host[start : start + length]

    def _each(self, command: str, arguments: Iterator[tuple[Any, ...]]) -> Sequence[Any]:
        with self.redis.pipeline(transaction=False) as pipe:
            for each in arguments:
                pipe.execute_command(command, *each)
            return pipe.execute(raise_on_error=command != "SET")

    def _take(self, value: bytes | None, place: memoryview) -> fk.Status:
        if value is None or len(value) != len(place):
            return fk.Status.MISSING if value is None else fk.Status.FAILED
        place[:] = value
        return fk.Status.OK


@fk.hookimpl
def flexkv_backend() -> fk.BackendSpec:
    return fk.BackendSpec("redis", RedisConfig, RedisBackend, contract_version=1, addressing="key")
