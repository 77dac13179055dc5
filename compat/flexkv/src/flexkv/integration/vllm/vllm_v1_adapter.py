"""What vLLM's own connector `FlexKVConnectorV1` imports."""

from flexkv_core.connectors.vllm_in_tree import FlexKVConnectorV1Impl

__all__ = ["FlexKVConnectorV1Impl"]
