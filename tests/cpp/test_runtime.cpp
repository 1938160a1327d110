// Files of models: the ones that are right run, and whatever a file has instead, there is an error and no access
// outside of it. Files are cut off, have bytes changed, and numbers replaced by hostile ones, with the checksum made
// right again, as who means harm would.
#include <cstdint>
#include <string>
#include <vector>

#include "random.h"
// Compiled here, so that the sanitizers watch it.
#include "../../csrc/kernels/common/cpu/bodies_prelude.h"
#include "../../csrc/runtime/element_ops.cpp"
#include "../../csrc/runtime/graph.cpp"
#include "../../csrc/runtime/layer_ops.cpp"
#include "../../csrc/runtime/norm_ops.cpp"
#include "../../csrc/runtime/pool_ops.cpp"
#include "../../csrc/runtime/program.cpp"
#include "../../csrc/runtime/quantized_ops.cpp"
#include "../../csrc/runtime/shape_ops.cpp"
#include "../../csrc/runtime/threads.cpp"

namespace {

using namespace fastops::runtime;
using Bytes = std::vector<unsigned char>;

void put(Bytes& to, const void* data, size_t bytes) {
  const auto* const from = static_cast<const unsigned char*>(data);
  to.insert(to.end(), from, from + bytes);
}
template <class Number>
void put(Bytes& to, Number number) {
  put(to, &number, sizeof number);
}
void put(Bytes& to, const std::string& text) {
  put(to, static_cast<uint32_t>(text.size()));
  put(to, text.data(), text.size());
}
template <class Number>
void put(Bytes& to, const std::vector<Number>& numbers) {
  put(to, static_cast<uint32_t>(numbers.size()));
  for (const Number& number : numbers) put(to, number);
}

// Writes a file as docs/light-runtime.md describes it.
class Writer {
 public:
  int weight(Element type, const std::vector<int64_t>& shape) {
    put(weights_, static_cast<uint32_t>(type));
    put(weights_, shape);
    put(weights_, static_cast<uint64_t>(data_.size()));
    size_t bytes = fastops::runtime::size_of(type);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    for (size_t i = 0; i < bytes; ++i)
      data_.push_back(type == Element::f32 ? (i % 4 == 3 ? 0x3d : 0) : static_cast<unsigned char>(between(0, 3)));
    data_.resize((data_.size() + 63) / 64 * 64);
    return weight_count_++;
  }
  int indices(const std::vector<int32_t>& values) {
    const size_t at = data_.size();
    const int index = weight(Element::i32, {static_cast<int64_t>(values.size())});
    std::memcpy(&data_[at], values.data(), values.size() * sizeof(int32_t));
    return index;
  }
  // Weights come first, then inputs, then nodes.
  int input(Element type, const std::vector<int64_t>& shape) {
    put(inputs_, std::string("x"));
    put(inputs_, static_cast<uint32_t>(type));
    put(inputs_, uint32_t{0});
    put(inputs_, shape);
    return weight_count_ + input_count_++;
  }
  int node(const std::string& op, const std::vector<int32_t>& inputs, const std::vector<int64_t>& ints = {},
           const std::vector<double>& floats = {}, const std::vector<std::string>& texts = {}) {
    put(nodes_, op);
    put(nodes_, "node" + std::to_string(node_count_));
    put(nodes_, inputs);
    put(nodes_, ints);
    put(nodes_, floats);
    put(nodes_, texts);
    return weight_count_ + input_count_ + node_count_++;
  }
  Bytes file(const std::vector<int>& outputs) const {
    Bytes graph;
    const auto section = [&](int count, const Bytes& bytes) {
      put(graph, static_cast<uint32_t>(count));
      put(graph, bytes.data(), bytes.size());
    };
    section(weight_count_, weights_);
    section(input_count_, inputs_);
    section(node_count_, nodes_);
    put(graph, static_cast<uint32_t>(outputs.size()));
    for (const int value : outputs) {
      put(graph, std::string("y"));
      put(graph, static_cast<int32_t>(value));
    }
    const size_t start = (64 + graph.size() + 63) / 64 * 64;
    Bytes file;
    put(file, kMagic, sizeof kMagic);
    put(file, kVersion);
    put(file, uint32_t{0});
    for (const size_t number : {start + data_.size(), size_t{64}, graph.size(), start, data_.size(), size_t{0}})
      put(file, static_cast<uint64_t>(number));
    file.resize(64);
    put(file, graph.data(), graph.size());
    file.resize(start);
    put(file, data_.data(), data_.size());
    return file;
  }

