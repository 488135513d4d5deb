#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace beagle::cpu {
namespace {

struct Job {
  const std::function<void(int64_t)>* task;
  int64_t count;
  std::atomic<int64_t> next{0};
  int helpers_wanted, helpers_busy = 0;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*task)(i);
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
    lock.unlock();
    wake_.notify_all();
    job.work();
    lock.lock();
    job_ = nullptr;
    done_.wait(lock, [&] { return job.helpers_busy == 0; });
  }

 private:
  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ && job_->helpers_wanted > 0; });
      Job* job = job_;
      --job->helpers_wanted;
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
  int started_ = 0;
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

}  // namespace beagle::cpu
