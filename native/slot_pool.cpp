// Slot pools, batch by batch. flexkv_core/pool.py says what they promise, and checks classes and counts.
//
// The GIL is held throughout, so a call is one step for all threads: a batch takes microseconds.
#include "slot_pool.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "block_arguments.hpp"

namespace flexkv {
namespace {

class PySlotPool {
 public:
  PySlotPool(int64_t pages, int64_t extent_pages) : pool_(pages, extent_pages) {}
  PySlotPool(const PySlotPool&) = delete;

  SlotPool& pool() { return pool_; }

  nb::object allocate(uint32_t number, int64_t count) {
    if (count > pool_.available(number)) return nb::none();
    nb::object slots = numpy().empty(count, numpy().int64);
    return pool_.allocate(number, count, NumPy::data<int64_t>(slots)) ? slots : nb::none();
  }

  void free(nb::handle slots) {
    const Slots given(slots);
    if (pool_.free(given.data(), given.count())) return;
    std::vector<int64_t> sorted(given.data(), given.data() + given.count());
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
      throw nb::value_error("slots name a slot twice: free each once");
    }
    std::string wrong;
    size_t found = 0;
    for (size_t i = 0; i < given.count() && found < kNamed; ++i) {
      if (pool_.is_allocated(given.data()[i])) continue;
      wrong += (found++ == 0 ? "" : ", ") + std::to_string(given.data()[i]);
    }
    throw nb::value_error(("slots [" + wrong + "] are not allocated: free what allocate gave, once").c_str());
  }

  nb::object adopt(nb::handle slots, uint32_t number) {
    const Slots given(slots);
    nb::object taken = numpy().empty(given.count(), numpy().boolean);
    pool_.adopt(number, given.data(), given.count(), NumPy::data<bool>(taken));
    return taken;
  }

  nb::list room_of_others(uint32_t number, size_t most) const {
    nb::list ranges;
    for (const SlotPool::Range& range : pool_.room_of_others(number, most)) {
      ranges.append(nb::make_tuple(range.start, range.stop, range.used));
    }
    return ranges;
  }

 private:
  static constexpr size_t kNamed = 8;  // slots that an error spells out

  class Slots {
   public:
    explicit Slots(nb::handle slots) : view_(slots, numpy().copied) {
      if (view_.dimensions() == 1 && (view_.holds_int64() || view_.size(0) == 0)) return;
      throw nb::value_error(("slots are " + text_of(nb::object(slots.attr("dtype"))) + " " +
                             text_of(nb::object(slots.attr("shape"))) + ": pass a 1-D int64 array").c_str());
    }
    const int64_t* data() const { return view_.data<int64_t>(); }
    size_t count() const { return size_t(view_.size(0)); }

   private:
    View view_;
  };

  SlotPool pool_;
};

}  // namespace

void bind_slot_pool(nb::module_& m) {
  nb::class_<PySlotPool>(m, "SlotPool")
      .def(nb::init<int64_t, int64_t>(), nb::arg("pages"), nb::arg("extent_pages"))
      .def("add_class", [](PySlotPool& self, int64_t pages, uint32_t run_extents, uint32_t run_slots) {
        return self.pool().add_class(pages, run_extents, run_slots);
      }, nb::arg("pages"), nb::arg("run_extents"), nb::arg("run_slots"))
      .def("clear", [](PySlotPool& self) { self.pool().clear(); })
      .def("allocate", &PySlotPool::allocate, nb::arg("slot_class"), nb::arg("count"))
      .def("free", &PySlotPool::free, nb::arg("slots"))
      .def("adopt", &PySlotPool::adopt, nb::arg("slots"), nb::arg("slot_class"))
      .def("available", [](PySlotPool& self, uint32_t number) { return self.pool().available(number); },
           nb::arg("slot_class"))
      .def("allocated", [](PySlotPool& self, uint32_t number) { return self.pool().allocated(number); },
           nb::arg("slot_class"))
      .def("extents", [](PySlotPool& self, uint32_t number) { return self.pool().extents(number); },
           nb::arg("slot_class"))
      .def("room_of_others", &PySlotPool::room_of_others, nb::arg("slot_class"), nb::arg("most"))
      .def_prop_ro("used_classes", [](PySlotPool& self) { return self.pool().used_classes(); })
      .def_prop_ro("used_pages", [](PySlotPool& self) { return self.pool().used_pages(); });
}

}  // namespace flexkv
