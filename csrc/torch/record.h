// One row per kernel call, for fastops.record() and FASTOPS_VERBOSE=1.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <initializer_list>
#include <string>
#include <vector>

#include "../kernels/kernel_name.h"

namespace fastops::record {

struct Row {
  std::string op, kernel, shapes, dtype;
  double microseconds = 0;
};

bool enabled();           // somebody listens; one relaxed load
void start();             // begins a recording; recordings nest
std::vector<Row> stop();  // ends the innermost one: its rows, in order of call
void add(Row row);

// The name of a kernel by the rule of csrc/kernels/kernel_name.h: "gemm_12x32_avx512".
std::string kernel_text(const KernelName& name, const char* tier);

std::string shapes_of(std::initializer_list<at::Tensor> tensors);  // "16x10, 5x10, 5"; undefined ones are left out

// Runs the call; when somebody listens, also times it and adds the row that describe() returns without its time.
template <class Describe, class Call>
void timed(Describe&& describe, Call&& call) {
  if (!enabled()) {
    call();
    return;
  }
  const auto begin = std::chrono::steady_clock::now();
  call();
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - begin;
  Row row = describe();
  row.microseconds = elapsed.count();
  add(std::move(row));
}

}  // namespace fastops::record
