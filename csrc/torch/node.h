// How an op of the fast door records itself for autograd.
//
// An OpNode is a node of its own, as PyTorch's generated code has them for its ops: plain members for what is not a
// tensor, and the saved tensors. torch::autograd::Function costs about as much as a small op itself: a context with a
// string-keyed map, sets for dirty and non-differentiable outputs, the shape of every input and output. What compiled
// autograd wants to see of a node (torch.compile over the backward pass) is made when it asks.
//
// Op provides
//   struct Args                                            everything but tensors
//   static std::string name(const Args&)                   the op, as record() has it: "linear"
//   static c10::IValue pack(const Args&), Args unpack(const c10::IValue&)
//   static variable_list gradients(const Args&, TensorList saved, const variable_list& grads, const Needs&)
//                                                          one gradient an input; undefined where needs(i) says no
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "record.h"

namespace fastops {

using torch::autograd::variable_list;

// Whether the gradient of input i is wanted.
using Needs = c10::function_ref<bool(size_t)>;

template <class Op>
struct OpNode : torch::autograd::Node {
  typename Op::Args args;
  c10::SmallVector<torch::autograd::SavedVariable, 3> saved;
  bool holds = false, released = false;  // something is saved; it has been freed

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto tensors = unpacked();
    return record::observed(
        [&] { return Op::name(args) + "_backward"; },
        [&] { return Op::gradients(args, tensors, grads, [this](size_t i) { return task_should_compute_output(i); }); },
        at::TensorList(grads), at::TensorList(tensors));
  }

  std::string name() const override { return record::node_name(Op::name(args)); }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    released = released || holds;
    if (holds) saved.clear();
  }

  // ---- compiled autograd: a call of functional() in its graph, with everything packed

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& compiled) const override {
    compiled.collect(std::string(typeid(Op).name()));
    compiled.collect(Op::pack(args));
    for (const auto& variable : saved) compiled.collect(variable, /*is_output=*/true);
    compiled.collect(released);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (auto& variable : saved) swapped.before(variable);
    const auto tensors = unpacked();
    std::vector<bool> needs;
    for (size_t i = 0; i < num_outputs(); ++i) needs.push_back(task_should_compute_output(i));
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack_saved_data({{"args", Op::pack(args)}});
    packed.pack(variable_list(tensors.begin(), tensors.end()));
    packed.pack(needs);
    const std::vector<at::IValue> values = packed.vec();
    std::vector<at::TypePtr> schema;
    for (const at::IValue& value : values)
      schema.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    const auto& python = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function = python->bind_function(swapped.get_py_compiler(), typeid(Op).name(), functional, schema,
                                                       /*is_custom_function=*/true, /*is_traceable=*/false);
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    variable_list result = python->call_function(swapped.get_py_compiler(), "apply_functional", function, grads, values,
                                                 torch::dynamo::autograd::IValuePacker<Metadata>::pack(
                                                     torch::dynamo::autograd::get_input_metadata(next_edges())));
    for (auto& variable : saved) swapped.after(variable);
    return result;
  }

 private:
  static variable_list functional(const variable_list& grads, const std::vector<at::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    const auto args = Op::unpack(packed.unpack_saved_data().at("args"));
    const auto tensors = packed.unpack<variable_list>();
    const auto needs = packed.unpack<std::vector<bool>>();
    return Op::gradients(args, tensors, grads, [&](size_t i) { return needs[i]; });
  }

  c10::SmallVector<at::Tensor, 3> unpacked() {
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    c10::SmallVector<at::Tensor, 3> tensors;
    for (const auto& variable : saved) tensors.push_back(variable.unpack(getptr()));
    return tensors;
  }
};

// The node of one call, its edges leading to where the inputs came from. Nodes are counted intrusively from torch 2.12
// on.
template <class Op, class... Inputs>
auto make_node(typename Op::Args args, const Inputs&... inputs) {
  const auto fill = [&](auto node) {
    node->args = std::move(args);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
    return node;
  };
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>)
    return fill(c10::make_intrusive<OpNode<Op>>());
  else
    return fill(std::shared_ptr<OpNode<Op>>(new OpNode<Op>(), [](auto* node) { deleteNode(node); }));
}

// Saves tensors, some of them perhaps undefined. After set_history or rebase_history, so that a saved output is known
// for one.
template <class Node, class... Tensors>
void save(const Node& node, const Tensors&... tensors) {
  const auto one = [&](const at::Tensor& tensor) {
    node->saved.emplace_back(tensor, tensor.defined() && tensor.grad_fn() == node);
    node->holds = node->holds || tensor.defined();
  };
  (one(tensors), ...);
}

inline const at::Tensor none;  // an operand that is not there

}  // namespace fastops
