// A model as its file holds it (docs/light-runtime.md has the format), read and checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastops::runtime {

// What is wrong with a file, an input or a call; its text is what fastops_run_error gives.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Error{all of these, written one after the other}.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts);

// The numbers are the file's and fastops_run.h's.
enum class Element : uint32_t { f32, f64, bf16, f16, i8, u8, i32, i64, f8 };  // f8 is float8_e4m3fn
constexpr uint32_t kElements = 9;

size_t size_of(Element type);
const char* name_of(Element type);

// At most this many dimensions, and elements in any tensor: sizes and offsets in bytes stay far from 2^63.
constexpr int kMostDims = 8;
constexpr int64_t kMostElements = int64_t{1} << 40;
// The most that an attribute of a layer may be: a kernel's size, a stride, a padding.
constexpr int64_t kMostAttribute = int64_t{1} << 31;

struct Shape {
  int rank = 0;
  int64_t dims[kMostDims] = {};

  int64_t operator[](int i) const { return dims[i]; }
  // Throws where a size is negative or there are more than kMostElements. Sizes of 0 count as 1 for that, so that any
  // part of a shape may be multiplied.
  int64_t elements() const;
  std::string text() const;
  bool operator==(const Shape& other) const;
};

struct Weight {
  Element type;
  Shape shape;  // dense, the last dimension innermost
  const void* data;
};

struct Input {
  std::string name;
  Element type;
  bool any_rank;
  Shape shape;  // -1: any size
};

// A call of an op. Its inputs are values: the weights, the inputs of the graph, and what earlier nodes gave, counted in
// this order; -1 is an argument that is not there.
struct Node {
  std::string op, name;
  std::vector<int32_t> inputs;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::vector<std::string> texts;
};

struct Output {
  std::string name;
  int32_t value;
};

struct Graph {
  std::vector<Weight> weights;
  std::vector<Input> inputs;
  std::vector<Node> nodes;  // each gives one value
  std::vector<Output> outputs;
};

// The graph in a file of this many bytes, 64-byte aligned, which have to outlive it. Every offset, size and number is
// checked against what is there; whether the nodes fit each other is checked when they are planned.
Graph read_graph(const void* file, size_t bytes);

uint32_t crc32(const void* data, size_t bytes);

// ---------------------------------------------------------------------------------------------------------------------

inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const Shape& shape) { text += shape.text(); }
template <class Number>
  requires std::is_arithmetic_v<Number>
void append(std::string& text, Number number) {
  text += std::to_string(number);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw Error(text);
}

}  // namespace fastops::runtime
