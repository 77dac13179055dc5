// Which slots of a tier are free: runs of extents, and a bit for each slot of a run. flexkv_core/pool.py says what the
// words mean and what is promised. Slots are page numbers; sizes are in pages.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

namespace flexkv {

class SlotPool {
 public:
  struct Range {  // of pages, with so many slots in use
    int64_t start, stop, used;
  };

  SlotPool(int64_t pages, int64_t extent_pages)
      : pages_(pages), extent_pages_(extent_pages), extents_(size_t((pages + extent_pages - 1) / extent_pages)) {}

  uint32_t add_class(int64_t pages, uint32_t run_extents, uint32_t run_slots) {
    classes_.push_back(Class{pages, run_extents, run_slots});
    return uint32_t(classes_.size() - 1);
  }

  size_t classes() const { return classes_.size(); }
  int64_t used_pages() const { return used_pages_; }
  int64_t allocated(uint32_t number) const { return classes_[number].slots - classes_[number].free; }
  int64_t extents(uint32_t number) const { return classes_[number].extents; }

  // Also what runs could have that are not made yet.
  int64_t available(uint32_t number) {
    Class& kind = classes_[number];
    if (kind.counted != changes_) {
      kind.common = 0;
      for_free_runs(kind, [&](uint32_t, uint32_t slots) { kind.common += slots; });
      kind.counted = changes_;
    }
    return kind.free + kind.common;
  }

  void clear() {
    for (Extent& extent : extents_) extent = Extent{};
    for (Class& kind : classes_) {
      kind.slots = kind.free = kind.extents = 0;
      kind.open.clear();
    }
    used_pages_ = 0;
    unassigned_ = extents_.size();
    ++changes_;
  }

  // Writes `count` slots, ascending; false, and nothing changed, where they do not fit.
  bool allocate(uint32_t number, int64_t count, int64_t* slots) {
    Class& kind = classes_[number];
    if (count > kind.free && !grow(number, count - kind.free)) return false;
    for (int64_t left = count; left > 0;) {
      const uint32_t first = *kind.open.begin();
      Extent& run = extents_[first];
      const int64_t base = int64_t(first) * extent_pages_;
      int64_t taken = 0;
      for (uint32_t word = run.hint; taken < std::min<int64_t>(left, run.free); ++word) {
        uint64_t& bits = run.open[word];
        for (run.hint = word; bits != 0 && taken < std::min<int64_t>(left, run.free); ++taken) {
          *slots++ = base + (int64_t(word) * 64 + __builtin_ctzll(bits)) * kind.pages;
          bits &= bits - 1;
        }
      }
      run.free -= uint32_t(taken);
      kind.free -= taken;
      left -= taken;
      if (run.free == 0) kind.open.erase(kind.open.begin());
    }
    used_pages_ += count * kind.pages;
    return true;
  }

  // False, and nothing changed, if one is not allocated, or is named twice.
  bool free(const int64_t* slots, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (give(slots[i])) continue;
      while (i-- > 0) take(slots[i]);
      return false;
    }
    for (size_t i = 0; i < count; ++i) {
      const Extent& extent = extents_[size_t(slots[i] / extent_pages_)];
      if (extent.owner != kCommon) reclaim(extent.first);
    }
    return true;
  }

  bool is_allocated(int64_t slot) const {
    const Place place = find(slot);
    return place.run != nullptr && (place.run->open[place.number / 64] >> place.number % 64 & 1) == 0;
  }

  void adopt(uint32_t number, const int64_t* slots, size_t count, bool* taken) {
    Class& kind = classes_[number];
    std::vector<uint32_t> fresh;
    for (size_t i = 0; i < count; ++i) {
      taken[i] = false;
      if (slots[i] < 0 || slots[i] > pages_ - kind.pages) continue;
      const uint32_t start = uint32_t(slots[i] / extent_pages_ / kind.run_extents * kind.run_extents);
      const int64_t beyond = slots[i] - int64_t(start) * extent_pages_;
      if (beyond % kind.pages != 0 || beyond / kind.pages >= kind.run_slots) continue;
      if (extents_[start].owner == kCommon) {
        const uint32_t room = free_run(kind, start);
        if (room == 0) continue;
        assign(number, start, room);
        fresh.push_back(start);
      }
      const Extent& run = extents_[start];
      if (run.owner != int32_t(number) || run.first != start || beyond / kind.pages >= run.slots) continue;
      if (is_allocated(slots[i])) continue;
      take(slots[i]);
      taken[i] = true;
    }
    for (uint32_t start : fresh) reclaim(start);
  }

