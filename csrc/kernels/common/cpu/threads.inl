// How many threads a call is worth.
#pragma once

#include "numbers.inl"

// The least work per thread. Smaller products run on the calling thread, as starting a team takes some microseconds.
constexpr int64_t kFlopPerThread = 400 * 1000;

// The number of threads for `elements` elements in `blocks` blocks.
inline int threads_for(const Team& team, int64_t elements, int64_t blocks, int64_t grain) {
  const int64_t wanted = smaller(elements / grain, blocks);
  return wanted < 1 ? 1 : static_cast<int>(smaller(wanted, team.threads));
}
