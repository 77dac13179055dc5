#!/usr/bin/env bash
# Installs the CPU build of torch that the tests are written for; an open range would pull gigabytes of CUDA.
set -euo pipefail
python=$1
version=2.13.0
if "$python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
  exit 0
fi
"$python" -m pip install -q "torch==$version+cpu" 2>/dev/null && exit 0
"$python" -m pip install -q "torch==$version" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null && exit 0
echo "no CPU build of torch $version can be had for this Python here: installing the default build, which is large" >&2
"$python" -m pip install -q "torch==$version"
