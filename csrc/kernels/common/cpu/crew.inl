// How the members of a region divide its work (common/parallel.h).
#pragma once

#include "../parallel.h"
#include "numbers.inl"

// A member of a region, in a body: its number, which is below the number of threads that were wanted, and the phases.
// A phase returns whether the body is to go on; where it is not, the body returns at once.
//
// Of the last phase of a body the result does not matter.
class Crew {
 public:
  const int thread;

  Crew() : thread(0) {}  // alone
  Crew(Region& region, int member) : thread(member), region_(&region), phase_(region.first_phase()), seen_(phase_) {}

  // body(unit) for every unit in [0, units). Members draw the next one, in order.
  template <class Body>
  bool share(int64_t units, Body&& body) {
    if (region_ == nullptr) {
      for (int64_t u = 0; u < units; ++u) body(u);
      return true;
    }
    return phase(units, 1, [&] {
      int64_t done = 0;
      for (int64_t u; (u = region_->claim(phase_, 0, units)) >= 0; ++done) body(u);
      return done;
    });
  }

  // body(begin, end) for runs of units that cover [0, units). Each member has a part of them, the same whenever a team
  // of this size does as many: what it has done last is then in its caches still. It takes its part in a few runs, and
  // then what is left of the others' parts. A member goes through its part from the first unit to the last or, if not
  // in_order, from the last run to the first.
  template <bool in_order = true, class Body>
  bool divide(int64_t units, Body&& body) {
    if (region_ == nullptr) {
      if (units > 0) body(int64_t{0}, units);
      return true;
    }
    const int parts = region_->members();
    return phase(units, parts, [&] {
      int64_t done = 0;
      for (int i = 0; i < parts; ++i) {
        const int part = thread + i < parts ? thread + i : thread + i - parts;
        const int64_t first = units * part / parts, count = units * (part + 1) / parts - first;
        const int64_t runs = smaller(count, kRuns);
        for (int64_t run; (run = region_->claim(phase_, part, runs)) >= 0;) {
          const int64_t at = in_order ? run : runs - 1 - run;
          const int64_t begin = first + count * at / runs, end = first + count * (at + 1) / runs;
          body(begin, end);
          done += end - begin;
        }
      }
      return done;
    });
  }

  // body(unit) for every unit in [0, units), divided in the same way.
  template <bool in_order = true, class Body>
  bool each(int64_t units, Body&& body) {
    return divide<in_order>(units, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(in_order ? i : begin + end - 1 - i);
    });
  }

  uint32_t seen() const { return seen_; }

 private:
  // Of a member's part. With fewer, a member that comes late leaves more for the others to wait for.
  static constexpr int64_t kRuns = 4;

  template <class Claims>
  bool phase(int64_t units, int queues, Claims&& claims) {
    ++phase_;
    if (thread == 0) {
      region_->begin(phase_, queues);
      const int64_t done = claims();
      region_->close(phase_);
      region_->finish(done, units);
      region_->wait_for(units);
      return true;
    }
    seen_ = region_->current();
    if (seen_ != phase_) return static_cast<int32_t>(seen_ - phase_) > 0;
    const int64_t done = claims();
    region_->close(phase_);
    if (done > 0) region_->finish(done, units);
    return false;
  }

  Region* region_ = nullptr;
  uint32_t phase_ = 0, seen_ = 0;
};

// body(crew) on at most `wanted` threads of a team. The calling thread is one of them.
template <class Body>
inline void parallel(const Team& team, int wanted, const Body& body) {
  const int n = smaller(wanted, team.threads);
  if (n <= 1 || team.run == nullptr) {
    Crew alone;
    body(alone);
    return;
  }
  team.run(
      n,
      [](void* context, Region& region, int member) {
        Crew crew(region, member);
        (*static_cast<const Body*>(context))(crew);
        return crew.seen();
      },
      const_cast<Body*>(&body));
}
