// Sets of blocks for the planner and its kin, batch by batch. flexkv_core/_native.pyi says what they promise.
//
// The GIL is held throughout, so a call is one step for all threads: a batch takes microseconds.
#include <nanobind/nanobind.h>

#include "bindings.hpp"
#include "block_arguments.hpp"
#include "block_sets.hpp"

namespace flexkv {
namespace {

class BlockSet {
 public:
  BlockSet() = default;
  BlockSet(const BlockSet&) = delete;

  nb::object add_new(nb::handle keys, nb::handle groups) {
    const Blocks blocks(keys, groups);
    nb::object fresh = numpy().empty(blocks.count(), numpy().boolean);
    bool* out = NumPy::data<bool>(fresh);
    blocks.forward(tally_, [&](size_t i, const uint8_t* key, uint32_t group) {
      out[i] = tally_.count(key, group) == 0;
      if (out[i]) tally_.add(key, group);
    });
    return fresh;
  }

  nb::object contains(nb::handle keys, nb::handle groups) const {
    const Blocks blocks(keys, groups);
    nb::object found = numpy().empty(blocks.count(), numpy().boolean);
    bool* out = NumPy::data<bool>(found);
    if (tally_.size() == 0) {
      std::memset(out, 0, blocks.count());
      return found;
    }
    blocks.forward(tally_,
                   [&](size_t i, const uint8_t* key, uint32_t group) { out[i] = tally_.count(key, group) != 0; });
    return found;
  }

  void discard(nb::handle keys, nb::handle groups) {
    const Blocks blocks(keys, groups);
    if (tally_.size() == 0) return;
    blocks.forward(tally_, [&](size_t, const uint8_t* key, uint32_t group) { tally_.take(key, group); });
  }

  void clear() { tally_.clear(); }
  size_t size() const { return tally_.size(); }
  size_t memory_bytes() const { return tally_.memory_bytes(); }

 private:
  BlockTally tally_;
};

}  // namespace

void bind_block_sets(nb::module_& m) {
  nb::class_<BlockSet>(m, "BlockSet")
      .def(nb::init<>())
      .def("add_new", &BlockSet::add_new, nb::arg("keys"), nb::arg("groups"))
      .def("contains", &BlockSet::contains, nb::arg("keys"), nb::arg("groups"))
      .def("discard", &BlockSet::discard, nb::arg("keys"), nb::arg("groups"))
      .def("clear", &BlockSet::clear)
      .def("__len__", &BlockSet::size)
      .def_prop_ro("memory_bytes", &BlockSet::memory_bytes);
}

}  // namespace flexkv
