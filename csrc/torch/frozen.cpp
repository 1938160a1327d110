// Layers of fastops.freeze: weights that do not change are packed once for each kind of call, and stay packed.
#include <ATen/ATen.h>

#include <cstring>
#include <list>
#include <mutex>

#include "../kernels/conv/conv.h"
#include "../kernels/conv_pool/conv_pool.h"
#include "../kernels/inverted_residual/inverted_residual.h"
#include "../kernels/linear/linear.h"
#include "binding.h"
#include "call.h"
#include "conv_binding.h"
#include "conv_plan.h"
#include "fingerprint.h"

namespace fastops {
namespace {

// The plans of one layer with what they packed, newest first. Several threads may call the layer at once.
template <class Call>
class PackedPlans {
 public:
  struct Entry {
    Call call;
    const Planners* planners;
    int threads;
    Plan<Call> plan;
    Tensor packed;  // undefined: the weight is read as it is
  };

  std::shared_ptr<const Entry> find(const Call& call, const void* weight, int threads) {
    const Planners& planners = kernels(call.dtype).planners;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = entries_.begin(); at != entries_.end(); ++at)
      if ((*at)->planners == &planners && (*at)->threads == threads && (*at)->call == call) {
        entries_.splice(entries_.begin(), entries_, at);
        return entries_.front();
      }
    auto made = std::make_shared<Entry>(Entry{call, &planners, threads, planners.plan(call, {.threads = threads}), {}});
    if (made->plan.runner != nullptr && made->plan.packed > 0) {
      made->packed = empty_output({static_cast<int64_t>(made->plan.packed)}, at::kByte);
      made->plan.pack(weight, made->packed.mutable_data_ptr());
    }
    if (entries_.size() == kMost) entries_.pop_back();
    entries_.push_front(made);
    return made;
  }

  int64_t packed_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = 0;
    for (const auto& entry : entries_) bytes += entry->packed.defined() ? entry->packed.numel() : 0;
    return bytes;
  }

 private:
  static constexpr size_t kMost = 4;  // as many shapes of the input as keep their packed weights
  std::mutex mutex_;
  std::list<std::shared_ptr<const Entry>> entries_;
};

// The call of a layer: with packed weights, and if no kernel adds the residual, without it and f, which then follow.
template <class Call, class Pointers, class Describe>
Tensor run_packed(PackedPlans<Call>& plans, Call call, const Pointers& pointers, const Tensor& y,
                  const Tensor& residual, Describe&& row) {
  const Activation f = call.activation;
  call.with_residual = residual.defined();
  call.packed_w = true;
  call.alignment = alignment_of({pointers.x, pointers.w});
  const Team team = torch_team();
  auto entry = plans.find(call, pointers.w, team.threads);
  if (entry->plan.runner == nullptr) {
    call.with_residual = false;
    call.activation = {};
    entry = plans.find(call, pointers.w, team.threads);
  }
  Pointers packed = pointers;
  if (entry->packed.defined()) packed.w = entry->packed.const_data_ptr();
  packed.residual = call.with_residual ? residual.const_data_ptr() : nullptr;
  const Workspace workspace(entry->plan.workspace);
  record::timed(
      [&] {
        record::Row result = row();
        result.kernel = record::kernel_text(entry->plan.name, entry->plan.tier);
        result.flops = flops_of(call);
        return result;
      },
      [&] { entry->plan.run(packed, workspace.get(), team); });
  if (!residual.defined() || call.with_residual) return y;
  y.add_(residual);
  return f.kind == ActivationKind::identity ? y : activation_forward(y, f, false).y;
}

// Whether there is no residual, or one that a kernel can add.
bool is_like_output(const Tensor& residual, at::IntArrayRef sizes, at::ScalarType type) {
  return !residual.defined() || (residual.sizes() == sizes && residual.scalar_type() == type && residual.is_cpu());
}

