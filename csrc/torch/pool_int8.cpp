#include "../kernels/pool_int8/pool_int8.h"

#include <ATen/ATen.h>

#include "binding.h"
#include "call.h"
#include "conv_plan.h"

namespace fastops {
namespace {

using Pair = std::array<int64_t, 2>;

// The windows of a pool in two dimensions; adaptive ones are the sizes of the output alone.
struct Windows {
  optional<Pair> output;
  Pair kernel{}, stride{}, padding{}, dilation{};
  bool ceil_mode = false;

  PoolParams params() const {
    PoolParams params{2, output.has_value(), ceil_mode, false, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}, {1, 1, 1}};
    for (const auto& [from, to] : {std::pair(&kernel, &params.kernel),
                                   {&stride, &params.stride},
                                   {&padding, &params.padding},
                                   {&dilation, &params.dilation}})
      if (!output) std::copy(from->begin(), from->end(), *to + 1);
    if (output) std::copy(output->begin(), output->end(), params.output + 1);
    return params;
  }
};

// Fills the call's geometry and runs it. The output is uint8, or of the type of `like`. NotImplemented for an input
// that is not plain, and for windows whose sums do not fit.
py::object run_pool(py::handle input, const Windows& windows, PoolInt8Forward call, const optional<Tensor>& like) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr())) return not_implemented();
  const Tensor& image = THPVariable_Unpack(input.ptr());
  if (!image.is_cpu() || image.scalar_type() != at::kByte || image.dim() != 4) return not_implemented();
  PoolPlan plan;
  const std::string problem = plan_pool(image.sizes(), windows.params(), plan);
  TORCH_CHECK(problem.empty(), "pool_int8: ", problem);
  const PoolGeometry& g = plan.geometry;
  if (call.average && !sums_fit(g)) return not_implemented();
  const auto type = like ? like->scalar_type() : at::kByte;
  call.geometry = g;
  call.dtype = like ? to_dtype(type) : DType::f32;
  call.float_y = like.has_value();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return wrap(without_gil([] { return "pool_int8"; },
                          [&] {
                            const Tensor x = image.contiguous(at::MemoryFormat::ChannelsLast);
                            const Tensor y =
                                empty_in({g.batch, g.channels, g.out[1], g.out[2]}, Layout::channels_last, type);
                            if (y.numel() == 0) return y;
                            run(call, {x.const_data_ptr<uint8_t>(), y.mutable_data_ptr()}, at::kCPU,
                                [&] { return record::Row{"pool_int8", "", record::shapes_of({image}), "uint8"}; });
                            return y;
                          },
                          image));
}

py::object max_pool_int8(py::handle input, const Pair& kernel, const Pair& stride, const Pair& padding,
                         const Pair& dilation, bool ceil_mode) {
  return run_pool(input, {{}, kernel, stride, padding, dilation, ceil_mode}, {.geometry = {}}, {});
}

// The numbers are those of pool_int8.h. like: None for a uint8 output, or a tensor of the output's type.
py::object avg_pool_int8(py::handle input, const Pair& kernel, const Pair& stride, const Pair& padding, bool ceil_mode,
                         bool count_include_pad, int64_t divisor_override, int zero, double factor, double offset,
                         const optional<Tensor>& like) {
  return run_pool(input, {{}, kernel, stride, padding, {1, 1}, ceil_mode},
                  {.geometry = {},
                   .average = true,
                   .count_include_pad = count_include_pad,
                   .divisor_override = divisor_override,
                   .zero = zero,
                   .factor = static_cast<float>(factor),
                   .offset = static_cast<float>(offset)},
                  like);
}

py::object adaptive_avg_pool_int8(py::handle input, const Pair& output, int zero, double factor, double offset,
                                  const optional<Tensor>& like) {
  return run_pool(input, {.output = output},
                  {.geometry = {},
                   .average = true,
                   .zero = zero,
                   .factor = static_cast<float>(factor),
                   .offset = static_cast<float>(offset)},
                  like);
}

}  // namespace

void bind_pool_int8(py::module_& m) {
  m.def("max_pool_int8", max_pool_int8);
  m.def("avg_pool_int8", avg_pool_int8);
  m.def("adaptive_avg_pool_int8", adaptive_avg_pool_int8);
}

}  // namespace fastops
