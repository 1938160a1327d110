// Large outputs come from a caching pool of huge-page memory.
//
// PyTorch's CPU allocator returns a large block to the system at every free, so each new output pays its page faults
// again (16 ms instead of 2.6 ms for a 64 MB ReLU). The pool keeps freed blocks instead, and divides and joins them,
// under two bounds: the cache never exceeds `limit` bytes, and live plus cached bytes never exceed the highest number
// of live bytes so far by more than a 64th and 10 MiB, so that the process is hardly larger than it would have been at
// its own peak. Where what is free is enough but lies apart, its pages are moved together, as in Guo et al., "GMLake"
// (2024): a model whose outputs have many sizes would otherwise map some of them at every pass.
//
// Training steps of a batch of 8, Zen 5: without the moves and with an eighth instead of a 64th, blocks of 2 MiB,
// ResNet-50 mapped 1 to 3 blocks a step, of 25 MB each that took up to 17 ms, and the process grew by 925 MB
// (ConvNeXt-T 1211, ViT-B/16 1114); now parts of 1 to 3 blocks, and 746 (1058, 1059).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastops {

// An uninitialised tensor: on the CPU from the pool when it is large, otherwise from PyTorch's allocator.
at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device = at::kCPU);
at::Tensor empty_output_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                                at::Device device = at::kCPU);

// Scratch for one kernel call: 64-byte aligned, kept by the thread for its next call unless it is large.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
  at::DataPtr large_;
};

namespace memory {

struct Stats {
  int64_t allocated_bytes;       // held by live tensors
  int64_t cached_bytes;          // kept for the next ones
  int64_t peak_allocated_bytes;  // the most that live tensors have held
  int64_t limit_bytes;           // bound on cached_bytes
  int64_t threshold_bytes;       // outputs from this size on come from the pool
  int64_t hits, misses;          // allocations served from the cache, and from the system
};

Stats stats();
void set_limit(int64_t bytes);  // gives back at once what is cached above it; 0 keeps nothing
void empty_cache();

}  // namespace memory
}  // namespace fastops
