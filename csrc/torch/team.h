// The threads of the kernels, from PyTorch's OpenMP pool.
#pragma once

#include "../kernels/common/parallel.h"

namespace fastops {

// A team of torch.get_num_threads() threads. Inside another parallel region it has one thread. So it has in a forked
// child, where libgomp's pool no longer exists and waking it would hang (GCC bug 60035).
Team torch_team();

}  // namespace fastops
