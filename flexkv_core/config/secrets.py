"""Secrets in configs: which fields are secret, and how they reach the tier process without being shown anywhere.

A backend's author marks a field as `SecretStr`, `SecretBytes` or `Secret[...]` of pydantic. Names such as `password`
are taken for secrets too, so that a careless author or a misspelt key shows none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, get_args

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

SHOWN_SECRET = "***"
_SECRET_TYPES = (Secret, SecretStr, SecretBytes)
_NAME = re.compile(
    r"(^|[_-])(pass(wd|word|phrase)|secrets?|token|credentials?|(api|access|private|account)[_-]?key)([_-]|$)",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a key's name says that its value is a secret: redis_password, secret_access_key."""
    return _NAME.search(name) is not None


def is_secret_field(model: type[BaseModel], location: Sequence[str | int]) -> bool:
    """Whether the value at a place of a model is, or may hold, a secret by its type."""
    kind: Any = model
    for step in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found = kind.model_fields.get(str(step))
            if found is None:
                return False
            kind = found.annotation
        if _mentions_secret(kind):
            return True
    return _mentions_secret(kind)


def _mentions_secret(kind: Any) -> bool:
    origin = getattr(kind, "__origin__", None)
    for one in (kind, origin):
        if isinstance(one, type) and issubclass(one, _SECRET_TYPES):
            return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return any(_mentions_secret(each.annotation) for each in kind.model_fields.values() if each.annotation != kind)
    return any(_mentions_secret(each) for each in get_args(kind))


def dump_with_secrets(options: BaseModel) -> dict[str, Any]:
    """A model as plain data that its class validates again, secrets in the clear: for the socket to the tier process.

    Never log, print or store what this returns.
    """
    shown = options.model_dump(mode="json")
    revealed: dict[str, Any] = _reveal(options.model_dump(mode="python"), shown)
    return revealed


def secrets_in(plain: Any) -> Iterator[str]:
    """The secrets in a model's `model_dump(mode="python")`, in the clear: for those who must recognise them."""
    if isinstance(plain, _SECRET_TYPES):
        value = plain.get_secret_value()
        yield value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    elif isinstance(plain, Mapping):
        for item in plain.values():
            yield from secrets_in(item)
    elif isinstance(plain, list | tuple | AbstractSet):
        for item in plain:
            yield from secrets_in(item)


def _reveal(plain: Any, shown: Any) -> Any:
    """`shown` (JSON's types, secrets masked) with the secrets of `plain` (Python's types) put in."""
    if isinstance(plain, _SECRET_TYPES):
        return plain.get_secret_value()
    if isinstance(plain, Mapping) and isinstance(shown, Mapping) and len(plain) == len(shown):
        return {key: _reveal(value, item) for value, (key, item) in zip(plain.values(), shown.items(), strict=True)}
    if isinstance(plain, list | tuple | AbstractSet) and isinstance(shown, list) and len(plain) == len(shown):
        return [_reveal(value, item) for value, item in zip(plain, shown, strict=True)]
    return shown


def mask_by_type(model: type[BaseModel], written: Mapping[str, Any], keep: AbstractSet[str]) -> dict[str, Any]:
    """Keys as written, those of secret fields masked; `keep`: keys whose values tell nothing (references)."""
    return {
        key: SHOWN_SECRET if key not in keep and value is not None and is_secret_field(model, (key,)) else value
        for key, value in written.items()
    }
