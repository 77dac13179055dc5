// The index for Python: arguments, arrays, the lock. flexkv_core/index/native.py puts the finishing touches.
//
// The lock is taken with the GIL held and only ever waited for without it: a thread that waits stops nobody.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "index/gate.hpp"
#include "index/index.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

using namespace flexkv::index;

// A third party's policy. An exception counts as 0, or as no change, and is reported.
class PythonPolicy final : public CustomPolicy {
 public:
  explicit PythonPolicy(nb::object policy) : policy_(policy) {}

  int64_t insert(int64_t now) override {
    return ask(0, [&] { return policy_.attr("insert")(now); });
  }
  int64_t hit(int64_t state, int64_t now) override {
    return ask(state, [&] { return policy_.attr("hit")(state, now); });
  }
  int64_t order(int64_t state) override {
    return ask(0, [&] { return policy_.attr("order")(state); });
  }

 private:
  template <class Call>
  int64_t ask(int64_t otherwise, Call call) {
    try {
      nb::object answer = nb::steal(PyNumber_Index(call().ptr()));
      const long long value = answer.is_valid() ? PyLong_AsLongLong(answer.ptr()) : 0;
      if (PyErr_Occurred()) throw nb::python_error();
      otherwise = value;
    } catch (nb::python_error& error) {
      error.restore();
      PyErr_WriteUnraisable(policy_.ptr());
    }
    return otherwise;
  }

  nb::object policy_;
};

class PyIndex {
 public:
  using PolicyArguments = std::tuple<std::string, uint64_t, uint32_t, nb::object>;

  PyIndex(uint32_t tiers, const std::vector<PolicyArguments>& policies) : index_(tiers, made(policies)) {
    nb::object types = nb::module_::import_("flexkv_core.index");
    match_ = types.attr("Match");
    evicted_ = types.attr("Evicted");
    removed_ = types.attr("Removed");
    copies_ = types.attr("Copies");
  }

  void advance(int64_t tick) {
    Guard guard(*this);
    if (tick > 0) index_.advance(uint64_t(tick));
  }

  void add_namespace(nb::handle root,
                     const std::vector<std::tuple<std::string, uint32_t, std::vector<uint32_t>>>& groups) {
    std::vector<Rule> rules;
    for (const auto& [coverage, window, classes] : groups) {
      rules.push_back({coverage == "all"      ? Coverage::kAll
                       : coverage == "window" ? Coverage::kWindow
                                              : Coverage::kState,
                       window, classes});
    }
    Guard guard(*this);
    translate([&] { index_.add_namespace(root_of(root), std::move(rules)); });
  }

  void retire_namespace(nb::handle root) {
    Guard guard(*this);
    translate([&] { index_.retire_namespace(root_of(root)); });
  }

  bool has_namespace(nb::handle root) {
    Guard guard(*this);
    return index_.has_namespace(root_of(root));
  }

  bool has_copies(nb::handle root) {
    Guard guard(*this);
    bool found = false;
    translate([&] { found = index_.has_copies(root_of(root)); });
    return found;
  }

