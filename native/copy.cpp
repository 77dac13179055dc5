#include "bindings.hpp"

namespace flexkv {
void bind_copy(nanobind::module_&) {}
}  // namespace flexkv
