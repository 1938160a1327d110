// How a kernel gets its threads: the caller passes a Team. Kernels create no threads and do not use OpenMP.
#pragma once

namespace fastops {

// run(threads, body, context) calls body(context, thread, actual) once for every thread in [0, actual), where
// 1 <= actual <= threads, and returns when all calls have returned. All calls run at the same time, so the body may use
// a barrier among `actual` threads. A kernel's result must be bitwise the same for every `actual`.
struct Team {
  int threads = 1;  // the most that a kernel may use
  void (*run)(int threads, void (*body)(void* context, int thread, int actual), void* context) = nullptr;

  // Calls body(thread, actual) on at most `wanted` threads. One thread is the calling thread.
  template <class Body>
  void parallel(int wanted, Body&& body) const {
    const int n = wanted < threads ? wanted : threads;
    if (n <= 1 || run == nullptr) {
      body(0, 1);
      return;
    }
    run(
        n, [](void* context, int thread, int actual) { (*static_cast<Body*>(context))(thread, actual); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace fastops
