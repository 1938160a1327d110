// On the CPU a network is computed layer by layer, by linear.
#pragma once

#include "../../common/cpu/common.inl"
