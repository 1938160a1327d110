#include "../kernels/sparse_linear/sparse_linear.h"

#include <ATen/ATen.h>

#include <atomic>

#include "binding.h"
#include "call.h"
#include "fingerprint.h"
#include "quantized.h"
#include "sizes.h"

namespace fastops {
namespace {

constexpr const char* kSparseLinear = "sparse_linear";

// The operands that stand for W, as an op gets them.
struct SparseTensors {
  const Tensor& crow;
  const Tensor& col;
  const Tensor& values;
  int64_t n;
};

// A linear layer's features are the last dimension. The others are those of a 1 x 1 convolution of images (N, C, H, W).
enum Features : int64_t { kLast = -1, kChannels = 1 };

bool is_layout(int64_t rows, int64_t cols) {
  return (rows == 1 && (cols == 1 || cols == 4)) || (rows == 4 && cols == 4) || (rows == 16 && cols == 1);
}
int block_rows(const SparseTensors& w) { return w.values.dim() == 3 ? static_cast<int>(w.values.size(1)) : 1; }
int block_cols(const SparseTensors& w) { return w.values.dim() == 3 ? static_cast<int>(w.values.size(2)) : 1; }

// What of these shapes does not fit; "" where everything does.
template <class Int>
std::string sparse_problem(const Tensor& input, const SparseTensors& w, int64_t dim) {
  const auto x = sizes_as<Int>(input), crow = sizes_as<Int>(w.crow), col = sizes_as<Int>(w.col),
             values = sizes_as<Int>(w.values);
  if (dim == kLast && x.empty()) return "input must have shape (*, in_features), got a scalar";
  if (dim == kChannels && x.size() != 4) return c10::str("input must have shape (N, C, H, W), got ", x);
  if (values.size() != 1 && (values.size() != 3 || !is_layout(w.values.size(1), w.values.size(2))))
    return c10::str(
        "values must have shape (elements,), or (blocks, rows, columns) with blocks of 1 x 4, 4 x 4 or 16 x 1, got ",
        values);
  if (col.size() != 1 || differ(col[0], values[0]))
    return c10::str("col_indices must have shape (", values[0], ",), an index for each of values, got ", col);
  const int64_t rows = (w.n + block_rows(w) - 1) / block_rows(w);
  if (crow.size() != 1 || differ(crow[0], Int(rows + 1)))
    return c10::str("crow_indices must have shape (", rows + 1, ",) for ", w.n, " out_features in blocks of ",
                    block_rows(w), ", got ", crow);
  return {};
}

void check_sparse_tensors(const Tensor& input, const SparseTensors& w, int64_t dim) {
  check_dense_on_cpu(input, input, kSparseLinear, "input");
  TORCH_CHECK(has_quantized_kernel(input.scalar_type()), kSparseLinear,
              ": input must be float32, bfloat16 or float16, got ", dtype_name(input.scalar_type()));
  check_dense_on_cpu(w.crow, input, kSparseLinear, "crow_indices");
  check_dense_on_cpu(w.col, input, kSparseLinear, "col_indices");
  check_dense_on_cpu(w.values, input, kSparseLinear, "values");
  TORCH_CHECK(w.crow.scalar_type() == at::kInt, kSparseLinear, ": crow_indices must be int32, got ",
              dtype_name(w.crow.scalar_type()));
  TORCH_CHECK(w.col.scalar_type() == at::kInt || w.col.scalar_type() == at::kShort, kSparseLinear,
              ": col_indices must be int16 or int32, got ", dtype_name(w.col.scalar_type()));
  TORCH_CHECK(w.values.scalar_type() == at::kFloat, kSparseLinear, ": values must be float32, got ",
              dtype_name(w.values.scalar_type()));
  TORCH_CHECK(w.n >= 0, kSparseLinear, ": out_features must not be negative, got ", w.n);
  TORCH_CHECK(dim == kLast || dim == kChannels, kSparseLinear, ": dim must be -1 or 1, got ", dim);
}

template <class Int>
Tensor output_like(const Tensor& input, Int features, int64_t dim) {
  SizeVector<Int> sizes(sizes_as<Int>(input));
  if (dim == kLast) {
    sizes.back() = features;
    return new_tensor<Int>(sizes, input.scalar_type(), input.device());
  }
  sizes[1] = features;
  if (input.suggest_memory_format() != at::MemoryFormat::ChannelsLast)
    return new_tensor<Int>(sizes, input.scalar_type(), input.device());
  const SizeVector<Int> strides{sizes[1] * sizes[2] * sizes[3], Int(1), sizes[1] * sizes[3], sizes[1]};
  return new_tensor_strided<Int>(sizes, strides, input.scalar_type(), input.device());
}

template <class Int>
Tensor new_output(const Tensor& input, const SparseTensors& w, const optional<Tensor>& bias, int64_t dim) {
  check_sparse_tensors(input, w, dim);
  const std::string problem = sparse_problem<Int>(input, w, dim);
  TORCH_CHECK(problem.empty(), kSparseLinear, ": ", problem);
  if (bias) {
    check_dense_on_cpu(*bias, input, kSparseLinear, "bias");
    check_dtype(*bias, input.scalar_type(), kSparseLinear, "bias");
    TORCH_CHECK(!sizes_differ<Int>(sizes_as<Int>(*bias), {Int(w.n)}), kSparseLinear, ": bias must have shape (", w.n,
                ",) (out_features), got ", sizes_as<Int>(*bias));
  }
  return output_like<Int>(input, Int(w.n), dim);
}

// Whether the blocks of each row have indices from 0 on, below `columns`, in ascending order. Without branches, so that
// the compiler makes vectors of it.
template <class Index>
bool ascend(const Index* col, int64_t begin, int64_t end, int64_t columns) {
  if (begin == end) return true;
  bool good = col[begin] >= 0 && col[end - 1] < columns;
  for (int64_t b = begin + 1; b < end; ++b) good &= col[b - 1] < col[b];
  return good;
}

// What of the indices is no sparse matrix of k columns is an error. crow and col are contiguous.
void check_indices(const Tensor& crow_indices, const Tensor& col_indices, int64_t columns) {
  const int64_t rows = crow_indices.numel() - 1, blocks = col_indices.numel();
  const int32_t* const crow = crow_indices.const_data_ptr<int32_t>();
  TORCH_CHECK(crow[0] == 0 && crow[rows] == blocks, kSparseLinear, ": crow_indices must begin with 0 and end with ",
              blocks, ", the number of col_indices, got ", crow[0], " and ", crow[rows]);
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK(crow[i] <= crow[i + 1] && crow[i + 1] <= blocks, kSparseLinear, ": crow_indices must not descend, got ",
                crow[i], " and ", crow[i + 1], " at ", i);
    const bool good = col_indices.scalar_type() == at::kShort
                          ? ascend(col_indices.const_data_ptr<int16_t>(), crow[i], crow[i + 1], columns)
                          : ascend(col_indices.const_data_ptr<int32_t>(), crow[i], crow[i + 1], columns);
    TORCH_CHECK(good, kSparseLinear, ": col_indices must ascend in each row, from 0 to at most ", columns - 1,
                "; those of row ", i, " do not");
  }
}

int64_t columns_of_blocks(const SparseTensors& w, int64_t k) { return (k + block_cols(w) - 1) / block_cols(w); }

// How a tensor whose features are dimension `dim` is matrices of rows by features, once it is contiguous in `format`.
struct MatrixRows {
  at::MemoryFormat format;
  int64_t images, m;
  bool channels_first;

