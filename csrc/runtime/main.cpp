// fastops-run: a model on files of numpy.save.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "npy.h"

namespace {

constexpr const char* kUsage =
    "fastops-run MODEL.fops [INPUT.npy ...] [-o OUTPUT.npy ...] [--threads N] [--repeat N]\n"
    "\n"
    "Runs a model that fastops.light.save has written. Without inputs it says what the model takes.\n"
    "  -o OUTPUT.npy  where the next output goes; outputs without one are not written\n"
    "  --threads N    how many threads compute (1)\n"
    "  --repeat N     runs it N times more, and prints the median and the fastest time\n";

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void describe(const char* what, const char* name, const fastops_run_tensor& tensor) {
  static constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "int8",
                                           "uint8",   "int32",   "int64",    "float8"};
  std::printf("%s %s: %s (", what, name, kNames[tensor.type]);
  if (tensor.rank < 0) std::printf("any shape");
  for (int i = 0; i < tensor.rank; ++i) {
    if (i > 0) std::printf(", ");
    tensor.dims[i] < 0 ? std::printf("any") : std::printf("%lld", static_cast<long long>(tensor.dims[i]));
  }
  std::printf(")\n");
}

struct Arguments {
  const char* model = nullptr;
  std::vector<const char*> inputs, outputs;
  long threads = 1, repeat = 0;
};

// Whether they can be understood.
bool read_arguments(int count, char** values, Arguments& arguments) {
  for (int i = 1; i < count; ++i) {
    const auto is = [&](const char* name) { return std::strcmp(values[i], name) == 0; };
    if (is("-o") || is("--threads") || is("--repeat")) {
      if (i + 1 == count) return false;
      char* end = nullptr;
      long* const number = is("--threads") ? &arguments.threads : is("--repeat") ? &arguments.repeat : nullptr;
      const char* const value = values[++i];
      if (number == nullptr) {
        arguments.outputs.push_back(value);
        continue;
      }
      *number = std::strtol(value, &end, 10);
      if (end == value || *end != '\0' || *number < 0 || *number > 1000000000) return false;
    } else if (values[i][0] == '-') {
      return false;
    } else if (arguments.model == nullptr) {
      arguments.model = values[i];
    } else {
      arguments.inputs.push_back(values[i]);
    }
  }
  return arguments.model != nullptr;
}

int complain(const char* text) {
  std::fprintf(stderr, "fastops-run: %s\n", text);
  return 1;
}

int run(fastops_run_model* model, const Arguments& arguments, double begin) {
  const size_t input_count = fastops_run_inputs(model), output_count = fastops_run_outputs(model);
  if (arguments.inputs.empty() && input_count > 0) {
    for (size_t i = 0; i < input_count; ++i)
      describe("input", fastops_run_input_name(model, i), fastops_run_input(model, i));
    for (size_t i = 0; i < output_count; ++i) std::printf("output %s\n", fastops_run_output_name(model, i));
    std::printf("fastops %s, kernels %s\n", fastops_run_version(), fastops_run_isa());
    return 0;
  }
  if (arguments.outputs.size() > output_count) return complain("there are more -o than outputs");
  std::vector<fastops::runtime::Array> arrays;
  std::vector<fastops_run_tensor> inputs, outputs(output_count);
  for (const char* path : arguments.inputs) arrays.push_back(fastops::runtime::read_npy(path));
  for (const auto& array : arrays) inputs.push_back(array.tensor);
  const auto once = [&] {
    return fastops_run(model, inputs.data(), inputs.size(), outputs.data(), outputs.size()) == 0;
  };
  if (!once()) return complain(fastops_run_error());
  std::printf("first result after %.2f ms\n", (seconds() - begin) * 1e3);
  std::vector<double> times;
  for (long i = 0; i < arguments.repeat; ++i) {
    const double before = seconds();
    if (!once()) return complain(fastops_run_error());
    times.push_back(seconds() - before);
  }
  if (!times.empty()) {
    std::sort(times.begin(), times.end());
    std::printf("%ld runs: median %.1f us, fastest %.1f us\n", arguments.repeat, times[times.size() / 2] * 1e6,
                times.front() * 1e6);
  }
  for (size_t i = 0; i < output_count; ++i) {
    describe("output", fastops_run_output_name(model, i), outputs[i]);
    if (i < arguments.outputs.size()) fastops::runtime::write_npy(arguments.outputs[i], outputs[i]);
  }
  return 0;
}

}  // namespace

int main(int count, char** values) {
  const double begin = seconds();
  Arguments arguments;
  if (!read_arguments(count, values, arguments)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  fastops_run_model* const model = fastops_run_open(arguments.model, static_cast<int>(arguments.threads));
  if (model == nullptr) return complain(fastops_run_error());
  int status = 1;
  try {
    status = run(model, arguments, begin);
  } catch (const std::exception& error) {
    complain(error.what());
  }
  fastops_run_close(model);
  return status;
}
