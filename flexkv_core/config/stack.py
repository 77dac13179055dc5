"""The stack: what a document may say, and what it means.

Keys of a tier that the core knows are `TierKeys`; all others belong to the tier's backend and are validated by
its own pydantic model. Every error names file, line, column, key, value and the fix, and shows no secret. Files,
flat keys and variables are read in `load.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flexkv_core.backend import BackendConfig, BackendSpec
from flexkv_core.breaker import BreakerConfig
from flexkv_core.config.places import Path_, Source, is_reference, masked, show
from flexkv_core.config.secrets import is_secret_field, is_secret_name, mask_by_type
from flexkv_core.config.sizes import Capacity, Size, parse_capacity
from flexkv_core.errors import BackendLoadError, BackendNotFoundError, PolicyError
from flexkv_core.plugins import load_backend
from flexkv_core.policies import Eviction, check_policy
from flexkv_core.policies.admission import check_admission
from flexkv_core.testing.faults import FaultConfig

Model = TypeVar("Model", bound=BaseModel)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
REFERENCES_ALLOWED = frozenset({"state_directory"})
"""Keys of the core in which `${NAME}` may stand; the others are shown in figures and logs."""
NOT_FOR_THE_HOST = (
    "faults",
    "breaker",
    "in_flight",
    "isolation",
    "deadline_s",
    "write_queue",
    "state_directory",
    "probe_ttl_s",
)
"""Keys about a backend's process and queue: the host tier has neither."""
IndexName = Literal["native", "reference"]


def _known(check: Callable[[str], str]) -> BeforeValidator:
    """Accept the names that `check` accepts."""

    def known(name: Any) -> str:
        try:
            return check(str(name))
        except PolicyError as error:
            raise ValueError(str(error)) from None

    return BeforeValidator(known)


class TierKeys(BaseModel):
    """The keys of a tier that the core owns; strict about types, so `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    backend: str
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    capacity: Annotated[Capacity, BeforeValidator(parse_capacity)] | None = None
    eviction: Annotated[str, _known(check_policy)] = "lru"
    hit_reward_seconds: Annotated[float, Field(ge=0, le=1e9, strict=True)] | None = None
    slru_protected_threshold: Annotated[int, Field(ge=1, le=1 << 20, strict=True)] | None = None
    evict_ratio: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0
    evict_start_threshold: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    admission: Annotated[str, _known(check_admission)] = "all"
    isolation: Literal["process", "none"] = "process"
    deadline_s: Annotated[float, Field(gt=0, le=86400, strict=True)] = 10.0
    write_queue: Size | None = None
    in_flight: Size | None = None
    probe_ttl_s: Annotated[float, Field(ge=0, le=86400, strict=True)] = 5.0
    state_directory: Path | None = None
    breaker: BreakerConfig = BreakerConfig()
    faults: FaultConfig | None = None


class StackKeys(BaseModel):
    """The top-level keys of a stack."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block_size: Annotated[int, Field(ge=1, le=1 << 20, strict=True)] | None = None
    pin_budget: Annotated[float, Field(gt=0, le=1)] = 0.8
    pin_limit_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    index: IndexName = "native"
    state_directory: Path | None = None
    tiers: list[Any]


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier, validated.

    Attributes:
        backend, name: the plug-in, and what the tier is called in figures and logs.
        hosts: it is the host tier (first of the stack, lives in the host region).
        persistent: its blocks may outlive the backend's process.
        options: the backend's own config.
        capacity: None where the backend bounds itself.
        evict_ratio: at least this share of the capacity is evicted at a time.
        evict_start_threshold: eviction starts when this share of the capacity would be passed.
        admission: which of the blocks that requests offer the tier takes; the host tier takes all.
        write_queue: bytes that may wait to be written down; None: a quarter of host memory.
        in_flight: bytes that calls under way may move; None: a quarter of host memory, at least 64 MiB.
        deadline_s: a call of the backend that takes longer gets its process killed.
        probe_ttl_s: for how long a key-addressed tier is not asked again for a block that it did not have.
        breaker: when a lower tier that fails is left alone.
        faults: failures on purpose, in a lower tier.
        written: the tier's keys for eyes: references as `${NAME}`, secrets masked. The repr has these.
    """

    backend: str
    name: str
    addressing: Literal["slot", "key"]
    hosts: bool
    persistent: bool
    options: BackendConfig = field(repr=False)
    capacity: Capacity | None
    eviction: Eviction
    evict_ratio: float
    evict_start_threshold: float
    admission: str
    isolation: Literal["process", "none"]
    deadline_s: float
    write_queue: int | None
    in_flight: int | None
    probe_ttl_s: float
    state_directory: Path | None = field(repr=False)
    breaker: BreakerConfig
    faults: FaultConfig | None
    written: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class StackConfig:
    """A stack, validated.

    Attributes:
        block_size: tokens a block; None: the engine says.
        tiers: fastest first.
        pin_budget: share of host memory that fetches may keep pinned; longer prefixes are truncated.
        pin_limit_s: seconds after which a fetch that was not released loses its pins.
        index: which implementation finds blocks: the native one, or the slow Python reference.
        state_directory: of this manager alone: what it must know after a restart.
    """

    block_size: int | None
    tiers: tuple[TierConfig, ...]
    pin_budget: float = 0.8
    pin_limit_s: float = 600.0
    index: IndexName = "native"
    state_directory: Path | None = field(default=None, repr=False)


def stack_of(source: Source) -> StackConfig:
    """Validate a document that was read and whose references were resolved. Raises StackConfigError."""
    if not isinstance(source.data, dict):
        raise source.error((), "a stack is a mapping with the key tiers: see README.md")
    for path in sorted(source.referenced, key=str):
        _refuse_reference(source, path)
    top = validated(source, (), StackKeys, source.resolved, StackKeys.model_fields)
    if not top.tiers:
        raise source.error(("tiers",), "a stack needs at least one tier")
    tiers: list[TierConfig] = []
    for number, entry in enumerate(top.tiers):
        tiers.append(_tier(source, number, entry, [tier.name for tier in tiers]))
    return StackConfig(top.block_size, tuple(tiers), top.pin_budget, top.pin_limit_s, top.index, top.state_directory)


def _refuse_reference(source: Source, path: Path_) -> None:
    """References are for a backend's own keys and for paths: names and policies are shown everywhere."""
    key = path[2] if len(path) > 2 and path[0] == "tiers" else path[-1] if path else ""
    of_the_core = len(path) <= 2 or key in TierKeys.model_fields
    if of_the_core and (len(path) == 2 or key not in REFERENCES_ALLOWED):
        problem = f"a reference is for secrets and paths, and {key} is shown in figures and logs: write the value out"
        raise source.error(path, problem)


