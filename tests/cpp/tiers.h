// What every test here shares: counting failures, teams of threads, memory between guard pages, running a call by its
// plan, and running the cases for every dtype of every tier of this machine.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/kernels/common/cpu/isa.h"

namespace {

using namespace fastops;

inline int failures = 0;

template <class T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<double> = DType::f64;
template <>
constexpr DType kDType<bf16_t> = DType::bf16;
template <>
constexpr DType kDType<f16_t> = DType::f16;

// ---------------------------------------------------------------------------------------------------------------------
// teams

inline void run_threads(int threads, Region::Body body, void* context) {
  Region region(threads, body, context);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&] { region.serve(); });
  region.lead();
  for (std::thread& t : others) t.join();
}
// A pool that is busy elsewhere gives fewer threads than a kernel asks for.
inline void run_at_most_two(int threads, Region::Body body, void* context) {
  run_threads(threads < 2 ? threads : 2, body, context);
}
// Threads that come when some or all of the work is done, one after the other.
inline void run_late(int threads, Region::Body body, void* context) {
  Region region(threads, body, context);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t)
    others.emplace_back([&region, t] {
      std::this_thread::sleep_for(std::chrono::microseconds(20 * t));
      region.serve();
    });
  region.lead();
  for (std::thread& t : others) t.join();
}
// How many threads the last kernel has asked its team for; 0 before one has.
inline int asked = 0;
inline void run_and_note(int threads, Region::Body body, void* context) {
  asked = threads;
  run_threads(threads, body, context);
}

const Team kTeams[] = {{1, nullptr}, {2, run_threads}, {3, run_threads}, {3, run_at_most_two}, {3, run_late}};

// ---------------------------------------------------------------------------------------------------------------------
// memory

// Memory between two pages that fault, against the one in front or the one behind. AddressSanitizer does not see the
// masked loads and stores of vectors; these pages stop them. It starts as NaN, whatever the type.
class Pages {
 public:
  // The address is a multiple of `alignment`, plus `offset`: as near to the chosen page as that allows.
  Pages(size_t bytes, bool at_end, size_t alignment = 1, size_t offset = 0) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + offset + page - 1) / page * page;
    length_ = inner + 2 * page;
    memory_ = static_cast<char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED) std::abort();
    if (inner > 0 && mprotect(memory_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = memory_ + page + offset + (at_end ? (inner - bytes - offset) / alignment * alignment : 0);
    std::memset(data_, 0xff, bytes);
  }
  ~Pages() { munmap(memory_, length_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  void* data() const { return data_; }

 private:
  size_t length_;
  char* memory_;
  char* data_;
};

// n elements between two such pages, with the interface of a unique_ptr<T[]>: some against the page in front, most
// against the one behind.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t n, size_t alignment = sizeof(T))
      : pages_(static_cast<size_t>(n) * sizeof(T), ++made_ * 2654435761u >> 30 != 0, alignment) {}
  T* get() const { return static_cast<T*>(pages_.data()); }
  T& operator[](size_t i) const { return get()[i]; }

 private:
  static inline unsigned made_ = 0;
  Pages pages_;
};

// Scratch memory of exactly this size; null if it has none, as the contract allows.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : pages_(bytes, true, 64), empty_(bytes == 0) {}
  void* get() const { return empty_ ? nullptr : pages_.data(); }

 private:
  Pages pages_;
  bool empty_;
};

// ---------------------------------------------------------------------------------------------------------------------
// denormal numbers

