#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace beagle::cpu {
namespace {

// How long a thread looks for what it waits for before it sleeps: a round's ops follow each other within this, and a
// sleeping thread takes as long to wake as a small op does.
constexpr std::chrono::microseconds kWatch(100);

template <class Ready>
void watch(Ready ready) {
  const auto until = std::chrono::steady_clock::now() + kWatch;
  while (!ready() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

struct Job {
  const std::function<void(int64_t)>* task;
  int64_t count;
  std::atomic<int64_t> next{0};
  int helpers_wanted;
  std::atomic<int> helpers_busy{0};

  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;  // of the first task that threw; the rest is left undone

  // Throws nothing: the caller's stack holds the job until every thread has left it.
  void work() noexcept {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*task)(i);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
      next = count;
    }
  }
};

// Never destroyed: its threads outlive main. A forked child starts its own, since threads do not survive a fork.
class Pool {
 public:
  static Pool& get() {
    static std::mutex guard;
    static Pool* pool = nullptr;
    const std::lock_guard<std::mutex> lock(guard);
    if (!pool || pool->owner_ != getpid()) pool = new Pool;
    return *pool;
  }

  void run(Job& job) {
    const std::lock_guard<std::mutex> one_at_a_time(callers_);
    std::unique_lock<std::mutex> lock(mutex_);
    while (started_ < job.helpers_wanted) {
      std::thread(&Pool::help, this).detach();
      ++started_;
    }
    job_ = &job;
    open_ = true;
    const bool asleep = asleep_ > 0;
    lock.unlock();
    if (asleep) wake_.notify_all();
    job.work();
    lock.lock();
    job_ = nullptr;
    open_ = false;
    lock.unlock();
    watch([&] { return job.helpers_busy == 0; });
    lock.lock();
    done_.wait(lock, [&] { return job.helpers_busy == 0; });
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  void help() {
    for (;;) {
      watch([&] { return open_.load(); });
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return job_ && job_->helpers_wanted > 0; });
      --asleep_;
      Job* job = job_;
      if (--job->helpers_wanted == 0) open_ = false;
      ++job->helpers_busy;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers_busy == 0) done_.notify_one();
    }
  }

  const pid_t owner_ = getpid();
  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  std::atomic<bool> open_{false};  // there is a job that wants helpers
  int started_ = 0, asleep_ = 0;
};

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  const int helpers = int(count < threads ? count : threads) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  Job job;
  job.task = &task, job.count = count, job.helpers_wanted = helpers;
  Pool::get().run(job);
}

float* room(int64_t floats) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t have = 0;
  if (floats > have) {
    have = (floats + 1023) / 1024 * 1024;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, size_t(have) * sizeof(float))));
    if (!memory) have = 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

}  // namespace beagle::cpu
