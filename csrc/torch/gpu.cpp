#include "gpu.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <dlfcn.h>

#include <array>
#include <atomic>

namespace fastops::gpu {
namespace {

#if defined(FASTOPS_WITH_CUDA)
constexpr bool kCompiled = true;
const cuda::KernelTable* compiled() { return &cuda::kernels(); }
#else
constexpr bool kCompiled = false;
const cuda::KernelTable* compiled() { return nullptr; }
#endif

std::atomic<const cuda::KernelTable*> emulator{nullptr};

// torch's current stream, through its C shim, as not every build of torch has c10/cuda.
using GetStream = int32_t (*)(int32_t device, void** stream);
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<GetStream>(
      dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}
GetStream get_stream() {
  static const GetStream function = find_get_stream();
  return function;
}

constexpr int kMostDevices = 64;

// Whether the kernels run on a device. The query needs the context of the device, so its result is kept.
bool runs_on(int device) {
  enum : int { unknown, yes, no };
  static std::array<std::atomic<int>, kMostDevices> known{};
  if (device < 0 || device >= kMostDevices) return false;
  auto& entry = known[static_cast<size_t>(device)];
  int state = entry.load(std::memory_order_relaxed);
  if (state == unknown) {
    state = get_stream() != nullptr && compiled()->device_problem(device) == nullptr ? yes : no;
    entry.store(state, std::memory_order_relaxed);
  }
  return state == yes;
}

Precision allowed(const at::Tensor& operand, at::Float32Op op) {
  const bool tf32 = !operand.is_cpu() && operand.scalar_type() == at::kFloat &&
                    !at::NoTF32Guard::should_disable_tf32() &&
                    at::globalContext().float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
  return tf32 ? Precision::medium : Precision::highest;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

const cuda::KernelTable* table() {
  const cuda::KernelTable* const emulated = emulator.load(std::memory_order_relaxed);
  return emulated != nullptr ? emulated : compiled();
}

c10::DeviceType device_type() {
  return emulator.load(std::memory_order_relaxed) != nullptr ? c10::DeviceType::PrivateUse1 : c10::DeviceType::CUDA;
}

bool takes(at::Device device) {
  if (device.type() != device_type()) return false;
  return device.type() != c10::DeviceType::CUDA || (kCompiled && runs_on(device.index()));
}

Description describe() {
  if (!kCompiled) return {false, ""};
  const cuda::Runtime runtime = compiled()->runtime();
  if (runtime.problem != nullptr) return {false, runtime.problem};
  if (get_stream() == nullptr) return {false, "this torch has no CUDA"};
  bool available = false;
  std::string text = "driver for CUDA " + version_text(runtime.driver_version);
  for (int device = 0; device < runtime.devices; ++device) {
    char name[320];
    compiled()->describe_device(device, name, sizeof name);
    text += std::string("; ") + name;
    const char* problem = compiled()->device_problem(device);
    if (problem != nullptr) text += std::string(" (not used: ") + problem + ")";
    available |= problem == nullptr;
  }
  return {available, text};
}

void use_emulator(const cuda::KernelTable* kernels) { emulator.store(kernels); }

Precision precision(const at::Tensor& operand) { return allowed(operand, at::Float32Op::MATMUL); }

Precision conv_precision(const at::Tensor& operand) { return allowed(operand, at::Float32Op::CONV); }

const Planners& planners() { return table()->planners; }

cuda::Stream current_stream(at::Device device) {
  if (device.type() != c10::DeviceType::CUDA) return nullptr;
  void* stream = nullptr;
  TORCH_CHECK(get_stream()(device.index(), &stream) == 0, "fastops: torch has no current stream for ", device);
  return static_cast<cuda::Stream>(stream);
}

Workspace::Workspace(size_t bytes, at::Device device) {
  if (bytes > 0)
    memory_ = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
}

void throw_failed(const Status& status, const record::Row& row) {
  TORCH_CHECK(false, row.op, ": kernel ", record::kernel_text(status.kernel, cuda::kTier), " for ", row.dtype,
              " tensors of shapes ", row.shapes, " failed on a grid of ", status.blocks, " blocks of ", status.threads,
              " threads and ", status.shared, " bytes of shared memory: ", status.message);
}

}  // namespace fastops::gpu
