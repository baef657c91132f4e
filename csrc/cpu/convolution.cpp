#include "cpu/convolution.h"

#include <cmath>

#include "cpu/thread_pool.h"

namespace advkd {
namespace {

float input_of(const ConvolutionArgs& args, std::int64_t b, std::int64_t y, std::int64_t x,
               std::int64_t c) {
  const ConvolutionShape& s = args.shape;
  if (y < 0 || x < 0 || y >= s.in_height() || x >= s.in_width()) return 0.0f;
  const std::int64_t row = s.upsample ? y / 2 : y, column = s.upsample ? x / 2 : x;
  float v = args.x[((b * s.height + row) * s.width + column) * args.x_stride + c];
  if (args.x_scale != nullptr) {
    v = v * args.x_scale[b * s.in_channels + c] + args.x_shift[b * s.in_channels + c];
  }
  return args.x_silu ? v / (1.0f + std::exp(-v)) : v;
}

void output_row(const ConvolutionArgs& args, std::int64_t task) {
  const ConvolutionShape& s = args.shape;
  const std::int64_t b = task / s.out_height(), y = task % s.out_height();
  for (std::int64_t x = 0; x < s.out_width(); ++x) {
    const std::int64_t pixel = task * s.out_width() + x;
    for (std::int64_t o = 0; o < s.out_channels; ++o) {
      float sum = 0.0f;
      const float* w = args.packed + o;
      for (int ky = 0; ky < s.kernel; ++ky) {
        for (int kx = 0; kx < s.kernel; ++kx) {
          for (std::int64_t i = 0; i < s.in_channels; ++i, w += s.out_channels) {
            sum += *w * input_of(args, b, y * s.stride - s.pad_before + ky,
                                 x * s.stride - s.pad_before + kx, i);
          }
        }
      }
      if (args.bias != nullptr) sum += args.bias[b * args.bias_stride + o];
      if (args.residual != nullptr) sum += args.residual[pixel * args.residual_stride + o];
      args.y[pixel * args.y_stride + o] = sum * args.scale;
    }
  }
}

}  // namespace

bool supported(const ConvolutionShape& s) {
  return (s.kernel == 1 || s.kernel == 3) && (s.stride == 1 || s.stride == 2) && s.batch >= 0 &&
         s.height >= 1 && s.width >= 1 && s.in_channels >= 1 && s.out_channels >= 1 &&
         s.pad_before >= 0 && s.pad_before < s.kernel && s.pad_after >= 0 &&
         s.pad_after < s.kernel && s.in_height() + s.pad_before + s.pad_after >= s.kernel &&
         s.in_width() + s.pad_before + s.pad_after >= s.kernel;
}

ConvolutionAlgorithm choose_algorithm(const ConvolutionShape&, int) {
  return ConvolutionAlgorithm::direct;
}

std::int64_t packed_size(const ConvolutionShape& s, ConvolutionAlgorithm) {
  return s.kernel * s.kernel * s.in_channels * s.out_channels;
}

void pack_weights(const ConvolutionShape& s, ConvolutionAlgorithm, const ConvolutionWeights& w,
                  float* packed) {
  for (int ky = 0; ky < s.kernel; ++ky) {
    for (int kx = 0; kx < s.kernel; ++kx) {
      for (std::int64_t i = 0; i < s.in_channels; ++i) {
        for (std::int64_t o = 0; o < s.out_channels; ++o) {
          *packed++ = w.at[o * w.out + i * w.in + ky * w.row + kx * w.column];
        }
      }
    }
  }
}

std::int64_t workspace_size(const ConvolutionShape&, ConvolutionAlgorithm, int) { return 0; }

void convolution(const ConvolutionArgs& args) {
  parallel_for(args.shape.batch * args.shape.out_height(), args.threads,
               [&](std::int64_t task) { output_row(args, task); });
}

}  // namespace advkd