def _tier(source: Source, number: int, entry: Any, taken: list[str]) -> TierConfig:
    path: Path_ = ("tiers", number)
    if not isinstance(entry, dict):
        raise source.error(path, "a tier is a mapping with the key backend")
    if not isinstance(entry.get("backend"), str):
        missing = "backend" not in entry
        problem = "the key backend is missing: name one, such as cpu" if missing else "must be the name of a backend"
        raise source.error(path if missing else (*path, "backend"), problem)
    spec = _spec(source, path, entry["backend"])
    known = [*TierKeys.model_fields, *spec.config_model.model_fields]
    core = {key: value for key, value in entry.items() if key in TierKeys.model_fields}
    own = {key: value for key, value in entry.items() if key not in TierKeys.model_fields}
    keys = validated(source, path, TierKeys, core, known)
    options: BackendConfig = validated(source, path, spec.config_model, own, known)
    written = _written(source, path, spec, own)
    options.hide_in_repr(key for key in own if is_secret_name(key) or source.hides((*path, key)))
    name = keys.name or _free_name(spec.name, taken)
    if name in taken:
        raise source.error((*path, "name"), f"two tiers are called {name!r}: choose another name")
    if spec.hosts and keys.capacity is None:
        raise source.error(path, "the key capacity is missing: write one, such as 32GiB")
    if spec.addressing == "slot" and keys.capacity is None:
        raise source.error(path, f"the key capacity is missing: a {spec.name} tier needs one, such as 1TiB")
    hosts = spec.hosts and number == 0
    _refuse_contradictions(source, path, spec, keys, hosts=hosts)
    return TierConfig(
        backend=spec.name,
        name=name,
        addressing=spec.addressing,
        hosts=hosts,
        persistent=spec.persistent,
        options=options,
        capacity=keys.capacity,
        eviction=_eviction(keys),
        evict_ratio=keys.evict_ratio,
        evict_start_threshold=keys.evict_start_threshold,
        admission=keys.admission,
        isolation=keys.isolation,
        deadline_s=keys.deadline_s,
        write_queue=keys.write_queue,
        in_flight=keys.in_flight,
        probe_ttl_s=keys.probe_ttl_s,
        state_directory=keys.state_directory,
        breaker=keys.breaker,
        faults=keys.faults,
        written=written,
    )


def _written(source: Source, path: Path_, spec: BackendSpec, own: dict[str, Any]) -> dict[str, Any]:
    """The tier's keys for eyes."""
    entry = source.at(path)
    kept = {key for key, value in entry.items() if key not in own or is_reference(value)}
    return mask_by_type(spec.config_model, masked(entry), kept)


