// How a kernel gets its threads: the caller passes a Team. Kernels create no threads and do not use OpenMP.
#pragma once

#include <sched.h>

#include <cstdint>

// Kernels of every tier call these. Compiled into one, they leave no copy that the linker could take for all.
#define FASTOPS_IN_PLACE __attribute__((always_inline)) inline

namespace fastops {

// Lets the other thread of a core run, for a moment.
FASTOPS_IN_PLACE void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

// The work of several threads on one body. The thread that has the work leads; others may come, in any number and at
// any time until it is done. A body is a sequence of phases, and a phase is a number of units that its members claim
// one after the other. The lead returns when all units of all phases are done. It waits for members that have claimed a
// unit, and at the end for those that are in the body just then; for no others: what a thread would have done that the
// system has stopped, or that never came, the others do. So a body does little but units, and a member is not let in
// when all units of a phase are claimed.
//
// A member other than the lead leaves the body when it finds no more unit to claim, and comes back for the next phase;
// the phases that are over then have nothing for it. So a body may be called several times by a thread, and everything
// between its phases must depend on the call alone. A kernel's result must be bitwise the same whichever member does
// what.
//
// Members touch nothing of the body's while they are outside, so a region may be used again as soon as lead() returns.
// Its own memory has to live until no thread is in serve().
class Region {
 public:
  // Calls the body as `member`; returns the last phase that this member has seen.
  using Body = uint32_t (*)(void* context, Region& region, int member);
  static constexpr int kMembers = 256;  // the most that take part

  // How the lead waits for long, and is woken: as a futex does. Null: it yields.
  void (*sleep)(uint32_t* word, uint32_t value) = nullptr;
  void (*wake)(uint32_t* word) = nullptr;
  // Called by the lead when a phase begins, to wake members that sleep. Null if none does.
  void (*ring)(int members) = nullptr;

