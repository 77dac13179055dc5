// What a key-addressed tier holds, in order of use: entries in a doubly linked list. flexkv_core/presence.py says what
// it promises.
//
// The GIL is held throughout, so a call is one step for all threads: a batch takes microseconds.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "bindings.hpp"
#include "block_arguments.hpp"
#include "block_sets.hpp"

namespace flexkv {
namespace {

constexpr uint64_t kLengthLimit = uint64_t(1) << 56;

class Presence {
 public:
  Presence(std::optional<int64_t> capacity, uint64_t max_entries) : capacity_(capacity), max_entries_(max_entries) {}
  Presence(const Presence&) = delete;

  void add(nb::handle keys, nb::handle groups, nb::handle lengths) {
    const Blocks blocks(keys, groups);
    const View view(lengths, numpy().copied);
    check_lengths(view, lengths, blocks.count());
    const int64_t* length = view.data<int64_t>();
    blocks.backward(table_, [&](size_t i, const uint8_t* key, uint32_t group) {
      uint32_t number = table_.find(key, group);
      if (number == kNone) {
        number = table_.insert(key, group);
      } else {
        unlink(number);
        used_ -= int64_t(table_[number].length);
      }
      table_[number].length = uint64_t(length[i]);
      used_ += length[i];
      append(number);
    });
    if (!capacity_) take(0, nullptr);
  }

  void discard(nb::handle keys, nb::handle groups) {
    const Blocks blocks(keys, groups);
    blocks.forward(table_, [&](size_t, const uint8_t* key, uint32_t group) {
      const uint32_t number = table_.find(key, group);
      if (number != kNone) drop(number);
    });
  }

  void clear() {
    table_.clear();
    oldest_ = newest_ = kNone;
    used_ = 0;
  }

  nb::object held(nb::handle keys, nb::handle group) const {
    const Blocks blocks(keys, group);
    nb::object found = numpy().empty(blocks.count(), numpy().boolean);
    bool* out = NumPy::data<bool>(found);
    blocks.forward(table_, [&](size_t i, const uint8_t* key, uint32_t g) { out[i] = table_.find(key, g) != kNone; });
    return found;
  }

  void touch(nb::handle keys, nb::handle group) {
    const Blocks blocks(keys, group);
    blocks.backward(table_, [&](size_t, const uint8_t* key, uint32_t g) {
      const uint32_t number = table_.find(key, g);
      if (number == kNone || number == newest_) return;
      unlink(number);
      append(number);
    });
  }

  void pin(nb::handle keys, nb::handle groups) {
    const Blocks blocks(keys, groups);
    blocks.forward(pins_, [&](size_t, const uint8_t* key, uint32_t group) { pins_.add(key, group); });
  }

  void unpin(nb::handle keys, nb::handle groups) {
    const Blocks blocks(keys, groups);
    for (size_t i = 0; i < blocks.count(); ++i) {
      if (pins_.take(blocks.key(i), blocks.group(i))) continue;
      for (size_t j = 0; j < i; ++j) pins_.add(blocks.key(j), blocks.group(j));
      throw nb::value_error(("key " + hex(blocks.key(i)) + " group " + std::to_string(blocks.group(i)) +
                             " has no such pin: unpin once a pin").c_str());
    }
  }

  nb::object overflow() { return capacity_ ? entries(0) : nothing(); }

  // The caller has checked that it is 0 or more.
  nb::object evict_for(int64_t nbytes) { return capacity_ ? entries(nbytes) : nothing(); }

  int64_t used_bytes() const { return used_; }
  size_t size() const { return table_.size(); }
  uint32_t pinned() const { return pins_.size(); }
  size_t memory_bytes() const { return table_.memory_bytes() + pins_.memory_bytes(); }

 private:
  struct Entry {
    uint8_t key[index::kKeyBytes];
    uint32_t older, newer;
    uint64_t length : 56, group : 8;
  };
  static_assert(sizeof(Entry) == 48);
  using Table = BlockTable<Entry>;
  static constexpr uint32_t kNone = Table::kNone;

  struct Taken {
    std::vector<uint8_t> keys, groups;
    std::vector<int64_t> lengths;
  };

