// Blocks as they come from Python: keys (n, 32) uint8 and a group, one for all or (n,) uint8. Checked here.
#pragma once
#include "arrays.hpp"
#include "index/types.hpp"

namespace flexkv {

// One import for all classes that take blocks; kept to the end of the process, like the module that it names.
inline const NumPy& numpy() {
  static const NumPy& made = *new NumPy;
  return made;
}

class Blocks {
 public:
  Blocks(nb::handle keys, nb::handle groups) : keys_(array(keys), numpy().copied), groups_(none_or(groups)) {
    if (!keys_.holds('B')) {
      raise("KeyTypeError", "keys are " + dtype(keys) + ": pass a uint8 array (n, 32)");
    }
    if (keys_.dimensions() != 2 || keys_.size(1) != Py_ssize_t(index::kKeyBytes)) {
      raise("KeyInputError", "keys have shape " + shape(keys) + ": pass (n, 32)");
    }
    count_ = size_t(keys_.size(0));
    if (groups_) {
      if (!groups_->holds('B') || groups_->dimensions() != 1 || size_t(groups_->size(0)) != count_) {
        raise("KeyInputError",
              "groups are " + dtype(groups) + " " + shape(groups) + ": pass uint8 (" + std::to_string(count_) + ",)");
      }
      return;
    }
    nb::object number = nb::steal(PyNumber_Index(groups.ptr()));
    if (!number.is_valid()) throw nb::python_error();
    int overflow = 0;
    const long value = PyLong_AsLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0 || value < 0 || value > kLargestGroup) {
      raise("KeyInputError", "group " + text_of(number) + ": must be 0 to 254");
    }
    group_ = uint32_t(value);
  }

  size_t count() const { return count_; }
  const uint8_t* key(size_t at) const { return keys_.data<uint8_t>() + at * index::kKeyBytes; }
  uint32_t group(size_t at) const { return groups_ ? groups_->data<uint8_t>()[at] : group_; }

  // Calls `act(position, key, group)`, first to last, or last to first; has `table` prefetch some blocks ahead.
  template <class Table, class Act>
  void forward(const Table& table, Act act) const {
    for (size_t i = 0; i < count_ && i < kAhead; ++i) table.prefetch(key(i));
    for (size_t i = 0; i < count_; ++i) {
      if (i + kAhead < count_) table.prefetch(key(i + kAhead));
      act(i, key(i), group(i));
    }
  }
  template <class Table, class Act>
  void backward(const Table& table, Act act) const {
    for (size_t i = 0; i < count_ && i < kAhead; ++i) table.prefetch(key(count_ - 1 - i));
    for (size_t i = count_; i-- > 0;) {
      if (i >= kAhead) table.prefetch(key(i - kAhead));
      act(i, key(i), group(i));
    }
  }

 private:
  static constexpr long kLargestGroup = 254;
  static constexpr size_t kAhead = 8;

  static nb::handle array(nb::handle keys) {
    if (!numpy().is_array(keys)) {
      raise("KeyTypeError", "keys are " + name_of_type(keys) + ": pass a uint8 array (n, 32)");
    }
    return keys;
  }
  static std::unique_ptr<View> none_or(nb::handle groups) {
    return numpy().is_array(groups) ? std::make_unique<View>(groups, numpy().copied) : nullptr;
  }
  static std::string dtype(nb::handle array) { return text_of(nb::object(array.attr("dtype"))); }
  static std::string shape(nb::handle array) { return text_of(nb::object(array.attr("shape"))); }

  View keys_;
  std::unique_ptr<View> groups_;
  size_t count_ = 0;
  uint32_t group_ = 0;
};

}  // namespace flexkv
