// What plan.h promises of every plan, on every tier this machine has. A plan that is kept gives the bits of one made
// for its only run: on other operands, on the same workspace again, by two threads at once, with fewer threads than it
// was made for, with operands of just the alignment that the call states, and with weights packed ahead. The other
// tests say whether those bits are right.
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <type_traits>

#include "convolutions.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// operands

// The operands of a call, each between pages of its own. Any two of a call hold the same values.
template <class T, class Call>
class Operands {
 public:
  // alignment: the addresses are odd multiples of it; 0: as near to a page as they can be.
  Operands(const Call& call, bool at_end, size_t alignment = 0) : at_end_(at_end), alignment_(alignment) {
    list(*this, call);
  }

  template <class P>
  void input(P* Call::Pointers::* to, int64_t elements) {
    T* const data = static_cast<T*>(place(to, elements * static_cast<int64_t>(sizeof(T))));
    static const std::vector<T> values = [] {  // a few, as drawing and rounding them takes longer than the kernels
      std::mt19937 random(2);
      std::normal_distribution<double> normal(0, 1);
      std::vector<T> drawn;
      while (drawn.size() < 1024) drawn.push_back(narrow<T>(normal(random)));
      return drawn;
    }();
    for (int64_t i = 0; i < elements; ++i) data[i] = values[random_() % 1024];
  }
  // Bytes below `limit`.
  void bytes(const uint8_t* Call::Pointers::* to, int64_t size, unsigned limit) {
    uint8_t* const data = static_cast<uint8_t*>(place(to, size));
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<uint8_t>(random_() % limit);
  }
  // The first element of each window: number 0 in it, and in the plane the element at its start.
  void first_elements(const void* Call::Pointers::* to, const PoolGeometry& g, Layout layout, PoolIndices kind) {
    const int64_t positions = volume(g.out), size = g.batch * g.channels * positions;
    if (kind == PoolIndices::window) {
      std::memset(place(to, size), 0, static_cast<size_t>(size));
      return;
    }
    int64_t* const data = static_cast<int64_t*>(place(to, 8 * size));
    for (int64_t i = 0; i < size; ++i) {
      const int64_t p = layout == Layout::channels_last ? i / g.channels % positions : i % positions;
      data[i] = p / g.out[2] * g.stride[1] * g.in[2] + p % g.out[2] * g.stride[2];
    }
  }
  template <class P>
  void output(P* Call::Pointers::* to, int64_t bytes) {
    outputs_.push_back({place(to, bytes), static_cast<size_t>(bytes)});
  }

  // Gives the memory of an operand back to the system: whoever reads it from now on faults.
  template <class P>
  void forget(P* Call::Pointers::* which) {
    std::erase_if(memory_, [&](const auto& pages) { return pages->data() == pointers.*which; });
  }

  // Makes all outputs what they were before the first run.
  void clear() const {
    for (const auto& [data, size] : outputs_) std::memset(data, 0xff, size);
  }

  // The bytes of all outputs.
  std::string results() const {
    std::string all;
    for (const auto& [data, size] : outputs_) all.append(static_cast<const char*>(data), size);
    return all;
  }

  typename Call::Pointers pointers{};

 private:
  template <class P>
  void* place(P* Call::Pointers::* to, int64_t bytes) {
    const size_t step = alignment_ == 0 ? 1 : 2 * alignment_;
    memory_.push_back(std::make_unique<Pages>(static_cast<size_t>(bytes), at_end_, step, alignment_));
    void* const data = memory_.back()->data();
    pointers.*to = static_cast<P*>(data);
    return data;
  }

  bool at_end_;
  size_t alignment_;
  std::mt19937 random_{1};
  std::vector<std::unique_ptr<Pages>> memory_;
  std::vector<std::pair<void*, size_t>> outputs_;
};

