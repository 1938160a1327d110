#include "team.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <string_view>
#include <thread>

namespace fastops {
namespace {

std::atomic<bool> forked{false};
// From when the library is loaded, not from the first call: by then the process may have forked, and the pool that
// torch filled before is not there in the child.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

void sleep_on(uint32_t* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake(uint32_t* word, int sleepers) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, sleepers, nullptr, nullptr, 0); }

// A thread of the library's own. It handles no signals but those of its own mistakes, so that Python's handlers run
// where they would without it. Whether the system gave one.
template <class Body>
bool start_thread(Body body) {
  sigset_t all, before;
  sigfillset(&all);
  for (const int mistake : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, mistake);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool started = true;
  try {
    std::thread(body).detach();
  } catch (const std::exception&) {
    started = false;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

// ---------------------------------------------------------------------------------------------------------------------
// a team of our own

// Its threads are started when they are first wanted, and stay. Several threads may lead a region at once.
namespace own {

constexpr int kRegions = 16;  // at once; who wants another one works alone
// How long a thread without work looks for more before it sleeps. Waking one takes 5 to 50 us.
constexpr int64_t kSpinNanoseconds = 5000;

Region regions[kRegions];
std::atomic<bool> taken[kRegions];
std::atomic<int> regions_used{0}, threads{0};
std::atomic<bool> no_more_threads{false};
alignas(64) uint32_t bell;  // how often work was announced
alignas(64) std::atomic<int> sleepers{0};

void ring(int members) {
  __atomic_fetch_add(&bell, 1, __ATOMIC_SEQ_CST);
  const int asleep = sleepers.load();
  if (asleep > 0) wake(&bell, std::min(members - 1, asleep));
}

}  // namespace own

// ---------------------------------------------------------------------------------------------------------------------
// whether other programs want the processor

// A parked thread of OpenMP's. With more of them than processors, libgomp's threads wait for each other with 1000 looks
// instead of 300000 before they sleep (GOMP_SPINCOUNT in its manual): PyTorch's ops leave the core to whoever can go
// on.
namespace short_waits {

uint32_t parking;  // counts beginnings and ends: odd while there is one
std::atomic<bool> impossible{false};

void begin() {
  uint32_t count = __atomic_load_n(&parking, __ATOMIC_RELAXED);
  if (count % 2 == 1 || impossible.load(std::memory_order_relaxed)) return;
  if (!__atomic_compare_exchange_n(&parking, &count, count + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) return;
  const auto park = [mine = count + 1] {
    // libgomp ends the process where it is given no thread. So another one is asked for first.
    if (!start_thread([] {})) {
      impossible.store(true);
      return;
    }
// The pool of this thread has one thread besides it.
#pragma omp parallel num_threads(2)
    while (__atomic_load_n(&parking, __ATOMIC_ACQUIRE) == mine) sleep_on(&parking, mine);
  };
  if (!start_thread(park)) impossible.store(true);
}
void end() {
  uint32_t count = __atomic_load_n(&parking, __ATOMIC_RELAXED);
  if (count % 2 == 0 ||
      !__atomic_compare_exchange_n(&parking, &count, count + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
    return;
  wake(&parking, INT_MAX);
}

}  // namespace short_waits

std::atomic<TeamChoice> choice{[] {
  const char* const text = std::getenv("FASTOPS_TEAM");
  const std::string_view value = text == nullptr ? "" : text;
  return value == "own" ? TeamChoice::own : value == "openmp" ? TeamChoice::openmp : TeamChoice::automatic;
}()};

// How much of the time that threads wanted to run they waited for a processor, from /proc/thread-self/schedstat: time
// on a processor, time ready but waiting, in nanoseconds. Where there is no such file, the machine counts as idle.
namespace contention {

constexpr int64_t kBetweenReadings = 4000000;  // of a thread; a reading takes 5 us
// The own team takes over when threads have waited for more than kShare of this time, which is the sum over all. On an
// idle machine it is less than a hundredth. Beside loops at nice 19, which get one part in seventy, it is some
// hundredths; but whoever waits at a barrier waits as well.
constexpr int64_t kWindow = 40000000, kShare = 25;
// It hands back on trial. How long its own threads wait says little, as they sleep where others would spin. A trial
// takes a window; after one that failed, the next comes after twice the time.
constexpr int64_t kFirstTrial = 100000000, kLastTrial = 800000000, kCalm = 1000000000;

std::atomic<bool> contended{false};
std::atomic<int64_t> ran{0}, waited{0};
std::atomic_flag deciding = ATOMIC_FLAG_INIT;
int64_t changed = 0, patience = kFirstTrial;  // of whoever is deciding

void decide(int64_t now) {
  const int64_t waiting = waited.load(std::memory_order_relaxed);
  const int64_t total = waiting + ran.load(std::memory_order_relaxed);
  if (total < kWindow || deciding.test_and_set(std::memory_order_acquire)) return;
  ran.store(0, std::memory_order_relaxed);
  waited.store(0, std::memory_order_relaxed);
  const bool own = contended.load(std::memory_order_relaxed);
  const int64_t since = now - changed;
  if (!own && waiting * kShare > total) {
    patience = since > kCalm ? kFirstTrial : std::min(2 * patience, kLastTrial);
    short_waits::begin();
    contended.store(true, std::memory_order_relaxed);
    changed = now;
  } else if (own && since > patience) {
    contended.store(false, std::memory_order_relaxed);
    short_waits::end();
    changed = now;
  }
  deciding.clear(std::memory_order_release);
}

// What a thread has read last. The file is not kept open: a program may close all that it does not know.
class Reader {
 public:
  // Reads now and then; called by every thread that has done a part of a region.
  void look() {
    const int64_t now = nanoseconds();
    if (!there_ || now - looked_ < kBetweenReadings) return;
    looked_ = now;
    const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    char text[64];
    if (file < 0) {
      there_ = errno == EMFILE || errno == ENFILE;
      return;
    }
    const ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return;
    text[length] = 0;
    char* end = nullptr;
    const int64_t ran_now = std::strtoll(text, &end, 10), waited_now = std::strtoll(end, nullptr, 10);
    if (ran_ >= 0) {
      ran.fetch_add(ran_now - ran_, std::memory_order_relaxed);
      waited.fetch_add(waited_now - waited_, std::memory_order_relaxed);
      decide(now);
    }
    ran_ = ran_now;
    waited_ = waited_now;
  }

 private:
  bool there_ = true;
  int64_t looked_ = 0, ran_ = -1, waited_ = 0;
};

void look() {
  static thread_local Reader reader;
  if (choice.load(std::memory_order_relaxed) == TeamChoice::automatic) reader.look();
}

}  // namespace contention

// ---------------------------------------------------------------------------------------------------------------------

// How many processors the calling thread may use.
int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : INT_MAX;
}

// A body whose members round and treat denormal numbers as the lead does.
struct Led {
  Region::Body body;
  void* context;
  uint64_t modes = current();

#if defined(__x86_64__)
  static uint64_t current() { return __builtin_ia32_stmxcsr() & 0xffc0; }  // without what has happened so far
  static void set(uint64_t modes) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(modes)); }
#elif defined(__aarch64__)
  static uint64_t current() {
    uint64_t modes;
    asm volatile("mrs %0, fpcr" : "=r"(modes));
    return modes;
  }
  static void set(uint64_t modes) { asm volatile("msr fpcr, %0" : : "r"(modes)); }
#else
  static uint64_t current() { return 0; }
  static void set(uint64_t) {}
#endif

  static uint32_t run(void* context, Region& region, int member) {
    const Led& led = *static_cast<const Led*>(context);
    const uint64_t before = current();
    const bool others = before != led.modes;
    if (others) set(led.modes);
    const uint32_t seen = led.body(led.context, region, member);
    if (others) set(before);
    return seen;
  }
};

void run_openmp(int threads, Region::Body body, void* context) {
  static thread_local Region own;
  Region& region = own;
  Led led{body, context};
  region.open(threads, Led::run, &led);
// There is no num_threads clause, as libgomp rebuilds its pool whenever the size of the team changes (PyTorch issue
// 32008). All threads of the pool start; those that are not wanted return at once.
#pragma omp parallel
  {
    const int thread = omp_get_thread_num();
    if (thread == 0) {
      region.lead();
    } else if (thread < threads) {
      region.serve();
      contention::look();
    }
  }
  contention::look();
}

namespace own {

[[maybe_unused]] const bool prepared = [] {
  for (Region& region : regions) {
    region.sleep = sleep_on;
    region.wake = [](uint32_t* word) { wake(word, 1); };
    region.ring = ring;
  }
  return true;
}();

void work() {
  Region::Visit visits[kRegions];
  int64_t idle_since = nanoseconds();
  for (;;) {
    const uint32_t heard = __atomic_load_n(&bell, __ATOMIC_SEQ_CST);
    bool worked = false;
    const int used = regions_used.load(std::memory_order_acquire);
    for (int i = 0; i < used; ++i) worked |= regions[i].visit(visits[i]);
    if (worked) {
      contention::look();
      idle_since = nanoseconds();
      continue;
    }
    for (int i = 0; i < 16; ++i) spin_pause();
    if (nanoseconds() - idle_since < kSpinNanoseconds) continue;
    sleepers.fetch_add(1);
    if (__atomic_load_n(&bell, __ATOMIC_SEQ_CST) == heard) sleep_on(&bell, heard);
    sleepers.fetch_sub(1);
    idle_since = nanoseconds();
  }
}

void run(int wanted, Region::Body body, void* context) {
  if (choice.load(std::memory_order_relaxed) == TeamChoice::own) short_waits::begin();
  const int members = std::min({wanted, processors(), Region::kMembers});
  for (int have = threads.load(); have < members - 1 && !no_more_threads.load();)
    if (threads.compare_exchange_strong(have, have + 1) && !start_thread(work)) {
      threads.fetch_sub(1);
      no_more_threads.store(true);
    }
  Led led{body, context};
  for (int i = 0; i < kRegions; ++i) {
    if (taken[i].load(std::memory_order_relaxed) || taken[i].exchange(true, std::memory_order_acquire)) continue;
    for (int used = regions_used.load(); used <= i && !regions_used.compare_exchange_weak(used, i + 1);) {
    }
    Region& region = regions[i];
    region.open(members, Led::run, &led);
    region.lead();
    taken[i].store(false, std::memory_order_release);
    contention::look();
    return;
  }
  static thread_local Region alone;
  alone.open(1, body, context);
  alone.lead();
}

}  // namespace own

}  // namespace

const char* team_name(TeamChoice choice) {
  return choice == TeamChoice::automatic ? "auto" : choice == TeamChoice::openmp ? "openmp" : "own";
}

TeamChoice team_choice() { return choice.load(std::memory_order_relaxed); }

void set_team_choice(TeamChoice chosen) {
  choice.store(chosen);
  contention::contended.store(false);
  chosen == TeamChoice::own ? short_waits::begin() : short_waits::end();
}

namespace {

// Whether a team of our own would have the processors that PyTorch's threads have. A program that binds its threads, or
// this one, to processors has given them to those.
bool own_team_fits(int threads) {
  static const int at_first = processors();
  return omp_get_proc_bind() == omp_proc_bind_false && processors() >= std::min(threads, at_first);
}

}  // namespace

bool own_team_in_use() {
  const TeamChoice now = team_choice();
  return now == TeamChoice::own ||
         (now == TeamChoice::automatic && contention::contended.load(std::memory_order_relaxed) &&
          own_team_fits(at::get_num_threads()));
}

Team torch_team() {
  if (registered != 0 || forked.load(std::memory_order_relaxed) || at::in_parallel_region()) return Team{1, nullptr};
  return Team{at::get_num_threads(), own_team_in_use() ? own::run : run_openmp};
}

}  // namespace fastops