  std::vector<uint32_t> used_classes() const {
    std::vector<uint32_t> numbers;
    for (uint32_t number = 0; number < classes_.size(); ++number) {
      if (classes_[number].extents != 0) numbers.push_back(number);
    }
    return numbers;
  }

  std::vector<Range> room_of_others(uint32_t number, size_t most) const {
    const Class& kind = classes_[number];
    const size_t count = extents_.size();
    std::vector<int64_t> own(count + 1), used(count + 1);  // in the extents before
    for (size_t at = 0; at < count; ++at) {
      const Extent& extent = extents_[at];
      own[at + 1] = own[at] + (extent.owner == int32_t(number));
      used[at + 1] = used[at] + (extent.slots - extent.free);  // of the run that begins there
    }
    std::vector<Range> found;
    for (size_t start = 0; start < count; start += kind.run_extents) {
      const size_t end = std::min(start + kind.run_extents, count);
      if (std::min(int64_t(end) * extent_pages_, pages_) - int64_t(start) * extent_pages_ < kind.pages) continue;
      const size_t first = extents_[start].owner == kCommon ? start : extents_[start].first;
      const Extent& last = extents_[end - 1];
      const size_t behind = last.owner == kCommon ? end : last.first + length_of(last.first);
      const int64_t cost = used[behind] - used[first];
      if (cost == 0 || own[behind] != own[first]) continue;
      found.push_back({int64_t(first) * extent_pages_, std::min(int64_t(behind) * extent_pages_, pages_), cost});
    }
    std::stable_sort(found.begin(), found.end(), [](const Range& a, const Range& b) { return a.used < b.used; });
    if (found.size() > most) found.resize(most);
    return found;
  }

 private:
  static constexpr int32_t kCommon = -1;

  struct Extent {
    int32_t owner = kCommon;
    uint32_t first = 0;                // extent of its run
    uint32_t slots = 0, free = 0;      // of the run that begins here; else 0
    uint32_t hint = 0;                 // no bit is set in the words before it
    std::unique_ptr<uint64_t[]> open;  // a bit a slot of that run: set where it is free
  };

  struct Class {
    int64_t pages;
    uint32_t run_extents, run_slots;           // of a full run
    int64_t slots = 0, free = 0, extents = 0;  // of all its runs
    std::set<uint32_t> open{};                 // first extents of the runs with free slots
    int64_t common = 0;                        // slots that runs to come could have, as things were at `counted`
    uint64_t counted = 0;
  };

  struct Place {
    const Extent* run;
    uint32_t number;
  };

  // Where an allocated slot would be; no run if it cannot be one.
  Place find(int64_t slot) const {
    if (slot < 0 || slot >= pages_) return {nullptr, 0};
    const Extent& extent = extents_[size_t(slot / extent_pages_)];
    if (extent.owner == kCommon) return {nullptr, 0};
    const Extent& run = extents_[extent.first];
    const int64_t beyond = slot - int64_t(extent.first) * extent_pages_, pages = classes_[size_t(run.owner)].pages;
    const int64_t number = beyond / pages;
    if (number * pages != beyond || number >= run.slots) return {nullptr, 0};
    return {&run, uint32_t(number)};
  }

  // Frees one; its run stays. False if it is not allocated.
  bool give(int64_t slot) {
    const Place place = find(slot);
    if (place.run == nullptr) return false;
    Extent& run = extents_[size_t(place.run - extents_.data())];
    const uint32_t word = place.number / 64;
    const uint64_t bit = uint64_t(1) << place.number % 64;
    if ((run.open[word] & bit) != 0) return false;
    Class& kind = classes_[size_t(run.owner)];
    if (run.free == 0) kind.open.insert(uint32_t(place.run - extents_.data()));
    run.open[word] |= bit;
    run.hint = std::min(run.hint, word);
    ++run.free;
    ++kind.free;
    used_pages_ -= kind.pages;
    return true;
  }

