// Convolutions of the inference engine and of training: float32, pixels as (B, H, W), the channels
// of a pixel consecutive, pixels `stride` floats apart (at least the channels), so that an operand
// may be a slice of the channels of a wider tensor.
#pragma once

#include <cstdint>

namespace advkd {

struct ConvolutionShape {
  std::int64_t batch, height, width;  // of the input as it is stored
  std::int64_t in_channels, out_channels;
  int kernel;  // 1 or 3
  int stride;  // 1 or 2
  int pad_before, pad_after;  // zeros above and left, below and right
  bool upsample;  // each stored pixel is read as a square of 2 x 2

  std::int64_t in_height() const { return upsample ? 2 * height : height; }
  std::int64_t in_width() const { return upsample ? 2 * width : width; }
  std::int64_t out_height() const { return out_side(in_height()); }
  std::int64_t out_width() const { return out_side(in_width()); }

 private:
  std::int64_t out_side(std::int64_t side) const {
    return (side + pad_before + pad_after - kernel) / stride + 1;
  }
};

// winogradN computes N x N outputs of a 3 x 3 kernel with stride 1 from (N + 2) x (N + 2) inputs
// with (N + 2)^2 multiplications (Lavin and Gray 2016).
enum class ConvolutionAlgorithm { direct, winograd2, winograd4 };

// Weight (o, i, r, c) lies at + o * out + i * in + r * row + c * column.
// dgrad, the gradient of the input, is the convolution with the transposed weights.
struct ConvolutionWeights {
  const float* at;
  std::int64_t out, in, row, column;

  ConvolutionWeights transposed(int kernel) const {
    return {at + (kernel - 1) * (row + column), in, out, -row, -column};
  }
};

// Whole numbers q in [0, 255] that stand for (q - zero) * step. Numbers are rounded to the nearest of
// these, halves to an even q. Without a step they stay as they are.
struct Levels {
  float step, per_step, zero;

  // Levels from low to high, which 0 lies between; false where there are none.
  bool cover(float low, float high);
};

// y = (conv(act(x * x_scale + x_shift)) + bias + residual) * scale; act is SiLU or nothing, and
// the padding's zeros are those of act's result.
struct ConvolutionArgs {
  ConvolutionShape shape;
  ConvolutionAlgorithm algorithm;
  const float* x;
  std::int64_t x_stride;  // of pixels
  const float *x_scale, *x_shift;  // (B, in_channels), both or neither
  bool x_silu;
  Levels x_levels;  // that act's result is rounded to
  const float* packed;  // by pack_weights for this shape
  const float* bias;  // (out_channels,), or null
  std::int64_t bias_stride;  // 0: one for all images; else image b has the one at + b * bias_stride
  const float* residual;  // (B, out_height, out_width, out_channels), or null; may be y
  std::int64_t residual_stride;  // of pixels
  float scale;
  float* y;
  std::int64_t y_stride;  // of pixels
  float* workspace;  // workspace_size floats
  int threads;
};

// wgrad, the gradients of weights and bias, where kernel = 3 and stride = 1, without upsampling. What
// was convolved is act(x * x_scale + x_shift), as in ConvolutionArgs.
struct ConvolutionWgradArgs {
  ConvolutionShape shape;
  const float* x;
  std::int64_t x_stride;  // of pixels
  const float *x_scale, *x_shift;  // (B, in_channels), both or neither
  bool x_silu;
  const float* grad_y;
  std::int64_t grad_y_stride;  // of pixels
  float* dweights;  // (out_channels, 3, 3, in_channels), dense
  float* dbias;  // (out_channels,), or null
  float* workspace;  // wgrad_workspace_size floats
  int threads;
};

// Whether the kernels know such a convolution; the other functions expect it.
bool supported(const ConvolutionShape& shape);

// The algorithm that should be fastest with weights that are packed already, and not in a cache, by
// a model of its arithmetic and its memory traffic.
ConvolutionAlgorithm choose_algorithm(const ConvolutionShape& shape, int threads);

// How many of the threads such a convolution is worth waking, by the same model.
int convolution_threads(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm, int threads);

// By what factor such a convolution should be faster than torch's in training, where the weights
// are packed on each call; by the same model.
double speedup_in_training(const ConvolutionShape& shape);

// Floats of the packed weights, which are the same for every algorithm, instruction set, batch and
// image size.
std::int64_t packed_size(const ConvolutionShape& shape);

void pack_weights(const ConvolutionShape& shape, const ConvolutionWeights& weights, float* packed);

// Floats of the workspace; 0 is possible.
std::int64_t workspace_size(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                            int threads);

// An image's result is the same bits in every batch and with every number of threads. y must not
// overlap x; memory on a cache line's boundary is fastest, but none is required.
void convolution(const ConvolutionArgs& args);

std::int64_t wgrad_workspace_size(const ConvolutionShape& shape, int threads);

// The same bits with every number of threads.
void convolution_wgrad(const ConvolutionWgradArgs& args);

}  // namespace advkd
