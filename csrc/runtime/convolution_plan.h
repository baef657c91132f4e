// How a convolution is cut into blocks; computed once for all instruction sets.
#pragma once

#include <cstdint>

#include "runtime/convolution.h"

namespace advkd {

constexpr std::int64_t kPanel = 16;  // channels of one block of input, or of one panel of weights
constexpr std::int64_t kMostGroup = 3;  // panels that are computed together at most

// Units are tiles of N x N outputs for winogradN and single outputs for direct. A block is the same
// `images` x `rows` x `columns` of them everywhere but at the ends; several images only if whole.
struct ConvolutionPlan {
  std::int64_t in_height, in_width, out_height, out_width;
  std::int64_t tile_rows, tile_columns;  // of an image
  std::int64_t images, rows, columns;
  std::int64_t image_blocks, row_blocks, column_blocks, blocks;
  std::int64_t channel_blocks, panels;  // of kPanel channels in and out
  std::int64_t group, groups;           // panels that are computed together
  // Blocks of a tile_batch, in which all inputs are prepared before the first product; 0: each block is
  // done by itself, by one thread. A group's products of a tile_batch are cut into so many parts.
  std::int64_t tile_batch, parts;
  // Floats of: the prepared input of a block, and from one point of a tile to the next in it; the
  // products of a block and a group, and between points; the scratch; a panel of the packed weights;
  // one of the transformed ones, and between points in it, both 0 for direct.
  std::int64_t a_size, a_step, product_size, product_step, scratch_size;
  std::int64_t packed_panel, transformed_panel, transformed_step;

  // Floats that all threads share, and those of each thread beside them.
  std::int64_t shared_size() const {
    return tile_batch == 0 ? panels * transformed_panel : tile_batch * a_size;
  }
  std::int64_t own_size() const {
    return product_size + scratch_size + (tile_batch == 0 ? a_size : group * transformed_panel);
  }
};

// The same for the gradient of the weights: `blocks` has its left factor, the transformed input; the
// right one is the transformed gradient of the output, and `accumulator_size` is of the transformed weights'.
struct ConvolutionWgradPlan {
  ConvolutionPlan blocks;
  std::int64_t b_size, b_step, accumulator_size;
};

// One block: where it begins and how much there is of it.
struct ConvolutionBlock {
  std::int64_t image, images, row, rows, column, columns;
};

ConvolutionPlan plan_convolution(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                                 int threads);

ConvolutionWgradPlan plan_wgrad(const ConvolutionShape& shape);

}  // namespace advkd
