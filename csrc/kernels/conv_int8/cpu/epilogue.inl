// From sums to y.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "levels.inl"

class Int8Epilogue {
 public:
  static constexpr int kMost = 64;  // columns at a time

  explicit Int8Epilogue(const Bound<ConvInt8Forward>& args)
      : args_(args),
        volume_(args.geometry.out[0] * args.geometry.out[1] * args.geometry.out[2]),
        relu_(rectifier(args.activation, nullptr)),
        f_(relu_ == kNoRectifier && args.activation.kind != ActivationKind::identity
               ? row_forward<float>(args.activation.kind)
               : nullptr) {}

  // Whether what lanes() does is all that there is.
  bool simple() const { return !args_.float_y && args_.activation.kind == ActivationKind::identity; }

  // Of a row of kMost or fewer sums, load(v), the one of output `position`, from channel k on.
  template <class Load>
  void finish(Load&& load, int64_t position, int64_t k, int columns) const {
    const int64_t at = position * args_.geometry.out_channels + k;
    alignas(64) float values[kMost];
    for (int j = 0; j < columns; j += VecF::size) {
      const int count = smaller(VecF::size, columns - j);
      VecF v =
          load(j / VecF::size) * load_part(args_.multiplier + k + j, count) + load_part(args_.offset + k + j, count);
      if (args_.with_residual)
        v = v +
            (count == VecF::size ? load_levels(args_.residual + at + j) : load_levels(args_.residual + at + j, count)) *
                VecF::set1(args_.residual_scale);
      if (relu_ != kNoRectifier) v = rectified(v, relu_);
      v.store(values + j);
    }
    if (f_ != nullptr) f_(values, values, columns, args_.activation);
    if (!args_.float_y) return store_all_levels(values, static_cast<uint8_t*>(args_.y) + at, columns);
    switch (args_.dtype) {
      case DType::bf16:
        return store_floats<bf16_t>(values, position, k, columns);
      case DType::f16:
        return store_floats<f16_t>(values, position, k, columns);
      default:
        return store_floats<float>(values, position, k, columns);
    }
  }

 private:
  static VecF load_part(const float* p, int count) {
    return count == VecF::size ? VecF::load(p) : VecF::load(p, count);
  }

  void store_all_levels(const float* values, uint8_t* y, int columns) const {
    const bool requantized = args_.activation.kind != ActivationKind::identity;
    const VecF factor = VecF::set1(args_.y_factor), offset = VecF::set1(args_.y_offset);
    const VecF low = VecF::set1(static_cast<float>(args_.y_low)), high = VecF::set1(static_cast<float>(args_.y_high));
    for (int j = 0; j < columns; j += VecF::size) {
      VecF v = VecF::load(values + j);
      if (requantized) v = v * factor + offset;
      v = clamped(v, low, high);
      if (columns - j >= VecF::size)
        store_levels_of(v, y + j);
      else
        store_levels_of(v, y + j, columns - j);
    }
  }

  template <class T>
  void store_floats(const float* values, int64_t position, int64_t k, int columns) const {
    const int64_t channels = args_.geometry.out_channels;
    T* const y = static_cast<T*>(args_.y);
    if (args_.y_layout == Layout::channels_last) return store_row<T>(values, y + position * channels + k, columns);
    T row[kMost];
    store_row<T>(values, row, columns);
    T* const to = y + (position / volume_ * channels + k) * volume_ + position % volume_;
    for (int j = 0; j < columns; ++j) to[j * volume_] = row[j];
  }

  const Bound<ConvInt8Forward>& args_;
  const int64_t volume_;
  const Rectifier relu_;
  const RowForward<float> f_;
};
