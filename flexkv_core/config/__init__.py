"""Stack files, flat files and variables: reading, validating, and errors that name the place."""

from flexkv_core.config.flat import FlatValue, Notice
from flexkv_core.config.load import LoadedConfig, load_config, load_stack, load_to_open
from flexkv_core.config.secrets import dump_with_secrets
from flexkv_core.config.settings import Settings
from flexkv_core.config.sizes import Capacity, Size
from flexkv_core.config.stack import StackConfig, TierConfig

__all__ = [
    "Capacity",
    "FlatValue",
    "LoadedConfig",
    "Notice",
    "Settings",
    "Size",
    "StackConfig",
    "TierConfig",
    "dump_with_secrets",
    "load_config",
    "load_stack",
    "load_to_open",
]
