#!/usr/bin/env bash
# Builds the native code without Python under ThreadSanitizer, then AddressSanitizer and UBSan, and runs its drivers.
# FLEXKV_SOAK=1: whole counts. FLEXKV_SEED=n repeats a run.
set -euo pipefail
cd "$(dirname "$0")/.."
declare -A steps=([thread]="500 2000" [address,undefined]="8000 500")  # one thread; an owner and readers
rounds=12
if [ -n "${FLEXKV_SOAK:-}" ]; then steps=([thread]="5000 100000" [address,undefined]="400000 20000") rounds=600; fi
seed=${FLEXKV_SEED:-$RANDOM}
out=build/sanitizers
mkdir -p "$out"
export TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1

for kind in thread address,undefined; do
  flags=(-O1 -g -fsanitize="$kind" -fno-sanitize-recover=all -fno-omit-frame-pointer -Inative -Inative/third_party)
  objects=()
  case $(uname -m) in
    x86_64)
      flags+=(-DFLEXKV_X86)
      for wide in avx2 avx512; do
        cc -mavx2 $([ $wide = avx512 ] && echo -mavx512f) "${flags[@]}" -c native/hash_$wide.c -o "$out/hash_$wide.$kind.o"
        objects+=("$out/hash_$wide.$kind.o")
      done ;;
  esac
  flags+=(-std=c++20 -Wall -Wextra -Werror -pthread)
  c++ "${flags[@]}" -Wl,--wrap=realloc,--wrap=aligned_alloc native/index/*.cpp native/tests/index_stress.cpp \
    -o "$out/index_stress.$kind"
  c++ "${flags[@]}" native/thread_pool.cpp native/hash.cpp native/tests/blocks_stress.cpp "${objects[@]}" \
    -o "$out/blocks_stress.$kind"
  echo "-fsanitize=$kind"
  "$out/index_stress.$kind" ${steps[$kind]} "$seed"
  "$out/blocks_stress.$kind" "$rounds" "$seed"
done
