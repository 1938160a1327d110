#include <ATen/SequenceNumber.h>
#include <ATen/core/grad_mode.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "binding.h"

namespace fastops::record {
namespace {

bool asked_to_print() {
  const char* value = std::getenv("FASTOPS_VERBOSE");
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

const bool verbose = asked_to_print();
std::mutex mutex;
std::vector<Row> rows;
std::vector<size_t> starts;  // rows.size() at each start() not yet stopped

}  // namespace

std::atomic<int> listeners{verbose ? 1 : 0};

void start() {
  const std::lock_guard<std::mutex> lock(mutex);
  starts.push_back(rows.size());
  listeners.fetch_add(1);
}

std::vector<Row> stop() {
  const std::lock_guard<std::mutex> lock(mutex);
  TORCH_CHECK(!starts.empty(), "record_stop: no recording has been started");
  std::vector<Row> mine(rows.begin() + static_cast<std::ptrdiff_t>(starts.back()), rows.end());
  starts.pop_back();
  if (starts.empty()) rows.clear();
  listeners.fetch_sub(1);
  return mine;
}

void add(Row row) {
  row.thread = syscall(SYS_gettid);
  const std::lock_guard<std::mutex> lock(mutex);
  if (verbose)
    std::fprintf(stderr, "fastops: %-22s %-32s %-10s %10.1f us  %s\n", row.op.c_str(), row.kernel.c_str(),
                 row.dtype.c_str(), row.microseconds, row.shapes.c_str());
  if (!starts.empty()) rows.push_back(std::move(row));
}

std::string kernel_text(const KernelName& name, const char* tier) {
  std::string text = name.algorithm;
  for (int i = 0; i < 3 && name.tile[i] != 0; ++i) text += (i == 0 ? '_' : 'x') + std::to_string(name.tile[i]);
  return text + '_' + tier;
}

std::string shapes_of(std::initializer_list<at::Tensor> tensors) {
  std::string text;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) continue;
    if (!text.empty()) text += ", ";
    if (tensor.dim() == 0) text += "scalar";
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (i != 0) text += 'x';
      text += std::to_string(tensor.size(i));
    }
  }
  return text;
}

void Event::take(const at::Tensor& tensor) { values_.emplace_back(tensor); }

void Event::take(const std::optional<at::Tensor>& tensor) {
  if (tensor)
    take(*tensor);
  else
    values_.emplace_back();
}

void Event::take(at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) take(tensor);
}

void Event::begin(std::string_view op) {
  // The number that the next node will get: it links a backward event to its forward one.
  const int64_t sequence = at::GradMode::is_enabled() ? static_cast<int64_t>(at::sequence_number::peek()) : -1;
  const std::string name = c10::str("fastops::", op);
  if (event_.needsInputs())
    event_.before(name, at::ArrayRef<c10::IValue>(values_), sequence);
  else
    event_.before(name, sequence);
  values_.clear();  // read by now; kept, they would keep the tensors alive
}

void Event::end(at::TensorList outputs) {
  if (event_.needsOutputs()) event_.setOutputs(std::vector<c10::IValue>(outputs.begin(), outputs.end()));
}

std::string node_name(std::string_view op) {
  std::string name = "Fastops";
  bool first = true;
  for (const char c : op) {
    if (c != '_') name += first ? static_cast<char>(std::toupper(c)) : c;
    first = c == '_';
  }
  return name + "Backward";
}

}  // namespace fastops::record

namespace fastops {
namespace {

py::list record_stop() {
  py::list rows;
  for (const record::Row& row : record::stop())
    rows.append(
        py::make_tuple(row.op, row.kernel, row.shapes, row.dtype, row.microseconds, row.flops, row.begin, row.thread));
  return rows;
}

}  // namespace

void bind_record(py::module_& m) {
  m.def("record_enabled", &record::enabled);
  m.def("record_start", &record::start);
  m.def("record_stop", &record_stop);
  m.def("record_add", [](std::string op, std::string kernel, std::string shapes, std::string dtype, double microseconds,
                         double begin) {
    record::add({.op = std::move(op),
                 .kernel = std::move(kernel),
                 .shapes = std::move(shapes),
                 .dtype = std::move(dtype),
                 .microseconds = microseconds,
                 .begin = begin});
  });
}

}  // namespace fastops
