// Drives the thread pool, copies and seals without Python, for the sanitizers: several threads at once gather blocks, seal
// and verify them, and scatter them back, each with as many parts as it likes.
//
//   blocks_stress [rounds] [seed]
//
// Streamed copies (stream_copy.hpp) are intrinsics: the sanitizers see their loads, not their stores; the bytes around
// each slot are compared instead.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "copy_blocks.hpp"
#include "seal_blocks.hpp"

namespace {

using namespace flexkv;
using Dice = std::mt19937_64;
using Bytes = std::vector<std::uint8_t>;

constexpr std::uint8_t kUntouched = 0xa5;

void expect(bool condition, const char* what, std::uint64_t where) {
  if (!condition) throw std::runtime_error(std::string(what) + " at " + std::to_string(where));
}

// One caller's blocks: fragments of odd lengths in device memory, slots with a gap between them in the region.
struct Caller {
  explicit Caller(Dice& dice) {
    const std::size_t fragments = 1 + dice() % 4;
    blocks_in_device = 4 + dice() % 12;
    const std::size_t wide = dice() % 4 == 0 ? 300'000 : 5'000;  // from 4 MiB on copies are streamed
    std::int64_t at = 0;
    for (std::size_t f = 0; f < fragments; ++f) {
      length.push_back(std::int64_t(1 + dice() % wide));
      stride.push_back(length[f] + std::int64_t(dice() % 100));
      host_offset.push_back(at);
      at += length[f];
      device.emplace_back(std::size_t(stride[f]) * blocks_in_device);
      for (std::uint8_t& byte : device[f]) byte = std::uint8_t(dice());
      base.push_back(reinterpret_cast<std::uint64_t>(device[f].data()));
    }
    payload = std::uint64_t(at);
    slot = seal_padded(payload) + kSealPage + 4096;
    for (std::size_t block = 0; block < blocks_in_device; ++block) {
      if (dice() % 4 == 0) continue;
      blocks.push_back(std::int64_t(block));
      offsets.push_back(std::int64_t(slot * offsets.size()));
      lengths.push_back(at);
      groups.push_back(std::uint8_t(dice() % 3));
      for (int i = 0; i < 32; ++i) keys.push_back(std::uint8_t(dice()));
    }
    host.assign(slot * (blocks.size() + 1), kUntouched);
  }

  void round(Dice& dice) {
    if (blocks.empty()) return;
    const CopyPlan plan{offsets.data(), blocks.data(), blocks.size(), base.data(), stride.data(),
                        length.data(), host_offset.data(), base.size(), payload};
    const SealBlocks sealed{offsets.data(), lengths.data(), keys.data(), groups.data(), blocks.size()};
    copy_blocks<Direction::kGather>(plan, host.data(), 1 + dice() % 6);
    const std::vector<std::int64_t> depths(blocks.size(), 7);
    const SealPlaces places{keys.data(), keys.data(), depths.data()};
    seal_blocks(host.data(), sealed, places, 1 + dice() % 6);
    Bytes faults(blocks.size(), 99), moved(host.size());
    copy_bytes(moved.data(), host.data(), host.size(), 1 + dice() % 6);
    verify_blocks(moved.data(), sealed, faults.data(), 1 + dice() % 6);
    for (std::size_t i = 0; i < faults.size(); ++i) expect(faults[i] == kGood, "fault", i);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      for (std::size_t at = slot * (i + 1) - 4096; at < slot * (i + 1); ++at) expect(host[at] == kUntouched, "overrun", at);
    }
    const std::size_t hurt = dice() % blocks.size();
    moved[std::size_t(offsets[hurt]) + dice() % payload] ^= 1;
    verify_blocks(moved.data(), sealed, faults.data(), 1 + dice() % 6);
    for (std::size_t i = 0; i < faults.size(); ++i) expect(faults[i] == (i == hurt ? kBadChecksum : kGood), "verdict", i);

    std::vector<Bytes> before = device;
    for (std::size_t f = 0; f < device.size(); ++f) {
      for (std::int64_t block : blocks) {
        std::fill_n(device[f].begin() + block * stride[f], length[f], std::uint8_t(0));
      }
    }
    copy_blocks<Direction::kScatter>(plan, host.data(), 1 + dice() % 6);
    expect(device == before, "scatter", 0);
  }

  std::size_t blocks_in_device = 0;
  std::uint64_t payload = 0, slot = 0;
  std::vector<Bytes> device;
  std::vector<std::uint64_t> base;
  std::vector<std::int64_t> stride, length, host_offset, blocks, offsets, lengths;
  Bytes host, keys, groups;
};

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 60;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device()();
  std::printf("blocks_stress %llu %llu\n", (unsigned long long)rounds, (unsigned long long)seed);
  std::fflush(stdout);
  std::atomic<bool> failed{false};
  std::vector<std::thread> callers;
  for (std::uint64_t number = 0; number < 3; ++number) {
    callers.emplace_back([&, number] {
      Dice dice(seed * 31 + number);
      try {
        for (std::uint64_t done = 0; done < rounds; done += 3) {
          Caller caller(dice);
          for (int i = 0; i < 3; ++i) caller.round(dice);
        }
      } catch (const std::exception& error) {
        std::fprintf(stderr, "FAILED with seed %llu: %s\n", (unsigned long long)seed, error.what());
        failed = true;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  return failed ? 1 : 0;
}