  // Takes one that is free.
  void take(int64_t slot) {
    const Place place = find(slot);
    Extent& run = extents_[size_t(place.run - extents_.data())];
    run.open[place.number / 64] &= ~(uint64_t(1) << place.number % 64);
    Class& kind = classes_[size_t(run.owner)];
    if (--run.free == 0) kind.open.erase(uint32_t(place.run - extents_.data()));
    --kind.free;
    used_pages_ += kind.pages;
  }

  size_t length_of(uint32_t first) const {
    const Extent& run = extents_[first];
    return size_t((run.slots * classes_[size_t(run.owner)].pages + extent_pages_ - 1) / extent_pages_);
  }

  // How many slots a run that begins there could have; 0: none.
  uint32_t free_run(const Class& kind, uint32_t start) const {
    uint32_t lead = 0;
    while (lead < kind.run_extents && start + lead < extents_.size() && extents_[start + lead].owner == kCommon) ++lead;
    const int64_t pages = std::min(int64_t(start + lead) * extent_pages_, pages_) - int64_t(start) * extent_pages_;
    return uint32_t(std::min<int64_t>(pages / kind.pages, kind.run_slots));
  }

  // Calls `act(first extent, slots)` for each run that could be made.
  template <class Act>
  void for_free_runs(const Class& kind, Act act) const {
    if (unassigned_ == 0) return;
    for (size_t start = 0; start < extents_.size(); start += kind.run_extents) {
      const uint32_t slots = free_run(kind, uint32_t(start));
      if (slots != 0) act(uint32_t(start), slots);
    }
  }

  // Makes runs for at least `missing` more slots, full ones first; all or nothing.
  bool grow(uint32_t number, int64_t missing) {
    if (available(number) - classes_[number].free < missing) return false;
    const Class& kind = classes_[number];
    std::vector<std::pair<uint32_t, uint32_t>> full, shorter;
    for_free_runs(kind, [&](uint32_t start, uint32_t slots) {
      (slots == kind.run_slots ? full : shorter).emplace_back(start, slots);
    });
    full.insert(full.end(), shorter.begin(), shorter.end());
    for (const auto& [start, slots] : full) {
      if (missing <= 0) break;
      assign(number, start, slots);
      missing -= slots;
    }
    return true;
  }

  void assign(uint32_t number, uint32_t start, uint32_t slots) {
    Class& kind = classes_[number];
    const size_t words = (size_t(slots) + 63) / 64;
    Extent& run = extents_[start];
    run.open = std::make_unique<uint64_t[]>(words);
    std::fill_n(run.open.get(), words, ~uint64_t(0));
    if (slots % 64 != 0) run.open[words - 1] = (uint64_t(1) << slots % 64) - 1;
    kind.open.insert(start);
    run.slots = run.free = slots;
    run.hint = 0;
    run.owner = int32_t(number);
    const size_t length = length_of(start);
    for (size_t at = start; at < start + length; ++at) {
      extents_[at].owner = int32_t(number);
      extents_[at].first = start;
    }
    kind.slots += slots;
    kind.free += slots;
    kind.extents += int64_t(length);
    unassigned_ -= length;
    ++changes_;
  }

  // Gives a run back if it is empty.
  void reclaim(uint32_t first) {
    Extent& run = extents_[first];
    if (run.free != run.slots) return;
    Class& kind = classes_[size_t(run.owner)];
    const size_t length = length_of(first);
    kind.slots -= run.slots;
    kind.free -= run.slots;
    kind.extents -= int64_t(length);
    kind.open.erase(first);
    for (size_t at = first; at < first + length; ++at) extents_[at] = Extent{};
    unassigned_ += length;
    ++changes_;
  }

  int64_t pages_, extent_pages_, used_pages_ = 0;
  std::vector<Extent> extents_;
  std::vector<Class> classes_;
  size_t unassigned_ = extents_.size();
  uint64_t changes_ = 1;  // of which extent belongs to whom
};

}  // namespace flexkv
