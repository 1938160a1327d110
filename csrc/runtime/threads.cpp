#include "threads.h"

#include <condition_variable>
#include <csignal>
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

// How many looks a thread takes for the next kernel's work before it sleeps: some 20 us, as kernels of a small model
// follow each other within microseconds, and waking a thread takes 5 to 50 us.
constexpr int kLooks = 1000;

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
    for (int looks = 0; looks < kLooks; ++looks) {
      if (shared.region.visit(visit)) looks = 0;
      spin_pause();
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
