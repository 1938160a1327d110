#include "../kernels/conv_int8/conv_int8.h"

#include <ATen/ATen.h>

#include <cmath>
#include <mutex>

#include "binding.h"
#include "call.h"
#include "conv_binding.h"
#include "conv_plan.h"
#include "fingerprint.h"
#include "quantized.h"

namespace fastops {
namespace {

constexpr const char* kConvInt8 = "conv_int8";

// What a call is besides its input: a convolution in two dimensions, or a linear layer.
struct Int8Layer {
  Tensor weight, multiplier, offset;  // as in conv_int8.h; offset may be undefined
  bool linear = false;
  ConvParams params{2, false, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
  int x_zero = 0;
  float x_inverse = 1;
  Activation activation{};
  // Of uint8 outputs.
  bool levels = false;
  float y_factor = 1, y_offset = 0, residual_scale = 1;
  int y_low = 0, y_high = 255;
  at::ScalarType float_type = at::kFloat;  // of a float output, where the input is uint8
  bool channels_last = false;              // the output is, whatever the input is

  const char* op() const { return linear ? "linear_int8" : kConvInt8; }
};

// The geometry of a call, and the sizes and the layout of its output. Raises where the input does not fit.
struct Int8Shape {
  ConvGeometry geometry;
  Layout layout = Layout::channels_last;
  SizeVector<int64_t> sizes;
};

void check_products(const Tensor& weight, const char* op) {
  const int64_t products = weight.numel() / std::max<int64_t>(weight.size(0), 1);
  TORCH_CHECK(products <= kMostInt8Products, op, ": weight must have at most ", kMostInt8Products,
              " elements for each output, whose products fit 32 bits, got ", products);
}

Int8Shape shape_of(const Int8Layer& layer, const Tensor& input) {
  const Tensor& w = layer.weight;
  Int8Shape shape;
  check_products(w, layer.op());
  if (!layer.linear) {
    ConvPlan plan;
    const std::string problem = plan_conv(input, w, {}, layer.params, plan);
    TORCH_CHECK(problem.empty(), kConvInt8, ": ", problem);
    shape.layout = suggests_channels_last(input) ? Layout::channels_last : Layout::channels_first;
    shape.geometry = canonical(plan.geometry);
    shape.sizes = out_sizes(plan);
    return shape;
  }
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == w.size(1), "linear_int8: input must have shape (*, ", w.size(1),
              "), got ", input.sizes());
  shape.sizes = input.sizes();
  shape.sizes.back() = w.size(0);
  const int64_t k = w.size(1), rows = c10::multiply_integers(input.sizes().slice(0, input.sizes().size() - 1));
  shape.geometry = {rows, k, w.size(0), 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}};
  return shape;
}

// packed: null, or what Plan::pack made of the weight. residual: undefined, or uint8 and like the output.
template <class Run>
Tensor run_layer(const Int8Layer& layer, const Tensor& input, const Tensor& residual, const void* packed, Run&& run) {
  const bool float_x = input.scalar_type() != at::kByte;
  const auto type = float_x ? input.scalar_type() : layer.float_type;
  const Int8Shape shape = shape_of(layer, input);
  const auto y_type = layer.levels ? at::kByte : type;
  const bool last = layer.levels || layer.channels_last || shape.layout == Layout::channels_last;
  const Layout y_layout = last ? Layout::channels_last : Layout::channels_first;
  const Tensor y = layer.linear ? empty_output(shape.sizes, y_type) : empty_in(shape.sizes, y_layout, y_type);
  if (y.numel() == 0) return y;
  const auto image = [&](const Tensor& tensor) {
    const bool levels = tensor.scalar_type() == at::kByte;
    return tensor.contiguous(layer.linear ? at::MemoryFormat::Contiguous
                                          : format_of(levels ? Layout::channels_last : shape.layout, 2));
  };
  const Tensor x = image(input), added = residual.defined() ? image(residual) : Tensor();
  const Tensor w = packed != nullptr ? Tensor()
                   : layer.linear    ? layer.weight.contiguous()
                                     : layer.weight.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor offset =
      layer.offset.defined() ? layer.offset : at::zeros({layer.weight.size(0)}, at::TensorOptions(at::kFloat));
  const ConvInt8Forward call{.dtype = to_dtype(type),
                             .geometry = shape.geometry,
                             .float_x = float_x,
                             .float_y = !layer.levels,
                             .x_layout = shape.layout,
                             .y_layout = y_layout,
                             .x_zero = layer.x_zero,
                             .x_inverse = layer.x_inverse,
                             .with_residual = added.defined(),
                             .residual_scale = layer.residual_scale,
                             .activation = layer.activation,
                             .y_factor = layer.y_factor,
                             .y_offset = layer.y_offset,
                             .y_low = layer.y_low,
                             .y_high = layer.y_high,
                             .packed_w = packed != nullptr};
  run(call,
      ConvInt8Forward::Pointers{x.const_data_ptr(), packed != nullptr ? packed : w.const_data_ptr(),
                                layer.multiplier.const_data_ptr<float>(), offset.const_data_ptr<float>(),
                                added.defined() ? added.const_data_ptr<uint8_t>() : nullptr, y.mutable_data_ptr()},
      [&] {
        return record::Row{layer.op(), "", record::shapes_of({input, layer.weight}),
                           float_x ? dtype_name(type) : "uint8"};
      });
  return y;
}

Tensor run_layer(const Int8Layer& layer, const Tensor& input, const Tensor& residual, const void* packed) {
  return run_layer(layer, input, residual, packed,
                   [](const auto& call, const auto& pointers, auto&& row) { run(call, pointers, at::kCPU, row); });
}

// The weight as this tier's kernels want it.
class PackedInt8 {
 public:
  const void* of(const Int8Layer& layer) {
    const KernelTable& tier = integer_kernels();
    if (packed_.defined() && tier_ == &tier) return packed_.const_data_ptr();
    const Tensor& weight = layer.weight;
    if (weight.numel() == 0) return nullptr;
    ConvInt8Forward call{.geometry = {1,
                                      weight.size(1) * layer.params.groups,
                                      weight.size(0),
                                      layer.params.groups,
                                      {1, 1, 1},
                                      {1, 1, 1},
                                      {1, 1, 1},
                                      {1, 1, 1},
                                      {},
                                      {1, 1, 1}},
                         .x_zero = layer.x_zero,
                         .packed_w = true};
    Tensor w = weight.contiguous();
    if (!layer.linear) {
      w = weight.contiguous(at::MemoryFormat::ChannelsLast);
      for (int i = 1; i < 3; ++i) call.geometry.in[i] = call.geometry.kernel[i] = weight.size(1 + i);
      for (int i = 1; i < 3; ++i) call.geometry.dilation[i] = layer.params.dilation[i];
      call.geometry = canonical(call.geometry);
    }
    const auto plan = tier.planners.plan(call);
    packed_ = empty_output({static_cast<int64_t>(plan.packed)}, at::kByte);
    plan.pack(w.const_data_ptr(), packed_.mutable_data_ptr());
    tier_ = &tier;
    return packed_.const_data_ptr();
  }
  Tensor keep() const { return packed_; }
  int64_t bytes() const { return packed_.defined() ? packed_.numel() : 0; }

