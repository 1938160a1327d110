// How a kernel gets its threads: the caller hands in a Team. Kernels create no threads and know no OpenMP.
#pragma once

namespace fastops {

// run(threads, body, context) calls body(context, thread, actual) once for every thread in [0, actual), all of them at
// the same time, and returns when all have returned; 1 <= actual <= threads. The calls run concurrently, so the body
// may use a barrier among `actual` threads. A kernel must give bitwise the same result for every `actual`.
struct Team {
  int threads = 1;  // how many the caller is willing to give
  void (*run)(int threads, void (*body)(void* context, int thread, int actual), void* context) = nullptr;

  // Calls body(thread, actual) on at most `wanted` threads; runs in the calling thread alone when one is enough.
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
