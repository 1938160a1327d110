// What an isa_<tier>.cpp is. It is compiled once for each room, with FASTOPS_ROOM the room's name, and once without:
// then it is the tier's table.
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
namespace FASTOPS_TIER {

// The plan of a call of any room.
template <class Call>
void fill_plan(Plan<Call>&);

#if defined(FASTOPS_ROOM)

namespace {
constexpr const char* kTier = FASTOPS_TEXT(FASTOPS_TIER);
#include FASTOPS_BODIES
}  // namespace

#define FASTOPS_FILL(Call)           \
  template <>                        \
  void fill_plan(Plan<Call>& plan) { \
    plan.tier = kTier;               \
    plan_call(plan);                 \
  }
FASTOPS_JOIN(FASTOPS_CALLS_, FASTOPS_ROOM)(FASTOPS_FILL)

}  // namespace FASTOPS_TIER

#else

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
