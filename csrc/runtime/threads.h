// The threads that a model's kernels run on: its own, which sleep while it does nothing.
#pragma once

#include <memory>

#include "../kernels/common/parallel.h"

namespace fastops::runtime {

// A team of the calling thread and threads - 1 others. They are started at once, and end with the pool. One thread at
// a time may use it.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();

  int threads() const { return threads_; }
  // For kernels that the calling thread runs until the end of its life or the next call of team(), of any pool.
  Team team();

 private:
  struct Shared;
  static void work(Shared& shared);
  static void announce(int members);  // that a phase begins
  static void run(int threads, Region::Body body, void* context);

  int threads_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace fastops::runtime
