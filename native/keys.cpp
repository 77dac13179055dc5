// Block keys: key[i] = SHA-256(tokens[i] as little-endian int32 || extras[i] || key[i-1]).
//
// A block's message has a body, whole chunks of tokens and extras that depend on no key, and a tail with the previous
// key, which is the only serial part. Two lanes run at a time: the tail of block i beside the body of a later block, or
// the bodies of two blocks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "bindings.hpp"
#include "sha256.hpp"

namespace nb = nanobind;

namespace flexkv {
namespace {

using sha256::kChunk;
using sha256::kDigest;

std::atomic<uint64_t> tokens_hashed{0};  // by this process; lets tests see that nothing is hashed twice

// The position of the first token that is not in 0 .. 2^31-1, or -1.
template <class Token>
int64_t first_bad(const Token* tokens, size_t count) {
  using Wide = std::make_unsigned_t<Token>;
  Wide all = 0;
  for (size_t i = 0; i < count; ++i) all |= Wide(tokens[i]);
  if (all <= 0x7fffffffu) return -1;
  for (size_t i = 0; i < count; ++i) {
    if (Wide(tokens[i]) > 0x7fffffffu) return int64_t(i);
  }
  return -1;
}

template <class Token>
class Chain {
 public:
  Chain(const sha256::Implementation& sha, const Token* tokens, size_t block_size, size_t blocks,
        const uint8_t* previous, const uint8_t* extras, const int64_t* extra_offsets, uint8_t* out)
      : sha_(sha), tokens_(tokens), block_size_(block_size), blocks_(blocks), previous_(previous), extras_(extras),
        extra_offsets_(extra_offsets), out_(out) {}

  // Returns -1, or the position of a token that is out of range; then the keys are not complete.
  int64_t run() {
    for (;;) {
      for (Lane& lane : lanes_) {
        if (!lane.chunks) refill(lane);
      }
      if (bad_ >= 0) return bad_;
      Lane &a = lanes_[0], &b = lanes_[1];
      if (a.chunks && b.chunks) {
        const size_t chunks = std::min(a.chunks, b.chunks);
        sha_.two(*a.state, a.data, *b.state, b.data, chunks);
        advance(a, chunks);
        advance(b, chunks);
      } else if (a.chunks || b.chunks) {
        Lane& only = a.chunks ? a : b;
        sha_.one(*only.state, only.data, only.chunks);
        advance(only, only.chunks);
      } else {
        return -1;
      }
    }
  }

 private:
  static constexpr size_t kAhead = 4;  // bodies may be this many blocks ahead of the chain; a power of two

  struct Block {  // one that is begun and has no key yet
    sha256::State state;
    const uint8_t* message = nullptr;  // tokens and extras
    size_t length = 0;
    bool body_done = false;
    std::vector<uint8_t> joined;  // the message, where it does not lie in the caller's array as it is
  };
  struct Lane {
    sha256::State* state = nullptr;
    const uint8_t* data = nullptr;
    size_t chunks = 0;  // still to do; 0: idle
    size_t block = 0;
    bool tail = false;
  };

  Block& block(size_t i) { return ring_[i % kAhead]; }

  void refill(Lane& lane) {
    while (bad_ < 0) {
      if (!tail_runs_ && tail_ < body_ && block(tail_).body_done) return begin_tail(lane);
      if (body_ == blocks_ || body_ == tail_ + kAhead) return;
      Block& next = block(body_);
      read_message(body_, next);
      sha_.start(next.state);
      lane = {&next.state, next.message, next.length / kChunk, body_, false};
      next.body_done = lane.chunks == 0;
      ++body_;
      if (lane.chunks) return;
    }
  }

  void read_message(size_t i, Block& to) {
    const Token* tokens = tokens_ + i * block_size_;
    const int64_t bad = first_bad(tokens, block_size_);
    if (bad >= 0) bad_ = int64_t(i * block_size_) + bad;
    const size_t token_bytes = 4 * block_size_;
    const size_t extra_bytes = extra_offsets_ ? size_t(extra_offsets_[i + 1] - extra_offsets_[i]) : 0;
    to.length = token_bytes + extra_bytes;
    constexpr bool little = std::endian::native == std::endian::little;
    if (little && sizeof(Token) == 4 && extra_bytes == 0) {
      to.message = reinterpret_cast<const uint8_t*>(tokens);
      return;
    }
    if (to.joined.size() < to.length) to.joined.resize(to.length);
    uint8_t* bytes = to.joined.data();
    for (size_t t = 0; t < block_size_; ++t) {
      uint32_t word = uint32_t(tokens[t]);
      if (!little) word = word >> 24 | (word >> 8 & 0xff00) | (word << 8 & 0xff0000) | word << 24;
      std::memcpy(bytes + 4 * t, &word, 4);
    }
    if (extra_bytes) std::memcpy(bytes + token_bytes, extras_ + extra_offsets_[i], extra_bytes);
    to.message = bytes;
  }

