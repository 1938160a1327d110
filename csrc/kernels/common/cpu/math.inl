// The elementary functions (../math.inl) over the vectors of this tier.
// clang-format off
#pragma once

#include "vec.h"
#include "../math.inl"
// clang-format on
