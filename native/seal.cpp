#include "bindings.hpp"

namespace flexkv {
void bind_seal(nanobind::module_&) {}
}  // namespace flexkv