class FrozenConv {
 public:
  FrozenConv(const Tensor& weight, const optional<Tensor>& bias, const ConvArguments& arguments, Activation f)
      : weight_(weight), bias_(bias), f_(f) {
    params_ = {static_cast<int>(weight.dim()) - 2, false, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
    TORCH_CHECK(read_params(arguments, weight, params_),
                "FrozenConv: stride, padding, dilation or groups are not those of a convolution");
  }

  Tensor forward(const Tensor& input, const Tensor& residual) {
    ConvPlan conv;
    const std::string problem = plan_conv(input, weight_, bias_, params_, conv);
    TORCH_CHECK(problem.empty(), "conv: ", problem);
    const auto type = weight_.scalar_type();
    const ConvSizes sizes = out_sizes(conv);
    check_operand(input, type, in_sizes(conv), "input");
    if (!is_like_output(residual, sizes, type)) return {};
    const Tensor x = in_layout(input, conv), w = weight_in_layout(weight_, conv);
    const Tensor added = residual.defined() ? in_layout(residual, conv) : Tensor();
    const Tensor y = empty_in(sizes, conv.layout, type);
    if (y.numel() == 0) return y;
    const ConvForward call{.dtype = to_dtype(type),
                           .layout = conv.layout,
                           .w_layout = conv.w_layout,
                           .geometry = conv.geometry,
                           .with_bias = bias_.has_value(),
                           .activation = f_,
                           .precision = conv_precision()};
    return run_packed(plans_, call,
                      ConvForward::Pointers{x.const_data_ptr(), w.const_data_ptr(),
                                            data_or_null(bias_.value_or(Tensor())), y.mutable_data_ptr()},
                      y, added,
                      [&] { return record::Row{"conv", "", record::shapes_of({input, weight_}), dtype_name(type)}; });
  }

  int64_t packed_bytes() { return plans_.packed_bytes(); }

 private:
  const Tensor weight_;
  const optional<Tensor> bias_;
  const Activation f_;
  ConvParams params_{};
  PackedPlans<ConvForward> plans_;
};

// With a max pool of windows that do not overlap; the activation is identity or relu.
class FrozenConvPool {
 public:
  FrozenConvPool(const Tensor& weight, const optional<Tensor>& bias, const ConvArguments& arguments,
                 const std::vector<int64_t>& pool, Activation f)
      : weight_(weight), bias_(bias), f_(f) {
    params_ = {static_cast<int>(weight.dim()) - 2, false, 1, {1, 1, 1}, {}, {}, {1, 1, 1}};
    TORCH_CHECK(read_params(arguments, weight, params_),
                "FrozenConvPool: stride, padding, dilation or groups are not those of a convolution");
    TORCH_CHECK(pool.size() == static_cast<size_t>(params_.dims), "FrozenConvPool: pool must have ", params_.dims,
                " sizes, got ", pool.size());
    std::copy(pool.begin(), pool.end(), pool_.end() - params_.dims);
  }

  // Undefined for images that are smaller than a window.
  Tensor forward(const Tensor& input, const Tensor&) {
    ConvPlan conv;
    const std::string problem = plan_conv(input, weight_, bias_, params_, conv);
    TORCH_CHECK(problem.empty(), "conv: ", problem);
    const auto type = weight_.scalar_type();
    check_operand(input, type, in_sizes(conv), "input");
    int64_t pooled[3];
    for (size_t i = 0; i < 3; ++i) {
      pooled[i] = conv.geometry.out[i] / pool_[i];
      if (pooled[i] == 0) return {};
    }
    const Tensor x = in_layout(input, conv), w = weight_in_layout(weight_, conv);
    const Tensor y =
        empty_in(conv_sizes(conv.geometry.batch, conv.geometry.out_channels, pooled, conv.dims), conv.layout, type);
    if (y.numel() == 0) return y;
    ConvPoolForward call{.dtype = to_dtype(type),
                         .layout = conv.layout,
                         .w_layout = conv.w_layout,
                         .geometry = conv.geometry,
                         .pool = {pool_[0], pool_[1], pool_[2]},
                         .with_bias = bias_.has_value(),
                         .activation = f_,
                         .precision = conv_precision(),
                         .packed_w = true};
    const Team team = torch_team();
    const auto entry = plans_.find(call, w.const_data_ptr(), team.threads);
    const void* const read = entry->packed.defined() ? entry->packed.const_data_ptr() : w.const_data_ptr();
    const Workspace workspace(entry->plan.workspace);
    record::timed(
        [&] {
          return record::Row{.op = conv_pool_name(conv),
                             .kernel = record::kernel_text(entry->plan.name, entry->plan.tier),
                             .shapes = record::shapes_of({input, weight_}),
                             .dtype = dtype_name(type),
                             .flops = flops_of(call)};
        },
        [&] {
          entry->plan.run({x.const_data_ptr(), read, data_or_null(bias_.value_or(Tensor())), y.mutable_data_ptr()},
                          workspace.get(), team);
        });
    return y;
  }