#if defined(__SSE__)
// Whether an instruction of this thread underflowed or met a denormal number while body ran: each such instruction
// takes an Intel processor 100 to 150 cycles.
template <class Body>
bool underflows(Body body) {
  constexpr unsigned kDenormal = 1 << 1, kUnderflow = 1 << 4;
  _mm_setcsr(_mm_getcsr() & ~(kDenormal | kUnderflow));
  body();
  return (_mm_getcsr() & (kDenormal | kUnderflow)) != 0;
}
#else
template <class Body>
bool underflows(Body body) {
  body();
  return false;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// calls

// The plan of a call on the tier that is set. It must have a kernel, and a name for it.
template <class Call>
Plan<Call> plan_of(const Call& call, const Target& target = {}) {
  const Plan<Call> plan = kernels_of(call).planners.plan(call, target);
  if (plan.runner == nullptr || plan.name.algorithm == nullptr || plan.tier == nullptr) {
    std::printf("%s dtype %d: a call has no kernel\n", isa_name(isa_used()), static_cast<int>(call.dtype));
    std::abort();
  }
  return plan;
}

// Plans a call for a team and runs it with a workspace of its own.
template <class Call>
void run_call(const Call& call, const typename Call::Pointers& pointers, const Team& team = {},
              Bf16Multiply bf16_multiply = Bf16Multiply::automatic) {
  const Plan<Call> plan = plan_of(call, {team.threads, bf16_multiply});
  const Workspace workspace(plan.workspace);
  plan.run(pointers, workspace.get(), team);
}

// The same with weights packed ahead, which take the place of w; w itself where the plan reads it as it is. Returns
// whether anything was packed.
template <class Call>
bool run_packed(Call call, typename Call::Pointers pointers, const Team& team, bool at_end,
                Bf16Multiply bf16_multiply = Bf16Multiply::automatic) {
  call.packed_w = true;
  const Plan<Call> plan = plan_of(call, {team.threads, bf16_multiply});
  const Pages packed(plan.packed, at_end, 64);
  if (plan.packed > 0) {
    plan.pack(pointers.w, packed.data());
    pointers.w = packed.data();
  }
  const Workspace workspace(plan.workspace);
  plan.run(pointers, workspace.get(), team);
  return plan.packed > 0;
}

// What a test's main does. Arguments: "quick" for fewer cases, names of tiers to run those alone, and names of dtypes
// to run those alone. body<T>(quick) runs the cases of one dtype on the tier that is set. by_parts: of a room where AMX
// takes float32 too; for others that tier has avx512's kernels. integers: of a room of products of integers, which
// every tier has for every dtype but float64.
template <class Body>
int run_tiers(int argc, char** argv, Body&& body, bool by_parts = false, bool integers = false) {
  const char* const dtypes[] = {"f32", "f64", "bf16", "f16"};  // as in DType
  bool quick = false, all = true, wanted[4] = {};
  std::vector<const char*> only;
  for (int i = 1; i < argc; ++i) {
    bool is_dtype = false;
    for (int d = 0; d < 4; ++d)
      if (std::strcmp(argv[i], dtypes[d]) == 0) is_dtype = wanted[d] = true;
    if (is_dtype)
      all = false;
    else if (std::strcmp(argv[i], "quick") == 0)
      quick = true;
    else
      only.push_back(argv[i]);
  }
  for (int i = 0; i <= static_cast<int>(isa_found()); ++i) {
    const Isa isa = static_cast<Isa>(i);
    const auto named = [&](const char* name) { return std::strcmp(name, isa_name(isa)) == 0; };
    if ((!only.empty() && std::none_of(only.begin(), only.end(), named)) || !set_isa(isa)) continue;
    const auto run = [&]<class T>() {
      if (!all && !wanted[static_cast<int>(kDType<T>)]) return;
      if (integers) return kDType<T> == DType::f64 ? void() : body.template operator()<T>(quick);
      if (isa == Isa::amx && kDType<T> == DType::f32 && !by_parts) return;
      if (std::strcmp(kernels(kDType<T>).isa, isa_name(isa)) == 0) body.template operator()<T>(quick);
    };
    run.template operator()<float>();
    run.template operator()<double>();
    run.template operator()<bf16_t>();
    run.template operator()<f16_t>();
    std::printf("%s: %s\n", isa_name(isa), failures == 0 ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}

}  // namespace
