// What fastops.info() reads: the build, the processor and the GPUs.
#include "../kernels/common/cpu/isa.h"
#include "binding.h"
#include "call.h"
#include "gpu.h"
#include "team.h"

namespace fastops {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FASTOPS_VERSION;
  info["torch"] = FASTOPS_TORCH_VERSION;
  info["compiler"] = FASTOPS_COMPILER;
  info["flags"] = FASTOPS_FLAGS;
  info["cuda"] = FASTOPS_CUDA_BUILD;
  return info;
}

// Whether tensors take the CUDA kernels, and the driver and devices found or what is missing.
py::tuple cuda_found() {
  const gpu::Description found = gpu::describe();
  return py::make_tuple(found.available, found.text);
}

// For tests: tensors on the device of type PrivateUse1 take the kernels of the cuda::KernelTable at this address.
void use_cuda_emulator(uintptr_t table) {
  gpu::use_emulator(reinterpret_cast<const cuda::KernelTable*>(table));
  static torch::Library ops(torch::Library::IMPL, "fastops", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static const bool implemented = (implement(ops), true);
  (void)implemented;
}

bool set_isa_by_name(const std::string& name) {
  for (int i = 0; i < static_cast<int>(Isa::count); ++i)
    if (name == isa_name(static_cast<Isa>(i))) return set_isa(static_cast<Isa>(i));
  return false;
}

bool set_team(const std::string& name) {
  for (const TeamChoice choice : {TeamChoice::automatic, TeamChoice::openmp, TeamChoice::own})
    if (name == team_name(choice)) return set_team_choice(choice), true;
  return false;
}

}  // namespace

void bind_info(py::module_& m) {
  m.def("build_info", &build_info);
  m.def("cuda_found", &cuda_found);
  m.def("gpu_takes", [](const at::Device& device) { return gpu::takes(device); });
  m.def("use_cuda_emulator", &use_cuda_emulator);
  m.def("isa_found", [] { return isa_name(isa_found()); });
  m.def("isa_used", [] { return isa_name(isa_used()); });
  m.def("isa_problem", &isa_problem);
  m.def("plans_made", [] { return plans_made.load(); });
  m.def("set_isa", &set_isa_by_name);
  m.def("cpu_name", &cpu_name);
  m.def("team", [] { return team_name(own_team_in_use() ? TeamChoice::own : TeamChoice::openmp); });
  m.def("team_choice", [] { return team_name(team_choice()); });
  m.def("set_team", &set_team);
  // One thread each, so that a benchmark can start one on every core at once.
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("peak_f32", [](double milliseconds) { return kernels(DType::f32).peak_f32(milliseconds); }, NoGil());
  m.def("peak_bf16", [](double milliseconds) { return kernels(DType::bf16).peak_bf16(milliseconds); }, NoGil());
}

}  // namespace fastops
