// What each native file adds to the extension module.
#pragma once
#include <nanobind/nanobind.h>

namespace flexkv {
void bind_keys(nanobind::module_& m);    // keys.cpp: block keys (SHA-256 chains)
void bind_seal(nanobind::module_& m);    // seal.cpp: write and verify seals (xxh3-64)
void bind_copy(nanobind::module_& m);    // copy.cpp: gather and scatter of fragments
void bind_memory(nanobind::module_& m);  // memory.cpp: pre-fault, page queries
void bind_index(nanobind::module_& m);   // index_bindings.cpp: the index
void bind_sketch(nanobind::module_& m);  // sketch.cpp: which blocks were offered before
void bind_presence(nanobind::module_& m);    // presence.cpp: what a key-addressed tier holds
void bind_block_sets(nanobind::module_& m);  // block_sets.cpp: sets of blocks
void bind_slot_pool(nanobind::module_& m);   // slot_pool.cpp: which slots of a tier are free
}  // namespace flexkv
