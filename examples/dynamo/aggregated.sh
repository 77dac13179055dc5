#!/usr/bin/env bash
# One worker with FlexKV behind a frontend.  aggregated.sh [--kv-aware]: the frontend routes by KV events.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in
  "") frontend=() worker=() ;;
  --kv-aware) frontend=(--router-mode kv) worker=(--kv-events-config "$(events 0)") ;;
  *) echo "usage: aggregated.sh [--kv-aware]" >&2; exit 2 ;;
esac

start_flexkv
start_frontend ${frontend[@]+"${frontend[@]}"}
start_worker 0 "$CONNECTOR" ${worker[@]+"${worker[@]}"}
serve 1