def _refuse_contradictions(source: Source, path: Path_, spec: BackendSpec, keys: TierKeys, *, hosts: bool) -> None:
    """Refuse options that would do nothing, or that speak of another policy."""

    def refuse(key: str, problem: str) -> None:
        raise source.error((*path, key), problem)

    _refuse_for_eviction(refuse, spec, keys)
    if spec.addressing == "slot" and not hosts and "probe_ttl_s" in keys.model_fields_set:
        refuse("probe_ttl_s", f"a {spec.name} tier is slot-addressed, the core knows what it holds: leave the key out")
    for key in NOT_FOR_THE_HOST if hosts else ():
        if key in keys.model_fields_set:
            refuse(key, "no backend runs for the host tier, its blocks lie in the core's memory: leave the key out")
    if hosts and "admission" in keys.model_fields_set:
        refuse("admission", "the host tier takes every block, all others come through it: give the key to a lower tier")
    for fault in ("crash", "duplicate") if keys.faults and keys.isolation == "none" else ():
        if getattr(keys.faults, fault):
            refuse("faults", f"{fault} is a fault of a tier's process, and isolation: none has none: leave one out")


def _refuse_for_eviction(refuse: Callable[[str, str], None], spec: BackendSpec, keys: TierKeys) -> None:
    for key, policy in (("hit_reward_seconds", "lru"), ("slru_protected_threshold", "slru")):
        if getattr(keys, key) is not None and keys.eviction != policy:
            refuse(key, f"is an option of eviction: {policy}, and this tier has {keys.eviction}: leave one of them out")
    if spec.addressing == "key":
        why = f"a {spec.name} tier is key-addressed, and keeps what was used last"
        if keys.eviction != "lru":
            refuse("eviction", f"{keys.eviction!r}: {why}: write lru, or leave the key out")
        if keys.hit_reward_seconds is not None:
            refuse("hit_reward_seconds", f"{why}, without rewards: leave the key out")
    for key in ("evict_ratio", "evict_start_threshold"):
        if key in keys.model_fields_set and keys.capacity is None:
            refuse(key, "this tier has no capacity and bounds itself: give it a capacity, or leave the key out")


def _eviction(keys: TierKeys) -> Eviction:
    options = {
        key: value
        for key in ("hit_reward_seconds", "slru_protected_threshold")
        if (value := getattr(keys, key)) is not None
    }
    return Eviction(keys.eviction, **options)


def _spec(source: Source, path: Path_, name: str) -> BackendSpec:
    try:
        return load_backend(name)
    except (BackendNotFoundError, BackendLoadError) as error:
        raise source.error((*path, "backend"), str(error)) from error


def _free_name(backend: str, taken: list[str]) -> str:
    name, number = backend, 2
    while name in taken:
        name, number = f"{backend}-{number}", number + 1
    return name


def validated(source: Source, path: Path_, model: type[Model], data: dict[str, Any], known: Iterable[str]) -> Model:
    """What a pydantic model makes of `data`, which stands at `path`; `known`: the keys that there are.

    Raises StackConfigError.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
    # An unknown key first: a misspelt one is also a missing one, and only its own name helps.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    raise _translated(source, path, model, first, list(known))  # outside of except: pydantic's own error shows values


def _translated(source: Source, path: Path_, model: type[BaseModel], found: Any, known: list[str]) -> Exception:
    """Turn one of pydantic's findings into an error with a place."""
    kind = found["type"]
    location = tuple(found["loc"])
    where: Path_ = (*path, *(location[:-1] if kind == "missing" else location))
    while source.at(where) is None and len(where) > len(path) + 1 and where not in source.values:
        where = where[:-1]  # pydantic adds steps for union members
    if kind == "extra_forbidden":
        inner: dict[str | int, type[BaseModel]] = {"faults": FaultConfig, "breaker": BreakerConfig}
        if (top := where[len(path)]) in inner:
            known = list(inner[top].model_fields)
        near = difflib.get_close_matches(str(where[-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
        return source.error(where, f"unknown key {show(where[-1])}: {hint}", at_key=True)
    if kind == "missing":
        return source.error(where, f"the key {location[-1]} is missing")
    message = found["msg"].removeprefix("Value error, ")
    secret = is_secret_field(model, where[len(path) :]) or any(is_secret_name(str(step)) for step in where)
    if secret or source.hides(where):
        problem = message[:1].lower() + message[1:] if _TELLS_NO_VALUE.fullmatch(kind) else "this value is not accepted"
        written = source.at(where)
        shown = f"{written}: " if is_reference(written) else ""
        error = source.error(where, f"{shown}{problem} (its value is not shown)")
        if secret and not is_reference(written):
            error.value = None
        return error
    value = found.get("input")
    shown = "" if show(value) in message else f"{show(value)}: " if not isinstance(value, dict | list) else ""
    return source.error(where, f"{shown}{message[:1].lower()}{message[1:]}")


_TELLS_NO_VALUE = re.compile(
    r"(int|float|bool|string|path|bytes|dict|list|tuple|set|model)_\w+|literal_error|(greater|less)_than\w*|too_(short|long)"
)
"""Types of pydantic's findings whose text has nothing of the value; third parties' own messages may."""
