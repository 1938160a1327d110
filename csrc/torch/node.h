// How an op of the fast door records itself for autograd.
//
// torch::autograd::Function costs about as much as a small op itself: a string-keyed map for what is not a tensor, sets
// for dirty and non-differentiable outputs, the shape of every input and output. An OpNode is the CppNode that Function
// would have made, filled by hand as PyTorch's own generated code does it, with plain members in place of the map. What
// compiled autograd wants to see besides (torch.compile over the backward pass) is put in place when it asks.
//
// Op provides
//   struct Args                                            everything but tensors
//   static std::string name(const Args&)                   the op, as record() has it: "linear"
//   static c10::IValue pack(const Args&), Args unpack(const c10::IValue&)
//   static variable_list gradients(const Args&, const variable_list& saved, const variable_list& grads, const Needs&)
//                                                          one gradient an input; undefined where needs(i) says no
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>

#include "record.h"

namespace fastops {

using torch::autograd::variable_list;

// Whether the gradient of input i is wanted.
using Needs = c10::function_ref<bool(size_t)>;

template <class Op>
struct OpNode : torch::autograd::CppNode<Op> {
  typename Op::Args args;

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(this->mutex_);
    const variable_list saved = this->ctx_.get_saved_variables();
    return record::observed([&] { return Op::name(args) + "_backward"; },
                            [&] {
                              return Op::gradients(args, saved, grads,
                                                   [this](size_t i) { return this->task_should_compute_output(i); });
                            },
                            at::TensorList(grads), at::TensorList(saved));
  }

  std::string name() const override { return record::node_name(Op::name(args)); }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& compiled) const override {
    auto& self = const_cast<OpNode&>(*this);
    self.ctx_.saved_data["args"] = Op::pack(args);
    self.is_variable_input_.assign(this->num_outputs(), true);
    torch::autograd::CppNode<Op>::compiled_args(compiled);
  }
};

// The part of torch::autograd::Function that CppNode calls, for compiled autograd.
template <class Op>
struct CompiledBackward {
  static constexpr bool is_traceable = false;
  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    return Op::gradients(Op::unpack(ctx->saved_data["args"]), ctx->get_saved_variables(), grads,
                         [ctx](size_t i) { return ctx->needs_input_grad(i); });
  }
};

// The node of one call, its edges leading to where the inputs came from. Nodes are counted intrusively from torch 2.12
// on.
template <class Op, class... Inputs>
auto make_node(typename Op::Args args, const Inputs&... inputs) {
  const auto fill = [&](auto node) {
    node->args = std::move(args);
    node->ctx_.set_materialize_grads(false);
    node->set_ctx_grad_fn(node);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
    return node;
  };
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>)
    return fill(c10::make_intrusive<OpNode<Op>>());
  else
    return fill(std::shared_ptr<OpNode<Op>>(new OpNode<Op>(), [](auto* node) { deleteNode(node); }));
}

// After set_history or rebase_history, so that a saved output is known for one.
template <class Node>
void save(const Node& node, variable_list tensors) {
  node->ctx_.save_for_backward(std::move(tensors));
  node->save_variables_to_ctx();
}

}  // namespace fastops
