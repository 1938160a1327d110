// What an isa_<tier>.cpp is. It is compiled once for each room, with FASTOPS_ROOM the room's name, and once without:
// then it is the tier's table. Or a unit includes it for one room after the other, and at last for the table: what
// rooms share is then there once. So names are different in all rooms (build_native.py, tier_unit).
#define FASTOPS_TEXT_OF(tokens) #tokens
#define FASTOPS_TEXT(tokens) FASTOPS_TEXT_OF(tokens)
#define FASTOPS_JOIN_OF(a, b) a##b
#define FASTOPS_JOIN(a, b) FASTOPS_JOIN_OF(a, b)

// clang-format off
#define FASTOPS_CONTRACT FASTOPS_TEXT(../../FASTOPS_ROOM/FASTOPS_ROOM.h)
#define FASTOPS_BODIES FASTOPS_TEXT(../../FASTOPS_ROOM/cpu/FASTOPS_ROOM.inl)
// clang-format on

#include "bodies_prelude.h"
#if defined(FASTOPS_ROOM)
#include FASTOPS_CONTRACT
#else
#include "kernel_table.h"
#endif

namespace fastops {
#if defined(FASTOPS_HAS_AVX512_BF16)
namespace avx512 {
template <class Call>
void fill_plan(Plan<Call>&);
}
namespace avx512_bf16 {
template <class Call>
void fill_plan(Plan<Call>&);
}
#endif
namespace FASTOPS_TIER {

// The plan of a call of any room.
template <class Call>
void fill_plan(Plan<Call>&);

#if !defined(FASTOPS_FILL)
template <class Call>
constexpr bool of_integers = requires { Call::integer_products; };

#if defined(FASTOPS_NEXT_TIER)
template <class Call>
void hand_down(Plan<Call>& plan) {
  const bool next = of_integers<Call> || dtype_of(plan.call) == DType::bf16;
  next ? FASTOPS_NEXT_TIER::fill_plan(plan) : avx512::fill_plan(plan);
}
#endif
#endif

#if defined(FASTOPS_ROOM)

namespace {
#include FASTOPS_BODIES
}  // namespace
#if defined(FASTOPS_HAS_AMX)  // products of integers, bfloat16, some calls of float32; and lower tiers' kernels
#define FASTOPS_FILL(Call)                                       \
  template <>                                                    \
  void fill_plan(Plan<Call>& plan) {                             \
    plan.tier = FASTOPS_TEXT(FASTOPS_TIER);                      \
    if (of_integers<Call> || dtype_of(plan.call) == DType::bf16) \
      plan_call(plan);                                           \
    else if (dtype_of(plan.call) == DType::f32)                  \
      plan_float32(plan);                                        \
    if (plan.runner == nullptr) hand_down(plan);                 \
  }
#else
#define FASTOPS_FILL(Call)                  \
  template <>                               \
  void fill_plan(Plan<Call>& plan) {        \
    plan.tier = FASTOPS_TEXT(FASTOPS_TIER); \
    plan_call(plan);                        \
  }
#endif
FASTOPS_JOIN(FASTOPS_CALLS_, FASTOPS_ROOM)(FASTOPS_FILL)

}  // namespace FASTOPS_TIER

#else

#if defined(FASTOPS_HANDED_DOWN)  // the calls of rooms that this library does not have for this tier
#define FASTOPS_HAND_DOWN(Call)      \
  template <>                        \
  void fill_plan(Plan<Call>& plan) { \
    hand_down(plan);                 \
  }
FASTOPS_HANDED_DOWN(FASTOPS_HAND_DOWN)
#endif

namespace {
#include "peak.inl"

template <class... Calls>
constexpr Planners planners_of(const PlannersOf<Calls...>*) {
  return {Planner<Calls>{fill_plan<Calls>}...};
}
}  // namespace

}  // namespace FASTOPS_TIER

const KernelTable FASTOPS_JOIN(kernels_, FASTOPS_TIER) = {
    FASTOPS_TEXT(FASTOPS_TIER), FASTOPS_TIER::planners_of(static_cast<const Planners*>(nullptr)),
    FASTOPS_TIER::peak_f32, FASTOPS_TIER::peak_bf16};

#endif

}  // namespace fastops