  Region() = default;
  Region(int members, Body body, void* context) { open(members, body, context); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Lets threads in. One region at a time.
  void open(int members, Body body, void* context) {
    body_ = body;
    context_ = context;
    __atomic_store_n(&first_, phase_, __ATOMIC_RELAXED);
    __atomic_store_n(&members_, members < kMembers ? members : kMembers, __ATOMIC_RELAXED);
    const uint64_t gate = __atomic_load_n(&gate_, __ATOMIC_RELAXED);
    __atomic_store_n(&gate_, (gate & ~(kEpoch - 1)) + kEpoch + kOpen, __ATOMIC_RELEASE);
  }

  // The lead's work: returns when everything is done.
  void lead() {
    body_(context_, *this, 0);
    __atomic_fetch_and(&gate_, ~kOpen, __ATOMIC_ACQ_REL);
    wait([&] { return (__atomic_load_n(&gate_, __ATOMIC_ACQUIRE) & kInside) == 0; });
  }

  // What a thread remembers of its visits to a region.
  struct Visit {
    uint64_t epoch = 0;
    int member = 0;
    uint32_t seen = 0;
  };

  // Takes part in the phase that is going on, if it has not seen that one yet. Whether it was let in.
  bool visit(Visit& visit) {
    uint64_t gate = __atomic_load_n(&gate_, __ATOMIC_ACQUIRE);
    if ((gate & kOpen) == 0) return false;
    const uint32_t phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (gate / kEpoch == visit.epoch && phase == visit.seen) return false;
    const bool begun = phase != __atomic_load_n(&first_, __ATOMIC_RELAXED);
    if (begun && phase == __atomic_load_n(&all_claimed_, __ATOMIC_RELAXED)) return false;
    do {
      if ((gate & kOpen) == 0) return false;
      const bool again = gate / kEpoch == visit.epoch;
      const int joined = static_cast<int>(gate / kJoined % (2 * kMembers));
      if (!again && joined + 1 >= __atomic_load_n(&members_, __ATOMIC_RELAXED)) return false;
      if (__atomic_compare_exchange_n(&gate_, &gate, gate + 1 + (again ? 0 : kJoined), true, __ATOMIC_ACQUIRE,
                                      __ATOMIC_ACQUIRE)) {
        visit = {gate / kEpoch, again ? visit.member : joined + 1, visit.seen};
        break;
      }
    } while (true);
    visit.seen = body_(context_, *this, visit.member);
    gate = __atomic_sub_fetch(&gate_, 1, __ATOMIC_SEQ_CST);
    if ((gate & (kOpen | kInside)) == 0) rouse();
    return true;
  }

  bool is_open() const { return (__atomic_load_n(&gate_, __ATOMIC_ACQUIRE) & kOpen) != 0; }

  // Takes part until the region is closed. For teams that give a region threads of its own.
  void serve() {
    Visit mine;
    for (int spins = 0; is_open(); ++spins) {
      if (visit(mine)) spins = 0;
      if (spins < kSpins)
        spin_pause();
      else
        sched_yield();
    }
  }

  // ---- for kernels, through Crew
  // -------------------------------------------------------------------------------------

  FASTOPS_IN_PLACE uint32_t first_phase() const { return first_; }
  FASTOPS_IN_PLACE int members() const { return members_; }

  // By the lead: `phase` begins, with this many queues of units.
  FASTOPS_IN_PLACE void begin(uint32_t phase, int queues) {
    __atomic_store_n(&done_, 0, __ATOMIC_RELAXED);
    for (int q = 0; q < queues; ++q) __atomic_store_n(&queues_[q].next, uint64_t{phase} << 32, __ATOMIC_RELAXED);
    __atomic_store_n(&phase_, phase, __ATOMIC_RELEASE);
    if (ring != nullptr) ring(members_);
  }

  // By another member: the phase that is going on. It waits a little for a first phase that the lead prepares.
  FASTOPS_IN_PLACE uint32_t current() const {
    uint32_t now = __atomic_load_n(&phase_, __ATOMIC_ACQUIRE);
    for (int spins = 0; now == first_ && spins < kSpins; ++spins) {
      spin_pause();
      now = __atomic_load_n(&phase_, __ATOMIC_ACQUIRE);
    }
    return now;
  }

  // Claims one of the `units` of a queue in this phase; -1 if there is none left.
  FASTOPS_IN_PLACE int64_t claim(uint32_t phase, int queue, int64_t units) {
    uint64_t* const next = &queues_[queue].next;
    uint64_t value = __atomic_load_n(next, __ATOMIC_RELAXED);
    do {
      if (value >> 32 != phase || static_cast<int64_t>(value & 0xffffffff) >= units) return -1;
    } while (!__atomic_compare_exchange_n(next, &value, value + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return static_cast<int64_t>(value & 0xffffffff);
  }

  // All units of the phase are claimed. It may come late: it only spares members the way in.
  FASTOPS_IN_PLACE void close(uint32_t phase) { __atomic_store_n(&all_claimed_, phase, __ATOMIC_RELAXED); }

  // `count` more of the phase's `units` are done.
  FASTOPS_IN_PLACE void finish(int64_t count, int64_t units) {
    if (__atomic_add_fetch(&done_, count, __ATOMIC_SEQ_CST) == units) rouse();
  }
  // By the lead, after finish().
  FASTOPS_IN_PLACE void wait_for(int64_t units) {
    wait([&]() __attribute__((always_inline)) { return __atomic_load_n(&done_, __ATOMIC_ACQUIRE) == units; });
  }

 private:
  // The gate: members inside, members that have come, whether it is open, and the number of the region.
  static constexpr uint64_t kInside = 0xfff, kJoined = 0x1000, kOpen = kJoined * kMembers * 2, kEpoch = 2 * kOpen;
  static constexpr int kSpins = 2000;

  struct alignas(64) Queue {
    uint64_t next;  // the phase, and how many units are claimed
  };

  template <class Ready>
  FASTOPS_IN_PLACE void wait(Ready ready) {
    for (int spins = 0; !ready(); ++spins) {
      if (spins < kSpins) {
        spin_pause();
      } else if (sleep == nullptr) {
        sched_yield();
      } else {
        __atomic_store_n(&asleep_, 1, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);  // rouse() finds it asleep, or it finds what rouse() came for
        if (!ready()) sleep(&asleep_, 1);
        __atomic_store_n(&asleep_, 0, __ATOMIC_RELAXED);
      }
    }
  }
  FASTOPS_IN_PLACE void rouse() {
    if (wake == nullptr || __atomic_load_n(&asleep_, __ATOMIC_SEQ_CST) == 0) return;
    __atomic_store_n(&asleep_, 0, __ATOMIC_SEQ_CST);
    wake(&asleep_);
  }

  Body body_ = nullptr;
  void* context_ = nullptr;
  uint32_t first_ = 0;
  int members_ = 1;
  alignas(64) uint64_t gate_ = 0;
  alignas(64) uint32_t phase_ = 0;
  uint32_t all_claimed_ = 0;
  alignas(64) int64_t done_ = 0;
  uint32_t asleep_ = 0;
  Queue queues_[kMembers];
};

// run(threads, body, context) has body(context, region, member) called as Region says: a Region of at most `threads`
// members, of which the calling thread is the lead.
struct Team {
  int threads = 1;  // the most that a kernel may use
  void (*run)(int threads, Region::Body body, void* context) = nullptr;
};

}  // namespace fastops