 private:
  Tensor packed_;
  const KernelTable* tier_ = nullptr;
};

// ---- a layer that takes and gives float tensors

// What is said of the scale and the zero point of an input, which are tensors of one element.
void read_input_scale(const Tensor& scale, const Tensor& zero, Int8Layer& layer) {
  const float s = scale.item<float>();
  const int64_t z = zero.item<int64_t>();
  TORCH_CHECK(std::isfinite(s) && s > 0, layer.op(), ": input_scale must be positive and finite, got ", s);
  TORCH_CHECK(z >= 0 && z <= 255, layer.op(), ": input_zero must be a number from 0 to 255, got ", z);
  layer.x_zero = static_cast<int>(z);
  layer.x_inverse = 1 / s;
  layer.multiplier = (layer.multiplier * s).contiguous();
}

Tensor float_offset(const optional<Tensor>& bias) {
  return bias ? bias->detach().to(at::kFloat).contiguous() : Tensor();
}

void check_operands(const Tensor& input, const Tensor& weight, const Tensor& scale, const optional<Tensor>& bias,
                    const char* op) {
  check_dense_on_cpu(input, input, op, "input");
  check_dense_on_cpu(weight, input, op, "weight");
  check_dense_on_cpu(scale, input, op, "scale");
  if (bias) check_dense_on_cpu(*bias, input, op, "bias");
  TORCH_CHECK(has_quantized_kernel(input.scalar_type()), op, ": input must be float32, bfloat16 or float16, got ",
              dtype_name(input.scalar_type()));
  TORCH_CHECK(weight.scalar_type() == at::kChar, op, ": weight must be int8, got ", dtype_name(weight.scalar_type()));
  TORCH_CHECK(scale.scalar_type() == at::kFloat, op, ": scale must be float32, got ", dtype_name(scale.scalar_type()));
  if (bias) check_dtype(*bias, input.scalar_type(), op, "bias");
}

template <class Int>
Tensor conv_int8_forward_op(const Tensor& input, const Tensor& weight, const Tensor& scale,
                            const optional<Tensor>& bias, const Tensor& input_scale, const Tensor& input_zero,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_operands(input, weight, scale, bias, kConvInt8);
  Int8Layer layer{
      .weight = weight, .multiplier = scale, .params = make_params(stride, padding, dilation, false, groups)};
  TORCH_CHECK(layer.params.dims == 2, kConvInt8, ": stride must have 2 elements, got ", layer.params.dims);
  SizeVector<Int> sizes;
  const auto bias_sizes = bias ? optional<Sizes<Int>>(sizes_as<Int>(*bias)) : std::nullopt;
  const std::string problem =
      infer_conv<Int>(sizes_as<Int>(input), sizes_as<Int>(weight), bias_sizes, layer.params, sizes);
  TORCH_CHECK(problem.empty(), kConvInt8, ": ", problem);
  TORCH_CHECK(!sizes_differ(sizes_as<Int>(scale), sizes_as<Int>(weight).slice(0, 1)), kConvInt8,
              ": scale must have shape (", sizes_as<Int>(weight)[0], ",) (weight's out_channels), got ",
              sizes_as<Int>(scale));
  if constexpr (is_symbolic<Int>) {
    const bool last = suggests_channels_last(input);
    return empty_in<Int>(sizes, last ? Layout::channels_last : Layout::channels_first, input.scalar_type(),
                         input.device());
  } else {
    read_input_scale(input_scale, input_zero, layer);
    layer.offset = float_offset(bias);
    return run_layer(layer, input, {}, nullptr);
  }
}

// The layer of a module: weights stay packed until they change.
class ConvInt8 {
 public:
  // A linear layer has None for stride. NotImplemented for what is not plain, or is recorded for autograd.
  py::object call(py::handle input, py::handle weight, py::handle scale, py::handle bias, py::handle input_scale,
                  py::handle input_zero, py::handle stride, py::handle padding, py::handle dilation, py::handle groups,
                  int kind, double a, double b) {
    const bool has_bias = !bias.is_none();
    if (!fast_door::ambient_is_plain() || (has_bias && !fast_door::is_plain(bias.ptr()))) return not_implemented();
    for (const py::handle& tensor : {input, weight, scale, input_scale, input_zero})
      if (!fast_door::is_plain(tensor.ptr())) return not_implemented();
    const Tensor &x = THPVariable_Unpack(input.ptr()), &w = THPVariable_Unpack(weight.ptr()),
                 &s = THPVariable_Unpack(scale.ptr()), &xs = THPVariable_Unpack(input_scale.ptr()),
                 &xz = THPVariable_Unpack(input_zero.ptr());
    const optional<Tensor> bias_tensor = has_bias ? optional<Tensor>(THPVariable_Unpack(bias.ptr())) : std::nullopt;
    const bool recorded = autograd_records() && (needs_grad(x) || (has_bias && needs_grad(*bias_tensor)));
    const auto refused = [&](const Tensor& tensor) { return !tensor.is_cpu() || tensor.layout() != at::kStrided; };
    if (refused(x) || refused(w) || refused(s) || refused(xs) || refused(xz) || recorded ||
        at::autocast::is_autocast_enabled(at::kCPU) || !has_quantized_kernel(x.scalar_type()) ||
        w.scalar_type() != at::kChar || s.scalar_type() != at::kFloat || s.numel() != w.size(0))
      return not_implemented();
    if (has_bias &&
        (bias_tensor->scalar_type() != x.scalar_type() || refused(*bias_tensor) || bias_tensor->numel() != w.size(0)))
      return not_implemented();
    ConvParams params{2, false, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
    const bool linear = stride.is_none();
    if (!linear && (w.dim() != 4 || !read_params({2, false, stride, padding, dilation, {}, groups}, w, params)))
      return not_implemented();
    const at::AutoDispatchBelowADInplaceOrView guard;
    return wrap(without_gil([&] { return linear ? "linear_int8" : kConvInt8; },
                            [&] {
                              Int8Layer layer{.linear = linear, .params = params};
                              const Tensor keep = prepare(w, s, xs, xz, layer);
                              layer.offset = float_offset(bias_tensor);
                              layer.activation = make_activation(kind, a, b);
                              const bool batched = linear || x.dim() != 3;
                              const Tensor y = run_layer(layer, batched ? x : x.unsqueeze(0), {},
                                                         keep.defined() ? keep.const_data_ptr() : nullptr);
                              return batched ? y : y.squeeze(0);
                            },
                            x, w));
  }

  int64_t packed_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return packed_.bytes();
  }

 private:
  Tensor prepare(const Tensor& w, const Tensor& s, const Tensor& xs, const Tensor& xz, Int8Layer& layer) {
    Fingerprint now;
    for (const Tensor& tensor : {w, s, xs, xz}) now.mix(tensor);
    for (const int64_t value : {layer.params.groups, int64_t{layer.linear}}) now.mix(static_cast<uint64_t>(value));
    const std::lock_guard<std::mutex> lock(mutex_);
    if (now.value != fingerprint_ || !layer_.weight.defined()) {
      layer_ = Int8Layer{.weight = w.detach(), .multiplier = s, .linear = layer.linear, .params = layer.params};
      packed_ = {};
      read_input_scale(xs, xz, layer_);
      fingerprint_ = now.value;
    }
    packed_.of(layer_);
    const ConvParams params = layer.params;
    layer = layer_;
    layer.params = params;
    return packed_.keep();
  }

  std::mutex mutex_;
  Int8Layer layer_;
  PackedInt8 packed_;
  uint64_t fingerprint_ = 0;
};

// ---- a layer of a frozen model, which may take and give levels

class FrozenInt8 {
 public:
  // geometry: None of a linear layer. output: None where that is a float tensor, of the type of `like` where the input
  // is uint8, or y_factor, y_offset, y_low and y_high of conv_int8.h. Images that it gives are channels last.
  FrozenInt8(const Tensor& weight, const Tensor& multiplier, const Tensor& offset, double x_scale, int x_zero,
             const py::object& geometry, const std::tuple<int, double, double>& activation, const py::object& output,
             double residual_scale, const Tensor& like) {
    layer_ = Int8Layer{.weight = weight,
                       .multiplier = multiplier.to(at::kFloat).contiguous(),
                       .offset = offset.to(at::kFloat).contiguous(),
                       .linear = geometry.is_none(),
                       .x_zero = x_zero,
                       .x_inverse = 1 / static_cast<float>(x_scale),
                       .residual_scale = static_cast<float>(residual_scale),
                       .float_type = like.scalar_type(),
                       .channels_last = true};
    const auto [kind, a, b] = activation;
    layer_.activation = make_activation(kind, a, b);
    if (!layer_.linear) {
      const auto g = geometry.cast<py::tuple>();
      TORCH_CHECK(read_params({2, false, g[0], g[1], g[2], {}, g[3]}, weight, layer_.params),
                  "FrozenInt8: stride, padding, dilation or groups are not those of a convolution");
    }
    if (output.is_none()) return;
    const auto [factor, y_offset, low, high] = output.cast<std::tuple<double, double, int, int>>();
    layer_.levels = true;
    layer_.y_factor = static_cast<float>(factor);
    layer_.y_offset = static_cast<float>(y_offset);
    layer_.y_low = low;
    layer_.y_high = high;
  }