  nb::object match(nb::handle root, nb::object keys) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Keys view(*this, keys, "keys");
    Index::Walked walked{};
    translate([&] { walked = index_.match(tree, view.data(), view.count()); });
    const nb::object shape = nb::make_tuple(walked.groups, walked.known);
    nb::object tiers = numpy_.empty(shape, numpy_.uint8), slots = numpy_.empty(shape, numpy_.int64);
    uint32_t blocks = 0;
    if (walked.known != 0) blocks = index_.fill(walked, NumPy::data<uint8_t>(tiers), NumPy::data<int64_t>(slots));
    return named(match_, nb::make_tuple(blocks, tiers, slots));
  }

  nb::object residency(nb::handle root, nb::object keys, int64_t tier, int64_t group) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Keys view(*this, keys, "keys");
    nb::object slots = numpy_.empty(view.count(), numpy_.int64);
    translate([&] {
      index_.residency(tree, view.data(), view.count(), unsigned_of(tier), unsigned_of(group),
                       NumPy::data<int64_t>(slots));
    });
    return slots;
  }

  void touch(nb::handle root, nb::object keys) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Keys view(*this, keys, "keys");
    translate([&] { index_.touch(tree, view.data(), view.count()); });
  }

  nb::object insert(nb::handle root, nb::object keys, int64_t tier, int64_t group, nb::object slots) {
    Guard guard(*this);
    const Index::Tree tree = live(root);
    Keys view(*this, keys, "keys");
    column(tree, tier, group);
    Integers values(*this, slots, view.count(), "slots");
    nb::object taken = numpy_.zeros(view.count(), numpy_.boolean);
    translate([&] {
      index_.insert(tree, view.data(), view.count(), uint32_t(tier), uint32_t(group), values.data(),
                    NumPy::data<uint8_t>(taken));
    });
    return taken;
  }

  nb::object remove(nb::handle root, nb::object keys, int64_t tier, int64_t group, int64_t start, int64_t stop) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Keys view(*this, keys, "keys");
    column(tree, tier, group);
    range(start, stop, view.count());
    nb::object slots = numpy_.empty(stop - start, numpy_.int64);
    translate([&] {
      index_.remove(tree, view.data(), uint32_t(tier), uint32_t(group), uint32_t(start), uint32_t(stop),
                    NumPy::data<int64_t>(slots));
    });
    return slots;
  }

  nb::object remove_subtree(nb::handle root, nb::object keys) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Keys view(*this, keys, "keys");
    Forest::RemovedRows rows;
    translate([&] { rows = index_.remove_subtree(tree, view.data(), view.count()); });
    return named(removed_, nb::make_tuple(numpy_.copy(rows.tiers, numpy_.uint8),
                                          numpy_.copy(rows.keys, numpy_.uint8, kKeyBytes),
                                          numpy_.copy(rows.groups, numpy_.uint8), numpy_.copy(rows.slots, numpy_.int64)));
  }

  void pin(nb::handle root, nb::object keys, int64_t tier, int64_t group, int64_t start, int64_t stop) {
    change_pins(root, keys, tier, group, start, stop, &Index::pin);
  }
  void unpin(nb::handle root, nb::object keys, int64_t tier, int64_t group, int64_t start, int64_t stop) {
    change_pins(root, keys, tier, group, start, stop, &Index::unpin);
  }

  nb::object evict(int64_t tier, int64_t count, int64_t slot_class) {
    Guard guard(*this);
    translate([&] { index_.count(unsigned_of(tier)); });
    if (count < 0) throw nb::value_error(("count " + std::to_string(count) + ": must be 0 or more").c_str());
    if (uint64_t(count) > index_.count(uint32_t(tier))) return nb::none();
    Gone gone(*this, count);
    bool done = false;
    translate([&] { done = index_.evict(uint32_t(tier), uint64_t(count), unsigned_of(slot_class), gone.rows); });
    return done ? named(evicted_, gone.arrays) : nb::none();
  }

  nb::object evict_range(int64_t tier, int64_t start, int64_t stop, int64_t count) {
    Guard guard(*this);
    translate([&] { index_.count(unsigned_of(tier)); });
    if (count < 0 || uint64_t(count) > index_.count(uint32_t(tier))) return nb::none();
    Gone gone(*this, count);
    bool done = false;
    translate([&] {
      done = index_.evict_range(uint32_t(tier), uint64_t(std::max<int64_t>(start, 0)),
                                uint64_t(std::max<int64_t>(stop, 0)), uint64_t(count), gone.rows);
    });
    return done ? named(evicted_, gone.arrays) : nb::none();
  }

  nb::object recover(nb::handle root, int64_t tier, int64_t group, nb::object keys, nb::object parents,
                     nb::object depths, nb::object slots) {
    Guard guard(*this);
    const Index::Tree tree = live(root);
    Keys view(*this, keys, "keys"), above(*this, parents, "parents");
    column(tree, tier, group);
    if (above.count() != view.count()) {
      throw nb::value_error((std::to_string(above.count()) + " parents for " + std::to_string(view.count()) +
                             " keys: give one each").c_str());
    }
    Integers depth_view(*this, depths, view.count(), "depths"), slot_view(*this, slots, view.count(), "slots");
    nb::object taken = numpy_.zeros(view.count(), numpy_.boolean);
    uint8_t* out = NumPy::data<uint8_t>(taken);
    translate([&] {
      std::optional<nb::gil_scoped_release> release;
      if (customs_.empty()) release.emplace();
      index_.recover(tree, uint32_t(tier), uint32_t(group), view.count(), view.data(), above.data(),
                     depth_view.data(), slot_view.data(), out);
    });
    return taken;
  }

  void end_recovery() {
    Guard guard(*this);
    index_.end_recovery();
  }

  void drop_tier(int64_t tier) {
    Guard guard(*this);
    translate([&] {
      std::optional<nb::gil_scoped_release> release;
      if (customs_.empty()) release.emplace();
      index_.drop_tier(unsigned_of(tier));
    });
  }

  uint64_t count(int64_t tier) {
    Guard guard(*this);
    uint64_t copies = 0;
    translate([&] { copies = index_.count(unsigned_of(tier)); });
    return copies;
  }

  nb::object copies(nb::handle root, int64_t tier, int64_t group) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Forest::CopyRows rows;
    translate([&] {
      nb::gil_scoped_release release;
      rows = index_.copies(tree, unsigned_of(tier), unsigned_of(group));
    });
    return named(copies_, nb::make_tuple(numpy_.copy(rows.keys, numpy_.uint8, kKeyBytes),
                                         numpy_.copy(rows.parents, numpy_.uint8, kKeyBytes),
                                         numpy_.copy(rows.depths, numpy_.int64), numpy_.copy(rows.slots, numpy_.int64)));
  }

  nb::dict statistics() {
    Guard guard(*this);
    const Statistics found = index_.statistics();
    nb::dict all;
    all["namespaces"] = found.namespaces;
    all["positions"] = found.positions;
    all["orphans"] = found.orphans;
    all["copies"] = found.copies;
    all["pinned"] = found.pinned;
    all["visited"] = found.visited;
    all["nodes"] = found.nodes;
    all["memory_bytes"] = found.memory_bytes;
    return all;
  }

 private:
  class Guard {
   public:
    explicit Guard(PyIndex& owner) {
      try {
        visit_.emplace(owner.gate_);
      } catch (const Reentered& error) {
        raise("StateError", error.what());
      }
      if (owner.index_.torn()) raise("StateError", "the index failed in the midst of a change, for want of memory: make a new one");
    }

   private:
    std::optional<Gate::Visit<nb::gil_scoped_release>> visit_;
  };

  class Keys {
   public:
    Keys(const PyIndex& owner, nb::handle keys, const char* name)
        : view_(checked(owner, keys, name), owner.numpy_.copied) {
      if (!view_.holds('B')) raise("KeyTypeError", std::string(name) + " are of another dtype: pass a uint8 array (n, 32)");
      if (view_.dimensions() != 2 || view_.size(1) != Py_ssize_t(kKeyBytes)) {
        raise("KeyInputError", std::string(name) + " have another shape: pass (n, 32)");
      }
      if (view_.size(0) > Py_ssize_t(GroupState::kNoHole - 1)) raise("KeyInputError", std::string(name) + " are too many");
    }
    const uint8_t* data() const { return view_.data<uint8_t>(); }
    uint32_t count() const { return uint32_t(view_.size(0)); }

   private:
    static nb::handle checked(const PyIndex& owner, nb::handle keys, const char* name) {
      if (PyObject_IsInstance(keys.ptr(), owner.numpy_.array.ptr()) != 1) {
        raise("KeyTypeError", std::string(name) + " are " + name_of_type(keys) + ": pass a uint8 array (n, 32)");
      }
      return keys;
    }
    View view_;
  };

  class Integers {
   public:
    Integers(const PyIndex& owner, nb::handle values, uint32_t count, const char* name)
        : view_(checked(owner, values, count, name), owner.numpy_.copied) {
      if (!view_.holds_int64() || view_.dimensions() != 1 || view_.size(0) != Py_ssize_t(count)) {
        refuse(name, "of another dtype or shape", count);
      }
    }
    const int64_t* data() const { return view_.data<int64_t>(); }

   private:
    static nb::handle checked(const PyIndex& owner, nb::handle values, uint32_t count, const char* name) {
      if (PyObject_IsInstance(values.ptr(), owner.numpy_.array.ptr()) != 1) refuse(name, name_of_type(values), count);
      return values;
    }
    [[noreturn]] static void refuse(const char* name, const std::string& what, uint32_t count) {
      throw nb::value_error(
          (std::string(name) + " are " + what + ": pass int64 (" + std::to_string(count) + ",)").c_str());
    }
    View view_;
  };

  struct Gone {  // arrays for what an eviction returns
    Gone(const PyIndex& owner, int64_t count) {
      const NumPy& numpy = owner.numpy_;
      nb::object shape = nb::make_tuple(count, kKeyBytes);
      nb::object roots = numpy.empty(shape, numpy.uint8), keys = numpy.empty(shape, numpy.uint8);
      nb::object groups = numpy.empty(count, numpy.uint8), slots = numpy.empty(count, numpy.int64);
      rows = {NumPy::data<uint8_t>(roots), NumPy::data<uint8_t>(keys), NumPy::data<uint8_t>(groups),
              NumPy::data<int64_t>(slots)};
      arrays = nb::make_tuple(roots, keys, groups, slots);
    }
    EvictedRows rows;
    nb::object arrays;
  };

  std::vector<Policy> made(const std::vector<PolicyArguments>& policies) {
    static const std::pair<const char*, Policy::Kind> kKinds[] = {
        {"lru", Policy::Kind::kLru},   {"lfu", Policy::Kind::kLfu},   {"slru", Policy::Kind::kSlru},
        {"fifo", Policy::Kind::kFifo}, {"mru", Policy::Kind::kMru},   {"filo", Policy::Kind::kFilo},
        {"s3fifo", Policy::Kind::kS3Fifo}};
    std::vector<Policy> all;
    for (const auto& [name, reward, threshold, custom] : policies) {
      Policy policy;
      policy.kind = Policy::Kind::kCustom;
      for (const auto& [known, kind] : kKinds) {
        if (name == known) policy.kind = kind;
      }
      policy.reward = reward;
      policy.threshold = threshold;
      if (policy.kind == Policy::Kind::kCustom) {
        customs_.push_back(std::make_unique<PythonPolicy>(custom));
        policy.custom = customs_.back().get();
      }
      all.push_back(policy);
    }
    return all;
  }

  static Root root_of(nb::handle root) {
    if (!PyBytes_Check(root.ptr())) raise("KeyTypeError", "root is " + name_of_type(root) + ": pass bytes");
    if (PyBytes_GET_SIZE(root.ptr()) != Py_ssize_t(kKeyBytes)) {
      raise("KeyInputError", "root has " + std::to_string(PyBytes_GET_SIZE(root.ptr())) + " bytes: pass 32");
    }
    Root name;
    std::memcpy(name.data(), PyBytes_AS_STRING(root.ptr()), kKeyBytes);
    return name;
  }

  Index::Tree known(nb::handle root) {
    const Root name = root_of(root);
    Index::Tree tree{};
    translate([&] { tree = index_.tree(name); });
    return tree;
  }
  Index::Tree live(nb::handle root) {
    const Index::Tree tree = known(root);
    translate([&] { Index::check_alive(tree); });
    return tree;
  }

  void column(const Index::Tree& tree, int64_t tier, int64_t group) {
    translate([&] { index_.check_column(tree, unsigned_of(tier), unsigned_of(group)); });
  }

  static void range(int64_t start, int64_t stop, int64_t keys) {
    if (0 <= start && start <= stop && stop <= keys) return;
    throw nb::value_error(("positions [" + std::to_string(start) + ", " + std::to_string(stop) + ") of " +
                           std::to_string(keys) + " keys: 0 <= start <= stop <= " + std::to_string(keys) + " must hold").c_str());
  }

  // Negative numbers of tiers, groups and classes are out of every range.
  static uint32_t unsigned_of(int64_t number) {
    return number < 0 || number >= int64_t(kNone) ? kNone : uint32_t(number);
  }

  void change_pins(nb::handle root, nb::object keys, int64_t tier, int64_t group, int64_t start, int64_t stop,
                   void (Index::*change)(Index::Tree, const uint8_t*, uint32_t, uint32_t, uint32_t, uint32_t)) {
    Guard guard(*this);
    const Index::Tree tree = known(root);
    Keys view(*this, keys, "keys");
    column(tree, tier, group);
    range(start, stop, view.count());
    translate([&] {
      (index_.*change)(tree, view.data(), uint32_t(tier), uint32_t(group), uint32_t(start), uint32_t(stop));
    });
  }

  // An instance of a named tuple, without its Python constructor.
  static nb::object named(nb::handle type, nb::object values) {
    nb::object arguments = nb::make_tuple(values);
    PyObject* made = PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(type.ptr()), arguments.ptr(), nullptr);
    if (made == nullptr) throw nb::python_error();
    return nb::steal(made);
  }

  template <class Act>
  static void translate(Act act) {
    try {
      act();
    } catch (const ArgumentError& error) {
      throw nb::value_error(error.what());
    } catch (const UnknownNamespace& error) {
      raise("UnknownNamespaceError", error.what());
    } catch (const LayoutMismatch& error) {
      raise("LayoutError", error.what());
    }
  }

  std::vector<std::unique_ptr<PythonPolicy>> customs_;
  Gate gate_;
  Index index_;
  NumPy numpy_;
  nb::object match_, evicted_, removed_, copies_;
};

}  // namespace

