// Where the products of an int8 convolution read x: in place, where it is uint8 and its channels come in whole groups,
// or in a copy with a border of zero points, which also rounds a float x.
#pragma once

#include "levels.inl"

// Rows of x as the products want them: `segments` pieces of `length` bytes for each output position.
struct Int8Input {
  bool copied;
  int64_t channels;   // of a group, with what fills them up in the copy
  int64_t pitch;      // bytes of a position
  int64_t extent[3];  // of an image
  int64_t origin[3];  // of tap 0 at output 0
  bool joined;        // neighbours along a row of taps are one piece

  int64_t image_bytes() const { return extent[0] * extent[1] * extent[2] * pitch; }
};

inline bool a_tap_is_outside(const ConvGeometry& g) {
  for (int i = 0; i < 3; ++i)
    if (g.padding[i] > 0 || (g.out[i] - 1) * g.stride[i] + (g.kernel[i] - 1) * g.dilation[i] >= g.in[i]) return true;
  return false;
}

// unit: channels of a group come in multiples of this. In place if that is so, and x is uint8, unless `copied`.
inline Int8Input int8_input(const ConvInt8Forward& call, int64_t unit, bool copied = false) {
  const ConvGeometry& g = call.geometry;
  const int64_t channels = g.in_channels / g.groups;
  copied = copied || call.float_x || channels % unit != 0;
  Int8Input in{copied, round_up(channels, unit), 0, {}, {}, false};
  in.pitch = in.channels * g.groups;
  for (int i = 0; i < 3; ++i) {
    in.extent[i] = in.copied ? (g.out[i] - 1) * g.stride[i] + (g.kernel[i] - 1) * g.dilation[i] + 1 : g.in[i];
    in.origin[i] = in.copied ? 0 : -g.padding[i];
  }
  in.joined = in.copied && g.groups == 1 && g.dilation[2] == 1;
  return in;
}

// ---- the copy

// Channels [c, c + 4) of `count` positions, as levels; zero from `channels` on.
template <class T>
inline void copy_four_planes(const Bound<ConvInt8Forward>& args, const T* x, int64_t plane, int64_t channels,
                             int64_t count, uint8_t* to, int64_t stride) {
  const VecF inverse = VecF::set1(args.x_inverse), zero = VecF::set1(static_cast<float>(args.x_zero));
  for (int64_t i = 0; i < count; i += VecF::size) {
    const int part = static_cast<int>(smaller<int64_t>(count - i, VecF::size));
    VecF v[4] = {VecF::zero(), VecF::zero(), VecF::zero(), VecF::zero()};
    for (int c = 0; c < smaller<int64_t>(channels, 4); ++c) {
      const VecF value = part == VecF::size ? VecF::load(x + c * plane + i) : VecF::load(x + c * plane + i, part);
      v[c] = clamped(value * inverse + zero, VecF::zero(), VecF::set1(255));
    }
    store_groups(v, to + i * stride, stride, part);
  }
}

// `count` elements of a row that lie side by side.
template <class T>
inline void copy_levels(const Bound<ConvInt8Forward>& args, const T* x, int64_t count, uint8_t* to) {
  const VecF inverse = VecF::set1(args.x_inverse), zero = VecF::set1(static_cast<float>(args.x_zero));
  const auto level = [&](VecF v) { return clamped(v * inverse + zero, VecF::zero(), VecF::set1(255)); };
  int64_t i = 0;
  for (; i + VecF::size <= count; i += VecF::size) store_levels_of(level(VecF::load(x + i)), to + i);
  const int part = static_cast<int>(count - i);
  if (part > 0) store_levels_of(level(VecF::load(x + i, part)), to + i, part);
}

