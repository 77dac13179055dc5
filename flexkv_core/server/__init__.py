"""The manager in a process of its own, for engines that come and go: see README.md beside this file."""

from flexkv_core.server.agent import DeviceAgent
from flexkv_core.server.client import Client, connect
from flexkv_core.server.client_handles import ClientFetch, ClientTransfer

__all__ = ["Client", "ClientFetch", "ClientTransfer", "DeviceAgent", "connect"]