  // Of so many lengths, each counted as new: the sum of all cannot pass 2^63 then.
  void check_lengths(const View& view, nb::handle lengths, size_t count) const {
    bool good = view.holds_int64() && view.dimensions() == 1 && size_t(view.size(0)) == count;
    __int128 sum = used_;
    for (size_t i = 0; good && i < count; ++i) {
      const int64_t length = view.data<int64_t>()[i];
      good = length >= 0 && uint64_t(length) < kLengthLimit;
      sum += length;
    }
    if (good && sum <= INT64_MAX) return;
    const std::string what =
        text_of(nb::object(lengths.attr("dtype"))) + " " + text_of(nb::object(lengths.attr("shape")));
    throw nb::value_error(("lengths are " + what + ": pass int64 (" + std::to_string(count) +
                           ",) of 0 to 2**56 - 1 bytes, 2**63 - 1 together").c_str());
  }

  void append(uint32_t number) {
    Entry& entry = table_[number];
    entry.older = newest_;
    entry.newer = kNone;
    (newest_ == kNone ? oldest_ : table_[newest_].newer) = number;
    newest_ = number;
  }

  void unlink(uint32_t number) {
    const Entry& entry = table_[number];
    (entry.older == kNone ? oldest_ : table_[entry.older].newer) = entry.newer;
    (entry.newer == kNone ? newest_ : table_[entry.newer].older) = entry.older;
  }

  void drop(uint32_t number) {
    unlink(number);
    used_ -= int64_t(table_[number].length);
    table_.erase(number);
  }

  // Drops from the least recently used on, passing over pinned ones, until `nbytes` more fit.
  void take(int64_t nbytes, Taken* taken) {
    const __int128 most = capacity_ ? __int128(*capacity_) - nbytes : __int128(INT64_MAX);
    for (uint32_t number = oldest_; number != kNone && (used_ > most || table_.size() > max_entries_);) {
      const Entry& entry = table_[number];
      const uint32_t next = entry.newer;
      if (next != kNone) __builtin_prefetch(&table_[next]);
      if (pins_.size() == 0 || pins_.count(entry.key, entry.group) == 0) {
        if (taken != nullptr) {
          taken->keys.insert(taken->keys.end(), entry.key, entry.key + index::kKeyBytes);
          taken->groups.push_back(uint8_t(entry.group));
          taken->lengths.push_back(int64_t(entry.length));
        }
        drop(number);
      }
      number = next;
    }
  }

  nb::object entries(int64_t nbytes) {
    Taken taken;
    take(nbytes, &taken);
    return arrays(taken);
  }
  static nb::object nothing() { return arrays(Taken{}); }
  static nb::object arrays(const Taken& taken) {
    return nb::make_tuple(numpy().copy(taken.keys, numpy().uint8, index::kKeyBytes),
                          numpy().copy(taken.groups, numpy().uint8), numpy().copy(taken.lengths, numpy().int64));
  }

  static std::string hex(const uint8_t* key) {
    static const char* kDigits = "0123456789abcdef";
    std::string text;
    for (size_t i = 0; i < index::kKeyBytes; ++i) text.append({kDigits[key[i] >> 4], kDigits[key[i] & 15]});
    return text;
  }

  std::optional<int64_t> capacity_;
  uint64_t max_entries_;
  int64_t used_ = 0;
  uint32_t oldest_ = kNone, newest_ = kNone;
  Table table_;
  BlockTally pins_;
};

}  // namespace

void bind_presence(nb::module_& m) {
  nb::class_<Presence>(m, "Presence")
      .def(nb::init<std::optional<int64_t>, uint64_t>(), nb::arg("capacity_bytes").none(), nb::arg("max_entries"))
      .def("add", &Presence::add, nb::arg("keys"), nb::arg("groups"), nb::arg("lengths"))
      .def("discard", &Presence::discard, nb::arg("keys"), nb::arg("groups"))
      .def("clear", &Presence::clear)
      .def("held", &Presence::held, nb::arg("keys"), nb::arg("group"))
      .def("touch", &Presence::touch, nb::arg("keys"), nb::arg("group"))
      .def("pin", &Presence::pin, nb::arg("keys"), nb::arg("groups"))
      .def("unpin", &Presence::unpin, nb::arg("keys"), nb::arg("groups"))
      .def("overflow", &Presence::overflow)
      .def("evict_for", &Presence::evict_for, nb::arg("nbytes"))
      .def_prop_ro("pinned", &Presence::pinned)
      .def("__len__", &Presence::size)
      .def_prop_ro("used_bytes", &Presence::used_bytes)
      .def_prop_ro("memory_bytes", &Presence::memory_bytes);
}

}  // namespace flexkv
