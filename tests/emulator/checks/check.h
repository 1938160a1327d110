// What the programs here share: memory between pages that fault, and one run of a check in every schedule. A check
// returns whether its results are right.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cuda/launch.h"
#include "simt.h"

// Elements that end at a page that faults, full of NaNs at first.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (count * sizeof(T) + page - 1) / page * page;
    char* const raw =
        static_cast<char*>(mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(raw + page, inner, PROT_READ | PROT_WRITE);
    std::memset(raw + page, 0xff, inner);
    data_ = reinterpret_cast<T*>(raw + page + inner) - count;
  }
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  T* data_;
  size_t count_;
};

inline bool succeeded(const fastops::Status& status) {
  if (!status.ok()) std::printf("%s: %s\n", status.kernel.algorithm, status.message);
  return status.ok();
}

template <class Check>
int in_every_schedule(Check&& check) {
  for (const auto schedule : {simt::Schedule::forward, simt::Schedule::reverse, simt::Schedule::shuffled}) {
    simt::settings().schedule = schedule;
    simt::settings().seed = 7;
    if (!check()) {
      std::printf("wrong in schedule %d\n", static_cast<int>(schedule));
      return 1;
    }
  }
  return 0;
}
