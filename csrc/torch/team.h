// The kernels' threads: PyTorch's own OpenMP pool.
#pragma once

#include "../kernels/parallel.h"

namespace fastops {

// As many threads as torch.get_num_threads() says; one inside another parallel region, and one in a forked child, where
// libgomp's pool no longer exists and waking it would hang (GCC bug 60035).
Team torch_team();

}  // namespace fastops
