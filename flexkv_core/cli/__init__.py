"""The command line: `flexkv replay`, `flexkv backends`. A shell over the core; nothing imports it."""
