#!/usr/bin/env bash
# The main job: an hour of production requests, simulated whole, then the first 2,000 of them with real bytes.
set -euo pipefail
flexkv=$1
trace=data/conversation_trace.jsonl.gz
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p out
sed "s#\./flexkv-demo#$folder/blocks#" examples/demo.yaml >"$folder/stack.yaml"
echo "== The whole trace, simulated: host memory of 30,000 blocks over a directory of 100,000"
"$flexkv" replay "$trace" --stack examples/simulate.yaml --simulate --json out/simulated.json --plot out/simulated.png
echo "== Its first 2,000 requests with real bytes, every byte compared"
"$flexkv" replay "$trace" --stack "$folder/stack.yaml" --limit 2000 --json out/demo.json --plot out/demo.png
