// Every op that has kernels, in one list: its contract, its calls, and its bodies on the CPU.
#if defined(FASTOPS_BODIES)
// In the namespace of a tier. Each body includes what it uses.
#include "../activation/cpu/activation.inl"
#include "../conv/cpu/conv.inl"
#include "../conv_pool/cpu/conv_pool.inl"
#include "../linear/cpu/linear.inl"
#include "../pool/cpu/pool.inl"
#elif !defined(FASTOPS_CALLS)
#define FASTOPS_CALLS
#include "../activation/activation.h"
#include "../conv/conv.h"
#include "../conv_pool/conv_pool.h"
#include "../linear/linear.h"
#include "../mlp/mlp.h"
#include "../pool/pool.h"
#include "plan.h"

namespace fastops {

using Planners =
    PlannersOf<ActivationForward, ActivationBackward, PreluForward, PreluBackward, GluForward, GluBackward,  //
               LinearForward, LinearBackward,                                                                //
               MlpForward, MlpBackward,                                                                      //
               ConvForward, ConvBackwardInput, ConvBackwardWeight,                                           //
               ConvPoolForward, ConvPoolBackward,                                                            //
               MaxPoolForward, MaxPoolBackward, AvgPoolForward, AvgPoolBackward>;

template <class Call>
DType dtype_of(const Call& call) {
  if constexpr (requires { call.shape; })
    return call.shape.dtype;
  else
    return call.dtype;
}

}  // namespace fastops
#endif
