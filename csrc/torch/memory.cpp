#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "binding.h"

namespace fastops {
namespace {

// What is mapped is whole huge pages of 2 MiB. Blocks are parts of that: from 3 MiB on the rounding is at most a
// twelfth.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kGranule = size_t{256} << 10;
// What may be cached above the peak besides a 64th of it: free parts of huge pages, which cannot be put together.
constexpr size_t kPieces = size_t{8} << 20;
constexpr size_t kThreshold = size_t{3} << 20;
constexpr size_t kDefaultLimit = size_t{1} << 30;

class Pool final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive static destruction.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::Device(at::kCPU)};
    void* data = take(bytes);
    // As PyTorch's own CPU allocator does, by what was asked for: the profiler's balance comes out the same.
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* dest, const void* src, size_t bytes) const override { default_copy_data(dest, src, bytes); }

  memory::Stats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {as_int(live_), as_int(cached_), as_int(peak_), as_int(limit_), as_int(kThreshold), hits_, misses_};
  }

  void set_limit(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink_cache_to(limit_);
  }

  void empty_cache() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink_cache_to(0);
  }

 private:
  struct Free {
    size_t size;
    int64_t freed;  // when, counted in frees
  };

  Pool() {
    // A fork while another thread holds the mutex would leave it locked in the child for ever.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }
  static int64_t as_int(size_t bytes) { return static_cast<int64_t>(bytes); }

  static void release(void* data) {
    if (data == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    instance().give_back(data);
  }

  void* take(size_t bytes) {
    const size_t size = round_up(bytes, kGranule);
    const std::lock_guard<std::mutex> lock(mutex_);
    // Best fit. What is left of a larger block stays free; it comes together again when this part is given back.
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if (it->second.size >= size && (best == free_.end() || it->second.size < best->second.size)) best = it;
    char* data;
    if (best != free_.end()) {
      data = best->first;
      take_out(best, data, size);
      ++hits_;
    } else {
      data = put_together(size);
    }
    sizes_.emplace(data, size);
    live_ += size;
    peak_ = std::max(peak_, live_);
    return data;
  }

  void give_back(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = sizes_.find(pointer);
    char* const data = static_cast<char*>(pointer);
    const size_t size = it->second;
    sizes_.erase(it);
    live_ -= size;
    keep(data, size);
    shrink_cache_to(limit_);
  }

  // A block for which no free one is large enough: the huge pages of free ones, moved to addresses that follow each
  // other, which costs no page faults; and new ones for what is missing.
  char* put_together(size_t size) {
    const size_t mapped = round_up(size, kHugePage);
    char* const data = map(mapped);
    size_t filled = 0;
    while (filled < mapped) {
      auto best = free_.end();
      size_t most = 0;
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const auto [first, bytes] = huge_pages(it->first, it->second.size);
        if (bytes > most) best = it, most = bytes;
      }
      if (most == 0) break;
      const auto [first, bytes] = huge_pages(best->first, best->second.size);
      const size_t taken = std::min(bytes, mapped - filled);
      if (mremap(first, taken, taken, MREMAP_MAYMOVE | MREMAP_FIXED, data + filled) == MAP_FAILED) break;
      filled += taken;
      take_out(best, first, taken);
    }
    if (filled == mapped) {
      ++hits_;
    } else {
      ++misses_;
      shrink_cache_to(std::max(peak_ + peak_ / 64 + kPieces, live_ + mapped) - live_ - mapped);
    }
    if (mapped > size) {
      keep(data + size, mapped - size);
      shrink_cache_to(limit_);
    }
    return data;
  }

  // The whole huge pages in a block.
  static std::pair<char*, size_t> huge_pages(char* data, size_t size) {
    const size_t head = round_up(reinterpret_cast<uintptr_t>(data), kHugePage) - reinterpret_cast<uintptr_t>(data);
    if (size < head + kHugePage) return {data, 0};
    return {data + head, (size - head) / kHugePage * kHugePage};
  }

  // A free block, together with its free neighbours.
  void keep(char* data, size_t size) {
    cached_ += size;
    // With the free blocks on both sides it is one; it does not matter whether they were mapped together.
    auto next = free_.lower_bound(data);
    if (next != free_.end() && next->first == data + size) {
      size += next->second.size;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.size == data) {
        data = before->first;
        size += before->second.size;
        free_.erase(before);
      }
    }
    free_.emplace(data, Free{size, ++frees_});
  }

  // Oldest first: a block that nobody has wanted for long is the least likely to be wanted next; only what has to go,
  // and whole huge pages before parts of them, as what is left of one is small pages from then on.
  void shrink_cache_to(size_t bytes) {
    while (cached_ > bytes) {
      auto oldest = free_.end();
      bool whole = false;
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const bool has_whole = huge_pages(it->first, it->second.size).second > 0;
        if (oldest == free_.end() || has_whole > whole ||
            (has_whole == whole && it->second.freed < oldest->second.freed))
          oldest = it, whole = has_whole;
      }
      auto [first, size] =
          whole ? huge_pages(oldest->first, oldest->second.size) : std::pair(oldest->first, oldest->second.size);
      const size_t gone = std::min(size, round_up(cached_ - bytes, whole ? kHugePage : kGranule));
      first += size - gone;
      take_out(oldest, first, gone);
      munmap(first, gone);
    }
  }

  // Takes a part out of a free block; what is before and after it stays free.
  void take_out(std::map<char*, Free>::iterator it, char* first, size_t size) {
    char* const begin = it->first;
    const Free block = it->second;
    const auto before = static_cast<size_t>(first - begin);
    free_.erase(it);
    if (before > 0) free_.emplace(begin, Free{before, block.freed});
    if (block.size > before + size) free_.emplace(first + size, Free{block.size - before - size, block.freed});
    cached_ -= size;
  }

  // Maps one page more than asked and trims, so that the block starts on a huge page.
  static char* map(size_t size) {
    const size_t padded = size + kHugePage;
    void* raw = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, raw != MAP_FAILED, "fastops: could not allocate ", size,
                     " bytes for an output: ", std::strerror(errno));
    char* begin = static_cast<char*>(raw);
    const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (head != 0) munmap(begin, head);
    munmap(begin + head + size, padded - head - size);
    madvise(begin + head, size, MADV_HUGEPAGE);  // a hint: small pages are slower, not wrong
    return begin + head;
  }

  std::mutex mutex_;
  std::map<char*, Free> free_;  // no two of them are next to each other
  std::unordered_map<void*, size_t> sizes_;
  size_t live_ = 0, cached_ = 0, peak_ = 0, limit_ = kDefaultLimit;
  int64_t hits_ = 0, misses_ = 0, frees_ = 0;
};

