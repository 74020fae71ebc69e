// Loops of the CPU operations: vectorised ones, and tasks on XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// Older compilers do not know these architectures. Other C libraries cannot choose at run time, nor
// can sanitizers, whose build defines it.
#if defined(VECTORISED)
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
// On a lambda of a VECTORISED function, which else might be compiled for the oldest CPU alone.
#ifndef INLINED_LAMBDA
#define INLINED_LAMBDA __attribute__((always_inline))
#endif
// The loop over a column: no element depends on another one.
#define EACH(i, count) _Pragma("GCC ivdep") for (int64_t i = 0; i < (count); ++i)

namespace gpu_ops {

// Call it before a result is written: XLA allocates new memory for every call, and on fresh memory
// the faults of small pages cost more than the columns themselves.
inline void WillWrite(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t huge = 1 << 21, begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = (begin + bytes) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

constexpr int64_t kCacheLine = 64;

// Memory from the start of a cache line on, which is not cleared.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : values_(count > 0 ? new (std::align_val_t(kCacheLine)) T[count] : nullptr) {}
  T* data() const { return values_.get(); }

 private:
  struct Delete {
    void operator()(T* values) const { ::operator delete[](values, std::align_val_t(kCacheLine)); }
  };
  std::unique_ptr<T[], Delete> values_;
};

// Runs task(0) ... task(count - 1) on the pool and on the calling thread. The caller takes tasks
// until none is left, so that a busy pool cannot block it. Where a task throws, the tasks that have
// not started are skipped, and the caller throws std::bad_alloc after all have ended: nothing but
// missing memory throws here.
template <typename Task>
void ParallelFor(xla::ffi::ThreadPool pool, int64_t count, Task task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      try {
        if (!shared->failed) task(i);
      } catch (...) {
        shared->failed = true;
      }
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (++shared->done == count) shared->finished.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  } catch (const std::bad_alloc&) {  // fewer helpers do the same work
  }
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
  if (shared->failed) throw std::bad_alloc();
}

}  // namespace gpu_ops
