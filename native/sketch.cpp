// What was offered before: two rotating Bloom filters, blocked by cache line. flexkv_core/policies/admission.py says
// what they promise and where the numbers come from.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

constexpr std::uint64_t kLargestWindow = std::uint64_t{1} << 28;
constexpr int kBlocksPerLine = 32;  // 512 bits, 16 a block
constexpr int kProbes = 7;          // 9 bits each, of one 64-bit number
constexpr std::size_t kKeyBytes = 32;

struct alignas(64) Line {
  std::uint64_t words[8];
};

// The finaliser of MurmurHash3: a bijection in which each bit depends on all.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

struct Place {
  std::size_t line;
  std::uint64_t probes;
};

class TouchSketch {
 public:
  using Keys = nb::ndarray<const std::uint8_t, nb::shape<-1, kKeyBytes>, nb::c_contig, nb::device::cpu>;
  using Flags = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

  explicit TouchSketch(std::uint64_t window) : window_(window) {
    if (window < 1 || window > kLargestWindow) {
      const std::string text = "window " + std::to_string(window) + ": must be from 1 to " +
                               std::to_string(kLargestWindow) + " blocks";
      throw nb::value_error(text.c_str());
    }
    const std::size_t lines = (window + kBlocksPerLine - 1) / kBlocksPerLine;
    current_.resize(lines);
    previous_.resize(lines);
  }

  // Notes each block, in order, and says of each whether it was noted before.
  void touch(const Keys& keys, unsigned group, const Flags& seen) {
    if (seen.shape(0) != keys.shape(0)) throw nb::value_error("seen must have one entry a key");
    if (group > 254) throw nb::value_error("group: must be 0 to 254");
    const std::uint8_t* key = keys.data();
    for (std::size_t i = 0; i < keys.shape(0); ++i, key += kKeyBytes) seen.data()[i] = touch_one(place(key, group));
  }

  std::uint64_t window() const { return window_; }
  std::uint64_t memory_bytes() const { return (current_.capacity() + previous_.capacity()) * sizeof(Line); }

 private:
  Place place(const std::uint8_t* key, unsigned group) const {
    std::uint64_t words[4];
    std::memcpy(words, key, kKeyBytes);
    const std::uint64_t one = mix(words[0] ^ std::rotl(words[2], 32) ^ (group + 1) * 0x9e3779b97f4a7c15ull);
    const std::uint64_t two = mix(one ^ mix(words[1] ^ std::rotl(words[3], 32)));
    // The line is the number's share of 2^64, without the bias and the cost of a remainder.
    return {static_cast<std::size_t>(static_cast<unsigned __int128>(one) * current_.size() >> 64), two};
  }

  // Sets the probes' bits; whether all were set already.
  static bool set(Line& line, std::uint64_t probes) {
    bool all = true;
    for (int i = 0; i < kProbes; ++i, probes >>= 9) {
      std::uint64_t& word = line.words[probes >> 6 & 7];
      const std::uint64_t bit = std::uint64_t{1} << (probes & 63);
      all &= (word & bit) != 0;
      word |= bit;
    }
    return all;
  }

  static bool all_set(const Line& line, std::uint64_t probes) {
    for (int i = 0; i < kProbes; ++i, probes >>= 9) {
      if (!(line.words[probes >> 6 & 7] >> (probes & 63) & 1)) return false;
    }
    return true;
  }

  bool touch_one(const Place& at) {
    const bool before = all_set(previous_[at.line], at.probes);
    if (set(current_[at.line], at.probes)) return true;
    if (++noted_ == window_) {
      std::swap(current_, previous_);
      std::memset(static_cast<void*>(current_.data()), 0, current_.size() * sizeof(Line));
      noted_ = 0;
    }
    return before;
  }

  std::uint64_t window_;
  std::uint64_t noted_ = 0;  // blocks in the current filter
  std::vector<Line> current_, previous_;
};

}  // namespace

void bind_sketch(nb::module_& m) {
  nb::class_<TouchSketch>(m, "TouchSketch")
      .def(nb::init<std::uint64_t>(), nb::arg("window"))
      .def("touch", &TouchSketch::touch, nb::arg("keys").noconvert(), nb::arg("group"), nb::arg("seen").noconvert())
      .def_prop_ro("window", &TouchSketch::window)
      .def_prop_ro("memory_bytes", &TouchSketch::memory_bytes);
}

}  // namespace flexkv