void bind_index(nb::module_& m) {
  nb::class_<PyIndex>(m, "Index")
      .def(nb::init<uint32_t, const std::vector<PyIndex::PolicyArguments>&>(), nb::arg("tiers"), nb::arg("policies"))
      .def("advance", &PyIndex::advance, nb::arg("tick"))
      .def("_add_namespace", &PyIndex::add_namespace, nb::arg("root"), nb::arg("groups"))
      .def("retire_namespace", &PyIndex::retire_namespace, nb::arg("root"))
      .def("has_namespace", &PyIndex::has_namespace, nb::arg("root"))
      .def("has_copies", &PyIndex::has_copies, nb::arg("root"))
      .def("match", &PyIndex::match, nb::arg("root"), nb::arg("keys"))
      .def("residency", &PyIndex::residency, nb::arg("root"), nb::arg("keys"), nb::arg("tier"), nb::arg("group"))
      .def("touch", &PyIndex::touch, nb::arg("root"), nb::arg("keys"))
      .def("insert", &PyIndex::insert, nb::arg("root"), nb::arg("keys"), nb::arg("tier"), nb::arg("group"),
           nb::arg("slots"))
      .def("remove", &PyIndex::remove, nb::arg("root"), nb::arg("keys"), nb::arg("tier"), nb::arg("group"),
           nb::arg("start"), nb::arg("stop"))
      .def("remove_subtree", &PyIndex::remove_subtree, nb::arg("root"), nb::arg("keys"))
      .def("pin", &PyIndex::pin, nb::arg("root"), nb::arg("keys"), nb::arg("tier"), nb::arg("group"), nb::arg("start"),
           nb::arg("stop"))
      .def("unpin", &PyIndex::unpin, nb::arg("root"), nb::arg("keys"), nb::arg("tier"), nb::arg("group"),
           nb::arg("start"), nb::arg("stop"))
      .def("evict", &PyIndex::evict, nb::arg("tier"), nb::arg("count"), nb::arg("slot_class") = 0)
      .def("evict_range", &PyIndex::evict_range, nb::arg("tier"), nb::arg("start"), nb::arg("stop"), nb::arg("count"))
      .def("recover", &PyIndex::recover, nb::arg("root"), nb::arg("tier"), nb::arg("group"), nb::arg("keys"),
           nb::arg("parents"), nb::arg("depths"), nb::arg("slots"))
      .def("end_recovery", &PyIndex::end_recovery)
      .def("drop_tier", &PyIndex::drop_tier, nb::arg("tier"))
      .def("count", &PyIndex::count, nb::arg("tier"))
      .def("copies", &PyIndex::copies, nb::arg("root"), nb::arg("tier"), nb::arg("group"))
      .def("statistics", &PyIndex::statistics);
}

}  // namespace flexkv
