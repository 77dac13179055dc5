"""From flat keys and variables to a stack: the one place that knows what they mean for tiers.

`gather` takes each key's value from the file, else from the environment, else its default. `flat_document` makes the
tiers that a flat file means; `apply` sets the options that flat keys and variables give to tiers, those of a stack file
included, unless the tier has the option itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexkv_core.backend import BackendSpec
from flexkv_core.config.flat_keys import CONFIG_PATH, FLAT, KEYS, PREFIX, VARIABLES, FlatKey, variables_of
from flexkv_core.config.flat_values import GIB
from flexkv_core.config.places import Origin, Path_, Source, is_reference, located, show
from flexkv_core.config.secrets import SHOWN_SECRET
from flexkv_core.errors import BackendLoadError, BackendNotFoundError, StackConfigError
from flexkv_core.plugins import load_backend

SSD = "ssd"
Kind = Literal["file", "environment", "default"]


@dataclass(frozen=True, slots=True)
class FlatValue:
    """A key's value and where it comes from.

    Attributes:
        value: typed.
        written: the same for eyes: references as `${NAME}`, secrets masked.
        referenced: it holds a reference, so that only `written` may be shown.
    """

    key: FlatKey
    value: Any
    written: Any
    origin: Origin
    referenced: bool = False

    @property
    def given(self) -> bool:
        return self.origin.kind != "default"


@dataclass(frozen=True, slots=True)
class Notice:
    """A key that was given and is accepted, but has no effect, and why."""

    key: str
    reason: str


Values = Mapping[str, FlatValue]


def gather(source: Source | None, environ: Mapping[str, str]) -> dict[str, FlatValue]:
    """Every key's value, by the key's name: file > environment > default.

    Raises StackConfigError, with the key's place or the variable's name, for a bad value and for two names of one key.
    """
    names: dict[str, str] = {}
    for name in source.data if source is not None else ():
        key = FLAT.get(name)
        if source is None or key is None or (source.data[name] is None and key.default is None):
            continue
        if key.name in names:
            raise source.error((name,), f"is another name of {names[key.name]}, which is given too: keep one")
        names[key.name] = name
    return {
        key.name: _from_file(source, names[key.name], key)
        if source is not None and key.name in names
        else _from_environment(key, environ) or _default(key)
        for key in KEYS
    }


def unknown_key(source: Source, name: str, others: Iterable[str] = ()) -> StackConfigError:
    """The error about a key of a file that nobody knows."""
    if name in VARIABLES and name not in FLAT:
        key = VARIABLES[name]
        what = f"write {key.name}" if key.in_file else "set it in the environment"
        return source.error((name,), f"unknown key {name!r}: this is the name of a variable: {what}", at_key=True)
    near = difflib.get_close_matches(name.lower(), [*FLAT, *others], 1)
    hint = f"did you mean {near[0]!r}?" if near else "see the table of flat keys in flexkv_core/config/README.md"
    return source.error((name,), f"unknown key {show(name)}: {hint}", at_key=True)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for each variable of the prefix that nobody knows; values are not shown."""
    warnings = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in VARIABLES and name != CONFIG_PATH:
            near = difflib.get_close_matches(name.upper(), [*VARIABLES, CONFIG_PATH], 1)
            hint = f"did you mean {near[0]}?" if near else "it is ignored"
            warnings.append(f"unknown variable {name}: {hint}")
    return warnings


def _from_file(source: Source, name: str, key: FlatKey) -> FlatValue:
    path: Path_ = (name,)
    referenced = any(each[0] == name for each in source.referenced)
    if referenced and not key.takes_references:
        raise source.error(path, f"a reference is for secrets and paths, and {name} is shown: write the value out")
    if source.data[name] is None:
        raise source.error(path, "has no value: write one, or leave the key out")
    problem, value = _parsed(key, source.resolved[name])
    if problem:
        if key.secret or referenced:
            problem = f"{source.data[name]}: {problem}" if is_reference(source.data[name]) else problem
        else:
            problem = f"{show(source.data[name])}: {problem}"
        raise source.error(path, problem)
    position = source.values.get(path)
    origin = Origin("file", name, source.name, position)
    return FlatValue(key, value, _written(key, value, source.data[name], referenced=referenced), origin, referenced)


