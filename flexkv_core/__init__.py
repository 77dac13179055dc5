"""FlexKV: a verified KV-cache store for LLM inference, on a stack of storage tiers.

This package's modules are layers; imports point down only (see docs/design.md, checked by `make check`).
"""

__version__ = "0.1.0"