// Dense matrices and contiguous vectors, whatever the strides.
template <class T>
void list(Operands<T, LinearForward>& to, const LinearForward& c) {
  using P = LinearForward::Pointers;
  const int64_t size = sizeof(T);
  to.input(&P::x, c.m * c.k);
  to.input(&P::w, c.n * c.k);
  if (c.with_bias) to.input(&P::bias, c.n);
  to.output(&P::y, c.m * c.n * size);
  if (c.with_z) to.output(&P::z, c.m * c.n * size);
}
template <class T>
void list(Operands<T, LinearBackward>& to, const LinearBackward& c) {
  using P = LinearBackward::Pointers;
  const int64_t size = sizeof(T);
  to.input(&P::grad_y, c.m * c.n);
  to.input(&P::saved, c.m * c.n);
  to.input(&P::x, c.m * c.k);
  to.input(&P::w, c.n * c.k);
  if (c.with_grad_x) to.output(&P::grad_x, c.m * c.k * size);
  if (c.with_grad_w) to.output(&P::grad_w, c.n * c.k * size);
  if (c.with_grad_bias) to.output(&P::grad_bias, c.n * size);
}

struct ConvSizes {
  int64_t x, w, y;
  explicit ConvSizes(const ConvGeometry& g)
      : x(g.batch * g.in_channels * volume(g.in)),
        w(g.out_channels * (g.in_channels / g.groups) * volume(g.kernel)),
        y(g.batch * g.out_channels * volume(g.out)) {}
};
template <class T>
void list(Operands<T, ConvForward>& to, const ConvForward& c) {
  using P = ConvForward::Pointers;
  const ConvSizes sizes(c.geometry);
  const int64_t size = sizeof(T);
  to.input(&P::x, sizes.x);
  to.input(&P::w, sizes.w);
  if (c.with_bias) to.input(&P::bias, c.geometry.out_channels);
  to.output(&P::y, sizes.y * size);
  if (c.with_z) to.output(&P::z, sizes.y * size);
}
template <class T>
void list(Operands<T, ConvBackwardInput>& to, const ConvBackwardInput& c) {
  using P = ConvBackwardInput::Pointers;
  const ConvSizes sizes(c.geometry);
  to.input(&P::grad_y, sizes.y);
  to.input(&P::saved, sizes.y);
  to.input(&P::w, sizes.w);
  to.output(&P::grad_x, sizes.x * static_cast<int64_t>(sizeof(T)));
}
template <class T>
void list(Operands<T, ConvBackwardWeight>& to, const ConvBackwardWeight& c) {
  using P = ConvBackwardWeight::Pointers;
  const ConvSizes sizes(c.geometry);
  const int64_t size = sizeof(T);
  to.input(&P::grad_y, sizes.y);
  to.input(&P::saved, sizes.y);
  to.input(&P::x, sizes.x);
  if (c.with_grad_w) to.output(&P::grad_w, sizes.w * size);
  if (c.with_grad_bias) to.output(&P::grad_bias, c.geometry.out_channels * size);
}

template <class Call>
int64_t pooled_size(const Call& c) {
  int64_t size = c.geometry.batch * c.geometry.out_channels;
  for (int d = 0; d < 3; ++d) size *= c.geometry.out[d] / c.pool[d];
  return size;
}
template <class T>
void list(Operands<T, ConvPoolForward>& to, const ConvPoolForward& c) {
  using P = ConvPoolForward::Pointers;
  const ConvSizes sizes(c.geometry);
  to.input(&P::x, sizes.x);
  to.input(&P::w, sizes.w);
  to.output(&P::y, pooled_size(c) * static_cast<int64_t>(sizeof(T)));
  if (c.with_indices) to.output(&P::indices, pooled_size(c));
}
template <class T>
void list(Operands<T, ConvPoolBackward>& to, const ConvPoolBackward& c) {
  using P = ConvPoolBackward::Pointers;
  const ConvSizes sizes(c.geometry);
  const int64_t size = sizeof(T);
  to.input(&P::grad_y, pooled_size(c));
  to.bytes(&P::indices, pooled_size(c), static_cast<unsigned>(volume(c.pool)));
  to.input(&P::x, sizes.x);
  to.input(&P::w, sizes.w);
  if (c.with_grad_x) to.output(&P::grad_x, sizes.x * size);
  if (c.with_grad_w) to.output(&P::grad_w, sizes.w * size);
  if (c.with_grad_bias) to.output(&P::grad_bias, c.geometry.out_channels * size);
}