  int64_t packed_bytes() { return plans_.packed_bytes(); }

 private:
  const Tensor weight_;
  const optional<Tensor> bias_;
  const Activation f_;
  ConvParams params_{};
  std::array<int64_t, 3> pool_{1, 1, 1};
  PackedPlans<ConvPoolForward> plans_;
};

class FrozenLinear {
 public:
  FrozenLinear(const Tensor& weight, const optional<Tensor>& bias, Activation f)
      : weight_(weight), bias_(bias), f_(f) {}

  Tensor forward(const Tensor& input, const Tensor& residual) {
    const auto type = weight_.scalar_type();
    const int64_t n = weight_.size(0), k = weight_.size(1);
    check_tensor(input, "linear", "input", at::kCPU);
    check_dtype(input, type, "linear", "input");
    TORCH_CHECK(input.dim() >= 1 && input.size(-1) == k, "linear: input must have shape (*, ", k, "), got ",
                input.sizes());
    c10::DimVector sizes(input.sizes());
    sizes.back() = n;
    if (!is_like_output(residual, sizes, type)) return {};
    const Tensor y = empty_output(sizes, type);
    if (y.numel() == 0) return y;
    const int64_t m = y.numel() / n;
    const Tensor x = k == 0 ? input : input.reshape({m, k});
    const LinearForward call{.dtype = to_dtype(type),
                             .m = m,
                             .n = n,
                             .k = k,
                             .x_strides = k == 0 ? Strides{0, 1} : Strides{x.stride(0), x.stride(1)},
                             .w_strides = {weight_.stride(0), weight_.stride(1)},
                             .y_row_stride = n,
                             .with_bias = bias_.has_value(),
                             .bias_stride = bias_ ? bias_->stride(0) : 1,
                             .activation = f_};
    return run_packed(plans_, call,
                      LinearForward::Pointers{x.const_data_ptr(), weight_.const_data_ptr(),
                                              data_or_null(bias_.value_or(Tensor())), y.mutable_data_ptr()},
                      y, residual.defined() ? residual.contiguous() : Tensor(),
                      [&] { return record::Row{"linear", "", record::shapes_of({input, weight_}), dtype_name(type)}; });
  }

  int64_t packed_bytes() { return plans_.packed_bytes(); }

 private:
  const Tensor weight_;
  const optional<Tensor> bias_;
  const Activation f_;
  PackedPlans<LinearForward> plans_;
};

// A 1x1 convolution, a depthwise one and another 1x1 convolution of channels_last images; the first or the last may be
// missing.
class FrozenInvertedResidual {
 public:
  struct Layer {
    optional<Tensor> weight, bias;
    Activation f;
  };

  FrozenInvertedResidual(const Layer& expand, const Layer& depthwise, const Layer& project,
                         const std::array<std::array<int64_t, 2>, 3>& steps)
      : layers_{dense(expand), dense(depthwise), dense(project)} {
    const Tensor& w = *layers_[1].weight;
    call_.dtype = to_dtype(w.scalar_type());
    call_.wide_channels = call_.in_channels = call_.out_channels = w.size(0);
    call_.with_expand = layers_[0].weight.has_value();
    call_.with_project = layers_[2].weight.has_value();
    if (call_.with_expand) call_.in_channels = layers_[0].weight->size(1);
    if (call_.with_project) call_.out_channels = layers_[2].weight->size(0);
    for (size_t i = 0; i < 2; ++i) {
      call_.kernel[i] = w.size(static_cast<int64_t>(i) + 2);
      call_.stride[i] = steps[0][i];
      call_.padding[i] = steps[1][i];
      call_.dilation[i] = steps[2][i];
    }
    call_.expand = expand.f;
    call_.depthwise = depthwise.f;
    call_.project = project.f;
  }

