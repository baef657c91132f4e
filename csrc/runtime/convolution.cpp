#include "runtime/convolution.h"

#include <algorithm>
#include <cmath>

#include "runtime/convolution_plan.h"
#include "runtime/dispatch.h"
#include "runtime/thread_pool.h"

namespace advkd {
namespace {

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Outputs of a tile along a side, and multiplications of a tile for a pair of channels.
int outputs_of(ConvolutionAlgorithm algorithm) {
  if (algorithm == ConvolutionAlgorithm::winograd4) return 4;
  return algorithm == ConvolutionAlgorithm::winograd2 ? 2 : 1;
}

// The tiles along a side of an image, and how many of them are whole: as many are an output shorter
// as the length then asks for.
struct TileSide {
  std::int64_t tiles, whole;

  TileSide(std::int64_t length, ConvolutionAlgorithm algorithm)
      : tiles(divided_up(length, outputs_of(algorithm))), whole(tiles) {
    if (kShorterTiles && algorithm == ConvolutionAlgorithm::winograd4) {
      whole -= std::min(tiles, 4 * tiles - length);
    }
  }
};

int points_of(const ConvolutionShape& s, ConvolutionAlgorithm algorithm) {
  const int side = algorithm == ConvolutionAlgorithm::direct ? s.kernel : outputs_of(algorithm) + 2;
  return side * side;
}

// Floats that a block's prepared input should not exceed, to leave room for products and weights in
// an L2 cache of 1 MiB; and how many tiles a block has at least, and at most, since more would not
// help to reuse weights.
constexpr std::int64_t kDirectASize = 48 << 10, kASize = 96 << 10;
constexpr std::int64_t kFewestTiles = 16, kMostTiles = 64;

constexpr std::int64_t kWgradInputSize = 192 << 10;
constexpr std::int64_t kMostWgradTiles = 128;

std::int64_t most_tiles(const ConvolutionShape& s, ConvolutionAlgorithm algorithm) {
  const bool direct = algorithm == ConvolutionAlgorithm::direct;
  const int points = direct ? s.kernel * 2 : points_of(s, algorithm);
  const std::int64_t size = divided_up(s.in_channels, kPanel) * kPanel * points;
  return direct ? std::clamp(kDirectASize / size / 8 * 8, kFewestTiles, 4 * kMostTiles)
                : std::clamp(kASize / size / 8 * 8, kFewestTiles, kMostTiles);
}

// Cuts `length` into parts as equal as can be, none longer than `most`.
std::int64_t equal_part(std::int64_t length, std::int64_t most) {
  return divided_up(length, divided_up(length, most));
}

void cut_into_blocks(ConvolutionPlan& plan, std::int64_t batch, std::int64_t most) {
  plan.images = plan.rows = 1;
  plan.columns = equal_part(plan.tile_columns, most);
  if (plan.columns == plan.tile_columns) {
    plan.rows = equal_part(plan.tile_rows, std::max<std::int64_t>(1, most / plan.columns));
  }
  const std::int64_t tiles = plan.rows * plan.columns;
  if (tiles == plan.tile_rows * plan.tile_columns && batch > 0) {
    plan.images = equal_part(batch, std::max<std::int64_t>(1, most / tiles));
  }
  plan.image_blocks = divided_up(batch, plan.images);
  plan.row_blocks = divided_up(plan.tile_rows, plan.rows);
  plan.column_blocks = divided_up(plan.tile_columns, plan.columns);
  plan.blocks = plan.image_blocks * plan.row_blocks * plan.column_blocks;
}

// Points lie a cache line further apart than they need, or all would share one set of the cache.
constexpr std::int64_t kGap = 16;

void size_inputs(ConvolutionPlan& plan, const ConvolutionShape& s, ConvolutionAlgorithm algorithm) {
  const std::int64_t channels = plan.channel_blocks * kPanel;
  if (algorithm == ConvolutionAlgorithm::direct) {
    const std::int64_t rows = plan.rows - 1 + divided_up(s.kernel, s.stride);
    plan.a_step = 0;
    plan.a_size = plan.images * channels * s.kernel * rows * s.stride * plan.columns;
    plan.scratch_size = ((plan.columns - 1) * s.stride + s.kernel) * kPanel;
    return;
  }
  const std::int64_t n = outputs_of(algorithm);
  plan.a_step = plan.images * plan.rows * plan.columns * channels + kGap;
  plan.a_size = points_of(s, algorithm) * plan.a_step;
  plan.scratch_size = (plan.rows * n + 2) * (plan.columns * n + 2) * kPanel;
}

void size_products(ConvolutionPlan& plan, const ConvolutionShape& s,
                   ConvolutionAlgorithm algorithm) {
  const std::int64_t columns = plan.group * kPanel;
  plan.product_step = 0;
  plan.product_size = plan.rows * plan.columns * columns;
  if (algorithm == ConvolutionAlgorithm::direct) return;
  plan.product_step = plan.images * plan.product_size + kGap;
  plan.product_size = points_of(s, algorithm) * plan.product_step;
}

// Floats of transformed weights that stay in a core's L2 cache beside a block's input.
constexpr std::int64_t kFewWeights = 160 << 10;
// Floats that a group's transformed weights should not exceed, to stay in a cache of 2 MiB.
constexpr std::int64_t kGroupSize = 300 << 10;
// Floats of a tile batch's prepared input: so many that transforming the weights once for each tile
// batch costs little.
constexpr std::int64_t kTileBatchSize = 2 << 20;

void plan_tile_batches(ConvolutionPlan& plan, int threads) {
  const bool shared = threads > 1 && plan.blocks < 4 * threads;
  const bool heavy = plan.panels * plan.transformed_panel > kFewWeights;
  plan.group = std::min<std::int64_t>(plan.panels, shared && plan.panels <= 8 ? 2 : kMostGroup);
  if (heavy) {
    const std::int64_t most = std::max<std::int64_t>(1, kGroupSize / plan.transformed_panel);
    plan.group = std::min(plan.group, most);
  }
  plan.groups = divided_up(plan.panels, plan.group);
  plan.tile_batch = 0;
  if (shared || heavy) {
    const std::int64_t most = std::max<std::int64_t>(1, kTileBatchSize / plan.a_size);
    plan.tile_batch = plan.blocks == 0 || shared ? plan.blocks : equal_part(plan.blocks, most);
  }
  plan.parts = threads == 1 ? 1 : divided_up(2 * threads, plan.groups);
}

// The model of what a convolution costs, in cycles of a core that starts two products of 16 lanes
// in each. The constants are measured on Emerald Rapids; on others the ratios are about the same.
constexpr double kProductsPerCycle = 1.5;
constexpr double kBytesPerCycle = 12;  // of weights that come from memory
constexpr double kFewestRows = 3;      // of a product; fewer wait for their own additions

// Rows of all points' products.
double product_rows(const ConvolutionShape& s, ConvolutionAlgorithm algorithm, const TileSide& rows,
                    const TileSide& columns) {
  const auto rows_of = [&](std::int64_t high, std::int64_t wide) {
    return std::max(static_cast<double>(s.batch * high * wide), kFewestRows);
  };
  const double all = rows_of(rows.tiles, columns.tiles);
  if (algorithm == ConvolutionAlgorithm::direct) return all * points_of(s, algorithm);
  // One point of each side is of the whole tiles alone.
  const double others = outputs_of(algorithm) + 1;
  return others * (others * all + rows_of(rows.whole, columns.tiles) +
                   rows_of(rows.tiles, columns.whole)) +
         rows_of(rows.whole, columns.whole);
}

double cycles_of(const ConvolutionShape& s, ConvolutionAlgorithm algorithm, int threads) {
  const double in = static_cast<double>(s.in_channels);
  const TileSide rows(s.out_height(), algorithm), columns(s.out_width(), algorithm);
  const double tiles = static_cast<double>(s.batch * rows.tiles * columns.tiles);
  const double panels = static_cast<double>(divided_up(s.out_channels, kPanel));
  const double blocks = static_cast<double>(divided_up(s.in_channels, kPanel));
  const double products =
      product_rows(s, algorithm, rows, columns) * panels * (in / kProductsPerCycle + 2);
  // Cycles to prepare and to write 16 channels of a tile, and to transform 16 weights.
  const double per_block[] = {8.0 * s.kernel, 80, 220}, per_panel[] = {8, 50, 130};
  const double per_weights[] = {0, 80, 180};
  const int index = static_cast<int>(algorithm);
  const double arithmetic = products + per_weights[index] * panels * in +
                            tiles * (per_block[index] * blocks + per_panel[index] * panels);
  const double bytes = static_cast<double>(packed_size(s)) * sizeof(float);
  return arithmetic / threads + bytes / kBytesPerCycle;
}

double packing_cycles_of(const ConvolutionShape& s) {
  constexpr double kCyclesPerWeight = 1;
  return kCyclesPerWeight * static_cast<double>(packed_size(s));
}

// Direct, with its vectors filled as far as the channels fill them.
double torch_cycles_of(const ConvolutionShape& s) {
  constexpr double kTorchProductsPerCycle = 1.2;
  const double pixels = static_cast<double>(s.batch * s.out_height() * s.out_width());
  const double channels = static_cast<double>(s.in_channels * divided_up(s.out_channels, kPanel));
  return pixels * s.kernel * s.kernel * channels / kTorchProductsPerCycle;
}

// A 1 x 1 kernel sees no neighbors: its images are rows of pixels.
ConvolutionShape flattened(ConvolutionShape s) {
  if (s.kernel == 1 && s.stride == 1 && !s.upsample) {
    s.width *= s.height;
    s.height = 1;
  }
  return s;
}

}  // namespace

ConvolutionPlan plan_convolution(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                                 int threads) {
  const ConvolutionShape s = flattened(shape);
  ConvolutionPlan plan;
  plan.in_height = s.in_height();
  plan.in_width = s.in_width();
  plan.out_height = s.out_height();
  plan.out_width = s.out_width();
  const TileSide rows(plan.out_height, algorithm), columns(plan.out_width, algorithm);
  plan.tile_rows = rows.tiles;
  plan.whole_rows = rows.whole;
  plan.tile_columns = columns.tiles;
  plan.whole_columns = columns.whole;
  plan.channel_blocks = divided_up(s.in_channels, kPanel);
  plan.panels = divided_up(s.out_channels, kPanel);
  plan.packed_panel = s.in_channels * s.kernel * s.kernel * kPanel;
  const bool direct = algorithm == ConvolutionAlgorithm::direct;
  const std::int64_t segments = plan.channel_blocks * (direct ? s.kernel * s.kernel : 1);
  plan.segment_size = divided_up(segments * kSegmentFloats, kPanel) * kPanel;
  plan.transformed_step = direct ? 0 : s.in_channels * kPanel + kGap;
  plan.transformed_panel = points_of(s, algorithm) * plan.transformed_step;
  cut_into_blocks(plan, s.batch, most_tiles(s, algorithm));
  size_inputs(plan, s, algorithm);
  plan_tile_batches(plan, threads);
  size_products(plan, s, algorithm);
  return plan;
}

ConvolutionWgradPlan plan_wgrad(const ConvolutionShape& s) {
  constexpr int kPoints = 36;
  ConvolutionWgradPlan plan = {plan_convolution(s, ConvolutionAlgorithm::winograd4, 1), 0, 0, 0};
  ConvolutionPlan& blocks = plan.blocks;
  const std::int64_t size = kPoints * kPanel * (blocks.channel_blocks + blocks.panels);
  cut_into_blocks(blocks, s.batch,
                  std::clamp(kWgradInputSize / size / 8 * 8, kFewestTiles, kMostWgradTiles));
  size_inputs(blocks, s, ConvolutionAlgorithm::winograd4);
  blocks.group = std::min(blocks.panels, kMostGroup);
  blocks.groups = divided_up(blocks.panels, blocks.group);
  plan.b_step = blocks.images * blocks.rows * blocks.columns * blocks.panels * kPanel + kGap;
  plan.b_size = kPoints * plan.b_step;
  plan.accumulator_size = kPoints * blocks.panels * kPanel * s.in_channels;
  return plan;
}

bool Levels::cover(float low, float high) {
  step = (high - low) / 255.0f;
  const bool proper = low <= 0.0f && high >= 0.0f && std::isnormal(step);
  if (!proper) return false;
  per_step = 1.0f / step;
  zero = std::nearbyint(-low * per_step);
  return std::isfinite(per_step) && zero <= 255.0f;
}

bool supported(const ConvolutionShape& s) {
  return (s.kernel == 1 || s.kernel == 3) && (s.stride == 1 || s.stride == 2) && s.batch >= 0 &&
         s.height >= 1 && s.width >= 1 && s.in_channels >= 1 && s.out_channels >= 1 &&
         s.pad_before >= 0 && s.pad_before < s.kernel && s.pad_after >= 0 &&
         s.pad_after < s.kernel && s.in_height() + s.pad_before + s.pad_after >= s.kernel &&
         s.in_width() + s.pad_before + s.pad_after >= s.kernel;
}

ConvolutionAlgorithm choose_algorithm(const ConvolutionShape& s, int threads) {
  ConvolutionAlgorithm best = ConvolutionAlgorithm::direct;
  if (s.kernel != 3 || s.stride != 1) return best;
  for (auto other : {ConvolutionAlgorithm::winograd2, ConvolutionAlgorithm::winograd4}) {
    if (cycles_of(s, other, threads) < cycles_of(s, best, threads)) best = other;
  }
  return best;
}

int convolution_threads(const ConvolutionShape& s, ConvolutionAlgorithm algorithm, int threads) {
  return threads_for(cycles_of(s, algorithm, 1), threads);
}

double speedup_in_training(const ConvolutionShape& s) {
  const ConvolutionAlgorithm algorithm = choose_algorithm(s, 1);
  return torch_cycles_of(s) / (cycles_of(s, algorithm, 1) + packing_cycles_of(s));
}

std::int64_t packed_size(const ConvolutionShape& s) {
  return divided_up(s.out_channels, kPanel) * kPanel * s.in_channels * s.kernel * s.kernel;
}

void pack_weights(const ConvolutionShape& shape, const ConvolutionWeights& weights, float* packed) {
  kernels().pack_convolution(shape, weights, packed);
}

std::int64_t workspace_size(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                            int threads) {
  const ConvolutionPlan plan = plan_convolution(shape, algorithm, threads);
  return plan.segment_size + plan.shared_size() + threads * plan.own_size();
}

void convolution(const ConvolutionArgs& args) {
  const ConvolutionPlan plan = plan_convolution(args.shape, args.algorithm, args.threads);
  ConvolutionArgs flat = args;
  flat.shape = flattened(args.shape);
  switch (args.algorithm) {
    case ConvolutionAlgorithm::direct:
      return kernels().convolution_direct(flat, plan);
    case ConvolutionAlgorithm::winograd2:
      return kernels().convolution_winograd2(flat, plan);
    case ConvolutionAlgorithm::winograd4:
      return kernels().convolution_winograd4(flat, plan);
  }
}

std::int64_t wgrad_workspace_size(const ConvolutionShape& shape, int threads) {
  const ConvolutionWgradPlan plan = plan_wgrad(shape);
  return plan.accumulator_size + plan.blocks.a_size + plan.b_size + plan.blocks.panels * kPanel +
         threads * plan.blocks.scratch_size;
}

}  // namespace advkd