int64_t in_size(const PoolGeometry& g) { return g.batch * g.channels * volume(g.in); }
int64_t out_size(const PoolGeometry& g) { return g.batch * g.channels * volume(g.out); }
int64_t index_size(PoolIndices kind) { return kind == PoolIndices::plane ? 8 : 1; }
template <class T>
void list(Operands<T, MaxPoolForward>& to, const MaxPoolForward& c) {
  using P = MaxPoolForward::Pointers;
  to.input(&P::x, in_size(c.geometry));
  to.output(&P::y, out_size(c.geometry) * static_cast<int64_t>(sizeof(T)));
  to.output(&P::indices, out_size(c.geometry) * index_size(c.kind));
}
template <class T>
void list(Operands<T, MaxPoolBackward>& to, const MaxPoolBackward& c) {
  using P = MaxPoolBackward::Pointers;
  to.input(&P::grad_y, out_size(c.geometry));
  to.first_elements(&P::indices, c.geometry, c.layout, c.kind);
  to.output(&P::grad_x, in_size(c.geometry) * static_cast<int64_t>(sizeof(T)));
}
template <class T>
void list(Operands<T, AvgPoolForward>& to, const AvgPoolForward& c) {
  using P = AvgPoolForward::Pointers;
  to.input(&P::x, in_size(c.geometry));
  to.output(&P::y, out_size(c.geometry) * static_cast<int64_t>(sizeof(T)));
}
template <class T>
void list(Operands<T, AvgPoolBackward>& to, const AvgPoolBackward& c) {
  using P = AvgPoolBackward::Pointers;
  to.input(&P::grad_y, out_size(c.geometry));
  to.output(&P::grad_x, in_size(c.geometry) * static_cast<int64_t>(sizeof(T)));
}

template <class T>
void list(Operands<T, ActivationForward>& to, const ActivationForward& c) {
  using P = ActivationForward::Pointers;
  to.input(&P::x, c.rows * c.cols);
  to.output(&P::y, c.rows * c.cols * static_cast<int64_t>(sizeof(T)));
  if (c.with_mask) to.output(&P::mask, c.rows * mask_row_bytes(c.cols));
}
template <class T>
void list(Operands<T, ActivationBackward>& to, const ActivationBackward& c) {
  using P = ActivationBackward::Pointers;
  to.input(&P::grad_y, c.rows * c.cols);
  to.input(&P::saved, c.rows * c.cols);
  to.output(&P::grad_x, c.rows * c.cols * static_cast<int64_t>(sizeof(T)));
}
template <class T>
void list(Operands<T, PreluForward>& to, const PreluForward& c) {
  using P = PreluForward::Pointers;
  to.input(&P::x, c.outer * c.channels * c.inner);
  to.input(&P::w, c.channels);
  to.output(&P::y, c.outer * c.channels * c.inner * static_cast<int64_t>(sizeof(T)));
}
template <class T>
void list(Operands<T, PreluBackward>& to, const PreluBackward& c) {
  using P = PreluBackward::Pointers;
  const int64_t size = sizeof(T);
  to.input(&P::grad_y, c.outer * c.channels * c.inner);
  to.input(&P::x, c.outer * c.channels * c.inner);
  to.input(&P::w, c.channels);
  to.output(&P::grad_x, c.outer * c.channels * c.inner * size);
  to.output(&P::grad_w, c.channels * size);
}
template <class T>
void list(Operands<T, GluForward>& to, const GluForward& c) {
  using P = GluForward::Pointers;
  to.input(&P::x, 2 * c.outer * c.inner);
  to.output(&P::y, c.outer * c.inner * static_cast<int64_t>(sizeof(T)));
}
template <class T>
void list(Operands<T, GluBackward>& to, const GluBackward& c) {
  using P = GluBackward::Pointers;
  to.input(&P::grad_y, c.outer * c.inner);
  to.input(&P::x, 2 * c.outer * c.inner);
  to.output(&P::grad_x, 2 * c.outer * c.inner * static_cast<int64_t>(sizeof(T)));
}