  // Undefined where the layers are faster one by one, and for images that they refuse.
  Tensor forward(const Tensor& input, const Tensor& residual) {
    const auto type = layers_[1].weight->scalar_type();
    if (input.dim() != 4 || input.size(1) != call_.in_channels || input.scalar_type() != type) return {};
    InvertedResidualForward call = call_;
    call.batch = input.size(0);
    call.with_residual = residual.defined();
    for (int i = 0; i < 2; ++i) {
      call.in[i] = input.size(i + 2);
      const int64_t reach = call.dilation[i] * (call.kernel[i] - 1) + 1;
      if (call.in[i] < 1 || call.in[i] + 2 * call.padding[i] < reach) return {};
      call.out[i] = (call.in[i] + 2 * call.padding[i] - reach) / call.stride[i] + 1;
    }
    const std::array<int64_t, 4> sizes{call.batch, call.out_channels, call.out[0], call.out[1]};
    if (call.batch == 0 || (residual.defined() && (residual.sizes() != sizes || residual.scalar_type() != type)))
      return {};
    const auto address = [](const Layer& layer, bool bias) {
      const optional<Tensor>& tensor = bias ? layer.bias : layer.weight;
      return tensor ? tensor->const_data_ptr() : nullptr;
    };
    const InvertedResidualForward::Weights weights{address(layers_[0], false), address(layers_[0], true),
                                                   address(layers_[1], false), address(layers_[1], true),
                                                   address(layers_[2], false), address(layers_[2], true)};
    const Team team = torch_team();
    const auto entry = plans_.find(call, &weights, team.threads);
    if (entry->plan.runner == nullptr) return {};
    const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
    const Tensor added = residual.defined() ? residual.contiguous(at::MemoryFormat::ChannelsLast) : Tensor();
    const int64_t c = sizes[1], w = c * sizes[3];
    const Tensor y = empty_output_strided(sizes, {w * sizes[2], 1, w, c}, type);
    const Workspace workspace(entry->plan.workspace);
    record::timed(
        [&] {
          return record::Row{.op = "inverted_residual",
                             .kernel = record::kernel_text(entry->plan.name, entry->plan.tier),
                             .shapes = record::shapes_of({input, layers_[0].weight.value_or(Tensor()),
                                                          *layers_[1].weight, layers_[2].weight.value_or(Tensor())}),
                             .dtype = dtype_name(type),
                             .flops = flops_of(call)};
        },
        [&] {
          entry->plan.run({x.const_data_ptr(), entry->packed.const_data_ptr(), y.mutable_data_ptr(),
                           added.defined() ? added.const_data_ptr() : nullptr},
                          workspace.get(), team);
        });
    return y;
  }

  int64_t packed_bytes() { return plans_.packed_bytes(); }

 private:
  static Layer dense(const Layer& layer) {
    const auto contiguous = [](const optional<Tensor>& tensor) {
      return tensor ? optional<Tensor>(tensor->contiguous()) : std::nullopt;
    };
    return {contiguous(layer.weight), contiguous(layer.bias), layer.f};
  }

  const std::array<Layer, 3> layers_;  // expand, depthwise, project
  InvertedResidualForward call_{};
  PackedPlans<InvertedResidualForward> plans_;
};

// NotImplemented for what is not plain: compiled, traced, on another device, a residual that is broadcast. Then the
// caller computes the layer by its op.
template <class Layer>
py::object call_frozen(Layer& layer, py::handle input, py::handle residual) {
  if (!fast_door::ambient_is_plain() || !fast_door::is_plain(input.ptr()) ||
      (!residual.is_none() && !fast_door::is_plain(residual.ptr())))
    return not_implemented();
  const Tensor& x = THPVariable_Unpack(input.ptr());
  const Tensor added = residual.is_none() ? Tensor() : THPVariable_Unpack(residual.ptr());
  if (!x.is_cpu() || at::autocast::is_autocast_enabled(at::kCPU)) return not_implemented();
  TORCH_CHECK(!autograd_records() || !(needs_grad(x) || (added.defined() && needs_grad(added))),
              "fastops.freeze: a frozen model has no gradients, but its input requires one. Call it under ",
              "torch.no_grad(), or use the model that it was made from");
  const at::AutoDispatchBelowADInplaceOrView guard;
  Tensor y = without_gil([] { return "frozen"; }, [&] { return layer.forward(x, added); }, x);
  return y.defined() ? wrap(std::move(y)) : not_implemented();
}

// Of all values, in the order of the indices: the same wherever and in whatever strides they lie.
uint64_t hash_of_values(const Tensor& tensor) {
  constexpr size_t kLanes = 4;  // a product need not wait for the one before it
  const Tensor dense = tensor.resolve_conj().resolve_neg().contiguous();
  const size_t bytes = dense.nbytes();
  const auto* const values = static_cast<const unsigned char*>(dense.const_data_ptr());
  Fingerprint lanes[kLanes];
  for (size_t i = 0; i < bytes; i += kLanes * sizeof(uint64_t)) {
    uint64_t words[kLanes] = {};
    std::memcpy(words, values + i, std::min(bytes - i, sizeof(words)));
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane].mix(words[lane]);
  }
  Fingerprint result;
  for (const Fingerprint& lane : lanes) result.mix(lane.value);
  return result.value;
}

