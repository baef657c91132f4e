// How a convolution is cut into blocks; computed once for all instruction sets.
#pragma once

#include <cstdint>

#include "cpu/convolution.h"

namespace advkd {

constexpr std::int64_t kPanel = 16;  // channels of one block of input, or of one panel of weights

// Units are tiles of N x N outputs for winogradN and single outputs for direct. A block is the same
// `images` x `rows` x `columns` of them everywhere but at the ends; several images only if whole.
struct ConvolutionPlan {
  std::int64_t in_height, in_width, out_height, out_width;
  std::int64_t unit_rows, unit_columns;  // of an image
  std::int64_t images, rows, columns;
  std::int64_t image_blocks, row_blocks, column_blocks, blocks;
  std::int64_t channel_blocks, panels;  // of kPanel channels in and out
  std::int64_t group, groups;           // panels that are computed together
  bool shared;  // blocks are so few that threads share them: all inputs first, then all products
  // Floats of: the prepared input of a block, and from one point of a tile to the next in it; the
  // products of a block and a group, and between points; the scratch. The former is shared or each
  // thread's, the others each thread's.
  std::int64_t left_size, left_step, product_size, product_step, scratch_size;
};

// The same for the gradient of the weights: `blocks` has its left factor, the transformed input; the
// right one is the transformed gradient of the output, and `sum_size` is of the transformed weights'.
struct ConvolutionGradientPlan {
  ConvolutionPlan blocks;
  std::int64_t right_size, right_step, sum_size;
};

// One block: where it begins and how much there is of it.
struct ConvolutionBlock {
  std::int64_t image, images, row, rows, column, columns;
};

ConvolutionPlan plan_convolution(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                                 int threads);

ConvolutionGradientPlan plan_gradient(const ConvolutionShape& shape);

}  // namespace advkd
