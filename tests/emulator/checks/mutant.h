// The number of the mutant that is turned on (tests/test_cuda_mutants.py), from the environment; 0 for none.
#pragma once

#include <cstdlib>

inline const int mutant = [] {
  const char* const number = std::getenv("FASTOPS_MUTANT");
  return number == nullptr ? 0 : std::atoi(number);
}();