def _from_environment(key: FlatKey, environ: Mapping[str, str]) -> FlatValue | None:
    """None if no variable sets it; an empty one does not."""
    names = [name for name in variables_of(key) if environ.get(name, "").strip()]
    if not names:
        return None
    if len(names) > 1:
        problem = f"is another name of {names[0]}, which is set too: unset one of them"
        raise located("environment", None, names[1], None, problem)
    problem, value = _parsed(key, environ[names[0]])
    if problem:
        shown = None if key.secret else environ[names[0]]
        text = problem if key.secret else f"{show(shown)}: {problem}"
        raise located("environment", None, names[0], shown, text)
    written = _written(key, value, None, referenced=False)
    return FlatValue(key, value, written, Origin("environment", names[0], "environment"))


def _default(key: FlatKey) -> FlatValue:
    written = list(key.default) if isinstance(key.default, tuple) else key.default
    return FlatValue(key, key.default, written, Origin("default", key.name, "default"))


def _parsed(key: FlatKey, value: Any) -> tuple[str, Any]:
    """What is wrong with a value ("" for nothing), and the typed one. No exception, which might carry a secret."""
    try:
        return "", key.parse(value)
    except ValueError as error:
        return str(error), None


def _written(key: FlatKey, value: Any, raw: Any, *, referenced: bool) -> Any:
    if referenced and (not key.secret or is_reference(raw)):
        parts = raw.split(";") if isinstance(raw, str) else raw
        return [part.strip() for part in parts if part.strip()] if isinstance(value, tuple) else raw
    if key.secret:
        return SHOWN_SECRET
    return list(value) if isinstance(value, tuple) else value


# --------------------------------------------------------------------------- from values to tiers


def flat_document(name: str, values: Values) -> Source:
    """The tiers that a flat file means. Raises StackConfigError for capacities that contradict each other."""
    document = Source(name, {"tiers": []}, resolved={"tiers": []})
    cpu, ssd = values["cpu_cache_gb"], values["ssd_cache_gb"]
    _add_tier(document, "cpu", cpu)
    if ssd.value > 0:
        if ssd.value <= cpu.value:
            how = "" if cpu.given else ", its default"
            problem = f"{ssd.value:g} must exceed cpu_cache_gb, which is {cpu.value:g}{how}: make the ssd tier larger"
            raise located(ssd.origin.place, ssd.origin.position, ssd.origin.key, ssd.value, problem)
        _add_tier(document, SSD, ssd)
        _set(document, ("tiers", 1, "directories"), values["ssd_cache_dir"], list(values["ssd_cache_dir"].value))
    return document


def check_together(values: Values) -> None:
    """Refuse values that contradict each other whatever the tiers are."""
    number, count = values["instance_id"], values["instance_num"]
    if number.value >= count.value:
        problem = f"{number.value} must be less than instance_num, which is {count.value}: instances count from 0"
        raise located(number.origin.place, number.origin.position, number.origin.key, number.value, problem)


def _add_tier(document: Source, backend: str, gib: FlatValue) -> None:
    capacity = int(gib.value * GIB)
    written = f"{int(gib.value)}GiB" if gib.value == int(gib.value) else capacity
    document.origins["tiers", len(document.data["tiers"])] = gib.origin
    document.data["tiers"].append({"backend": backend, "capacity": written})
    document.resolved["tiers"].append({"backend": backend, "capacity": capacity})


def _set(document: Source, path: Path_, given: FlatValue, value: Any) -> None:
    """Put a value of a flat key into the document, and remember where it comes from."""
    written = document.data
    resolved = document.resolved
    for step in path[:-1]:
        written, resolved = written[step], resolved[step]
    resolved[path[-1]] = value
    written[path[-1]] = given.written if given.referenced else value
    document.origins[path] = given.origin
    if given.referenced:
        document.referenced.add(path)