  // Undefined for an input or a residual that is not one of its calls'.
  Tensor forward(const Tensor& input, const Tensor& residual) {
    if (!input.is_cpu() || (input.scalar_type() != at::kByte && !has_quantized_kernel(input.scalar_type()))) return {};
    if (!layer_.linear && input.dim() != 4) return {};
    if (residual.defined() && (residual.scalar_type() != at::kByte || !residual.is_cpu())) return {};
    Tensor keep;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      packed_.of(layer_);
      keep = packed_.keep();
    }
    if (residual.defined() && residual.sizes() != at::IntArrayRef(shape_of(layer_, input).sizes)) return {};
    return run_layer(layer_, input, residual, keep.defined() ? keep.const_data_ptr() : nullptr,
                     [&](const ConvInt8Forward& call, const ConvInt8Forward::Pointers& pointers, auto&& row) {
                       run_planned(call, pointers, row);
                     });
  }

  int64_t packed_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return packed_.bytes();
  }

 private:
  struct Planned {
    const Planners* planners;
    int threads;
    Plan<ConvInt8Forward> plan;
  };

  // A plan for each kind of call, kept here: a model has more layers than a thread keeps plans.
  template <class Describe>
  void run_planned(const ConvInt8Forward& call, const ConvInt8Forward::Pointers& pointers, Describe&& row) {
    const Planners& planners = integer_kernels().planners;
    const Team team = torch_team();
    std::shared_ptr<const Planned> planned;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& one : plans_)
        if (one->planners == &planners && one->threads == team.threads && one->plan.call == call) planned = one;
      if (planned == nullptr) {
        planned = std::make_shared<Planned>(Planned{&planners, team.threads, planners.plan(call, {team.threads})});
        if (plans_.size() == kMostPlans) plans_.erase(plans_.begin());
        plans_.push_back(planned);
      }
    }
    const auto& plan = planned->plan;
    const Workspace workspace(plan.workspace);
    record::timed(
        [&] {
          record::Row result = row();
          result.kernel = record::kernel_text(plan.name, plan.tier);
          result.flops = flops_of(call);
          return result;
        },
        [&] { plan.run(pointers, workspace.get(), team); });
  }

  static constexpr size_t kMostPlans = 4;
  std::mutex mutex_;
  Int8Layer layer_;
  PackedInt8 packed_;
  std::vector<std::shared_ptr<const Planned>> plans_;
};