  MatrixRows(const Tensor& tensor, int64_t dim)
      : format(dim == kLast ? at::MemoryFormat::Contiguous : tensor.suggest_memory_format()),
        images(1),
        m(1),
        channels_first(dim == kChannels && format != at::MemoryFormat::ChannelsLast) {
    // Images of one pixel lie either way.
    if (channels_first && tensor.size(2) * tensor.size(3) == 1) channels_first = false;
    for (int64_t d = 0; d < tensor.dim(); ++d)
      if (d != (dim == kLast ? tensor.dim() - 1 : dim)) (d == 0 && channels_first ? images : m) *= tensor.size(d);
  }
  Strides strides(int64_t features) const { return channels_first ? Strides{1, m} : Strides{features, 1}; }
  int64_t image_stride(int64_t features) const { return features * m; }
  Tensor contiguous(const Tensor& tensor) const { return tensor.contiguous(format); }
};

SparseWeight weight_of(const SparseTensors& w, int64_t k) {
  return {.n = w.n,
          .k = k,
          .blocks = w.col.numel(),
          .block_rows = block_rows(w),
          .block_cols = block_cols(w),
          .index_bytes = static_cast<int>(w.col.element_size())};
}

// checked: the indices have been.
Tensor run_forward(const Tensor& input, const SparseTensors& given, const optional<Tensor>& bias, int64_t dim,
                   Activation activation, bool checked) {
  const Tensor y = new_output<int64_t>(input, given, bias, dim);
  const Tensor crow = given.crow.contiguous(), col = given.col.contiguous(), values = given.values.contiguous();
  const SparseTensors w{crow, col, values, given.n};
  const int64_t n = w.n, k = input.size(dim);
  if (!checked) check_indices(crow, col, columns_of_blocks(w, k));
  if (y.numel() == 0) return y;
  const MatrixRows rows(input, dim);
  const Tensor x = rows.contiguous(input), b = bias ? bias->contiguous() : Tensor();
  const auto type = input.scalar_type();
  const SparseLinearForward call{.dtype = to_dtype(type),
                                 .images = rows.images,
                                 .m = rows.m,
                                 .weight = weight_of(w, k),
                                 .x_strides = rows.strides(k),
                                 .y_strides = rows.strides(n),
                                 .x_image_stride = rows.image_stride(k),
                                 .y_image_stride = rows.image_stride(n),
                                 .with_bias = b.defined(),
                                 .activation = activation};
  run(call,
      {x.const_data_ptr(),
       {crow.const_data_ptr<int32_t>(), col.const_data_ptr(), values.const_data_ptr<float>()},
       data_or_null(b),
       y.mutable_data_ptr()},
      at::kCPU,
      [&] { return record::Row{kSparseLinear, "", record::shapes_of({input, values, b}), dtype_name(type)}; });
  return y;
}

template <class Int>
std::array<Tensor, 2> new_sparse_gradients(const Tensor& grad_output, const Tensor& input, const SparseTensors& w,
                                           int64_t dim, std::array<bool, 2> output_mask) {
  check_sparse_tensors(input, w, dim);
  check_dense_on_cpu(grad_output, input, kSparseLinear, "grad_output");
  check_dtype(grad_output, input.scalar_type(), kSparseLinear, "grad_output");
  const std::string problem = sparse_problem<Int>(input, w, dim);
  TORCH_CHECK(problem.empty(), kSparseLinear, ": ", problem);
  SizeVector<Int> sizes(sizes_as<Int>(input));
  (dim == kLast ? sizes.back() : sizes[1]) = Int(w.n);
  TORCH_CHECK(!sizes_differ<Int>(sizes_as<Int>(grad_output), sizes), kSparseLinear,
              ": grad_output must have the output's shape ", Sizes<Int>(sizes), ", got ", sizes_as<Int>(grad_output));
  std::array<Tensor, 2> out;
  const auto features = dim == kLast ? sizes_as<Int>(input).back() : sizes_as<Int>(input)[1];
  if (output_mask[0]) out[0] = output_like<Int>(input, features, dim);
  if (output_mask[1]) out[1] = new_tensor<Int>(sizes_as<Int>(w.values), at::kFloat, input.device());
  return out;
}

std::array<Tensor, 2> run_backward(const Tensor& grad_output, const Tensor& input, const SparseTensors& given,
                                   int64_t dim, std::array<bool, 2> output_mask) {
  std::array<Tensor, 2> out = new_sparse_gradients<int64_t>(grad_output, input, given, dim, output_mask);
  const Tensor crow = given.crow.contiguous(), col = given.col.contiguous(), values = given.values.contiguous();
  const SparseTensors w{crow, col, values, given.n};
  const int64_t n = w.n, k = input.size(dim);
  check_indices(crow, col, columns_of_blocks(w, k));
  const MatrixRows rows(input, dim);
  if (rows.images * rows.m == 0) {
    for (Tensor& gradient : out)
      if (gradient.defined()) gradient.zero_();
    return out;
  }
  const auto wanted = [](const Tensor& tensor) { return tensor.defined() && tensor.numel() > 0; };
  if (!wanted(out[0]) && !wanted(out[1])) return out;
  const Tensor g = rows.contiguous(grad_output), x = wanted(out[1]) ? rows.contiguous(input) : Tensor();
  const auto type = input.scalar_type();
  const SparseLinearBackward call{.dtype = to_dtype(type),
                                  .images = rows.images,
                                  .m = rows.m,
                                  .weight = weight_of(w, k),
                                  .grad_y_strides = rows.strides(n),
                                  .x_strides = rows.strides(k),
                                  .grad_x_strides = rows.strides(k),
                                  .grad_y_image_stride = rows.image_stride(n),
                                  .x_image_stride = rows.image_stride(k),
                                  .grad_x_image_stride = rows.image_stride(k),
                                  .with_grad_x = wanted(out[0]),
                                  .with_grad_values = wanted(out[1])};
  run(call,
      {g.const_data_ptr(),
       data_or_null(x),
       {crow.const_data_ptr<int32_t>(), col.const_data_ptr(), values.const_data_ptr<float>()},
       wanted(out[0]) ? out[0].mutable_data_ptr() : nullptr,
       wanted(out[1]) ? out[1].mutable_data_ptr<float>() : nullptr},
      at::kCPU, [&] {
        return record::Row{"sparse_linear_backward", "", record::shapes_of({grad_output, input, values}),
                           dtype_name(type)};
      });
  return out;
}

// ---- the general door

template <class Int>
Tensor sparse_linear_forward_op(const Tensor& input, const Tensor& crow_indices, const Tensor& col_indices,
                                const Tensor& values, const optional<Tensor>& bias, int64_t out_features, int64_t dim) {
  const SparseTensors w{crow_indices, col_indices, values, out_features};
  if constexpr (is_symbolic<Int>)
    return new_output<Int>(input, w, bias, dim);
  else
    return run_forward(input, w, bias, dim, {}, /*checked=*/false);
}

template <class Int>
std::tuple<Tensor, Tensor> sparse_linear_backward_op(const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& crow_indices, const Tensor& col_indices,
                                                     const Tensor& values, int64_t out_features, int64_t dim,
                                                     std::array<bool, 2> output_mask) {
  constexpr auto backward = is_symbolic<Int> ? new_sparse_gradients<Int> : run_backward;
  const auto out = backward(grad_output, input, {crow_indices, col_indices, values, out_features}, dim, output_mask);
  return {or_empty(out[0], grad_output), or_empty(out[1], values)};
}

// ---- the fast door: indices that are checked again only when they have changed; nothing is recorded

class SparseIndices {
 public:
  // NotImplemented for what is not plain, or is recorded for autograd.
  py::object call(py::handle input, py::handle crow_indices, py::handle col_indices, py::handle values, py::handle bias,
                  int64_t out_features, int64_t dim, int kind, double a, double b) {
    if (!fast_door::ambient_is_plain()) return not_implemented();
    bool recorded = false;
    for (const py::handle operand : {input, crow_indices, col_indices, values, bias}) {
      if (operand.is_none()) continue;
      if (!fast_door::is_plain(operand.ptr())) return not_implemented();
      recorded = recorded || needs_grad(THPVariable_Unpack(operand.ptr()));
    }
    if (input.is_none() || crow_indices.is_none() || col_indices.is_none() || values.is_none())
      return not_implemented();
    const Tensor &x = THPVariable_Unpack(input.ptr()), &crow = THPVariable_Unpack(crow_indices.ptr()),
                 &col = THPVariable_Unpack(col_indices.ptr()), &v = THPVariable_Unpack(values.ptr());
    const optional<Tensor> c = bias.is_none() ? optional<Tensor>() : THPVariable_Unpack(bias.ptr());
    if ((recorded && autograd_records()) || !x.is_cpu() || !has_quantized_kernel(x.scalar_type()) ||
        at::autocast::is_autocast_enabled(at::kCPU) || (c && c->scalar_type() != x.scalar_type()))
      return not_implemented();
    const at::AutoDispatchBelowADInplaceOrView guard;
    return wrap(without_gil([] { return kSparseLinear; },
                            [&] {
                              Fingerprint now;
                              now.mix(crow);
                              now.mix(col);
                              now.mix(static_cast<uint64_t>(out_features));
                              now.mix(static_cast<uint64_t>(x.dim() > 0 ? x.size(x.dim() > 1 ? dim : 0) : 0));
                              const bool checked = checked_.load(std::memory_order_relaxed) == now.value;
                              const Tensor y = run_forward(x, {crow, col, v, out_features}, c, dim,
                                                           make_activation(kind, a, b), checked);
                              checked_.store(now.value, std::memory_order_relaxed);
                              return y;
                            },
                            x, v));
  }

 private:
  std::atomic<uint64_t> checked_{0};  // the fingerprint of indices that were good
};

}  // namespace

void implement_sparse_linear(torch::Library& m, bool meta) {
  if (meta) {
    m.impl("sparse_linear_forward", sparse_linear_forward_op<c10::SymInt>);
    m.impl("sparse_linear_backward", sparse_linear_backward_op<c10::SymInt>);
  } else {
    m.impl("sparse_linear_forward", sparse_linear_forward_op<int64_t>);
    m.impl("sparse_linear_backward", sparse_linear_backward_op<int64_t>);
  }
}

void bind_sparse_linear(py::module_& m) {
  py::class_<SparseIndices>(m, "SparseIndices").def(py::init<>()).def("__call__", &SparseIndices::call);
}

}  // namespace fastops
