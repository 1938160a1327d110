// Files of numpy.save: one dense array each.
#pragma once

#include <string>
#include <vector>

#include "fastops_run.h"

namespace fastops::runtime {

struct Array {
  fastops_run_tensor tensor{};  // whose data are `bytes`
  std::vector<char> bytes;
};

// Throws std::runtime_error for what is no such file, or of another type than fastops_run.h has.
Array read_npy(const std::string& path);
// bfloat16, which numpy does not have, is written as uint16.
void write_npy(const std::string& path, const fastops_run_tensor& tensor);

}  // namespace fastops::runtime
