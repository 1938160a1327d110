#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastops {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"};

#if defined(__x86_64__)

struct CpuidLeaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  CpuidLeaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool bit(unsigned word, int position) { return (word >> position) & 1u; }

// The register state the operating system saves on a context switch (Intel SDM vol. 1, 13.3).
uint64_t xcr0() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// A process must ask Linux for AMX tile state once (kernel documentation, arch/x86/xstate).
bool amx_permitted() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

Isa detect() {
  const CpuidLeaf one(1, 0), seven(7, 0), seven_one(7, 1);
  if (!bit(one.c, 27)) return Isa::scalar;  // OSXSAVE
  const uint64_t state = xcr0();
  const bool avx_state = (state & 0x6) == 0x6, avx512_state = (state & 0xe6) == 0xe6,
             amx_state = (state & 0x60000) == 0x60000;
  const bool avx2 =
      avx_state && bit(one.c, 28) && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);  // AVX FMA F16C AVX2
  if (!avx2) return Isa::scalar;
  const bool avx512 =
      avx512_state && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);  // F DQ BW VL
  if (!avx512) return Isa::avx2;
  const bool avx512_bf16 = bit(seven.c, 11) && bit(seven_one.a, 5);  // VNNI, BF16
  if (!avx512_bf16) return Isa::avx512;
  const bool amx = amx_state && bit(seven.d, 24) && bit(seven.d, 22) && bit(seven.d, 25);  // TILE, BF16, INT8
  return amx && amx_permitted() ? Isa::amx : Isa::avx512_bf16;
}

bool has(Isa isa) { return isa <= isa_found() && has_kernels(isa); }

#elif defined(__aarch64__)

Isa detect() { return Isa::neon; }
bool has(Isa isa) { return has_kernels(isa); }

#else

Isa detect() { return Isa::scalar; }
bool has(Isa isa) { return isa == Isa::scalar; }

#endif

// The index of a tier in kNames, or -1.
int find_isa(const char* name) {
  for (int i = 0; i < static_cast<int>(Isa::count); ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i;
  return -1;
}

const char* asked() {
  const char* name = std::getenv("FASTOPS_ISA");
  return name != nullptr && *name != '\0' ? name : nullptr;
}

Isa choose() {
  const char* name = asked();
  const int wanted = name ? find_isa(name) : -1;
  return wanted >= 0 && has(static_cast<Isa>(wanted)) ? static_cast<Isa>(wanted) : isa_found();
}

std::atomic<int>& used() {
  static std::atomic<int> isa{static_cast<int>(choose())};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_found() {
  static const Isa isa = [] {
    auto best = static_cast<int>(detect());
    while (!has_kernels(static_cast<Isa>(best))) --best;
    return static_cast<Isa>(best);
  }();
  return isa;
}

Isa isa_used() { return static_cast<Isa>(used().load(std::memory_order_relaxed)); }

const char* isa_problem() {
  const char* name = asked();
  if (name == nullptr) return nullptr;
  const int wanted = find_isa(name);
  if (wanted < 0) return "names no tier (scalar, avx2, avx512, avx512_bf16, amx, neon)";
  if (!has(static_cast<Isa>(wanted))) return "asks for a tier that this processor does not have";
  return nullptr;
}

bool set_isa(Isa isa) {
  if (!has(isa)) return false;
  used().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* cpu_name() {
#if defined(__x86_64__)
  struct Brand {
    char text[49] = {};
    Brand() {
      for (unsigned i = 0; i < 3; ++i) {
        const CpuidLeaf leaf(0x80000002u + i, 0);
        const unsigned words[4] = {leaf.a, leaf.b, leaf.c, leaf.d};
        std::memcpy(text + 16 * i, words, sizeof words);
      }
    }
  };
  static const Brand brand;
  return brand.text;
#else
  return "unknown";
#endif
}

}  // namespace fastops
