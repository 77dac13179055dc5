#include "bindings.hpp"

namespace flexkv {
void bind_keys(nanobind::module_&) {}
}  // namespace flexkv