// ---------------------------------------------------------------------------------------------------------------------
// checks

void fail(const char* name, DType dtype, const std::string& what) {
  if (++failures > 20) return;
  std::printf("%s dtype %d: %s: %s\n", isa_name(isa_used()), static_cast<int>(dtype), name, what.c_str());
}

// The most threads that a kernel has asked for.
std::atomic<int> most_threads;
void run_counting(int threads, Region::Body body, void* context) {
  if (threads > most_threads) most_threads = threads;
  run_threads(threads, body, context);
}

// A plan for three threads, kept and run again, by teams that give all of them or fewer.
template <class T, class Call>
void check_kept(const Plan<Call>& plan, const char* name, const std::string& bits) {
  const Workspace workspace(plan.workspace);
  const Team teams[] = {{3, run_threads}, {3, run_at_most_two}, Team{}, {2, run_counting}, {3, run_threads}};
  most_threads = 0;
  for (const Team& team : teams) {
    const Operands<T, Call> operands(plan.call, &team != teams);
    plan.run(operands.pointers, workspace.get(), team);
    if (operands.results() != bits) fail(name, kDType<T>, "run again by another team");
  }
  if (most_threads > 2) fail(name, kDType<T>, "more threads than the team has");

  // By two threads at once, each with a team of its own.
  const auto run = [&](std::string* result) {
    const Workspace scratch(plan.workspace);
    const Operands<T, Call> operands(plan.call, true);
    for (int i = 0; i < 2; ++i) {
      operands.clear();
      plan.run(operands.pointers, scratch.get(), {{2, run_threads}});
    }
    *result = operands.results();
  };
  std::string results[2];
  std::thread other(run, &results[1]);
  run(&results[0]);
  other.join();
  for (const std::string& result : results)
    if (result != bits) fail(name, kDType<T>, "run by two threads at once");
}

// Plans for less than the operands have, and for just what they have. An element is always aligned to its own size.
template <class T, class Call>
void check_alignment(Call call, Bf16Multiply multiply, const char* name, const std::string& bits) {
  for (const size_t stated : {size_t{1}, sizeof(T), size_t{64}})
    for (const size_t actual : {sizeof(T), size_t{64}}) {
      if (actual < stated) continue;
      call.alignment = static_cast<int>(stated);
      const Operands<T, Call> operands(call, false, actual);
      run_call(call, operands.pointers, kTeams[2], multiply);
      if (operands.results() != bits)
        fail(name, kDType<T>, "alignment " + std::to_string(stated) + " of " + std::to_string(actual));
    }
}

// Whether a plan packs weights, or reads them as they are.
enum class Packs { no, yes };

// Where weights are packed, their own memory is gone when the plan runs.
template <class T, class Call>
void check_packed(Call call, Bf16Multiply multiply, Packs packs, const char* name, const std::string& bits) {
  call.packed_w = true;
  for (const Team& team : kTeams) {
    const bool at_end = team.threads != 2;
    const Plan<Call> plan = plan_of(call, {team.threads, multiply});
    if ((plan.packed > 0) != (packs == Packs::yes)) {
      fail(name, kDType<T>, "packs " + std::to_string(plan.packed) + " bytes");
      continue;
    }
    Operands<T, Call> operands(call, at_end);
    const Pages packed(plan.packed, at_end, 64);
    if (plan.packed > 0) {
      plan.pack(operands.pointers.w, packed.data());
      operands.forget(&Call::Pointers::w);
      operands.pointers.w = packed.data();
    }
    // Twice: a run does not change what was packed.
    for (int i = 0; i < 2; ++i) {
      operands.clear();
      const Workspace workspace(plan.workspace);
      plan.run(operands.pointers, workspace.get(), team);
      if (operands.results() != bits)
        fail(name, kDType<T>, "packed weights on " + std::to_string(team.threads) + " threads");
    }
  }
}

