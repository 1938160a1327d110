// Regions (common/parallel.h) and how a crew divides their work: every unit once, phases one after the other, nobody in
// the body after lead(), with threads that come when they like. No kernels but crew.inl's.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/kernels/common/parallel.h"

namespace {
using namespace fastops;

#include "../../csrc/kernels/common/cpu/crew.inl"

int failures = 0;
void expect(bool good, const char* what, unsigned seed) {
  if (good || ++failures > 20) return;
  std::printf("seed %u: %s\n", seed, what);
}

// A body of several phases over counters. A phase reads what the one before has written, of other members.
struct Work {
  std::vector<int64_t> units;  // of each phase
  bool in_order;
  int members;
  std::vector<std::vector<int>> times;  // how often each unit of a phase was done
  std::atomic<int> inside{0}, most{0};
  std::atomic<bool> open{true}, late{false}, early{false}, wrong_member{false};
  std::atomic<uint64_t> in_use{0};

  void run(Crew& crew) {
    if (!open) late = true;
    if (crew.thread >= members) wrong_member = true;
    if (in_use.fetch_or(uint64_t{1} << crew.thread) >> crew.thread & 1) wrong_member = true;
    const bool stays = phases(crew);
    (void)stays;
    in_use.fetch_and(~(uint64_t{1} << crew.thread));
    if (!open) late = true;
  }
  bool phases(Crew& crew) {
    for (size_t p = 0; p < units.size(); ++p) {
      const auto unit = [&](int64_t u) {
        if (p > 0)
          for (const int times_before : times[p - 1])
            if (times_before != 1) early = true;
        // A unit may take its time, above all where a thread that is not the lead has it.
        if (crew.thread > 0 && u % 3 == 0)
          for (int i = 0; i < 100; ++i) spin_pause();
        ++times[p][static_cast<size_t>(u)];  // not atomic: two members must never do the same one
      };
      bool stays;
      if (p % 3 == 0)
        stays = crew.share(units[p], unit);
      else if (in_order)
        stays = crew.each(units[p], unit);
      else
        stays = crew.each<false>(units[p], unit);
      if (!stays) return false;
    }
    return true;
  }
};

uint32_t body(void* context, Region& region, int member) {
  Crew crew(region, member);
  static_cast<Work*>(context)->run(crew);
  return crew.seen();
}

void prepare(Work& work, std::mt19937& random) {
  work.in_order = random() % 2 == 0;
  const size_t phases = 1 + random() % 5;
  for (size_t p = 0; p < phases; ++p) {
    const unsigned kind = random() % 4;
    work.units.push_back(kind == 0 ? 0 : kind == 1 ? 1 : kind == 2 ? random() % 8 : random() % 300);
    work.times.emplace_back(static_cast<size_t>(work.units.back()), 0);
  }
}
void check(Work& work, unsigned seed) {
  bool once = true;
  for (const auto& phase : work.times)
    for (const int times : phase) once &= times == 1;
  expect(once, "a unit was not done once", seed);
  expect(!work.early, "a phase began before the one before was over", seed);
  expect(!work.late, "a member was in the body after lead()", seed);
  expect(!work.wrong_member, "two members had one number, or a number was too large", seed);
}

// Threads that stay look at several regions that are led again and again, as the torch layer's own team has it.
void test_kept_threads(unsigned seed, int rounds) {
  constexpr int kRegions = 3, kThreads = 3;
  static Region regions[kRegions];
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      Region::Visit visits[kRegions];
      std::mt19937 random(seed + static_cast<unsigned>(t));
      while (!stop) {
        for (int i = 0; i < kRegions; ++i) regions[i].visit(visits[i]);
        if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 50));
        std::this_thread::yield();
      }
    });
  std::vector<std::thread> leads;
  for (int i = 0; i < kRegions; ++i)
    leads.emplace_back([&, i] {
      std::mt19937 random(seed * 7 + static_cast<unsigned>(i));
      for (int round = 0; round < rounds; ++round) {
        Work work;
        prepare(work, random);
        work.members = 1 + static_cast<int>(random() % (kThreads + 1));
        regions[i].open(work.members, body, &work);
        regions[i].lead();
        work.open = false;
        check(work, seed);
      }
    });
  for (std::thread& lead : leads) lead.join();
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

void test_served(unsigned seed) {
  std::mt19937 random(seed);
  Work work;
  prepare(work, random);
  work.members = 1 + static_cast<int>(random() % 4);
  Region region(work.members, body, &work);
  std::vector<std::thread> others;
  const int count = static_cast<int>(random() % 5);  // fewer than members, or more
  for (int t = 0; t < count; ++t)
    others.emplace_back([&region, wait = random() % 80] {
      std::this_thread::sleep_for(std::chrono::microseconds(wait));
      region.serve();
    });
  region.lead();
  work.open = false;
  check(work, seed);
  for (std::thread& other : others) other.join();
}

}  // namespace

int main(int argc, char**) {
  const unsigned rounds = argc > 1 ? 200 : 1000;
  for (unsigned seed = 0; seed < rounds; ++seed) test_served(seed);
  for (unsigned seed = 0; seed < 10; ++seed) test_kept_threads(seed, static_cast<int>(rounds));
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
