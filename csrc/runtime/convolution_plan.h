// How a convolution is cut into blocks; computed once for all instruction sets.
#pragma once

#include <cstdint>

#include "runtime/convolution.h"

namespace advkd {

constexpr std::int64_t kPanel = 16;  // channels of one block of input, or of one panel of weights
constexpr std::int64_t kMostGroup = 3;  // panels that are computed together at most
constexpr std::int64_t kSegmentFloats = 2;  // of a workspace, for one segment of an A operand

// Whether tiles of 4 outputs may be 3 at the end of a side, which 7 and 14 pixels take; the code for
// it would be a twentieth of a page's.
#ifdef __wasm__
constexpr bool kShorterTiles = false;
#else
constexpr bool kShorterTiles = true;
#endif

// Tiles are N x N outputs for winogradN and single outputs for direct; along each side of an image
// the first ones are whole, the others may be an output shorter. A block is `images` x `rows` x
// `columns` tiles, fewer at the ends; it has several images only if it covers each as a whole.
struct ConvolutionPlan {
  std::int64_t in_height, in_width, out_height, out_width;
  std::int64_t tile_rows, tile_columns;    // of an image
  std::int64_t whole_rows, whole_columns;  // those of its tiles that are not shorter
  std::int64_t images, rows, columns;
  std::int64_t image_blocks, row_blocks, column_blocks, blocks;
  std::int64_t channel_blocks, panels;  // of kPanel channels in and out
  std::int64_t group, groups;           // panels that are computed together
  // Blocks of a tile batch, whose inputs are all prepared before the first product; 0: each block
  // is done by itself, by one thread.
  std::int64_t tile_batch;
  std::int64_t parts;  // tasks of a group's products in a tile batch
  // Floats, and floats from one point of a tile to the next:
  std::int64_t a_size, a_step;              // a block's prepared input, the A operand
  std::int64_t product_size, product_step;  // the products of a block and a group
  std::int64_t scratch_size;
  std::int64_t packed_panel;
  std::int64_t transformed_panel, transformed_step;  // both 0 for direct
  std::int64_t segment_size;  // floats at the beginning of the workspace

  // Floats of the workspace that all threads share, and those that each has to itself.
  std::int64_t shared_size() const {
    return tile_batch == 0 ? panels * transformed_panel : tile_batch * a_size;
  }
  std::int64_t own_size() const {
    return product_size + scratch_size + (tile_batch == 0 ? a_size : group * transformed_panel);
  }
};

// The same for wgrad: the A operand, of which `blocks` has the sizes, is the transformed input; the
// B operand is the transformed gradient of the output; and the accumulators are the gradient of the
// transformed weights.
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
