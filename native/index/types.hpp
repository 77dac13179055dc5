// What all parts of the index share: identifiers, keys, rules of a namespace.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace flexkv::index {

using NodeId = uint32_t;
using TileId = uint32_t;
constexpr uint32_t kNone = ~0u;
constexpr uint8_t kNoTier = 255;
constexpr int64_t kNoSlot = -1;
constexpr uint64_t kEmpty = (uint64_t(1) << 40) - 1;  // a 40-bit slot that holds nothing
constexpr int64_t kMaxSlot = int64_t(kEmpty) - 1;
constexpr size_t kKeyBytes = 32;

// Keys are SHA-256 digests: 32 bytes at any address.
inline bool same_key(const uint8_t* a, const uint8_t* b) { return std::memcmp(a, b, kKeyBytes) == 0; }
inline uint64_t key_word(const uint8_t* key) {
  uint64_t word;
  std::memcpy(&word, key, sizeof word);
  return word;
}

enum class Coverage : uint8_t { kAll, kWindow, kState };

struct Rule {
  Coverage coverage = Coverage::kAll;
  uint32_t window = 0;                 // blocks, for kWindow
  std::vector<uint32_t> slot_classes;  // one a tier
  bool operator==(const Rule&) const = default;
};

// Errors that the bindings turn into FlexKV's Python exceptions.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct UnknownNamespace : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct LayoutMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace flexkv::index
