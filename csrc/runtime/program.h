// A graph for inputs of certain shapes: which kernels run on which memory, decided once.
#pragma once

#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/common/calls.h"
#include "../kernels/common/cpu/isa.h"
#include "graph.h"
#include "threads.h"

namespace fastops::runtime {

// 64-byte aligned.
class Memory {
 public:
  explicit Memory(size_t bytes) : data_(::operator new(bytes == 0 ? 1 : bytes, std::align_val_t{64})) {}
  ~Memory() { ::operator delete(data_, std::align_val_t{64}); }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

// A tensor in one of a program's buffers. Offset and strides are in elements.
struct View {
  Element type;
  Shape shape;
  int64_t strides[kMostDims] = {};
  int buffer = 0;
  int64_t offset = 0;
};

// What a step of a program works on.
struct Run {
  const std::vector<void*>& memory;  // by buffer
  void* scratch;
  Team team;

  void* at(const View& view) const {
    return static_cast<char*>(memory[static_cast<size_t>(view.buffer)]) +
           view.offset * static_cast<int64_t>(size_of(view.type));
  }
};

size_t machine_memory();  // bytes that this machine has

class Program {
 public:
  // Throws Error where the nodes do not fit each other or these shapes, and names the node; or where it would take more
  // memory than that.
  Program(const Graph& graph, const std::vector<Shape>& inputs, int threads, size_t most_bytes = machine_memory());

  // The inputs are dense. Until the next run the outputs' data are where output() says.
  void run(const void* const* inputs, Pool& pool);
  size_t outputs() const { return outputs_.size(); }
  const View& output(size_t i) const { return outputs_[i]; }
  const void* output_data(size_t i) const { return Run{memory_, nullptr, {}}.at(outputs_[i]); }
  size_t bytes() const { return bytes_; }  // of packed weights and memory for results

 private:
  friend class Builder;

  std::vector<std::function<void(const Run&)>> steps_;
  std::vector<View> outputs_;
  std::vector<int> inputs_;    // their buffers
  std::vector<size_t> sizes_;  // of the inputs, in bytes
  std::vector<Memory> packed_;
  std::vector<std::unique_ptr<Memory>> copies_;  // of inputs that are not aligned
  std::vector<void*> memory_;
  std::unique_ptr<Memory> arena_, scratch_;
  size_t bytes_ = 0;
};

// Makes a program, node by node.
class Builder {
 public:
  Builder(Program& program, const Graph& graph, const std::vector<Shape>& inputs, int threads, size_t most_bytes);
  void build();

  // ---- for the ops (ops.h): the node's arguments

  const Node& node() const { return *node_; }
  bool has(size_t i) const { return i < node_->inputs.size() && node_->inputs[i] >= 0; }
  const View& input(size_t i) const;
  // An argument that is one of the file's weights, dense, of this type and, where given, this rank.
  const View& weight(size_t i, Element type, int rank = -1) const;
  const void* data(const View& weight) const { return Run{program_.memory_, nullptr, {}}.at(weight); }
  int64_t integer(size_t i, int64_t least = 0, int64_t most = kMostAttribute) const;
  double number(size_t i) const;
  const std::string& text(size_t i) const;
  // The activation of texts[i], floats[2 i] and floats[2 i + 1].
  Activation activation(size_t i = 0) const;
  // The first size of the graph's first input.
  int64_t batch() const;
  // Fails with what the node is called in front.
  template <class... Parts>
  void require(bool good, const Parts&... parts) const {
    if (!good) fail(node_->op, " ", node_->name, ": ", parts...);
  }

  // ---- tensors

  View make(Element type, const Shape& shape, Layout layout = Layout::channels_first);
  // The view itself where it lies so, otherwise a copy that a step makes.
  View dense(const View& view, Layout layout = Layout::channels_first);

  // ---- steps

  // A step that touches these tensors, whose memory it keeps until then.
  void step(std::initializer_list<View> touched, std::function<void(const Run&)> run);
  // Null where there is no kernel.
  template <class Call>
  std::shared_ptr<const Plan<Call>> plan(const Call& call) {
    auto plan = std::make_shared<Plan<Call>>(kernels_of(call).planners.plan(call, {.threads = threads_}));
    return plan->runner == nullptr ? nullptr : plan;
  }
  // What the plan makes of a weight, or the weight.
  template <class Call>
  const void* pack(const Plan<Call>& plan, const void* weight) {
    return plan.packed == 0 ? weight : packed(plan.packed, [&](void* to) { plan.pack(weight, to); });
  }
  void reserve_scratch(size_t bytes);
  // pointers(run) are a Call::Pointers.
  template <class Call, class Pointers>
  void kernel(std::shared_ptr<const Plan<Call>> plan, std::initializer_list<View> touched, Pointers pointers) {
    require(plan != nullptr, "this processor has no kernel for it");
    reserve_scratch(plan->workspace);
    step(touched, [plan, pointers](const Run& run) { plan->run(pointers(run), run.scratch, run.team); });
  }
  template <class Call, class Pointers>
  void kernel(const Call& call, std::initializer_list<View> touched, Pointers pointers) {
    kernel(plan(call), touched, pointers);
  }

 private:
  struct Buffer {
    size_t bytes;     // 0: the memory is not the arena's
    int first, last;  // steps that touch it
  };

  const void* packed(size_t bytes, const std::function<void(void*)>& pack);
  void check_memory(size_t bytes) const;
  int add_buffer(size_t bytes, void* memory);
  View dense_view(Element type, const Shape& shape, int buffer, Layout layout) const;
  void place_buffers();

  Program& program_;
  const Graph& graph_;
  const int threads_;
  const size_t most_bytes_;
  const Node* node_ = nullptr;
  std::vector<View> values_;
  std::vector<Buffer> buffers_;
  size_t scratch_ = 0, packed_ = 0;
};

// ---- views

// Whether a tensor lies dense in a layout; channels_last is for 3 to 5 dimensions (batch, channels, ...).
bool is_dense(const View& view, Layout layout = Layout::channels_first);
// The layout that an image lies dense in, channels_first where both or none.
Layout layout_of(const View& view);
// A tensor of one dimension more or less.
void insert_dim(View& view, int at, int64_t size, int64_t stride);
void remove_dim(View& view, int at);

DType dtype_of(const View& view);  // fails for integers

}  // namespace fastops::runtime
