#include "team.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace fastops {
namespace {

std::atomic<bool> forked{false};
// From when the library is loaded, not from the first call: by then the process may have forked, and the pool that
// torch filled before is not there in the child.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

void run(int threads, void (*body)(void*, int, int), void* context) {
// No num_threads clause: libgomp rebuilds its pool whenever the team's size changes (PyTorch issue 32008), so the whole
// pool starts and the threads that are not wanted return at once.
#pragma omp parallel
  {
    const int actual = std::min(threads, omp_get_num_threads());
    const int thread = omp_get_thread_num();
    if (thread < actual) body(context, thread, actual);
  }
}

}  // namespace

Team torch_team() {
  if (registered != 0 || forked.load(std::memory_order_relaxed) || at::in_parallel_region()) return Team{1, nullptr};
  return Team{at::get_num_threads(), run};
}

}  // namespace fastops