py::object call_frozen(FrozenInt8& layer, py::handle input, py::handle residual) {
  const bool adds = !residual.is_none();
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) ||
      (adds && !fast_door::is_plain(residual.ptr())) || at::autocast::is_autocast_enabled(at::kCPU))
    return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  const Tensor r = adds ? THPVariable_Unpack(residual.ptr()) : Tensor();
  const at::AutoDispatchBelowADInplaceOrView guard;
  Tensor y = without_gil([] { return kConvInt8; }, [&] { return layer.forward(x, r); }, x);
  return y.defined() ? wrap(std::move(y)) : not_implemented();
}

}  // namespace

void implement_conv_int8(torch::Library& m, bool meta) {
  meta ? m.impl("conv_int8_forward", conv_int8_forward_op<c10::SymInt>)
       : m.impl("conv_int8_forward", conv_int8_forward_op<int64_t>);
}

void bind_conv_int8(py::module_& m) {
  py::class_<ConvInt8>(m, "ConvInt8")
      .def(py::init<>())
      .def("__call__", &ConvInt8::call)
      .def("packed_bytes", &ConvInt8::packed_bytes);
  py::class_<FrozenInt8>(m, "FrozenInt8")
      .def(py::init<const Tensor&, const Tensor&, const Tensor&, double, int, const py::object&,
                    const std::tuple<int, double, double>&, const py::object&, double, const Tensor&>())
      .def("__call__", &call_frozen)
      .def("packed_bytes", &FrozenInt8::packed_bytes);
}

}  // namespace fastops