template <class T, class Call>
void check(const Call& call, const char* algorithm = nullptr, Packs packs = Packs::no,
           Bf16Multiply multiply = Bf16Multiply::automatic) {
  const Operands<T, Call> operands(call, true);
  run_call(call, operands.pointers, Team{}, multiply);
  const std::string bits = operands.results();
  const Plan<Call> plan = plan_of(call, {3, multiply});
  const char* const name = plan.name.algorithm;
  if (algorithm != nullptr && std::strcmp(name, algorithm) != 0)
    fail(name, kDType<T>, std::string("expected ") + algorithm);
  if (plan.packed != 0) fail(name, kDType<T>, "packs weights that are not asked for");
  check_kept<T>(plan, name, bits);
  if constexpr (requires { call.alignment; }) check_alignment<T>(call, multiply, name, bits);
  if constexpr (requires { call.packed_w; }) check_packed<T>(call, multiply, packs, name, bits);
}

// ---------------------------------------------------------------------------------------------------------------------
// calls

template <class T>
void check_linear(int64_t m, int64_t n, int64_t k, bool w_transposed, const char* algorithm, Packs packs,
                  Bf16Multiply multiply = Bf16Multiply::automatic) {
  LinearForward forward{.dtype = kDType<T>,
                        .m = m,
                        .n = n,
                        .k = k,
                        .x_strides = {k, 1},
                        .w_strides = w_transposed ? Strides{1, n} : Strides{k, 1},
                        .y_row_stride = n};
  check<T>(forward, algorithm, packs, multiply);
  forward.with_bias = forward.with_z = true;
  forward.activation = {ActivationKind::tanh};
  check<T>(forward, algorithm, packs, multiply);
  check<T>(LinearBackward{.dtype = kDType<T>,
                          .m = m,
                          .n = n,
                          .k = k,
                          .grad_y_strides = {n, 1},
                          .saved_strides = {n, 1},
                          .x_strides = {k, 1},
                          .w_strides = forward.w_strides,
                          .activation = {m % 2 == 0 ? ActivationKind::relu : ActivationKind::identity},
                          .with_grad_x = true,
                          .with_grad_w = true,
                          .with_grad_bias = true},
           nullptr, Packs::no, multiply);
}

template <class T>
void check_conv(const ConvGeometry& g, Layout layout, const char* algorithm, Packs packs,
                Precision precision = Precision::highest, Bf16Multiply multiply = Bf16Multiply::automatic) {
  ConvForward forward{.dtype = kDType<T>, .layout = layout, .w_layout = layout, .geometry = g, .precision = precision};
  check<T>(forward, algorithm, packs, multiply);
  forward.w_layout = layout == Layout::channels_first ? Layout::channels_last : Layout::channels_first;
  forward.with_bias = forward.with_z = true;
  forward.activation = {ActivationKind::tanh};
  check<T>(forward, algorithm, packs, multiply);
  const Activation activation = {g.batch % 2 == 0 ? ActivationKind::relu : ActivationKind::identity};
  check<T>(ConvBackwardInput{.dtype = kDType<T>,
                             .layout = layout,
                             .w_layout = layout,
                             .geometry = g,
                             .activation = activation,
                             .precision = precision},
           nullptr, Packs::no, multiply);
  check<T>(ConvBackwardWeight{.dtype = kDType<T>,
                              .layout = layout,
                              .w_layout = layout,
                              .geometry = g,
                              .activation = activation,
                              .with_grad_w = true,
                              .with_grad_bias = true},
           nullptr, Packs::no, multiply);
}

