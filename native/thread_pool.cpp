#include "thread_pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

namespace flexkv {
namespace {

constexpr std::size_t kMaxWorkers = 256;

// Never destroyed: workers sleep in it until the process ends.
std::atomic<ThreadPool*> pool{nullptr};

// In the child only the forking thread lives; the parent's pool may be locked, so it is left behind as it is.
void replace_after_fork() { pool.store(new ThreadPool); }

}  // namespace

ThreadPool& ThreadPool::instance() {
  static const bool once = [] {
    pool.store(new ThreadPool);
    pthread_atfork(nullptr, nullptr, replace_after_fork);
    return true;
  }();
  (void)once;
  return *pool.load();
}

void ThreadPool::grow(std::size_t workers) {
  workers = std::min(workers, kMaxWorkers);
  if (workers_ >= workers) return;
  // Signals belong to the interpreter's threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (; workers_ < workers; ++workers_) std::thread([this] { work_forever(); }).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: the caller and the workers that exist do all parts.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::do_part(Job& job, std::unique_lock<std::mutex>& lock) {
  const std::size_t part = job.next++;
  if (job.next == job.parts) queue_.erase(std::find(queue_.begin(), queue_.end(), &job));
  lock.unlock();
  job.call(job.context, part);
  lock.lock();
  // The job lives on its caller's stack; it is not touched once the lock is given up after this.
  if (++job.done == job.parts) job.finished.notify_one();
}

void ThreadPool::run_parts(std::size_t parts, Call call, void* context) {
  Job job{call, context, parts};
  std::unique_lock lock(mutex_);
  grow(parts - 1);
  queue_.push_back(&job);
  for (std::size_t i = 1; i < parts; ++i) wake_.notify_one();
  while (job.next < job.parts) do_part(job, lock);
  job.finished.wait(lock, [&] { return job.done == job.parts; });
}

void ThreadPool::work_forever() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return !queue_.empty(); });
    do_part(*queue_.front(), lock);
  }
}

}  // namespace flexkv
