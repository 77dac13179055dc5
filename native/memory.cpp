// Pre-fault: makes the pages of a mapping present, so that no transfer pays for it later.
#include <nanobind/nanobind.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "bindings.hpp"
#include "thread_pool.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace nb = nanobind;

namespace flexkv {
namespace {

constexpr std::uint64_t kGrain = 2 << 20;  // threads meet at borders of huge pages

void touch(std::uint8_t* start, std::uint64_t bytes) {
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  // An atomic "or 0" makes the page writable and leaves what others may have written there.
  for (std::uint64_t at = 0; at < bytes; at += page) __atomic_fetch_or(start + at, 0, __ATOMIC_RELAXED);
}

int populate_one(std::uint8_t* start, std::uint64_t bytes) {
  while (madvise(start, bytes, MADV_POPULATE_WRITE) != 0) {
    if (errno == EAGAIN || errno == EINTR) continue;
    if (errno != EINVAL) return errno;
    touch(start, bytes);  // an older kernel
    break;
  }
  return 0;
}

// Returns 0 or the errno of the first thread that failed. `address` is the start of a page of the mapping.
int populate(std::uintptr_t address, std::uint64_t bytes, std::size_t threads) {
  std::atomic<int> error{0};
  auto* start = reinterpret_cast<std::uint8_t*>(address);
  const std::size_t parts = std::min<std::uint64_t>(std::max<std::size_t>(threads, 1), bytes / kGrain + 1);
  nb::gil_scoped_release release;
  ThreadPool::instance().run(parts, [&](std::size_t part) {
    const auto [first, last] = share(bytes, part, parts, kGrain);
    const int result = first == last ? 0 : populate_one(start + first, last - first);
    int none = 0;
    if (result != 0) error.compare_exchange_strong(none, result);
  });
  return error.load();
}

// Asks for transparent huge pages; returns whether the kernel takes the advice.
bool advise_huge_pages(std::uintptr_t address, std::uint64_t bytes) {
  return madvise(reinterpret_cast<void*>(address), bytes, MADV_HUGEPAGE) == 0;
}

}  // namespace

void bind_memory(nb::module_& m) {
  m.def("populate", &populate, nb::arg("address"), nb::arg("bytes"), nb::arg("threads"));
  m.def("advise_huge_pages", &advise_huge_pages, nb::arg("address"), nb::arg("bytes"));
}

}  // namespace flexkv
