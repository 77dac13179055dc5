// The lock of an index: one thread at a time is within, and none twice.
#pragma once
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace flexkv::index {

// The thread is within already: it was called back by a policy or a finalizer. Waiting would be for ever.
struct Reentered : std::logic_error {
  Reentered() : std::logic_error("the index was called from within itself, by an eviction policy or a finalizer") {}
};

class Gate {
 public:
  // Inside while it lives. `Idle` is what a thread gives up while it waits and takes back once it is within (the GIL): a
  // thread that waits stops nobody, and whoever takes it back inside is waited for by none that has it.
  template <class Idle>
  class Visit {
   public:
    explicit Visit(Gate& gate) : gate_(gate) {
      const std::thread::id self = std::this_thread::get_id();
      // Only the thread itself ever writes its own name there: no order with others is needed.
      if (gate.inside_.load(std::memory_order_relaxed) == self) throw Reentered();
      if (!gate.mutex_.try_lock()) {
        [[maybe_unused]] Idle idle;
        gate.mutex_.lock();
      }
      gate.inside_.store(self, std::memory_order_relaxed);
    }
    ~Visit() {
      gate_.inside_.store(std::thread::id(), std::memory_order_relaxed);
      gate_.mutex_.unlock();
    }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;

   private:
    Gate& gate_;
  };

 private:
  std::mutex mutex_;
  std::atomic<std::thread::id> inside_{};
};

}  // namespace flexkv::index
