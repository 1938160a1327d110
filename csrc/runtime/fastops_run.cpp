#define _FASTOPS_RUN_BUILDS
#include "fastops_run.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <list>
#include <string>
#include <vector>

#include "program.h"

namespace {

using namespace fastops;
using namespace fastops::runtime;

static_assert(FASTOPS_RUN_MOST_DIMS == kMostDims && FASTOPS_RUN_FLOAT8 == static_cast<int>(Element::f8));

thread_local std::string last_error;

// What f returns; `failed` where it throws, and then last_error says why.
template <class Result, class F>
Result guarded(Result failed, F f) noexcept {
  try {
    try {
      return f();
    } catch (const std::bad_alloc&) {
      last_error = "there is not enough memory";
    } catch (const std::exception& error) {
      last_error = error.what();
    }
  } catch (...) {  // not even the text could be kept
  }
  return failed;
}

class MappedFile {
 public:
  explicit MappedFile(const char* path) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about = {};
    if (file < 0 || fstat(file, &about) != 0) {
      const int error = errno;
      if (file >= 0) close(file);
      fail(path, ": ", std::strerror(error));
    }
    bytes_ = static_cast<size_t>(about.st_size);
    if (bytes_ > 0) data_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (data_ == MAP_FAILED) fail(path, ": it cannot be mapped into memory: ", std::strerror(errno));
  }
  ~MappedFile() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  MappedFile(const MappedFile&) = delete;
  const void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

fastops_run_tensor tensor_of(Element type, const Shape& shape, const void* data) {
  fastops_run_tensor tensor{static_cast<int32_t>(type), shape.rank, {}, data};
  std::memcpy(tensor.dims, shape.dims, sizeof tensor.dims);
  return tensor;
}

}  // namespace

struct fastops_run_model {
  fastops_run_model(const char* path, int threads)
      : file(path), graph(read_graph(file.data(), file.bytes())), pool(threads) {}

  // The program for inputs of these shapes.
  Program& program(const std::vector<Shape>& shapes) {
    for (auto at = programs.begin(); at != programs.end(); ++at)
      if (at->shapes == shapes && at->isa == isa_used()) {
        programs.splice(programs.begin(), programs, at);
        return programs.front().program;
      }
    if (programs.size() == kMost) programs.pop_back();
    programs.emplace_front(shapes, isa_used(), graph, pool.threads());
    return programs.front().program;
  }

  struct Planned {
    Planned(const std::vector<Shape>& inputs, Isa tier, const Graph& graph, int threads)
        : shapes(inputs), isa(tier), program(graph, inputs, threads) {}
    std::vector<Shape> shapes;
    Isa isa;
    Program program;
  };
  static constexpr size_t kMost = 4;

  const MappedFile file;
  const Graph graph;
  Pool pool;
  std::list<Planned> programs;  // the newest first
};

namespace {

Shape checked_shape(const Input& input, const fastops_run_tensor& tensor) {
  if (tensor.type != static_cast<int32_t>(input.type))
    fail("input ", input.name, " has to be of ", name_of(input.type), ", got ",
         tensor.type >= 0 && tensor.type < static_cast<int32_t>(kElements) ? name_of(static_cast<Element>(tensor.type))
                                                                           : "an unknown type");
  if (tensor.rank < 0 || tensor.rank > kMostDims)
    fail("input ", input.name, " has ", tensor.rank, " dimensions; there may be up to ", kMostDims);
  Shape shape{.rank = tensor.rank};
  std::memcpy(shape.dims, tensor.dims, sizeof shape.dims);
  bool fits = input.any_rank || shape.rank == input.shape.rank;
  for (int i = 0; fits && !input.any_rank && i < shape.rank; ++i)
    fits = input.shape[i] == -1 || input.shape[i] == shape[i];
  if (!fits) fail("input ", input.name, " has to have shape ", input.shape, ", got ", shape);
  if (shape.elements() > 0 && tensor.data == nullptr) fail("input ", input.name, " has no data");
  return shape;
}

}  // namespace

extern "C" {

fastops_run_model* fastops_run_open(const char* path, int threads) {
  return guarded<fastops_run_model*>(nullptr, [&] { return new fastops_run_model(path, threads); });
}

void fastops_run_close(fastops_run_model* model) { delete model; }

size_t fastops_run_inputs(const fastops_run_model* model) { return model->graph.inputs.size(); }
size_t fastops_run_outputs(const fastops_run_model* model) { return model->graph.outputs.size(); }
const char* fastops_run_input_name(const fastops_run_model* model, size_t i) {
  return i < model->graph.inputs.size() ? model->graph.inputs[i].name.c_str() : nullptr;
}
const char* fastops_run_output_name(const fastops_run_model* model, size_t i) {
  return i < model->graph.outputs.size() ? model->graph.outputs[i].name.c_str() : nullptr;
}
fastops_run_tensor fastops_run_input(const fastops_run_model* model, size_t i) {
  if (i >= model->graph.inputs.size()) return {};
  const Input& input = model->graph.inputs[i];
  fastops_run_tensor tensor = tensor_of(input.type, input.shape, nullptr);
  if (input.any_rank) tensor.rank = -1;
  return tensor;
}

int fastops_run(fastops_run_model* model, const fastops_run_tensor* inputs, size_t input_count,
                fastops_run_tensor* outputs, size_t output_count) {
  return guarded(1, [&] {
    const Graph& graph = model->graph;
    if (input_count != graph.inputs.size() || output_count != graph.outputs.size())
      fail("the model has ", graph.inputs.size(), " inputs and ", graph.outputs.size(), " outputs, got ", input_count,
           " and ", output_count);
    std::vector<Shape> shapes;
    std::vector<const void*> data;
    for (size_t i = 0; i < input_count; ++i) {
      shapes.push_back(checked_shape(graph.inputs[i], inputs[i]));
      data.push_back(inputs[i].data);
    }
    Program& program = model->program(shapes);
    program.run(data.data(), model->pool);
    for (size_t i = 0; i < output_count; ++i)
      outputs[i] = tensor_of(program.output(i).type, program.output(i).shape, program.output_data(i));
    return 0;
  });
}

size_t fastops_run_memory(const fastops_run_model* model) {
  size_t bytes = 0;
  for (const auto& planned : model->programs) bytes += planned.program.bytes();
  return bytes;
}

const char* fastops_run_error(void) { return last_error.c_str(); }
const char* fastops_run_version(void) { return FASTOPS_VERSION; }
const char* fastops_run_isa(void) { return isa_name(isa_used()); }

}  // extern "C"
