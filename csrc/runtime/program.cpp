#include "program.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "ops.h"

namespace fastops::runtime {
namespace {

constexpr size_t kAlignment = 64;

size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The dimensions from the innermost to the outermost.
int dim_at(int rank, Layout layout, int i) {
  if (layout == Layout::channels_first || rank < 3) return rank - 1 - i;
  return i == 0 ? 1 : i == rank - 1 ? 0 : rank - i;
}

}  // namespace

// ---- views

bool is_dense(const View& view, Layout layout) {
  int64_t step = 1;
  for (int i = 0; i < view.shape.rank; ++i) {
    const int dim = dim_at(view.shape.rank, layout, i);
    if (view.shape[dim] != 1 && view.strides[dim] != step) return false;
    step *= view.shape[dim];
  }
  return true;
}

Layout layout_of(const View& view) {
  const bool image = view.shape.rank >= 3 && view.shape.rank <= 5;
  return image && !is_dense(view) && is_dense(view, Layout::channels_last) ? Layout::channels_last
                                                                           : Layout::channels_first;
}

void insert_dim(View& view, int at, int64_t size, int64_t stride) {
  for (int i = view.shape.rank++; i > at; --i) {
    view.shape.dims[i] = view.shape.dims[i - 1];
    view.strides[i] = view.strides[i - 1];
  }
  view.shape.dims[at] = size;
  view.strides[at] = stride;
}

void remove_dim(View& view, int at) {
  --view.shape.rank;
  for (int i = at; i < view.shape.rank; ++i) {
    view.shape.dims[i] = view.shape.dims[i + 1];
    view.strides[i] = view.strides[i + 1];
  }
}

DType dtype_of(const View& view) {
  switch (view.type) {
    case Element::f32:
      return DType::f32;
    case Element::bf16:
      return DType::bf16;
#if defined(FASTOPS_TWO_DTYPES)
    case Element::f16:
      fail("this library has no kernels for float16, as only the one in the package fastops has");
#else
    case Element::f16:
      return DType::f16;
#endif
    default:
      fail("a tensor of ", name_of(view.type), " has to be one of float32, bfloat16 or float16");
  }
}

// ---- running

size_t machine_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : SIZE_MAX;
}

Program::Program(const Graph& graph, const std::vector<Shape>& inputs, int threads, size_t most_bytes) {
  Builder(*this, graph, inputs, threads, most_bytes).build();
}

void Program::run(const void* const* inputs, Pool& pool) {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    void* data = const_cast<void*>(inputs[i]);                  // no step writes to an input
    if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0) {  // kernels are planned for aligned operands
      if (copies_[i] == nullptr) copies_[i] = std::make_unique<Memory>(sizes_[i]);
      if (sizes_[i] > 0) std::memcpy(copies_[i]->get(), data, sizes_[i]);
      data = copies_[i]->get();
    }
    memory_[static_cast<size_t>(inputs_[i])] = data;
  }
  const Run run{memory_, scratch_->get(), pool.team()};
  for (const auto& step : steps_) step(run);
}

// ---- building

Builder::Builder(Program& program, const Graph& graph, const std::vector<Shape>& inputs, int threads, size_t most_bytes)
    : program_(program), graph_(graph), threads_(threads), most_bytes_(most_bytes) {
  for (const Weight& weight : graph.weights)
    values_.push_back(
        dense_view(weight.type, weight.shape, add_buffer(0, const_cast<void*>(weight.data)), Layout::channels_first));
  for (size_t i = 0; i < inputs.size(); ++i) {
    const size_t bytes = static_cast<size_t>(inputs[i].elements()) * size_of(graph.inputs[i].type);
    check_memory(bytes);
    program.inputs_.push_back(add_buffer(0, nullptr));
    program.sizes_.push_back(bytes);
    program.copies_.emplace_back();
    values_.push_back(dense_view(graph.inputs[i].type, inputs[i], program.inputs_.back(), Layout::channels_first));
  }
}

void Builder::build() {
  for (const Node& node : graph_.nodes) {
    node_ = &node;
    const OpBuilder op = find_op(node.op);
    if (op == nullptr)
      fail("the model has a layer '", node.op, "' (", node.name, "), which this version of the library does not know");
    try {
      values_.push_back(op(*this));
    } catch (const Error& error) {
      const std::string who = node.op + " " + node.name + ": ", what = error.what();
      throw Error(what.rfind(who, 0) == 0 ? what : who + what);
    }
  }
  for (const Output& output : graph_.outputs) {
    const View view = dense(values_[static_cast<size_t>(output.value)]);
    buffers_[static_cast<size_t>(view.buffer)].last = INT_MAX;  // until the next run
    program_.outputs_.push_back(view);
  }
  place_buffers();
}

const View& Builder::input(size_t i) const {
  require(has(i), "argument ", i, " is missing");
  return values_[static_cast<size_t>(node_->inputs[i])];
}

const View& Builder::weight(size_t i, Element type, int rank) const {
  const View& view = input(i);
  require(static_cast<size_t>(node_->inputs[i]) < graph_.weights.size(), "argument ", i, " has to be a weight");
  require(view.type == type, "argument ", i, " has to be of ", name_of(type), ", got ", name_of(view.type));
  require(rank < 0 || view.shape.rank == rank, "argument ", i, " has to have ", rank, " dimensions, got shape ",
          view.shape);
  return view;
}

