#include "npy.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "graph.h"

namespace fastops::runtime {
namespace {

constexpr const char* kTypes[kElements] = {"<f4", "<f8", "<u2", "<f2", "|i1", "|u1", "<i4", "<i8", "|u1"};
constexpr size_t kMostHeader = 65536;

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File open_file(const std::string& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode), std::fclose);
  if (file == nullptr) fail(path, ": ", std::strerror(errno));
  return file;
}

// What follows 'key': in the header's dictionary.
const char* value_of(const std::string& header, const std::string& key) {
  const size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) fail("its header has no ", key);
  const size_t value = header.find_first_not_of(' ', at + key.size() + 3);
  if (value == std::string::npos) fail("its header has no ", key);
  return header.c_str() + value;
}

Element type_of(const char* text) {
  for (uint32_t i = 0; i < kElements; ++i)
    if (static_cast<Element>(i) != Element::bf16 && static_cast<Element>(i) != Element::f8 &&
        std::strncmp(text + 1, kTypes[i], 3) == 0)
      return static_cast<Element>(i);
  fail("its type ", std::string(text).substr(0, 8), " is none of float32, float64, float16, int8, uint8, int32, int64");
}

Array read(std::FILE* file) {
  const auto take = [&](void* to, size_t bytes) {
    if (bytes > 0 && std::fread(to, 1, bytes, file) != bytes) fail("it ends too early");
  };
  unsigned char start[8], length[4] = {};
  take(start, sizeof start);
  if (std::memcmp(start, "\x93NUMPY", 6) != 0 || start[6] < 1 || start[6] > 3) fail("it is no file of numpy.save");
  take(length, start[6] == 1 ? 2 : 4);
  const size_t size = length[0] | length[1] << 8 | length[2] << 16 | static_cast<size_t>(length[3]) << 24;
  if (size > kMostHeader) fail("its header has ", size, " bytes");
  std::string header(size, ' ');
  take(header.data(), size);
  if (std::strncmp(value_of(header, "fortran_order"), "False", 5) != 0) fail("it is in Fortran's order");
  const Element type = type_of(value_of(header, "descr"));
  Shape shape;
  const char* at = value_of(header, "shape");
  if (*at++ != '(') fail("its header has no shape");
  for (char* end; *at != ')' && *at != '\0'; at = end) {
    if (shape.rank == kMostDims) fail("it has more than ", kMostDims, " dimensions");
    shape.dims[shape.rank++] = std::strtoll(at, &end, 10);
    if (end == at) fail("its header has no shape");
    while (*end == ',' || *end == ' ') ++end;
  }
  Array array;
  array.bytes.resize(static_cast<size_t>(shape.elements()) * size_of(type));
  take(array.bytes.data(), array.bytes.size());
  array.tensor = {static_cast<int32_t>(type), shape.rank, {}, array.bytes.data()};
  std::memcpy(array.tensor.dims, shape.dims, sizeof shape.dims);
  return array;
}

}  // namespace

Array read_npy(const std::string& path) {
  const File file = open_file(path, "rb");
  try {
    return read(file.get());
  } catch (const Error& error) {
    fail(path, ": ", error.what());
  }
}

void write_npy(const std::string& path, const fastops_run_tensor& tensor) {
  std::string shape;
  size_t bytes = size_of(static_cast<Element>(tensor.type));
  for (int i = 0; i < tensor.rank; ++i) {
    shape += std::to_string(tensor.dims[i]) + (i == 0 || i + 1 < tensor.rank ? ", " : "");
    bytes *= static_cast<size_t>(tensor.dims[i]);
  }
  std::string header =
      std::string("{'descr': '") + kTypes[tensor.type] + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.resize((header.size() + 11 + 63) / 64 * 64 - 10, ' ');  // the data begin at a multiple of 64
  header.back() = '\n';
  const unsigned char start[10] = {0x93,
                                   'N',
                                   'U',
                                   'M',
                                   'P',
                                   'Y',
                                   1,
                                   0,
                                   static_cast<unsigned char>(header.size()),
                                   static_cast<unsigned char>(header.size() >> 8)};
  const File file = open_file(path, "wb");
  const bool written = std::fwrite(start, 1, sizeof start, file.get()) == sizeof start &&
                       std::fwrite(header.data(), 1, header.size(), file.get()) == header.size() &&
                       (bytes == 0 || std::fwrite(tensor.data, 1, bytes, file.get()) == bytes) &&
                       std::fflush(file.get()) == 0;
  if (!written) fail(path, ": it could not be written: ", std::strerror(errno));
}

}  // namespace fastops::runtime
