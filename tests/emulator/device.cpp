// The emulator as a device of torch. Its tensors go through both doors, autograd and autocast, like CUDA tensors.
//
// Its memory is host memory. Every allocation is between two pages that fault and is full of NaNs at first. It ends at
// the second page or, with `aligned`, up to 15 bytes before it, as a GPU aligns allocations. These bytes are checked
// when the memory is freed. Ops of other libraries run on the CPU.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <torch/python.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>

#include "../../csrc/kernels/common/cuda/kernels.h"
#include "cuda_runtime.h"
#include "simt.h"

namespace {

using at::Tensor;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);
constexpr unsigned char kPoison = 0xff;
constexpr size_t kPoisoned = size_t{1} << 30;  // larger allocations are address space that a test hardly touches

std::atomic<bool> aligned{true};
std::atomic<int64_t> overruns{0};

struct Block {
  char* pages;
  size_t size;  // with the guards
  char *data, *end;
};

void give_back(void* context) {
  const Block* const block = static_cast<Block*>(context);
  const char* const last = block->pages + block->size - static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const char* p = block->end; p < last; ++p)
    if (static_cast<unsigned char>(*p) != kPoison) overruns.fetch_add(1);
  munmap(block->pages, block->size);
  delete block;
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back_nothing, kDevice};
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    void* raw = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(raw != MAP_FAILED, "emulator: no memory for ", bytes, " bytes");
    char* const begin = static_cast<char*>(raw) + page;
    TORCH_CHECK(mprotect(begin, inner, PROT_READ | PROT_WRITE) == 0, "emulator: mprotect failed");
    if (inner <= kPoisoned) std::memset(begin, kPoison, inner);
    const size_t room = aligned.load() ? (bytes + 15) / 16 * 16 : bytes;
    auto* block = new Block{static_cast<char*>(raw), inner + 2 * page, begin + inner - room, nullptr};
    block->end = block->data + bytes;
    return {block->data, block, &give_back, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, size_t bytes) const override { default_copy_data(dest, src, bytes); }

 private:
  static void give_back_nothing(void*) {}
};

GuardedAllocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

// One device with one stream.
struct GuardImpl final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl);

// The hooks that autograd needs.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};
const bool hooked = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

// A CPU tensor with the same memory.
Tensor on_host(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU));
}
Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (to.numel() > 0) on_host(to).copy_(on_host(self));
  return to;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}
at::Scalar local_scalar(const Tensor& self) { return on_host(self).item(); }

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

// The only op for which the fallback to the CPU has no kernel.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  const std::optional<Tensor> b = bias && bias->defined() ? std::optional(on_host(*bias)) : std::nullopt;
  return at::convolution(on_host(input), on_host(weight), b, stride, padding, dilation, transposed, output_padding,
                         groups)
      .to(kDevice);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(at::native::view));
  m.impl("_reshape_alias",
         static_cast<Tensor (*)(const Tensor&, at::IntArrayRef, at::IntArrayRef)>(at::native::_reshape_alias));
  m.impl("convolution_overrideable", convolution);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}

PYBIND11_MODULE(_emulator, m) {
  (void)hooked;
  // Returns the kernels of this chip. Each chip has a table of its own, so that no plan that is kept for a table runs
  // on another chip.
  m.def("configure", [](int schedule, uint64_t seed, int multiprocessors, size_t shared) {
    static std::map<std::pair<int, size_t>, fastops::cuda::KernelTable> tables;
    simt::settings() = {static_cast<simt::Schedule>(schedule), seed, multiprocessors, shared};
    const auto place = tables.try_emplace({multiprocessors, shared}, fastops::cuda::kernels()).first;
    return reinterpret_cast<uintptr_t>(&place->second);
  });
  m.def("take_queries", [] { return simt::queries().exchange(0); });
  m.def("set_aligned", [](bool value) { aligned.store(value); });
  // Writes past the end of an allocation since the last call.
  m.def("take_overruns", [] { return overruns.exchange(0); });
}

}  // namespace
