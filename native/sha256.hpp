// SHA-256 compression (FIPS 180-4), one and two streams at a time; what the machine can do is found at run time.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flexkv::sha256 {

constexpr size_t kChunk = 64;   // bytes that one compression takes
constexpr size_t kDigest = 32;  // bytes of a digest

// The chaining value. The order of its words is the implementation's own: use its `start` and `digest`.
struct alignas(16) State {
  uint32_t words[8];
};

struct Implementation {
  const char* name;
  void (*start)(State& state);
  void (*digest)(const State& state, uint8_t* out);
  // Compress `chunks` consecutive chunks of 64 bytes into the state.
  void (*one)(State& state, const uint8_t* data, size_t chunks);
  // The same for two independent streams. Where instructions have a long latency this takes little longer than one.
  void (*two)(State& a, const uint8_t* data_a, State& b, const uint8_t* data_b, size_t chunks);
};

const Implementation& portable();  // plain C++, any architecture
const Implementation& best();      // SHA-NI where this machine has it, else portable
}  // namespace flexkv::sha256
