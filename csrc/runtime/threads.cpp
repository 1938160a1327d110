#include "threads.h"

#include <condition_variable>
#include <csignal>
#include <ctime>
#include <mutex>
#include <thread>
#include <vector>

namespace fastops::runtime {

struct Pool::Shared {
  Region region;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t calls = 0;  // phases that have begun
  bool over = false;
  std::vector<std::thread> threads;
};

namespace {

// How long a thread looks for the next kernel's work before it sleeps, which then takes 5 to 50 us to wake it; kernels
// of a small model follow each other within microseconds. The ConvNet's image on two threads, AMD Zen 1, us, three runs
// each: not at all 245 to 250, as on one thread; 5 us 178 to 218; 50 us and 1 ms 170 to 208.
constexpr int64_t kSpinNanoseconds = 50000;
constexpr int kLooks = 16;  // between two readings of the clock

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

thread_local void* current = nullptr;  // the Pool::Shared of this thread's last team()

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads > Region::kMembers ? Region::kMembers : threads) {
  if (threads_ == 1) return;
  shared_ = std::make_unique<Shared>();
  shared_->region.ring = announce;
  sigset_t all, before;  // signals are the program's, whose handlers run on its own threads
  sigfillset(&all);
  for (const int mistake : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, mistake);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 1; i < threads_; ++i) shared_->threads.emplace_back([shared = shared_.get()] { work(*shared); });
  } catch (const std::exception&) {  // the system gives no more
    threads_ = static_cast<int>(shared_->threads.size()) + 1;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Pool::~Pool() {
  if (shared_ == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->over = true;
  }
  shared_->changed.notify_all();
  for (std::thread& thread : shared_->threads) thread.join();
}

Team Pool::team() {
  if (threads_ == 1) return {};
  current = shared_.get();
  return {threads_, run};
}

void Pool::work(Shared& shared) {
  Region::Visit visit;
  uint64_t heard = 0;
  for (;;) {
    for (int64_t since = nanoseconds(); nanoseconds() - since < kSpinNanoseconds;) {
      bool worked = false;
      for (int looks = 0; looks < kLooks; ++looks) {
        worked |= shared.region.visit(visit);
        spin_pause();
      }
      if (worked) since = nanoseconds();
    }
    std::unique_lock<std::mutex> lock(shared.mutex);
    shared.changed.wait(lock, [&] { return shared.calls != heard || shared.over; });
    if (shared.over) return;
    heard = shared.calls;
  }
}

void Pool::announce(int) {
  Shared& shared = *static_cast<Shared*>(current);
  {
    const std::lock_guard<std::mutex> lock(shared.mutex);
    ++shared.calls;
  }
  shared.changed.notify_all();
}

void Pool::run(int threads, Region::Body body, void* context) {
  Region& region = static_cast<Shared*>(current)->region;
  region.open(threads, body, context);
  region.lead();
}

}  // namespace fastops::runtime
