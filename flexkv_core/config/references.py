"""References to environment variables in strings: `${NAME}`, for secrets and paths.

`$${` stands for a literal `${`. Nothing else is replaced, what was put in is not looked at again, and nothing is
included. The value is never shown: errors, reprs and `flexkv validate` have `${NAME}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flexkv_core.config.places import Path_, Source

_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$\{")


def resolve(source: Source, environ: Mapping[str, str]) -> Source:
    """Fill `source.resolved` and `source.referenced`; returns the source.

    Raises StackConfigError, at the string's place, for a variable that is not set or is not UTF-8, for a `${` that
    is no reference, and for strings that are not Unicode.
    """
    source.resolved = _resolve(source, source.data, (), environ)
    return source


def _resolve(source: Source, value: Any, path: Path_, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not _is_unicode(key):
                raise source.error(path, f"the key {key!r} holds half of a surrogate pair, which is no character")
        return {key: _resolve(source, item, (*path, key), environ) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(source, item, (*path, number), environ) for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if not _is_unicode(value):
        raise source.error(path, "holds half of a surrogate pair, which is no character: write the character itself")
    if "${" not in value:
        return value

    def put(found: re.Match[str]) -> str:
        if found[0] == "$${":
            return "${"
        name = found[1]
        if name is None:
            raise source.error(path, "'${' begins a reference: write ${NAME}, or $${ for a literal ${")
        if name not in environ:
            problem = f"${{{name}}}: the environment has no variable {name}: set it, or write $${{ for a literal ${{"
            raise source.error(path, problem)
        if not _is_unicode(environ[name]):
            raise source.error(path, f"${{{name}}}: the variable {name} is not UTF-8: set it to UTF-8 text")
        source.referenced.add(path)
        return environ[name]

    return _REFERENCE.sub(put, value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