template <class T>
void check_products() {
  constexpr bool plain = sizeof(T) > 2;  // panels of the type itself, so that an operand can be read in place
  check_linear<T>(3, 70, 600, false, "dot", Packs::no);
  check_linear<T>(9, 20, 20, false, nullptr, Packs::yes);  // gemm_tiny
  check_linear<T>(5, 9, 9, true, nullptr, plain ? Packs::no : Packs::yes);
  check_linear<T>(7, 600, 300, true, nullptr, plain ? Packs::no : Packs::yes);  // few rows
  check_linear<T>(90, 300, 70, true, nullptr, Packs::yes);
  for (const Bf16Multiply multiply : {Bf16Multiply::automatic, Bf16Multiply::float32, Bf16Multiply::native}) {
    if (kDType<T> != DType::bf16 && multiply != Bf16Multiply::automatic) continue;
    check_linear<T>(70, 130, 700, false, nullptr, Packs::yes, multiply);  // several blocks of k
    check_linear<T>(130, 200, 64, false, nullptr, Packs::yes, multiply);
  }
  check_linear<T>(0, 5, 3, false, "none", Packs::no);
}

template <class T>
void check_convolutions() {
  constexpr Layout first = Layout::channels_first, last = Layout::channels_last;
  const auto square = [](int64_t batch, int64_t in, int64_t out, int64_t groups, int64_t size, int64_t kernel,
                         int64_t stride = 1) {
    const int64_t padding = kernel / 2;
    return make(batch, in, out, groups, {size, size + 1}, {kernel, kernel}, {stride, stride}, {padding, padding},
                {1, 1}, {padding, padding});
  };
  for (const Layout layout : {first, last}) {
    for (const Bf16Multiply multiply : {Bf16Multiply::automatic, Bf16Multiply::float32, Bf16Multiply::native}) {
      if (kDType<T> != DType::bf16 && multiply != Bf16Multiply::automatic) continue;
      const char* const name = kDType<T> == DType::bf16 ? nullptr : "conv_gemm";
      check_conv<T>(square(2, 32, 40, 1, 9, 3, 2), layout, name, Packs::yes, Precision::highest, multiply);
      check_conv<T>(square(1, 12, 30, 3, 15, 3), layout, name, Packs::yes, Precision::highest, multiply);
      check_conv<T>(square(2, 20, 70, 1, 6, 5), layout, name, Packs::yes, Precision::highest, multiply);
      check_conv<T>(make(2, 6, 9, 1, {200}, {7}, {1}, {3}, {2}, {3}), layout, name, Packs::yes, Precision::highest,
                    multiply);
      check_conv<T>(make(1, 8, 33, 1, {5, 6, 7}, {3, 2, 3}, {1, 1, 2}, {1, 0, 1}, {1, 1, 1}, {1, 1, 1}), layout, name,
                    Packs::yes, Precision::highest, multiply);
    }
    // Depthwise kernels read the weights themselves.
    check_conv<T>(square(2, 21, 21, 21, 12, 3), layout, layout == first ? "depthwise" : "depthwise_last", Packs::no);
    if constexpr (std::is_same_v<T, float>)
      for (const Precision precision : {Precision::highest, Precision::medium}) {
        check_conv<T>(square(2, 24, 40, 1, 20, 3), layout, "winograd", Packs::yes, precision);
        check_conv<T>(square(1, 100, 70, 1, 6, 3), layout, "winograd", Packs::yes, precision);
        check_conv<T>(make(1, 16, 20, 1, {4, 12, 13}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}), layout,
                      "winograd", Packs::yes, precision);
      }
  }
  // More weights than a run packs at a time.
  if constexpr (std::is_same_v<T, float>)
    check<T>(ConvForward{DType::f32, first, first, square(1, 700, 720, 1, 1, 3)}, "conv_gemm", Packs::yes);
  check_conv<T>(square(2, 30, 70, 1, 9, 1), first, nullptr, Packs::yes);
  check_conv<T>(square(2, 30, 70, 1, 9, 1), last, nullptr, Packs::yes);  // pointwise
  check_conv<T>(make(2, 128, 70, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {0, 0}), last, "dot", Packs::no);
  if (kDType<T> != DType::bf16) check_conv<T>(square(2, 3, 9, 1, 20, 3), first, "conv_first", Packs::no);
  check_conv<T>(square(0, 4, 6, 1, 5, 3), first, "none", Packs::no);

  const auto pool = [&](const ConvGeometry& g, Layout layout) {
    const ConvPoolForward forward{.dtype = kDType<T>,
                                  .layout = layout,
                                  .w_layout = layout,
                                  .geometry = g,
                                  .pool = {1, 2, 2},
                                  .activation = {ActivationKind::relu},
                                  .with_indices = true};
    // Blocks pack what the convolution does.
    const ConvForward conv{.dtype = kDType<T>,
                           .layout = layout,
                           .w_layout = layout,
                           .geometry = g,
                           .activation = {ActivationKind::relu},
                           .packed_w = true};
    const bool blocks = std::strcmp(plan_of(forward).name.algorithm, "conv_pool_blocks") == 0;
    check<T>(forward, nullptr, blocks && plan_of(conv).packed > 0 ? Packs::yes : Packs::no);
    for (int outputs = 1; outputs < 8; outputs += 3)
      check<T>(ConvPoolBackward{.dtype = kDType<T>,
                                .layout = layout,
                                .w_layout = layout,
                                .geometry = g,
                                .pool = {1, 2, 2},
                                .with_grad_x = (outputs & 1) != 0,
                                .with_grad_w = (outputs & 2) != 0,
                                .with_grad_bias = (outputs & 4) != 0});
  };
  pool(square(7, 2, 6, 1, 40, 3), first);  // the first layer's own kernel
  pool(square(2, 8, 12, 1, 14, 5), first);
  pool(square(5, 6, 35, 1, 60, 1), last);  // several blocks of images
}

