"""Whether the original FlexKV is installed beside this one: both have the module `flexkv`, and must not be mixed.

Owns how to tell, without importing anything, and what to do about it. The module is this project's where its
`__init__.py` speaks of `flexkv_core` (`compat/flexkv`); a distribution named flexkv, where it requires flexkv-core.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path

OURS = b"flexkv_core"
NATIVE = "c_ext*.so"
"""The original's native module: it has none of its names in common with anything here."""


def original_flexkv() -> str | None:
    """What is wrong and how to resolve it, where the original FlexKV is installed; else None."""
    found = _distribution() or _package()
    if found is None:
        return None
    return (
        f"the original FlexKV is installed beside flexkv-core ({found}), and they cannot be mixed: to use this one, "
        "`pip uninstall flexkv`, delete what is left of that, then `pip install flexkv`; to use the original, "
        "`pip uninstall flexkv-core`"
    )


def _distribution() -> str | None:
    for distribution in metadata.distributions(name="flexkv"):
        names = [re.split(r"[^A-Za-z0-9._-]", each, maxsplit=1)[0] for each in distribution.requires or ()]
        if "flexkv-core" not in (name.lower().replace("_", "-") for name in names):
            return f"the distribution flexkv {distribution.version} in {distribution.locate_file('')}"
    return None


def _package() -> str | None:
    try:
        spec = importlib.util.find_spec("flexkv")
    except (ImportError, ValueError):  # imported by other means, without a spec
        return None
    for folder in map(Path, (spec.submodule_search_locations if spec is not None else None) or ()):
        init = folder / "__init__.py"
        native = next(iter(sorted(folder.glob(NATIVE))), None)
        if native is not None:
            return str(native)
        # A folder without __init__.py that only has the name, such as the current directory's, is nobody's package.
        if init.is_file() and OURS not in init.read_bytes():
            return str(init)
    return None
