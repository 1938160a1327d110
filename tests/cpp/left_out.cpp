// Empty tables in the place of the tiers that build_native.py leaves out, as this processor cannot run them.
#include "../../csrc/kernels/common/cpu/kernel_table.h"

#define EMPTY(tier) const KernelTable kernels_##tier{};

namespace fastops {
LEFT_OUT
}
