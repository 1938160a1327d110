#include "batch_norm.cuh"

#include "../../common/cuda/planners.h"

namespace fastops::cuda {
namespace {

// Blocks for each multiprocessor that make a launch of its own worth it, where channels have parts. Not measured.
constexpr int64_t kPartBlocks = 4;

struct Decision {
  Units units;
  int64_t parts, tiles;  // of channels: planes have one for each
  int lanes;
};

template <class S, class Call>
Decision decision_of(const Call& call) {
  const int64_t chip = multiprocessors();
  Decision result{units_of<kVector<S>>(call.outer, call.inner), 1, call.channels, 1};
  int64_t most = result.units.units / (kThreads * kPlaneUnits<S>);
  if (call.inner == 1) {
    while (result.lanes < 32 && result.lanes * kVector<S> < call.channels) result.lanes *= 2;
    result.tiles = quotient_up(call.channels, result.lanes * kVector<S>);
    most = call.outer * result.lanes / (kThreads * Forward<S>::kRows);
  }
  if (result.tiles < chip) result.parts = at_least_one(smaller(quotient_up(chip * kPartBlocks, result.tiles), most));
  return result;
}

// The workspace: sums of the parts, then two numbers for each channel.
template <class S, class Call>
size_t partial_bytes(const Call& call, const Decision& how) {
  return how.parts > 1 ? round_up(static_cast<size_t>(how.parts * call.channels) * sizeof(ChannelSums)) : 0;
}
template <class S, class Call>
size_t workspace_bytes(const Call& call, const Decision& how) {
  return partial_bytes<S>(call, how) + 2 * static_cast<size_t>(call.channels) * sizeof(Compute<S>);
}

template <class S, class Call>
void fill(BatchNormTask<S>& task, const Call& call, const Decision& how, char* workspace) {
  task.outer = call.outer;
  task.channels = call.channels;
  task.inner = call.inner;
  task.units = how.units;
  task.parts = how.parts;
  task.lanes = how.lanes;
  task.training = call.training;
  task.single = call.param_dtype == DType::f32;
  task.kind = call.activation.kind;
  task.parameters = parameters<S>(call.activation);
  task.partial = reinterpret_cast<ChannelSums*>(workspace);
}

template <class Pass, class Call>
Status launch_pass(const Call& call, Pass& pass, const Decision& how, bool with_results, Stream stream) {
  using C = typename Pass::C;
  const bool rows = call.inner == 1;
  constexpr int n = kVector<typename Pass::Storage>;
  const size_t shared = rows ? kThreads * sizeof(ChannelSums) + static_cast<size_t>(how.lanes * n) * sizeof(Channel<C>)
                             : kThreads / 32 * sizeof(ChannelSums) + sizeof(Channel<C>);
  const auto sweep = [&](bool with_sums) {
    pass.with_sums = with_sums;
    const Launch launch_{{rows ? "batch_norm_rows" : "batch_norm_planes"},
                         how.tiles * how.parts,
                         kThreads,
                         with_sums ? shared : 0,
                         stream};
    return rows ? launch(launch_, batch_norm_rows_kernel<Pass>, pass)
                : launch(launch_, batch_norm_planes_kernel<Pass>, pass);
  };
  if (!pass.with_sums) return sweep(false);
  Status status = sweep(true);
  if (!status.ok() || how.parts == 1) return status;
  status = launch({{"batch_norm_finish"}, quotient_up(call.channels, kThreads / 32), kThreads, 0, stream},
                  batch_norm_finish_kernel<Pass>, pass);
  return status.ok() && with_results ? sweep(false) : status;
}

template <class S>
Status run(const BatchNormForward& call, const Decision& how, const BatchNormForward::Pointers& p, char* workspace,
           Stream stream) {
  using C = Compute<S>;
  Forward<S> pass{};
  fill(pass, call, how, workspace);
  C* const numbers = reinterpret_cast<C*>(workspace + partial_bytes<S>(call, how));
  pass.vectors = vector_aligned(static_cast<const S*>(p.x), call.inner == 1 ? call.channels : call.inner) &&
                 vector_aligned(static_cast<S*>(p.y), 0) && vector_aligned(static_cast<const S*>(p.residual), 0);
  pass.with_sums = call.training;
  pass.x = static_cast<const S*>(p.x);
  pass.more = static_cast<const S*>(p.residual);
  pass.gamma = p.gamma;
  pass.beta = p.beta;
  pass.eps = call.eps;
  pass.momentum = p.momentum;
  pass.y = static_cast<S*>(p.y);
  pass.mean = call.with_stats ? static_cast<C*>(p.mean) : call.training ? numbers : nullptr;
  pass.rstd = call.with_stats ? static_cast<C*>(p.rstd) : call.training ? numbers + call.channels : nullptr;
  pass.running_mean = p.running_mean;
  pass.running_var = p.running_var;
  return launch_pass(call, pass, how, true, stream);
}

template <class S>
Status run(const BatchNormBackward& call, const Decision& how, const BatchNormBackward::Pointers& p, char* workspace,
           Stream stream) {
  using C = Compute<S>;
  Backward<S> pass{};
  fill(pass, call, how, workspace);
  C* const numbers = reinterpret_cast<C*>(workspace + partial_bytes<S>(call, how));
  pass.vectors = vector_aligned(static_cast<const S*>(p.x), call.inner == 1 ? call.channels : call.inner) &&
                 vector_aligned(static_cast<const S*>(p.grad_y), 0) &&
                 vector_aligned(static_cast<const S*>(p.saved), 0) && vector_aligned(static_cast<S*>(p.grad_x), 0) &&
                 vector_aligned(static_cast<S*>(p.grad_residual), 0);
  pass.with_sums = (call.training && call.with_grad_x) || call.with_grad_gamma || call.with_grad_beta;
  pass.x = static_cast<const S*>(p.x);
  pass.more = static_cast<const S*>(p.saved);
  pass.gamma = p.gamma;
  pass.beta = p.beta;
  pass.from_output = call.saved_kind == Saved::output;
  pass.grad_y = static_cast<const S*>(p.grad_y);
  pass.mean = static_cast<const C*>(p.mean);
  pass.rstd = static_cast<const C*>(p.rstd);
  pass.grad_x = call.with_grad_x ? static_cast<S*>(p.grad_x) : nullptr;
  pass.grad_residual = call.with_grad_residual ? static_cast<S*>(p.grad_residual) : nullptr;
  pass.grad_gamma = call.with_grad_gamma ? p.grad_gamma : nullptr;
  pass.grad_beta = call.with_grad_beta ? p.grad_beta : nullptr;
  pass.slope = numbers;
  pass.offset = numbers + call.channels;
  return launch_pass(call, pass, how, call.with_grad_x || call.with_grad_residual, stream);
}

// A run looks at the alignment of its pointers, as only the width of its accesses depends on it.
template <class Call>
void plan_batch_norm(Plan<Call>& plan) {
  with_dtype(plan.call.dtype, [&](auto type) {
    using S = decltype(type);
    const Decision how = decision_of<S>(plan.call);
    decide(plan, {plan.call.inner == 1 ? "channels_last" : "channels_first"}, workspace_bytes<S>(plan.call, how), how,
           [](const Call& call, const Decision& decision, const typename Call::Pointers& p, char* workspace,
              Stream stream) { return run<decltype(type)>(call, decision, p, workspace, stream); });
  });
}

}  // namespace

void plan_call(Plan<BatchNormForward>& plan) { plan_batch_norm(plan); }
void plan_call(Plan<BatchNormBackward>& plan) { plan_batch_norm(plan); }

}  // namespace fastops::cuda
