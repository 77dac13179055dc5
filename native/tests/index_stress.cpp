// Drives the index without Python, for the sanitizers: random operations with every invariant checked, changes that run
// out of memory, and threads that match while the owner changes.
//
//   index_stress [steps] [steps of the owner of threads] [seed]
#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <random>
#include <thread>

#include "index/gate.hpp"
#include "index_check.hpp"

namespace {

long failing_allocation = -1;  // of those to come, the one that fails; below 0: none

bool fails() { return failing_allocation >= 0 && failing_allocation-- == 0; }

}  // namespace

#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // it takes the two below for strangers
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return fails() ? nullptr : std::malloc(bytes + (bytes == 0)); }
void* operator new(std::size_t bytes) {
  if (void* memory = operator new(bytes, std::nothrow)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

// Linked with -Wl,--wrap=realloc,--wrap=aligned_alloc.
extern "C" {
void* __real_realloc(void* memory, std::size_t bytes);
void* __real_aligned_alloc(std::size_t alignment, std::size_t bytes);
void* __wrap_realloc(void* memory, std::size_t bytes) { return fails() ? nullptr : __real_realloc(memory, bytes); }
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return fails() ? nullptr : __real_aligned_alloc(alignment, bytes);
}
}

namespace {

using namespace flexkv::index;

using Key = std::array<uint8_t, kKeyBytes>;
using Dice = std::mt19937_64;

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

Key child(const Key& parent, uint64_t token) {
  Key made;
  for (size_t word = 0; word < 4; ++word) {
    uint64_t all = token + 1 + word * 0x9e3779b97f4a7c15ull;
    for (size_t other = 0; other < 4; ++other) all = mix(all ^ key_word(parent.data() + 8 * other));
    std::memcpy(made.data() + 8 * word, &all, 8);
  }
  return made;
}

std::vector<Key> chain(const Key& root, const std::vector<uint8_t>& tokens) {
  std::vector<Key> keys;
  for (uint8_t token : tokens) keys.push_back(child(keys.empty() ? root : keys.back(), token));
  return keys;
}

const uint8_t* bytes(const std::vector<Key>& keys) { return keys.empty() ? nullptr : keys[0].data(); }

// Of a third party; equal and negative orders.
class Odd final : public CustomPolicy {
 public:
  int64_t insert(int64_t now) override { return now / 8; }
  int64_t hit(int64_t state, int64_t) override { return state + 5; }
  int64_t order(int64_t state) override { return state * 7 % 19 - 9; }
};
Odd odd;

Policy policy_of(Policy::Kind kind) {
  Policy policy;
  policy.kind = kind;
  policy.custom = &odd;
  return policy;
}

struct World {
  struct Name {
    Root root;
    uint32_t groups;
    std::deque<std::vector<uint8_t>> paths;
  };
  struct Pins {
    Root root;
    std::vector<Key> keys;
    uint32_t tier, group, start, stop;
  };

  explicit World(Dice& dice) : dice(dice) {
    tiers = 1 + dice() % 3;
    std::vector<Policy> policies;
    for (uint32_t tier = 0; tier < tiers; ++tier) {
      policies.push_back(policy_of(Policy::Kind(dice() % 8)));
      if (dice() % 3 == 0) policies.back().reward = 5;
    }
    longest = dice() % 4 == 0 ? 3000 : dice() % 2 == 0 ? 200 : 12;
    tokens = 2 + dice() % 3;
    index = std::make_unique<Index>(tiers, policies);
    held.assign(tiers, {});
    add();
  }

  uint32_t below(uint32_t bound) { return uint32_t(dice() % bound); }

  void add() {
    Name name{{}, 1 + below(3), {}};
    const Key root = child(Key{}, dice());
    std::memcpy(name.root.data(), root.data(), kKeyBytes);
    std::vector<Rule> rules;
    for (uint32_t group = 0; group < name.groups; ++group) {
      Rule rule{Coverage(group == 0 ? 0 : below(3)), 1 + below(4), {}};
      for (uint32_t tier = 0; tier < tiers; ++tier) rule.slot_classes.push_back(below(2));
      rules.push_back(rule);
    }
    index->add_namespace(name.root, rules);
    names.push_back(name);
  }

  std::vector<uint8_t> path(Name& name) {
    std::vector<uint8_t> made;
    if (!name.paths.empty() && below(8) != 0) made = name.paths[below(uint32_t(name.paths.size()))];
    if (!made.empty() && below(3) == 0) return made;
    made.resize(made.empty() ? 0 : below(uint32_t(made.size()) + 1));
    const uint32_t more = 1 + below(below(3) == 0 ? longest : 8);
    for (uint32_t i = 0; i < more && made.size() < 2 * longest; ++i) made.push_back(uint8_t(below(5) == 0 ? below(tokens) : 0));
    name.paths.push_back(made);
    if (name.paths.size() > 12) name.paths.pop_front();
    return made;
  }

  void came(uint32_t tier, const std::vector<int64_t>& slots, const std::vector<uint8_t>& taken) {
    for (size_t i = 0; i < slots.size(); ++i) {
      if (taken[i]) FLEXKV_CHECK(held[tier].insert(slots[i]).second, slots[i]);
    }
  }
  void went(uint32_t tier, int64_t slot) {
    if (slot != kNoSlot) FLEXKV_CHECK(held[tier].erase(slot) == 1, slot);
  }

  // One operation. What is refused (pins, retired namespaces) is as good as what is not.
  void step() {
    const size_t number = below(uint32_t(names.size()));
    if (!index->has_namespace(names[number].root)) {
      names.erase(names.begin() + long(number));
      if (names.empty()) add();
      return;
    }
    Name& name = names[number];
    const std::vector<uint8_t> tokens_of_path = path(name);
    Key root;
    std::memcpy(root.data(), name.root.data(), kKeyBytes);
    const std::vector<Key> keys = chain(root, tokens_of_path);
    const uint32_t n = uint32_t(keys.size()), tier = below(tiers), group = below(name.groups);
    const Index::Tree tree = index->tree(name.root);
    const uint32_t start = below(n + 1), stop = start + below(n - start + 1);
    const uint32_t what = below(1000);
    if (what < 330) {
      insert(tree, keys, tier, group);
    } else if (what < 400) {
      const Index::Walked walked = index->match(tree, bytes(keys), n);
      std::vector<uint8_t> found_tiers(size_t(walked.known) * walked.groups);
      std::vector<int64_t> slots(found_tiers.size());
      const uint32_t blocks = index->fill(walked, found_tiers.data(), slots.data());
      FLEXKV_CHECK(blocks <= walked.known);
      for (size_t i = 0; i < slots.size(); ++i) {
        FLEXKV_CHECK((slots[i] == kNoSlot) == (found_tiers[i] == kNoTier));
        if (slots[i] != kNoSlot) FLEXKV_CHECK(held[found_tiers[i]].count(slots[i]) == 1);
      }
    } else if (what < 550) {
      index->touch(tree, bytes(keys), n);
    } else if (what < 620) {
      index->pin(tree, bytes(keys), tier, group, start, stop);
      pins.push_back({name.root, keys, tier, group, start, stop});
    } else if (what < 700) {
      if (pins.empty()) return;
      const Pins pin = pins[below(uint32_t(pins.size()))];
      index->unpin(index->tree(pin.root), bytes(pin.keys), pin.tier, pin.group, pin.start, pin.stop);
    } else if (what < 850) {
      evict(tier, below(4) == 0 ? below(200) : below(8));
    } else if (what < 890) {
      std::vector<int64_t> slots(stop - start);
      index->remove(tree, bytes(keys), tier, group, start, stop, slots.data());
      for (int64_t slot : slots) went(tier, slot);
    } else if (what < 900) {
      const Forest::RemovedRows rows = index->remove_subtree(tree, bytes(keys), below(12) == 0 ? 0 : n);
      for (size_t i = 0; i < rows.slots.size(); ++i) went(rows.tiers[i], rows.slots[i]);
    } else if (what < 960) {
      recover(tree, root, keys, tier, group);
    } else if (what < 970) {
      index->end_recovery();
    } else if (what < 975) {
      index->drop_tier(tier);
      held[tier].clear();
    } else if (what < 985) {
      if (names.size() < 4) add();
    } else if (what < 990) {
      index->retire_namespace(name.root);
    } else {
      const Forest::CopyRows rows = index->copies(tree, tier, group);
      for (int64_t slot : rows.slots) FLEXKV_CHECK(held[tier].count(slot) == 1, slot);
    }
  }

  int64_t slot() { return ++made % 3 == 0 ? kMaxSlot - made : made; }

  void insert(const Index::Tree& tree, const std::vector<Key>& keys, uint32_t tier, uint32_t group) {
    Index::check_alive(tree);
    const uint32_t gaps = below(3) == 0 ? 2 + below(5) : 0, first = below(4) == 0 ? below(uint32_t(keys.size())) : 0;
    std::vector<int64_t> slots;
    for (uint32_t at = 0; at < keys.size(); ++at) slots.push_back(at < first || (gaps != 0 && below(gaps) == 0) ? kNoSlot : slot());
    std::vector<uint8_t> taken(keys.size(), 0);
    index->insert(tree, bytes(keys), uint32_t(keys.size()), tier, group, slots.data(), taken.data());
    came(tier, slots, taken);
    while (held[tier].size() > 20u * longest + 300 && evict(tier, 50)) {
    }
  }

  void recover(const Index::Tree& tree, const Key& root, const std::vector<Key>& keys, uint32_t tier, uint32_t group) {
    Index::check_alive(tree);
    std::vector<Key> rows, parents;
    std::vector<int64_t> depths, slots;
    for (uint32_t at = below(2) == 0 ? 0 : below(uint32_t(keys.size())); at < keys.size(); ++at) {
      if (below(6) == 0) continue;
      const size_t row = below(uint32_t(rows.size()) + 1);
      rows.insert(rows.begin() + long(row), keys[at]);
      parents.insert(parents.begin() + long(row), at == 0 ? root : keys[at - 1]);
      depths.insert(depths.begin() + long(row), at + (below(40) == 0 ? 1 + below(1 << 30) : 0));
      slots.push_back(slot());
    }
    std::vector<uint8_t> taken(rows.size(), 0);
    index->recover(tree, tier, group, uint32_t(rows.size()), bytes(rows), bytes(parents), depths.data(), slots.data(), taken.data());
    came(tier, slots, taken);
  }

  bool evict(uint32_t tier, uint32_t count) {
    // As many rows as are asked for, to the byte: a row too many is the address sanitizer's to find.
    std::vector<uint8_t> roots(size_t(count) * kKeyBytes), keys(size_t(count) * kKeyBytes), groups(count);
    std::vector<int64_t> slots(count);
    if (!index->evict(tier, count, below(2), {roots.data(), keys.data(), groups.data(), slots.data()})) return false;
    for (int64_t slot : slots) went(tier, slot);
    return count != 0;
  }

  void check() {
    Check::all(*index);
    for (uint32_t tier = 0; tier < tiers; ++tier) {
      FLEXKV_CHECK(index->count(tier) == held[tier].size(), tier, index->count(tier), held[tier].size());
    }
  }

  // Everything leaves, and so does the memory.
  void drain() {
    index->end_recovery();
    for (uint32_t tier = 0; tier < tiers; ++tier) index->drop_tier(tier);
    for (auto& slots : held) slots.clear();
    check();
    FLEXKV_CHECK(index->statistics().positions == 0 && index->statistics().nodes == 0);
    // The largest: one chunk of nodes a forest, tables of maps, and what ghosts remember.
    FLEXKV_CHECK(index->statistics().memory_bytes < 6'000'000, index->statistics().memory_bytes);
  }

  Dice& dice;
  uint32_t tiers = 1, longest = 12, tokens = 2;
  int64_t made = 0;
  std::unique_ptr<Index> index;
  std::vector<Name> names;
  std::deque<Pins> pins;
  std::vector<std::set<int64_t>> held;
};

// Returns how many operations were refused.
uint64_t random_steps(uint64_t seed, uint64_t steps) {
  uint64_t refused = 0;
  for (uint64_t done = 0, number = 0; done < steps; ++number) {
    Dice dice(seed * 1000003 + number);
    World world(dice);
    for (uint64_t length = std::min<uint64_t>(100 + dice() % 1500, steps - done), at = 0; at < length; ++at, ++done) {
      try {
        world.step();
      } catch (const ArgumentError&) {
        ++refused;
      } catch (const UnknownNamespace&) {
        ++refused;
      }
      if (world.longest < 1000 ? at % 16 == 0 : at % 64 == 0) world.check();
    }
    world.check();
    world.drain();
  }
  return refused;
}

// An allocation fails in the midst of an operation: either nothing has come of it, or the index says that it is torn. Then
// it can be destroyed. Returns how often either came about.
std::pair<uint64_t, uint64_t> without_memory(uint64_t seed, uint64_t steps) {
  uint64_t torn = 0, whole = 0;
  for (uint64_t done = 0, number = 0; done < steps; ++number) {
    Dice dice(seed * 7000003 + number);
    World world(dice);
    for (; done < steps; ++done) {
      const bool fail = done % 8 == 7;
      if (fail) failing_allocation = long(dice() % 40);
      bool failed = false;
      try {
        world.step();
      } catch (const std::bad_alloc&) {
        failed = true;
      } catch (const ArgumentError&) {
      } catch (const UnknownNamespace&) {
      }
      failing_allocation = -1;
      if (!failed) continue;
      ++(world.index->torn() ? torn : whole);
      if (world.index->torn()) break;
      Check::all(*world.index);  // the world's own books may be behind
      break;
    }
  }
  return {torn, whole};
}

// ---------------------------------------------------------------- threads

struct Nothing {};

// As the GIL is to the bindings.
std::mutex gil;
struct WithoutGil {
  WithoutGil() { gil.unlock(); }
  ~WithoutGil() { gil.lock(); }
};

int64_t slot_for(const Key& key, uint32_t tier) { return int64_t((key_word(key.data() + 8) & ((1ull << 38) - 1)) + tier); }

// One thread changes, others match; whoever finds a block finds its own slot, and paths that come whole are seen whole or
// not at all.
template <class Idle>
void threads(uint64_t seed, uint64_t steps, bool with_gil) {
  constexpr uint32_t kTiers = 2, kPaths = 12, kLength = 40, kReaders = 3;
  Index index(kTiers, {policy_of(Policy::Kind::kLru), policy_of(Policy::Kind::kS3Fifo)});
  Gate gate;
  const Key root = child(Key{}, seed);
  Root name;
  std::memcpy(name.data(), root.data(), kKeyBytes);
  index.add_namespace(name, {Rule{Coverage::kAll, 0, {0, 0}}});
  std::vector<std::vector<Key>> paths;
  std::vector<uint8_t> tokens;
  for (uint32_t i = 0; i < kPaths; ++i) {  // each leaves the one before it half-way
    tokens.resize(tokens.size() / 2);
    while (tokens.size() < kLength) tokens.push_back(uint8_t(i));
    paths.push_back(chain(root, tokens));
  }
  const std::vector<Key> whole = chain(root, std::vector<uint8_t>(kLength, 99));  // comes and goes as one
  std::atomic<bool> over{false}, failed{false};
  std::atomic<uint64_t> matches{0}, hits{0}, seen_whole{0};
  std::vector<std::thread> readers;
  std::array<std::string, kReaders> failures;
  for (uint32_t reader = 0; reader < kReaders; ++reader) {
    readers.emplace_back([&, reader] {
      Dice dice(seed + reader + 1);
      try {
        while (!over) {
          const bool special = dice() % 3 == 0;
          const std::vector<Key>& keys = special ? whole : paths[dice() % kPaths];
          std::vector<uint8_t> tiers;
          std::vector<int64_t> slots;
          uint32_t blocks = 0;
          std::unique_lock<std::mutex> held(gil, std::defer_lock);
          if (with_gil) held.lock();
          {
            Gate::Visit<Idle> visit(gate);
            const Index::Walked walked = index.match(index.tree(name), bytes(keys), kLength);
            tiers.resize(walked.known);
            slots.resize(walked.known);
            blocks = index.fill(walked, tiers.data(), slots.data());
          }
          if (with_gil) held.unlock();
          ++matches;
          hits += blocks;
          FLEXKV_CHECK(blocks <= tiers.size());
          for (size_t at = 0; at < tiers.size(); ++at) {
            if (at < blocks) FLEXKV_CHECK(tiers[at] != kNoTier, at);
            if (tiers[at] != kNoTier) FLEXKV_CHECK(slots[at] == slot_for(keys[at], tiers[at]), at);
          }
          if (special) {
            FLEXKV_CHECK(blocks == 0 || blocks == kLength, blocks);
            seen_whole += blocks != 0;
          }
        }
      } catch (const std::exception& error) {
        failures[reader] = error.what();
        failed = true;
      }
    });
  }
  Dice dice(seed);
  std::vector<int64_t> slots(kLength);
  std::vector<uint8_t> taken(kLength);
  for (uint64_t step = 0; step < steps; ++step) {
    std::unique_lock<std::mutex> held(gil, std::defer_lock);
    if (with_gil) held.lock();
    Gate::Visit<Idle> visit(gate);
    const Index::Tree tree = index.tree(name);
    const std::vector<Key>& keys = paths[dice() % kPaths];
    const uint32_t tier = uint32_t(dice() % kTiers), what = uint32_t(dice() % 8);
    if (what < 3) {
      for (uint32_t at = 0; at < kLength; ++at) slots[at] = slot_for(keys[at], tier);
      index.insert(tree, bytes(keys), uint32_t(1 + dice() % kLength), tier, 0, slots.data(), taken.data());
    } else if (what < 4) {
      if (index.match(tree, bytes(whole), 1).known == 0) {
        for (uint32_t at = 0; at < kLength; ++at) slots[at] = slot_for(whole[at], 0);
        index.insert(tree, bytes(whole), kLength, 0, 0, slots.data(), taken.data());
        index.pin(tree, bytes(whole), 0, 0, 0, kLength);
      } else {
        index.unpin(tree, bytes(whole), 0, 0, 0, kLength);
        index.remove_subtree(tree, bytes(whole), 1);
      }
    } else if (what < 5) {
      index.touch(tree, bytes(keys), kLength);
    } else if (what < 7) {
      uint8_t roots[20 * kKeyBytes], gone[20 * kKeyBytes], groups[20];
      int64_t gone_slots[20];
      index.evict(tier, 1 + dice() % 20, 0, {roots, gone, groups, gone_slots});
    } else {
      index.remove(tree, bytes(keys), tier, 0, uint32_t(dice() % 3), uint32_t(3 + dice() % 3), slots.data());
    }
    if (step % 64 == 0) Check::all(index);
    bool twice = false;
    try {
      Gate::Visit<Idle> again(gate);
    } catch (const Reentered&) {
      twice = true;
    }
    FLEXKV_CHECK(twice, "one thread is within twice");
  }
  // The readers have their turns, however the scheduler has dealt them.
  while (matches < 100 && !failed) std::this_thread::yield();
  over = true;
  for (std::thread& reader : readers) reader.join();
  for (const std::string& failure : failures) {
    if (!failure.empty()) throw Broken(failure);
  }
  std::printf("threads: %llu changes, %llu matches, %llu blocks hit, %llu whole paths\n", (unsigned long long)steps,
              (unsigned long long)matches.load(), (unsigned long long)hits.load(), (unsigned long long)seen_whole.load());
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t steps = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  const uint64_t owner_steps = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 5000;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : std::random_device()();
  std::printf("index_stress %llu %llu %llu\n", (unsigned long long)steps, (unsigned long long)owner_steps,
              (unsigned long long)seed);
  std::fflush(stdout);
  try {
    const uint64_t refused = random_steps(seed, steps);
    std::printf("random: %llu steps, %llu refused\n", (unsigned long long)steps, (unsigned long long)refused);
    const auto [torn, whole] = without_memory(seed, steps / 4);
    std::printf("without memory: %llu torn, %llu untouched\n", (unsigned long long)torn, (unsigned long long)whole);
    threads<Nothing>(seed, owner_steps, false);
    threads<WithoutGil>(seed + 1, owner_steps, true);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "FAILED with seed %llu: %s\n", (unsigned long long)seed, error.what());
    return 1;
  }
  return 0;
}