int64_t Builder::integer(size_t i, int64_t least, int64_t most) const {
  require(i < node_->ints.size(), "integer ", i, " is missing");
  const int64_t value = node_->ints[i];
  require(value >= least && value <= most, "integer ", i, " has to be from ", least, " to ", most, ", got ", value);
  return value;
}

int64_t Builder::batch() const {
  require(!program_.inputs_.empty(), "the model has no input");
  const View& first = values_[graph_.weights.size()];
  require(first.shape.rank >= 1, "the model's input has no batch");
  return first.shape[0];
}

double Builder::number(size_t i) const {
  require(i < node_->floats.size(), "number ", i, " is missing");
  return node_->floats[i];
}

const std::string& Builder::text(size_t i) const {
  require(i < node_->texts.size(), "text ", i, " is missing");
  return node_->texts[i];
}

Activation Builder::activation(size_t i) const {
#define FASTOPS_NAME(kind, ...) #kind,
  static constexpr const char* kNames[] = {FASTOPS_ACTIVATIONS(FASTOPS_NAME)};
#undef FASTOPS_NAME
  const std::string& name = text(i);
  for (int kind = 0; kind < static_cast<int>(ActivationKind::count); ++kind) {
    if (name != kNames[kind]) continue;
    const Activation f{static_cast<ActivationKind>(kind), number(2 * i), number(2 * i + 1)};
    require(is_valid(f), "activation ", name, " cannot have the parameters ", f.a, " and ", f.b);
    return f;
  }
  fail(node_->op, " ", node_->name, ": there is no activation '", name, "'");
}

// ---- memory

int Builder::add_buffer(size_t bytes, void* memory) {
  const int now = static_cast<int>(program_.steps_.size());
  buffers_.push_back({bytes, now, now});
  program_.memory_.push_back(memory);
  return static_cast<int>(buffers_.size()) - 1;
}

View Builder::dense_view(Element type, const Shape& shape, int buffer, Layout layout) const {
  View view{.type = type, .shape = shape, .buffer = buffer};
  int64_t step = 1;
  for (int i = 0; i < shape.rank; ++i) {
    const int dim = dim_at(shape.rank, layout, i);
    view.strides[dim] = step;
    step *= shape[dim];
  }
  return view;
}

View Builder::make(Element type, const Shape& shape, Layout layout) {
  const size_t bytes = static_cast<size_t>(shape.elements()) * size_of(type);
  check_memory(bytes);
  return dense_view(type, shape, add_buffer(rounded(std::max<size_t>(bytes, 1)), nullptr), layout);
}

View Builder::dense(const View& view, Layout layout) {
  if (is_dense(view, layout)) return view;
  View result = make(view.type, view.shape, layout);
  copy(*this, view, result);
  return result;
}

void Builder::step(std::initializer_list<View> touched, std::function<void(const Run&)> run) {
  const int now = static_cast<int>(program_.steps_.size());
  for (const View& view : touched) {
    Buffer& buffer = buffers_[static_cast<size_t>(view.buffer)];
    buffer.last = std::max(buffer.last, now);
  }
  program_.steps_.push_back(std::move(run));
}

const void* Builder::packed(size_t bytes, const std::function<void(void*)>& pack) {
  packed_ += bytes;
  check_memory(packed_);
  program_.packed_.emplace_back(bytes);
  pack(program_.packed_.back().get());
  return program_.packed_.back().get();
}

// What the machine does not have would end the process later, where nobody can be told.
void Builder::check_memory(size_t bytes) const {
  if (bytes > most_bytes_) fail("inputs of these shapes take ", bytes, " bytes of memory, more than this machine has");
}

void Builder::reserve_scratch(size_t bytes) {
  check_memory(bytes);
  scratch_ = std::max(scratch_, bytes);
}

// Gives each buffer a place where no other one lies while it is used, the largest first.
void Builder::place_buffers() {
  std::vector<size_t> order;
  for (size_t i = 0; i < buffers_.size(); ++i)
    if (buffers_[i].bytes > 0) order.push_back(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return buffers_[a].bytes > buffers_[b].bytes; });
  struct Placed {
    size_t from, to;
    int first, last;
  };
  std::vector<Placed> placed;  // by their places
  std::vector<size_t> offsets(buffers_.size());
  size_t total = 0;
  for (const size_t i : order) {
    const Buffer& buffer = buffers_[i];
    size_t at = 0;
    for (const Placed& other : placed) {
      if (other.first > buffer.last || other.last < buffer.first) continue;
      if (other.from >= at + buffer.bytes) break;
      at = std::max(at, other.to);
    }
    offsets[i] = at;
    const Placed here{at, at + buffer.bytes, buffer.first, buffer.last};
    placed.insert(std::upper_bound(placed.begin(), placed.end(), here,
                                   [](const Placed& a, const Placed& b) { return a.from < b.from; }),
                  here);
    total = std::max(total, here.to);
    check_memory(total);
  }
  check_memory(total + packed_ + scratch_);
  program_.arena_ = std::make_unique<Memory>(total);
  program_.scratch_ = std::make_unique<Memory>(scratch_);
  program_.bytes_ = total + packed_ + scratch_;
  for (const size_t i : order) program_.memory_[i] = static_cast<char*>(program_.arena_->get()) + offsets[i];
}

}  // namespace fastops::runtime