template <class T>
void check_elementwise() {
  constexpr DType dtype = kDType<T>;
  PoolGeometry g{3, 20, {1, 40, 51}, {1, 20, 25}, {1, 3, 3}, {1, 2, 2}, {0, 1, 0}, {1, 1, 1}, false};
  for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
    for (const PoolIndices kind : {PoolIndices::window, PoolIndices::plane}) {
      g.padding[1] = 1;
      check<T>(MaxPoolForward{dtype, layout, g, kind});
      g.padding[1] = 0;  // the first element of every window is inside
      g.out[1] = 19;
      check<T>(MaxPoolBackward{dtype, layout, g, kind});
      g.out[1] = 20;
    }
    g.padding[1] = 1;
    check<T>(AvgPoolForward{dtype, layout, g, true, 0});
    check<T>(AvgPoolBackward{dtype, layout, g, true, 0});
  }
  for (const ActivationKind kind : {ActivationKind::relu, ActivationKind::gelu}) {
    const bool mask = kind == ActivationKind::relu;
    check<T>(ActivationForward{dtype, {kind}, 3, 40001, 40001, mask});
    check<T>(ActivationBackward{dtype, {kind}, mask ? Saved::output : Saved::input, 3, 40001, 40001, 40001});
  }
  check<T>(PreluForward{dtype, 4, 30, 1000, 1});
  check<T>(PreluBackward{dtype, 4, 30, 1000, 1, true, true});
  check<T>(GluForward{dtype, 3, 40001});
  check<T>(GluBackward{dtype, 3, 40001});
}

template <class T>
void check_dtype() {
  check_products<T>();
  check_convolutions<T>();
  check_elementwise<T>();
  // The fused network has no kernel on the CPU, and its plan says so.
  if (kernels(kDType<T>).planners.plan(MlpForward{}).runner != nullptr) fail("mlp", kDType<T>, "has a kernel");
}

}  // namespace

int main(int argc, char** argv) {
  // A plan is the same object for every dtype: under the sanitizers, which are quick, one of each size.
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if (!quick || kDType<T> == DType::f32 || kDType<T> == DType::bf16) check_dtype<T>();
  });
}
