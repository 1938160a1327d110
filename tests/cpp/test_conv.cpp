// Convolution, forward and both gradients, on every tier this machine has (convolutions.h says how).
#include <array>

#include "convolutions.h"

namespace {

template <class T>
void test_dtype(bool quick) {
  unsigned seed = 1;
  const ActivationKind kinds[] = {ActivationKind::identity, ActivationKind::relu, ActivationKind::tanh,
                                  ActivationKind::silu};
  // float32 by bf16 parts: 1x1 convolutions, also with a stride.
  if (kDType<T> == DType::f32 && isa_used() == Isa::amx) {
    for (const auto& [batch, channels, outputs, height] :
         {std::array<int64_t, 4>{2, 40, 33, 5}, {3, 7, 70, 9}, {1, 130, 65, 12}, {2, 300, 290, 11}, {5, 33, 40, 23}}) {
      for (const ActivationKind kind : kinds) {
        const Layout layout = ++seed % 2 == 0 ? Layout::channels_first : Layout::channels_last;
        const int64_t stride = 1 + seed / 2 % 3;
        Case c{make(batch, channels, outputs, 1, {height, 7}, {1, 1}, {1, stride}, {0, 0}, {1, 1}, {0, 0}), layout,
               layout};
        c.kind = kind;
        c.integers = seed / 2 % 2 == 0;
        c.at_end = seed % 3 != 0;
        c.z = seed % 3 == 1;
        c.multiply = Bf16Multiply::native;
        test<T>(c, seed);
      }
    }
    return;
  }
  const auto both_layouts = [&](const ConvGeometry& geometry, bool integers = true) {
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      Case c{geometry, layout, layout};
      c.integers = integers;
      c.at_end = ++seed % 2 == 0;
      c.kind = kinds[seed / 2 % 4];
      test<T>(c, seed);
    }
  };
  // Widths, channels and outputs from nothing to beyond the largest tile (32 x 32).
  for (int64_t s = 0; s <= (quick ? 34 : 66); ++s) {
    if (quick && s > 4 && (s + 1) % 8 > 2) continue;  // around the widths of vectors and tiles
    both_layouts(make(2, 3, 5, 1, {3, s}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
    both_layouts(make(2, s, 5, 1, {4, 3}, {2, 3}, {1, 1}, {1, 1}, {1, 1}, {0, 1}));
    both_layouts(make(1, 3, s, 1, {4, 9}, {1, 2}, {1, 1}, {0, 0}, {1, 1}, {0, 1}));
    both_layouts(make(s % 7, 2, 4, 2, {s}, {4}, {2}, {3}, {1}, {2}));
    both_layouts(make(1, 4, 3, 1, {s}, {1}, {1}, {0}, {1}, {0}));
  }
  // Several blocks of everything: features, outputs, positions, chunks of the weight gradient.
  both_layouts(make(2, 70, 45, 1, {9, 11}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(1, 130, 290, 1, {3, 5}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(5, 3, 5, 1, {19, 33}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}), false);
  both_layouts(make(1, 2, 3, 1, {1200}, {7}, {1}, {3}, {1}, {3}), false);
  both_layouts(make(2, 3, 8, 1, {21, 23}, {7, 7}, {2, 2}, {3, 3}, {1, 1}, {3, 3}));
  both_layouts(make(2, 32, 48, 8, {7, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(3, 6, 12, 6, {5, 6, 7}, {3, 2, 3}, {1, 2, 1}, {1, 0, 2}, {1, 1, 2}, {0, 1, 1}));
  both_layouts(make(2, 20, 12, 1, {5, 5}, {4, 4}, {2, 2}, {1, 1}, {1, 1}, {1, 1}), false);
  both_layouts(make(1, 1, 1, 1, {90}, {71}, {1}, {35}, {1}, {35}));
  both_layouts(make(2, 3, 2, 1, {12, 12}, {2, 2}, {5, 3}, {0, 1}, {3, 4}, {0, 0}));
  // Channels last without packing the image: whole blocks of 32 channels, several pieces of a row.
  both_layouts(make(2, 64, 40, 1, {9, 11}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(1, 32, 33, 1, {3, 300}, {3, 3}, {1, 1}, {2, 0}, {1, 1}, {0, 3}));
  both_layouts(make(2, 96, 66, 3, {7, 9}, {3, 3}, {2, 2}, {1, 0}, {1, 1}, {1, 1}));
  both_layouts(make(1, 32, 5, 1, {3, 4, 15}, {2, 3, 3}, {1, 2, 1}, {1, 1, 1}, {1, 1, 2}, {0, 2, 1}), false);
  both_layouts(make(1, 64, 35, 1, {20, 13}, {3, 2}, {1, 3}, {4, 0}, {3, 1}, {1, 0}), false);
  // So many weights that the team packs the positions together, and so many outputs that threads transform all tiles.
  both_layouts(make(1, 140, 256, 1, {13, 19}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(1, 40, 99, 1, {7, 9}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  // The gradient of few channels: several strips, strides beyond the kernel, rows that no tap reaches.
  both_layouts(make(2, 3, 20, 1, {37, 41}, {7, 7}, {2, 2}, {3, 3}, {1, 1}, {3, 3}));
  both_layouts(make(1, 1, 17, 1, {90, 70}, {3, 2}, {4, 3}, {1, 0}, {1, 1}, {2, 5}), false);
  both_layouts(make(2, 4, 40, 1, {70, 33}, {2, 5}, {1, 1}, {0, 2}, {3, 1}, {0, 2}), false);
  // Rows of the kernel that are gathered from a copy; parts of the channels of the weight gradient.
  both_layouts(make(2, 20, 35, 1, {13, 37}, {3, 5}, {2, 1}, {1, 2}, {2, 1}, {1, 2}), false);
  both_layouts(make(1, 100, 64, 1, {17, 18}, {7, 7}, {1, 2}, {3, 3}, {1, 1}, {3, 3}), false);
  // Nothing at all: no channels, no positions, an empty output.
  both_layouts(make(2, 0, 4, 1, {3, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(2, 4, 0, 1, {3, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(0, 4, 3, 1, {3, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(2, 4, 3, 1, {2, 3}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, {0, 0}));
  // Strides and dilations that are never taken may be any number: no kernel may reserve memory for them.
  constexpr int64_t huge = int64_t{1} << 61;
  for (const int64_t groups : {1, 16})
    for (const int64_t k : {1, 3})
      both_layouts(make(2, 16, 16, groups, {5, 6}, {k, k}, {huge, huge}, {1, 1}, {k == 1 ? huge : 1, 1}, {0, 0}));
  both_layouts(make(2, 2, 16, 1, {5, 6}, {3, 3}, {huge, huge}, {1, 1}, {1, 1}, {1, 1}));
  both_layouts(make(2, 1, 4, 1, {7}, {3}, {huge}, {0}, {1}, {0}));
  // A 1x1 convolution that is not a product of matrices: what padding adds in front is cropped behind.
  both_layouts(make(2, 3, 5, 1, {4, 6}, {1, 1}, {1, 1}, {1, 0}, {1, 1}, {-1, 0}));
  both_layouts(make(1, 3, 5, 1, {7}, {1}, {1}, {2}, {1}, {-2}));
  // bfloat16 by its own instructions, channels first, planes that are not whole chunks: the gradient is copied before
  // it is packed, and what is copied is summed for the bias (add_rows). No other dtype or tier takes that way.
  for (const auto& [outputs, width] : {std::array<int64_t, 2>{5, 7}, {33, 10}, {70, 15}}) {
    Case c{make(3, 7, outputs, 1, {9, width}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {0, 0})};
    c.outputs = 2 + outputs % 2;  // with grad_w and without
    c.multiply = Bf16Multiply::native;
    test<T>(c, ++seed);
  }
  // Everything at random.
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const int rounds = quick ? 100 : 600;
  for (int i = 0; i < rounds; ++i) {
    const size_t dims = 1 + static_cast<size_t>(below(3));
    std::vector<int64_t> in(dims), kernel(dims), stride(dims), padding(dims), dilation(dims), after(dims);
    for (size_t d = 0; d < dims; ++d) {
      in[d] = 1 + below(dims == 1 ? 70 : dims == 2 ? 14 : 7);
      kernel[d] = 1 + below(4);
      stride[d] = 1 + (below(3) == 0 ? below(4) : 0);
      dilation[d] = 1 + (below(4) == 0 ? below(3) : 0);
      padding[d] = below(4);
      after[d] = below(5) - 1;
    }
    const int groups = below(3) == 0 ? 1 + below(4) : 1, many = below(4) == 0 ? 40 : 9;
    Case c{make(1 + below(3), groups * (1 + below(many)), groups * (1 + below(many)), groups, in, kernel, stride,
                padding, dilation, after)};
    c.layout = static_cast<Layout>(below(2));
    c.w_layout = static_cast<Layout>(below(2));
    c.kind = kinds[below(4)];
    c.bias = below(4) != 0;
    c.z = below(3) == 0;
    c.integers = below(2) == 0;
    c.at_end = below(2) == 0;
    c.outputs = static_cast<unsigned>(below(4));
    c.multiply = static_cast<Bf16Multiply>(below(3));
    test<T>(c, ++seed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) { test_dtype<T>(quick); }, true);
}
