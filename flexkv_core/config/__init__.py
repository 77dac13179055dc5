"""The stack file: reading it, validating it, and errors that name the place."""

from flexkv_core.config.sizes import Capacity, Size
from flexkv_core.config.stack import StackConfig, TierConfig, load_stack

__all__ = ["Capacity", "Size", "StackConfig", "TierConfig", "load_stack"]
