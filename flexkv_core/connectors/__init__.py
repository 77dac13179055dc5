"""Connectors: each speaks one engine's own KV interface, over the server's client and device agents."""
