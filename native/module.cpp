// The extension module: each concern binds itself; nothing else lives here.
#include <nanobind/nanobind.h>

#include "bindings.hpp"

NB_MODULE(_native, m) {
  m.doc() = "FlexKV's native code: knows bytes, not engines.";
  flexkv::bind_keys(m);
  flexkv::bind_seal(m);
  flexkv::bind_copy(m);
  flexkv::bind_memory(m);
  flexkv::bind_sketch(m);
}