def apply(document: Source, values: Values, *, flat: bool) -> list[Notice]:
    """Set what flat keys say of the tiers, where the tier does not say it; returns what had no effect.

    Args:
        flat: the tiers were made by `flat_document`: defaults of the ssd tier's engine are written out too.
    """
    taken: set[str] = set()
    if "index" in document.data:
        pass
    elif values["index_accel"].given:
        taken.add("index_accel")
        _set(document, ("index",), values["index_accel"], "native" if values["index_accel"].value else "reference")
    for number, spec in _tiers(document):
        path: Path_ = ("tiers", number)
        for key, option, value in _options(document.resolved["tiers"][number], spec, values, hosts=number == 0):
            given = values[key]
            if not (given.given or (flat and spec.name == SSD)):
                continue
            if option and option not in document.resolved["tiers"][number]:
                _set(document, (*path, option), given, value)
                taken.add(key)
            elif not option:
                taken.add(key)
    made = {"cpu_cache_gb", "ssd_cache_gb"} if flat else set()
    if flat and len(document.data["tiers"]) > 1:
        made.add("ssd_cache_dir")
    notices = []
    for given in values.values():
        if given.given and not given.key.does and given.key.name not in taken | made:
            notices.append(Notice(given.origin.key, given.key.needs or _WITHOUT_EFFECT[given.key.name]))
    return notices


_SSD_ONLY = "no ssd tier takes it"
_WITHOUT_EFFECT = {
    "ssd_cache_dir": "ssd_cache_gb is 0: there is no ssd tier",
    "enable_gds": _SSD_ONLY,
    "iouring_entries": f"{_SSD_ONLY}: none is there, it says engine or queue_depth itself, or its engine is gds",
    "max_file_size_gb": f"{_SSD_ONLY}: none is there, or it says segment_size itself",
    "use_hugepage_cpu_buffer": "no host tier takes it: none is there, or it says huge_pages itself",
    "eviction_policy": "each slot-addressed tier says eviction itself, or there is none",
    "evict_ratio": "each tier with a capacity says evict_ratio itself, or there is none",
    "evict_start_threshold": "each tier with a capacity says evict_start_threshold itself, or there is none",
    "hit_reward_seconds": "no slot-addressed tier with eviction lru takes it",
    "slru_protected_threshold": "no slot-addressed tier with eviction slru takes it",
    "index_accel": "the stack says index itself",
}


def _tiers(document: Source) -> Iterator[tuple[int, BackendSpec]]:
    """Tiers that are mappings and whose plug-in can be loaded; what is wrong with others is told later."""
    tiers = document.resolved.get("tiers")
    for number, tier in enumerate(tiers if isinstance(tiers, list) else []):
        name = tier.get("backend") if isinstance(tier, dict) else None
        try:
            if isinstance(name, str):
                yield number, load_backend(name)
        except (BackendLoadError, BackendNotFoundError):
            continue


def _options(
    tier: Mapping[str, Any], spec: BackendSpec, values: Values, *, hosts: bool
) -> Iterator[tuple[str, str, Any]]:
    """(flat key, the tier's option or "" for none needed, its value) of all that concern a tier."""
    if spec.name == "cpu" and hosts:
        yield "use_hugepage_cpu_buffer", "huge_pages", values["use_hugepage_cpu_buffer"].value
    if spec.addressing == "slot":
        eviction = values["eviction_policy"]
        yield "eviction_policy", "eviction", eviction.value
        policy = tier.get("eviction", eviction.value)
        if policy == "lru":
            yield "hit_reward_seconds", "hit_reward_seconds", values["hit_reward_seconds"].value
        if policy == "slru":
            yield "slru_protected_threshold", "slru_protected_threshold", values["slru_protected_threshold"].value
    if "capacity" in tier:
        yield "evict_ratio", "evict_ratio", values["evict_ratio"].value
        yield "evict_start_threshold", "evict_start_threshold", values["evict_start_threshold"].value
    if spec.name == SSD:
        yield from _ssd_options(tier, values)


def _ssd_options(tier: Mapping[str, Any], values: Values) -> Iterator[tuple[str, str, Any]]:
    gds, entries, size = values["enable_gds"], values["iouring_entries"], values["max_file_size_gb"]
    if gds.value:
        yield "enable_gds", "engine", "gds"
    else:
        yield "enable_gds", "", None
        yield "iouring_entries", "engine", "io_uring" if entries.value else "threads"
    if entries.value and not gds.value and tier.get("engine", "io_uring") == "io_uring":
        yield "iouring_entries", "queue_depth", entries.value
    yield "max_file_size_gb", "segment_size" if size.value > 0 else "", int(size.value * GIB)
