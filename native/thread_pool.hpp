// A process-wide pool of persistent worker threads for work that runs without the GIL.
// Owns threads, not work: no thread is created by a call once the pool has grown to its size.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>

namespace flexkv {

class ThreadPool {
 public:
  // The pool of this process. A forked child gets a fresh one: threads do not survive fork.
  static ThreadPool& instance();

  // Calls work(part) for every part in [0, parts), on at most `parts` threads, the caller's among them, and
  // returns when all are done. Any thread may call it at any time: a caller does the parts that no
  // worker has taken, so that busy workers delay nobody for ever. `work` must not throw.
  template <class Work>
  void run(std::size_t parts, Work&& work) {
    if (parts <= 1) {
      if (parts == 1) work(std::size_t{0});
      return;
    }
    run_parts(parts, [](void* context, std::size_t part) { (*static_cast<Work*>(context))(part); },
              const_cast<void*>(static_cast<const void*>(&work)));
  }

 private:
  using Call = void (*)(void*, std::size_t);
  struct Job {
    Call call;
    void* context;
    std::size_t parts;
    std::size_t next = 0;  // first part that nobody has taken
    std::size_t done = 0;
    std::condition_variable finished{};
  };

  void run_parts(std::size_t parts, Call call, void* context);
  void grow(std::size_t workers);  // mutex_ held
  void work_forever();
  void do_part(Job& job, std::unique_lock<std::mutex>& lock);  // mutex_ held before and after

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job*> queue_;  // jobs with parts that nobody has taken
  std::size_t workers_ = 0;
};

// The half-open share of `total` that part `part` of `parts` works on; cuts are multiples of `grain`.
inline std::pair<std::uint64_t, std::uint64_t> share(std::uint64_t total, std::size_t part, std::size_t parts,
                                                     std::uint64_t grain) {
  const auto cut = [&](std::size_t p) -> std::uint64_t {
    if (p == parts) return total;
    const auto exact = static_cast<std::uint64_t>(static_cast<unsigned __int128>(total) * p / parts);
    return exact / grain * grain;
  };
  return {cut(part), cut(part + 1)};
}

}  // namespace flexkv
