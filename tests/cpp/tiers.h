// What every test here does: count failures, and run its cases for every dtype of every tier of this machine.
#pragma once

#include <cstdio>
#include <cstring>

#include "../../csrc/kernels/common/cpu/isa.h"

namespace {

using namespace fastops;

inline int failures = 0;

template <class T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<double> = DType::f64;
template <>
constexpr DType kDType<bf16_t> = DType::bf16;
template <>
constexpr DType kDType<f16_t> = DType::f16;

// What a test's main does. Arguments: "quick" for fewer cases, and the name of a tier to run that one alone.
// body<T>(quick) runs the cases of one dtype on the tier that is set.
template <class Body>
int run_tiers(int argc, char** argv, Body&& body) {
  bool quick = false;
  const char* only = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "quick") == 0)
      quick = true;
    else
      only = argv[i];
  }
  for (int i = 0; i <= static_cast<int>(isa_found()); ++i) {
    const Isa isa = static_cast<Isa>(i);
    if ((only != nullptr && std::strcmp(only, isa_name(isa)) != 0) || !set_isa(isa)) continue;
    const auto run = [&]<class T>() {
      if (std::strcmp(kernels(kDType<T>).isa, isa_name(isa)) == 0) body.template operator()<T>(quick);
    };
    run.template operator()<float>();
    run.template operator()<double>();
    run.template operator()<bf16_t>();
    run.template operator()<f16_t>();
    std::printf("%s: %s\n", isa_name(isa), failures == 0 ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}

}  // namespace
