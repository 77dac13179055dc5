// The extension module: each concern binds itself; nothing else lives here.
#include <nanobind/nanobind.h>

#include "bindings.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // an index that lives to the end of its process is no leak
  m.doc() = "FlexKV's native code: knows bytes, not engines.";
  flexkv::bind_keys(m);
  flexkv::bind_seal(m);
  flexkv::bind_copy(m);
  flexkv::bind_memory(m);
  flexkv::bind_index(m);
  flexkv::bind_sketch(m);
  flexkv::bind_presence(m);
  flexkv::bind_block_sets(m);
  flexkv::bind_slot_pool(m);
}
