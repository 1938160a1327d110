// Whether a tensor has changed since it was last looked at.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>

namespace fastops {

// What changes with a tensor: which it is, its memory, its version, and some of its elements, for writes through .data,
// of which the version knows nothing.
struct Fingerprint {
  uint64_t value = 0;

  void mix(uint64_t next) { value = (value ^ next) * 0x9e3779b97f4a7c15u + (value >> 29); }

  void mix(const Tensor& tensor) {
    constexpr int64_t kElements = 8;
    mix(reinterpret_cast<uint64_t>(tensor.unsafeGetTensorImpl()));
    if (!tensor.is_inference()) mix(static_cast<uint64_t>(tensor._version()));
    if (!tensor.has_storage()) return;
    const void* const data = tensor.storage().unsafeGetStorageImpl()->data();  // null: of a fake tensor
    mix(reinterpret_cast<uint64_t>(data));
    mix(static_cast<uint64_t>(tensor.storage_offset()));
    const int64_t size = static_cast<int64_t>(tensor.element_size()), elements = tensor.numel();
    if (data == nullptr || !tensor.is_cpu() || !tensor.is_non_overlapping_and_dense() || elements == 0) return;
    const auto* const bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < kElements; ++i) {
      uint64_t element = 0;
      const int64_t at = elements == 1 ? 0 : i * (elements - 1) / (kElements - 1);
      std::memcpy(&element, bytes + at * size, static_cast<size_t>(std::min<int64_t>(size, 8)));
      mix(element);
    }
  }
};

}  // namespace fastops
