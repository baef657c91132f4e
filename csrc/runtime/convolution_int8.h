// Convolutions with products of whole numbers: inputs of 8 bits without sign, weights of 8 bits with
// one, and sums of 32 bits, which are exact. Only for instruction sets with dot products of bytes;
// elsewhere the same numbers are multiplied as float32 (ConvolutionArgs::x_levels).
#pragma once

#include <cstdint>

#include "runtime/convolution_plan.h"

namespace advkd {

constexpr std::int64_t kInt8Head = 3 * kPanel;  // floats of a panel before its weights

// Takes a convolution's arguments, packed by pack_int8; `algorithm` does not matter.
using Int8Convolution = void (*)(const ConvolutionArgs&);

// Whether there is a kernel for any processor of this build; what no page needs is left out of it.
#ifdef ADVKD_HAVE_WASM
constexpr bool kHasInt8 = false;
#else
constexpr bool kHasInt8 = true;
#endif

// The kernel that serves the instruction set in use on this processor, or null.
Int8Convolution int8_convolution();

// How such a convolution is cut: bands of whole rows of an image's output, whose input is made
// whole numbers before the first product.
struct Int8Plan {
  std::int64_t in_width;      // with its padding
  std::int64_t pixel_bytes;   // channels, a multiple of 4
  std::int64_t rows, bands;   // output rows of a band, bands of an image
  std::int64_t panels;        // of kPanel output channels
  std::int64_t panel_floats;  // of packed weights
  std::int64_t band_floats;   // a band's input

  explicit Int8Plan(const ConvolutionShape& shape);
};

// Whether no sum can overflow.
bool fits_int8(const ConvolutionShape& shape);

// Floats of the packed weights, the same for every instruction set: for each panel the sums' first
// values as int32, the sums' unit as float32, the sums of the weights as int32, and the weights,
// [row][column][in / 4][kPanel][4] int8.
std::int64_t int8_packed_size(const ConvolutionShape& shape);

// weights: (out, in, kernel, kernel); scales: the bytes of a float32 for each output channel, which
// multiplies its weights.
void pack_int8(const ConvolutionShape& shape, const std::int8_t* weights,
               const unsigned char* scales, const Levels& x_levels, float* packed);

std::int64_t int8_workspace_size(const ConvolutionShape& shape, int threads);

}  // namespace advkd