// A thread keeps at most this much scratch; more is asked of the pool for one call.
constexpr size_t kKeptWorkspace = size_t{16} << 20;

struct KeptWorkspace {
  void* data = nullptr;
  size_t size = 0;
  ~KeptWorkspace() { std::free(data); }
};

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  if (!device.is_cpu()) return at::empty(sizes, at::TensorOptions().dtype(dtype).device(device));
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kThreshold) return at::detail::empty_cpu(sizes, dtype);
  return at::detail::empty_generic(sizes, &Pool::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   std::nullopt);
}

at::Tensor empty_output_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                                at::Device device) {
  if (!device.is_cpu()) return at::empty_strided(sizes, strides, at::TensorOptions().dtype(dtype).device(device));
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kThreshold) return at::detail::empty_strided_cpu(sizes, strides, dtype);
  return at::detail::empty_strided_generic(sizes, strides, &Pool::instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
}

Workspace::Workspace(size_t bytes) {
  if (bytes == 0) return;
  if (bytes > kKeptWorkspace) {
    large_ = Pool::instance().allocate(bytes);
    data_ = large_.get();
    return;
  }
  static thread_local KeptWorkspace kept;
  if (kept.size < bytes) {
    std::free(kept.data);
    kept.size = 0;
    kept.data = std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
    TORCH_CHECK_WITH(OutOfMemoryError, kept.data != nullptr, "fastops: could not allocate ", bytes,
                     " bytes of workspace");
    kept.size = bytes;
  }
  data_ = kept.data;
}

namespace memory {

Stats stats() { return Pool::instance().stats(); }

void set_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "set_limit: bytes must be 0 or more, got ", bytes);
  Pool::instance().set_limit(static_cast<size_t>(bytes));
}

void empty_cache() { Pool::instance().empty_cache(); }

}  // namespace memory

namespace {

py::dict memory_stats() {
  const memory::Stats stats = memory::stats();
  py::dict result;
  result["allocated_bytes"] = stats.allocated_bytes;
  result["cached_bytes"] = stats.cached_bytes;
  result["peak_allocated_bytes"] = stats.peak_allocated_bytes;
  result["limit_bytes"] = stats.limit_bytes;
  result["threshold_bytes"] = stats.threshold_bytes;
  result["hits"] = stats.hits;
  result["misses"] = stats.misses;
  return result;
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("memory_stats", &memory_stats);
  m.def("memory_set_limit", &memory::set_limit);
  m.def("memory_empty_cache", &memory::empty_cache);
}

}  // namespace fastops