  void begin_tail(Lane& lane) {
    Block& of = block(tail_);
    const size_t rest = of.length % kChunk;
    const size_t chunks = (rest + kDigest + 9 + kChunk - 1) / kChunk;
    if (of.length != padded_length_) pad(of.length, rest, chunks);
    std::memcpy(tail_bytes_, of.message + of.length - rest, rest);
    std::memcpy(tail_bytes_ + rest, tail_ ? out_ + (tail_ - 1) * kDigest : previous_, kDigest);
    tail_runs_ = true;
    lane = {&of.state, tail_bytes_, chunks, tail_, true};
  }

  void pad(size_t length, size_t rest, size_t chunks) {
    std::memset(tail_bytes_, 0, sizeof tail_bytes_);
    tail_bytes_[rest + kDigest] = 0x80;
    const uint64_t bits = 8 * uint64_t(length + kDigest);
    for (int byte = 0; byte < 8; ++byte) tail_bytes_[chunks * kChunk - 1 - byte] = uint8_t(bits >> (8 * byte));
    padded_length_ = length;
  }

  void advance(Lane& lane, size_t chunks) {
    lane.data += chunks * kChunk;
    lane.chunks -= chunks;
    if (lane.chunks) return;
    if (lane.tail) {
      sha_.digest(*lane.state, out_ + lane.block * kDigest);
      tail_runs_ = false;
      ++tail_;
    } else {
      block(lane.block).body_done = true;
    }
  }

  const sha256::Implementation& sha_;
  const Token* tokens_;
  size_t block_size_, blocks_;
  const uint8_t* previous_;
  const uint8_t* extras_;
  const int64_t* extra_offsets_;  // blocks_ + 1 of them, or null
  uint8_t* out_;

  Block ring_[kAhead];
  Lane lanes_[2];
  size_t body_ = 0;  // the next block whose body may begin
  size_t tail_ = 0;  // the block whose key is next
  bool tail_runs_ = false;
  int64_t bad_ = -1;
  size_t padded_length_ = 0;  // of the message that tail_bytes_ is padded for; no message has length 0
  uint8_t tail_bytes_[2 * kChunk];
};

template <class Token>
using Tokens = nb::ndarray<const Token, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<uint8_t, nb::shape<-1, int(kDigest)>, nb::c_contig, nb::device::cpu>;

template <class Token>
int64_t hash_blocks(Tokens<Token> tokens, size_t block_size, nb::bytes previous, nb::bytes extras,
                    Offsets extra_offsets, Keys out, bool portable) {
  const size_t blocks = out.shape(0);
  if (block_size < 1 || block_size > SIZE_MAX / 64 || tokens.shape(0) / block_size < blocks ||
      previous.size() != kDigest) {
    throw std::invalid_argument("hash_blocks: sizes of tokens, block_size, previous and out do not agree");
  }
  const int64_t* offsets = extra_offsets.shape(0) ? extra_offsets.data() : nullptr;
  if (offsets) {
    bool fine = extra_offsets.shape(0) == blocks + 1 && offsets[0] == 0 && offsets[blocks] == int64_t(extras.size());
    for (size_t i = 0; fine && i < blocks; ++i) fine = offsets[i] <= offsets[i + 1];
    if (!fine) throw std::invalid_argument("hash_blocks: extra_offsets do not fit extras");
  }
  const auto* from = static_cast<const uint8_t*>(previous.data());
  const auto* extra = static_cast<const uint8_t*>(extras.data());
  nb::gil_scoped_release released;
  Chain<Token> chain(portable ? sha256::portable() : sha256::best(), tokens.data(), block_size, blocks, from, extra,
                     offsets, out.data());
  const int64_t bad = chain.run();
  if (bad < 0) tokens_hashed.fetch_add(blocks * block_size, std::memory_order_relaxed);
  return bad;
}

template <class Token>
int64_t first_bad_token(Tokens<Token> tokens) {
  return first_bad(tokens.data(), tokens.shape(0));
}

template <class Token>
void bind(nb::module_& m) {
  using namespace nb::literals;
  m.def("hash_blocks", &hash_blocks<Token>, "tokens"_a.noconvert(), "block_size"_a, "previous"_a, "extras"_a,
        "extra_offsets"_a.noconvert(), "out"_a.noconvert(), "portable"_a = false,
        "Fill `out`, (n, 32), with the keys of the first n blocks; returns -1 or the position of a bad token.");
  m.def("first_bad_token", &first_bad_token<Token>, "tokens"_a.noconvert(),
        "The position of the first token outside 0 .. 2**31-1, or -1.");
}
}  // namespace

void bind_keys(nb::module_& m) {
  bind<int32_t>(m);
  bind<int64_t>(m);
  m.def("tokens_hashed", [] { return tokens_hashed.load(std::memory_order_relaxed); },
        "How many tokens this process has hashed into block keys.");
  m.def("sha256_implementation", [] { return sha256::best().name; }, "\"sha-ni\" or \"portable\".");
}
}  // namespace flexkv
