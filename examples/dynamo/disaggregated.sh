#!/usr/bin/env bash
# A prefill worker and a decode worker: NIXL carries the prompt's KV from one to the other, FlexKV keeps it for later.
# Needs NIXL (pip install 'nixl[cu13]==1.4.1'); without GPUs NIXL_OPTIONS='"kv_buffer_device":"cpu"'.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
NIXL_PORT=${NIXL_PORT:-20096}                  # of the decode worker's NIXL; the prefill worker's is one more
nixl() { echo '{"kv_connector":"NixlConnector","kv_role":"'"$1"'"'"${NIXL_OPTIONS:+,$NIXL_OPTIONS}"'}'; }
both='{"kv_connector":"MultiConnector","kv_role":"kv_both","kv_connector_extra_config":{"connectors":['
both+="$CONNECTOR,$(nixl kv_producer)]}}"

start_flexkv
start_frontend
VLLM_NIXL_SIDE_CHANNEL_PORT=$NIXL_PORT \
  start_worker 0 "$(nixl kv_consumer)" --disaggregation-mode decode
VLLM_NIXL_SIDE_CHANNEL_PORT=$((NIXL_PORT + 1)) \
  start_worker 1 "$both" --disaggregation-mode prefill --kv-events-config "$(events 1)"
serve 2
