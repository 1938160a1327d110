// Every kernel body of the library, for the namespace of the tier that includes this file. Each body includes what it
// uses.
#include "../../activation/cpu/activation.inl"
#include "../../conv/cpu/conv.inl"
#include "../../conv_pool/cpu/conv_pool.inl"
#include "../../linear/cpu/linear.inl"
#include "../../pool/cpu/pool.inl"
#include "peak.inl"
#include "table.inl"