// places: for each tensor a tuple (reference to a module, "_parameters" or "_buffers", key).
uint64_t fingerprint(const py::list& places) {
  Fingerprint result;
  for (const py::handle place : places) {
    const auto module = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(PyTuple_GET_ITEM(place.ptr(), 0)));
    if (!module) throw py::error_already_set();
    if (module.is_none()) {
      result.mix(1);
      continue;
    }
    const auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!state) throw py::error_already_set();
    PyObject* const tensors = PyDict_GetItemWithError(state.ptr(), PyTuple_GET_ITEM(place.ptr(), 1));
    if (tensors && PyTuple_GET_ITEM(place.ptr(), 2) == Py_None) {  // all that there is
      PyObject *key, *value;
      for (Py_ssize_t i = 0; PyDict_Next(tensors, &i, &key, &value);) result.mix(reinterpret_cast<uintptr_t>(value));
      result.mix(PyDict_GET_SIZE(tensors));
      continue;
    }
    PyObject* const tensor = tensors ? PyDict_GetItemWithError(tensors, PyTuple_GET_ITEM(place.ptr(), 2)) : nullptr;
    tensor&& THPVariable_Check(tensor) ? result.mix(THPVariable_Unpack(tensor)) : result.mix(2);
  }
  return result.value;
}

}  // namespace

void bind_frozen(py::module_& m) {
  py::class_<FrozenConv>(m, "FrozenConv")
      .def(py::init([](const Tensor& weight, const optional<Tensor>& bias, py::handle stride, py::handle padding,
                       py::handle dilation, py::handle groups, int kind, double a, double b) {
        const ConvArguments arguments{static_cast<int>(weight.dim()) - 2, false, stride, padding, dilation, {}, groups};
        return std::make_unique<FrozenConv>(weight, bias, arguments, make_activation(kind, a, b));
      }))
      .def("__call__", call_frozen<FrozenConv>, py::arg("input"), py::arg("residual") = py::none())
      .def("packed_bytes", &FrozenConv::packed_bytes);
  py::class_<FrozenConvPool>(m, "FrozenConvPool")
      .def(py::init([](const Tensor& weight, const optional<Tensor>& bias, py::handle stride, py::handle padding,
                       py::handle dilation, py::handle groups, const std::vector<int64_t>& pool, int kind, double a,
                       double b) {
        const ConvArguments arguments{static_cast<int>(weight.dim()) - 2, false, stride, padding, dilation, {}, groups};
        return std::make_unique<FrozenConvPool>(weight, bias, arguments, pool, make_activation(kind, a, b));
      }))
      .def("__call__", call_frozen<FrozenConvPool>, py::arg("input"), py::arg("residual") = py::none())
      .def("packed_bytes", &FrozenConvPool::packed_bytes);
  py::class_<FrozenLinear>(m, "FrozenLinear")
      .def(py::init([](const Tensor& weight, const optional<Tensor>& bias, int kind, double a, double b) {
        return std::make_unique<FrozenLinear>(weight, bias, make_activation(kind, a, b));
      }))
      .def("__call__", call_frozen<FrozenLinear>, py::arg("input"), py::arg("residual") = py::none())
      .def("packed_bytes", &FrozenLinear::packed_bytes);
  using Layer = std::tuple<optional<Tensor>, optional<Tensor>, int, double, double>;
  py::class_<FrozenInvertedResidual>(m, "FrozenInvertedResidual")
      .def(py::init([](const Layer& expand, const Layer& depthwise, const Layer& project,
                       const std::array<std::array<int64_t, 2>, 3>& steps) {
        const auto layer = [](const Layer& one) {
          const auto& [weight, bias, kind, a, b] = one;
          return FrozenInvertedResidual::Layer{weight, bias, make_activation(kind, a, b)};
        };
        return std::make_unique<FrozenInvertedResidual>(layer(expand), layer(depthwise), layer(project), steps);
      }))
      .def("__call__", call_frozen<FrozenInvertedResidual>, py::arg("input"), py::arg("residual") = py::none())
      .def("packed_bytes", &FrozenInvertedResidual::packed_bytes);
  m.def("fingerprint", fingerprint);
  m.def("hash_of_values", hash_of_values, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastops
