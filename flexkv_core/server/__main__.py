"""The process that `launch.py` starts: reads its config from standard input, and serves.

python -m flexkv_core.server < JSON with "source", "socket", "linger_s" and "lock", a descriptor of the socket's lock
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from flexkv_core.config import load_config
from flexkv_core.errors import FlexKVError
from flexkv_core.logs import configure
from flexkv_core.server.daemon import run


def main() -> int:
    """The exit code: 2 where the config or the machine does not allow it, said in one line."""
    handed = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        config = load_config(handed["source"])
        process = config.settings.process
        configure(process.log_level, process.logging_prefix, secrets=config.secrets)
        return run(config, Path(handed["socket"]), linger_s=handed["linger_s"], lock_fd=handed["lock"])
    except FlexKVError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
