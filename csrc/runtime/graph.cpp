#include "graph.h"

#include <array>
#include <cstring>

namespace fastops::runtime {
namespace {

constexpr unsigned char kMagic[8] = {0x89, 'F', 'O', 'P', 'S', '\r', '\n', 0x1a};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeader = 64, kChecked = 16;  // the checksum is of everything from kChecked on
constexpr uint32_t kMostItems = 65536;         // weights, nodes, arguments of a node: a model has a few thousand
constexpr uint32_t kMostText = 4096;

struct ElementInfo {
  const char* name;
  size_t size;
};
constexpr ElementInfo kElementInfo[kElements] = {{"float32", 4}, {"float64", 8}, {"bfloat16", 2},
                                                 {"float16", 2}, {"int8", 1},    {"uint8", 1},
                                                 {"int32", 4},   {"int64", 8},   {"float8", 1}};

// Reads numbers one after the other, and nothing past the end.
class Cursor {
 public:
  Cursor(const unsigned char* data, size_t bytes) : at_(data), left_(bytes) {}

  template <class Number>
  Number number() {
    Number value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  // How many items follow. Each takes at least a byte, so that no number makes us reserve more than the file holds.
  uint32_t count(const char* what, uint32_t most = kMostItems) {
    const auto value = number<uint32_t>();
    if (value > most || value > left_) fail("the file is damaged: it cannot have ", value, " ", what);
    return value;
  }
  std::string text() {
    const uint32_t length = count("characters in a name", kMostText);
    return {reinterpret_cast<const char*>(take(length)), length};
  }
  Element element() {
    const auto value = number<uint32_t>();
    if (value >= kElements) fail("the file is damaged, or of a newer version: there is no element type ", value);
    return static_cast<Element>(value);
  }
  Shape shape(bool may_be_free) {
    Shape shape;
    shape.rank = static_cast<int>(count("dimensions", kMostDims));
    for (int i = 0; i < shape.rank; ++i) {
      shape.dims[i] = number<int64_t>();
      if (shape.dims[i] < (may_be_free ? -1 : 0) || shape.dims[i] > kMostElements)
        fail("the file is damaged: a tensor cannot have the size ", shape.dims[i]);
    }
    return shape;
  }
  size_t left() const { return left_; }

 private:
  const unsigned char* take(size_t bytes) {
    if (bytes > left_) fail("the file is damaged: its graph ends too early");
    const unsigned char* const here = at_;
    at_ += bytes;
    left_ -= bytes;
    return here;
  }

  const unsigned char* at_;
  size_t left_;
};

// A part of the file behind its header.
struct Section {
  const unsigned char* data;
  size_t bytes;
};
Section section(const unsigned char* file, size_t bytes, Cursor& header, const char* what) {
  const auto offset = header.number<uint64_t>(), size = header.number<uint64_t>();
  if (offset < kHeader || offset % 64 != 0 || offset > bytes || size > bytes - offset)
    fail("the file is damaged: its ", what, " (", size, " bytes at ", offset, ") does not lie in its ", bytes,
         " bytes");
  return {file + offset, static_cast<size_t>(size)};
}

void read_weight(Cursor& cursor, const Section& data, Graph& graph) {
  Weight weight{cursor.element(), cursor.shape(false), nullptr};
  const auto offset = cursor.number<uint64_t>();
  const uint64_t size = static_cast<uint64_t>(weight.shape.elements()) * size_of(weight.type);
  if (offset % 64 != 0 || offset > data.bytes || size > data.bytes - offset)
    fail("the file is damaged: weight ", graph.weights.size(), " (", size, " bytes at ", offset,
         ") does not lie in the file's ", data.bytes, " bytes of weights");
  weight.data = data.data + offset;
  graph.weights.push_back(weight);
}

void read_input(Cursor& cursor, Graph& graph) {
  Input input;
  input.name = cursor.text();
  input.type = cursor.element();
  input.any_rank = cursor.number<uint32_t>() != 0;
  input.shape = cursor.shape(true);
  graph.inputs.push_back(input);
}

// A value that is there before node number `nodes`.
int32_t read_value(Cursor& cursor, const Graph& graph, int64_t least) {
  const auto value = cursor.number<int32_t>();
  const auto values = static_cast<int64_t>(graph.weights.size() + graph.inputs.size() + graph.nodes.size());
  if (value < least || value >= values)
    fail("the file is damaged: node ", graph.nodes.size(), " reads value ", value, " of ", values);
  return value;
}

void read_node(Cursor& cursor, Graph& graph) {
  Node node;
  node.op = cursor.text();
  node.name = cursor.text();
  node.inputs.resize(cursor.count("arguments"));
  for (int32_t& value : node.inputs) value = read_value(cursor, graph, -1);
  node.ints.resize(cursor.count("integers"));
  for (int64_t& value : node.ints) value = cursor.number<int64_t>();
  node.floats.resize(cursor.count("numbers"));
  for (double& value : node.floats) value = cursor.number<double>();
  node.texts.resize(cursor.count("texts"));
  for (std::string& text : node.texts) text = cursor.text();
  graph.nodes.push_back(std::move(node));
}

}  // namespace

size_t size_of(Element type) { return kElementInfo[static_cast<uint32_t>(type)].size; }
const char* name_of(Element type) { return kElementInfo[static_cast<uint32_t>(type)].name; }

int64_t Shape::elements() const {
  int64_t all = 1, product = 1;
  for (int i = 0; i < rank; ++i) {
    if (dims[i] < 0) fail("a tensor cannot have shape ", *this);
    if (__builtin_mul_overflow(all, dims[i] == 0 ? 1 : dims[i], &all) || all > kMostElements)
      fail("a tensor of shape ", *this, " has more than ", kMostElements, " elements");
    product *= dims[i];
  }
  return product;
}

std::string Shape::text() const {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + (dims[i] < 0 ? "any" : std::to_string(dims[i]));
  return text + ")";
}

bool Shape::operator==(const Shape& other) const {
  return rank == other.rank && std::memcmp(dims, other.dims, sizeof(int64_t) * static_cast<size_t>(rank)) == 0;
}

Graph read_graph(const void* file, size_t bytes) {
  const auto* const start = static_cast<const unsigned char*>(file);
  if (bytes < kHeader) fail("the file has ", bytes, " bytes, and the header alone has ", kHeader);
  if (std::memcmp(start, kMagic, sizeof kMagic) != 0) fail("this is no model that fastops.light.save has written");
  Cursor header(start + sizeof kMagic, kHeader - sizeof kMagic);
  const auto version = header.number<uint32_t>();
  if (version != kVersion) fail("the file has format version ", version, ", and this library reads version ", kVersion);
  const auto checksum = header.number<uint32_t>();
  const auto written = header.number<uint64_t>();
  if (written != bytes)
    fail("the file has ", bytes, " bytes, and ", written, " were written: it is cut off or damaged");
  if (checksum != crc32(start + kChecked, bytes - kChecked)) fail("the file is damaged: its checksum is another one");
  const Section nodes = section(start, bytes, header, "graph"), data = section(start, bytes, header, "weights");

  Cursor cursor(nodes.data, nodes.bytes);
  Graph graph;
  for (uint32_t left = cursor.count("weights"); left > 0; --left) read_weight(cursor, data, graph);
  for (uint32_t left = cursor.count("inputs"); left > 0; --left) read_input(cursor, graph);
  for (uint32_t left = cursor.count("nodes"); left > 0; --left) read_node(cursor, graph);
  for (uint32_t left = cursor.count("outputs"); left > 0; --left) {
    std::string name = cursor.text();
    graph.outputs.push_back({std::move(name), read_value(cursor, graph, 0)});
  }
  if (cursor.left() != 0) fail("the file is damaged: ", cursor.left(), " bytes follow its graph");
  return graph;
}

// zlib's, eight bytes at a time. Source: Kounavis and Berry, "Novel Table Lookup-Based Algorithms for High-Performance
// CRC Generation" (2008).
uint32_t crc32(const void* data, size_t bytes) {
  using Tables = std::array<std::array<uint32_t, 256>, 8>;
  static constexpr Tables kTables = [] {
    Tables tables{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0xedb88320u : 0u);
      tables[0][i] = value;
    }
    for (size_t t = 1; t < 8; ++t)
      for (size_t i = 0; i < 256; ++i) tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 0xff];
    return tables;
  }();
  const auto* at = static_cast<const unsigned char*>(data);
  uint32_t crc = ~0u;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    uint64_t word;
    std::memcpy(&word, at, sizeof word);
    word ^= crc;
    crc = 0;
    for (size_t i = 0; i < 8; ++i) crc ^= kTables[7 - i][word >> (8 * i) & 0xff];
  }
  for (; bytes > 0; --bytes, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xff];
  return ~crc;
}

}  // namespace fastops::runtime