 private:
  Bytes weights_, inputs_, nodes_, data_;
  int weight_count_ = 0, input_count_ = 0, node_count_ = 0;
};

const std::vector<std::string> kRelu{"relu"};
const std::vector<double> kNone{0, 0};

// An image model: every layer and shape that it may have.
Bytes images() {
  Writer w;
  const int filters = w.weight(Element::f32, {8, 3, 3, 3}), bias = w.weight(Element::f32, {8}),
            wide = w.weight(Element::f32, {8, 1, 3, 3}), statistics = w.weight(Element::f32, {8}),
            square = w.weight(Element::f32, {8, 8, 1, 1}), matrix = w.weight(Element::f32, {10, 8}),
            out = w.weight(Element::f32, {10}), slope = w.weight(Element::f32, {1});
  const int x = w.input(Element::f32, {-1, 3, 12, 12});
  const int a = w.node("conv", {x, filters, bias, -1}, {2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, kNone, kRelu);
  const int b = w.node("conv", {a, wide, -1, -1}, {2, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1}, kNone, kRelu);
  const int c = w.node("conv", {b, square, bias, a}, {2, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1}, kNone, kRelu);
  const int block = w.node("inverted_residual", {c, square, bias, wide, -1, square, -1, c}, {1, 1, 1, 1, 1, 1},
                           {0, 0, 0, 0, 0, 0}, {"relu6", "relu6", "identity"});
  const int d = w.node("batch_norm", {block, statistics, statistics, bias, bias}, {}, {0, 0, 1e-5}, kRelu);
  const int e = w.node("max_pool", {d}, {2, 3, 3, 2, 2, 1, 1, 1, 1, 1});
  const int f = w.node("conv_max_pool", {e, square, bias}, {2, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2}, kNone, kRelu);
  const int g = w.node("avg_pool", {f}, {2, 2, 2, 1, 1, 0, 0, 0, 1, 0});
  const int h = w.node("prelu", {g, slope});
  const int i = w.node("adaptive_avg_pool", {h}, {2, 1, 1});
  const int j = w.node("flatten", {i}, {1, -1});
  return w.file({w.node("linear", {j, matrix, out}, {}, kNone, kRelu), w.node("softmax", {j}, {1})});
}

// A block of a transformer, and a network.
Bytes sequences() {
  Writer w;
  const int qkv = w.weight(Element::f32, {24, 8}), square = w.weight(Element::f32, {8, 8}),
            bias = w.weight(Element::f32, {8}), table = w.weight(Element::f32, {5, 8}),
            levels = w.weight(Element::i8, {8, 8}), scale = w.weight(Element::f32, {8}),
            halves = w.weight(Element::u8, {8, 4}), scales = w.weight(Element::f32, {8, 1}),
            one = w.weight(Element::f32, {1, 1, 8}), crow = w.indices({0, 1, 2}), col = w.indices({1, 0}),
            blocks = w.weight(Element::f32, {2, 4, 4});
  const int x = w.input(Element::i64, {-1, 6});
  const int a = w.node("embedding", {x, table});
  const int token = w.node("expand", {one}, {1, 1, 1, 0, 8, 0});
  const int b = w.node("cat", {token, a}, {1});
  const int c = w.node("layer_norm", {b, bias, bias}, {8}, {1e-5});
  const int d = w.node("linear", {c, qkv}, {}, kNone, {"identity"});
  const int e = w.node("reshape", {d}, {1, 1, 7, 0, 3, 0, 2, 0, 4, 0});
  const int f = w.node("permute", {e}, {2, 0, 3, 1, 4});
  const int q = w.node("select", {f}, {0, 0}), k = w.node("select", {f}, {0, 1}), v = w.node("select", {f}, {0, 2});
  const int g = w.node("attention", {q, k, v, -1}, {1}, {0.5});
  const int h = w.node("reshape", {w.node("permute", {g}, {0, 2, 1, 3})}, {1, 1, -1, 0, 8, 0});
  const int products = w.node("matmul", {h, w.node("permute", {h}, {0, 2, 1})});
  const int i = w.node("add", {w.node("mul", {w.node("matmul", {products, h}), bias}), b});
  const int j = w.node("mlp", {i, square, bias, square, -1}, {}, {0, 0, 0, 0}, {"gelu", "identity"});
  const int l = w.node("linear_int8", {j, levels, scale, bias}, {}, kNone, kRelu);
  const int m = w.node("linear_weight_only", {l, halves, scales, -1, bias}, {4, 16, 8}, kNone, kRelu);
  const int s = w.node("sparse_linear", {m, crow, col, blocks, bias}, {8, 8, 4, 4, 0}, kNone, kRelu);
  const int n = w.node("cast", {w.node("slice", {s}, {1, 1, 3, 2})}, {2});
  const int o = w.node("cast", {w.node("rms_norm", {n}, {8}, {1e-5})}, {0});
  return w.file({w.node("mean", {o}, {1, 0}), w.node("log_softmax", {w.node("sub", {o, bias})}, {2})});
}

// Layers that hand on levels of 8 bits.
Bytes levels() {
  Writer w;
  const int filters = w.weight(Element::i8, {8, 3, 3, 3}), wide = w.weight(Element::i8, {8, 1, 3, 3}),
            matrix = w.weight(Element::i8, {10, 8}), multiplier = w.weight(Element::f32, {8}),
            multipliers = w.weight(Element::f32, {10});
  constexpr int64_t kFloats = 0, kLevels = 5;
  const std::vector<double> numbers = {0, 0, 0.02, 1, 0, 0.5};
  const std::vector<std::string> identity = {"identity"};
  const int x = w.input(Element::f32, {-1, 3, 12, 12});
  const int a = w.node("conv_int8", {x, filters, multiplier, multiplier, -1},
                       {2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, kLevels, 100, 3, 250}, numbers, identity);
  const int b = w.node("conv_int8", {a, wide, multiplier, multiplier, a},
                       {2, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1, kLevels, 3, 0, 255}, {0, 0, 0.02, 20, 7, 0.5}, {"silu"});
  const int c = w.node("max_pool", {b}, {2, 3, 3, 2, 2, 1, 1, 1, 1, 1});
  const int d = w.node("avg_pool_int8", {c}, {2, 2, 2, 1, 1, 0, 0, 0, 1, 0, kLevels, 7}, {0.5, 9});
  const int e = w.node("adaptive_avg_pool_int8", {d}, {2, 1, 1, kFloats, 9}, {0.1, 0});
  const int f = w.node("flatten", {e}, {1, -1});
  const int g = w.node("flatten", {w.node("adaptive_avg_pool_int8", {d}, {2, 1, 1, kLevels, 9}, {1, 1})}, {1, -1});
  return w.file(
      {w.node("linear_int8_static", {f, matrix, multipliers, multipliers}, {kFloats, 5, 0, 255}, numbers, kRelu),
       w.node("linear_int8_static", {g, matrix, multipliers, multipliers}, {kFloats, 5, 0, 255}, numbers, identity)});
}

void make_right(Bytes& file) {
  const uint64_t bytes = file.size();
  if (bytes < 64) return;
  std::memcpy(&file[16], &bytes, sizeof bytes);
  const uint32_t sum = crc32(&file[16], file.size() - 16);
  std::memcpy(&file[12], &sum, sizeof sum);
}

// What came of a file: that it ran, or the text of the error.
std::string outcome(const Bytes& file, int threads = 1) {
  // Of exactly its size, so that the sanitizer sees what reads past it.
  const Memory memory(file.size());
  if (!file.empty()) std::memcpy(memory.get(), file.data(), file.size());
  constexpr size_t kMostBytes = 1 << 24;
  try {
    const Graph graph = read_graph(memory.get(), file.size());
    std::vector<Shape> shapes;
    std::vector<Memory> data;
    std::vector<const void*> inputs;
    for (const Input& input : graph.inputs) {
      Shape shape = input.shape;
      for (int i = 0; i < shape.rank; ++i)
        if (shape[i] < 0) shape.dims[i] = 2;
      shapes.push_back(shape);
      const size_t bytes = static_cast<size_t>(shape.elements()) * fastops::runtime::size_of(input.type);
      if (bytes > kMostBytes) return "a large input";
      data.emplace_back(bytes);
      std::memset(data.back().get(), 0, bytes);
      inputs.push_back(data.back().get());
    }
    Program program(graph, shapes, threads, kMostBytes);
    Pool pool(threads);
    for (int run = 0; run < 2; ++run) program.run(inputs.data(), pool);
    return "ran";
  } catch (const Error& error) {
    return error.what();
  }
}

void expect_outcome(const char* what, const Bytes& file, const std::string& wanted, int threads = 1) {
  const std::string got = outcome(file, threads);
  if (got.find(wanted) != std::string::npos) return;
  ++failures;
  std::printf("FAIL %s: got '%s', wanted '%s'\n", what, got.c_str(), wanted.c_str());
}

const int64_t kHostile[] = {-1,
                            0,
                            1,
                            2,
                            7,
                            255,
                            256,
                            65535,
                            65536,
                            1 << 20,
                            1 << 30,
                            1 << 31,
                            0xffffffff,
                            INT64_MIN,
                            INT64_MAX,
                            int64_t{1} << 40,
                            int64_t{1} << 61};

void corrupt(const Bytes& good, int64_t changes) {
  // Cut anywhere, with the header's size as it was and as it is then.
  for (size_t size = 0; size < good.size(); size += size < 700 ? 1 : 61) {
    Bytes cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    if (outcome(cut) == "ran") expect_outcome("a file that is cut off", cut, "an error");
    make_right(cut);
    outcome(cut);
  }
  uint64_t graph = 0;
  std::memcpy(&graph, &good[32], sizeof graph);
  int64_t ran = 0;
  for (int64_t i = 0; i < changes; ++i) {
    Bytes changed = good;
    for (int64_t more = between(1, 3); more > 0; --more) {
      // Most of them in header and graph: weights may be anything.
      const auto at = static_cast<size_t>(between(16, static_cast<int64_t>(64 + graph) - 8));
      const int64_t value = kHostile[between(0, std::size(kHostile) - 1)];
      switch (between(0, 3)) {
        case 0:
          std::memcpy(&changed[at], &value, 8);
          break;
        case 1:
          std::memcpy(&changed[at], &value, 4);
          break;
        case 2:
          changed[at] = static_cast<unsigned char>(between(0, 255));
          break;
        default:
          changed[at] ^= static_cast<unsigned char>(1 << between(0, 7));
          break;
      }
    }
    if (outcome(changed) == "ran" && changed != good) expect_outcome("a file with other bytes", changed, "checksum");
    make_right(changed);
    ran += outcome(changed) == "ran";
  }
  // Were there none, the checks behind the first ones would not have been reached.
  if (ran == 0) expect_outcome("files with harmless changes", {}, "ran");
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::strcmp(arguments[1], "quick") == 0;
  const Isa best = isa_used();
  for (const Isa isa : {Isa::scalar, best}) {  // the first one's kernels are those that are sanitized
    set_isa(isa);
    for (Bytes good : {images(), sequences(), levels()}) {
      make_right(good);
      expect_outcome("a file", good, "ran");
      expect_outcome("a file, three threads", good, "ran", 3);
      corrupt(good, quick ? 1500 : 10000);
    }
  }
  std::printf(failures == 0 ? "ok\n" : "FAILED\n");
  return failures == 0 ? 0 : 1;
}