// `count` positions of a row of image b, from `at` on: offset of the first one from the image's beginning, in
// positions.
template <class T>
void copy_positions(const Bound<ConvInt8Forward>& args, const Int8Input& in, int64_t b, int64_t at, int64_t count,
                    uint8_t* to) {
  const ConvGeometry& g = args.geometry;
  const int64_t volume = g.in[0] * g.in[1] * g.in[2], channels = g.in_channels / g.groups;
  if (!args.float_x || args.x_layout == Layout::channels_last) {
    const int64_t first = (b * volume + at) * g.in_channels;
    if (args.float_x && in.channels == channels)
      return copy_levels(args, static_cast<const T*>(args.x) + first, count * g.in_channels, to);
    if (in.channels == channels) {
      __builtin_memcpy(to, static_cast<const uint8_t*>(args.x) + first, static_cast<size_t>(count * g.in_channels));
      return;
    }
    for (int64_t i = 0; i < count * g.groups; ++i, to += in.channels) {
      if (args.float_x) {
        copy_levels(args, static_cast<const T*>(args.x) + first + i * channels, channels, to);
      } else {
        const uint8_t* const from = static_cast<const uint8_t*>(args.x) + first + i * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
      }
      for (int64_t c = channels; c < in.channels; ++c) to[c] = 0;
    }
    return;
  }
  for (int64_t group = 0; group < g.groups; ++group)
    for (int64_t c = 0; c < channels; c += 4) {
      const T* const x = static_cast<const T*>(args.x) + (b * g.in_channels + group * channels + c) * volume + at;
      uint8_t* const place = to + group * in.channels + c;
      if (c + 4 <= in.channels) {
        copy_four_planes(args, x, volume, channels - c, count, place, in.pitch);
        continue;
      }
      // Fewer than four, whose group would reach into the next position.
      for (int64_t e = c; e < channels; ++e)
        for (int64_t i = 0; i < count; i += VecF::size) {
          uint8_t levels[VecF::size];
          const int64_t part = smaller<int64_t>(count - i, VecF::size);
          copy_levels(args, x + (e - c) * volume + i, part, levels);
          for (int64_t j = 0; j < part; ++j) place[(e - c) + (i + j) * in.pitch] = levels[j];
        }
    }
}

// Row `unit` of the copy: of all images, planes and rows.
template <class T>
void copy_row(const Bound<ConvInt8Forward>& args, const Int8Input& in, int64_t unit, uint8_t* copy) {
  const ConvGeometry& g = args.geometry;
  const int64_t h = unit % in.extent[1] - g.padding[1], d = unit / in.extent[1] % in.extent[0] - g.padding[0];
  const int64_t b = unit / in.extent[1] / in.extent[0], width = in.extent[2];
  uint8_t* const to = copy + unit * width * in.pitch;
  int64_t before = width, inside = 0;
  if (d >= 0 && d < g.in[0] && h >= 0 && h < g.in[1]) {
    before = smaller(g.padding[2], width);
    inside = larger<int64_t>(smaller(width - before, g.in[2] - (before - g.padding[2])), 0);
  }
  __builtin_memset(to, args.x_zero, static_cast<size_t>(before * in.pitch));
  if (inside > 0)
    copy_positions<T>(args, in, b, (d * g.in[1] + h) * g.in[2] + before - g.padding[2], inside, to + before * in.pitch);
  __builtin_memset(to + (before + inside) * in.pitch, args.x_zero,
                   static_cast<size_t>((width - before - inside) * in.pitch));
}

// ---- where the taps of output positions are

// For positions [first, first + count): the place of each piece, all of one tap side by side, `stride` places apart.
// Outside of the image it is `zeros`. Returns how many pieces there are.
inline int64_t place_taps(const ConvGeometry& g, const Int8Input& in, const uint8_t* x, const uint8_t* zeros,
                          int64_t first, int64_t count, const uint8_t** places, int64_t stride) {
  const int64_t across = in.joined ? 1 : g.kernel[2], pieces = g.kernel[0] * g.kernel[1] * across;
  const int64_t volume = g.out[0] * g.out[1] * g.out[2], in_image = first % volume;
  int64_t out[3] = {in_image / g.out[2] / g.out[1], in_image / g.out[2] % g.out[1], in_image % g.out[2]};
  const uint8_t* image = x + first / volume * in.image_bytes();
  // Runs of positions of one row: the divisions above take longer than a small product.
  for (int64_t i = 0; i < count;) {
    const int64_t run = smaller(count - i, g.out[2] - out[2]);
    const uint8_t** to = places + i;
    for (int64_t r = 0; r < g.kernel[0]; ++r)
      for (int64_t s = 0; s < g.kernel[1]; ++s) {
        const int64_t d = out[0] * g.stride[0] + in.origin[0] + r * g.dilation[0];
        const int64_t h = out[1] * g.stride[1] + in.origin[1] + s * g.dilation[1];
        const bool inside = d >= 0 && d < in.extent[0] && h >= 0 && h < in.extent[1];
        const uint8_t* const row = image + (d * in.extent[1] + h) * in.extent[2] * in.pitch;
        for (int64_t t = 0; t < across; ++t, to += stride) {
          int64_t w = out[2] * g.stride[2] + in.origin[2] + t * g.dilation[2];
          for (int64_t j = 0; j < run; ++j, w += g.stride[2])
            to[j] = inside && w >= 0 && w < in.extent[2] ? row + w * in.pitch : zeros;
        }
      }
    i += run;
    out[2] = 0;
    if (++out[1] < g.out[1]) continue;
    out[1] = 0;
    if (++out[0] < g.out[0]) continue;
    out[0] = 0;
    image += in.image_bytes();
  }
  return pieces;
}
