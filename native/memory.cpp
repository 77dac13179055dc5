#include "bindings.hpp"

namespace flexkv {
void bind_memory(nanobind::module_&) {}
}  // namespace flexkv
