// wgrad of a 3 x 3 kernel with stride 1, by Winograd's minimal filtering transposed: with
// transformed tiles V of the input and Z of the output's gradient, the gradient of the transformed
// weights is, for each of the 36 points, the product V^T Z, summed over the tiles.
#include "cpu/convolution_product.h"
#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/winograd.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr int kOut = 4, kIn = 6, kPoints = 36;

// Adds a block's accumulators to those of earlier blocks.
struct AddTo {
  float* to;  // of the first row and panel
  std::int64_t panel_step;
  bool first;

  AddTo at(std::int64_t panel) const { return {to + panel * panel_step, panel_step, first}; }

  template <int kRows, int kPanels>
  void operator()(std::int64_t row, const Accumulators<kRows, kPanels>& tile) const {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * kPanelVectors; ++v) {
      float* const column = to + v / kPanelVectors * panel_step + v % kPanelVectors * kWidth;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* const place = column + (row + r) * kPanel;
        store(place, first ? tile.part[r][v] : load(place) + tile.part[r][v]);
      }
    }
  }
};

class WinogradWgrad {
 public:
  WinogradWgrad(const ConvolutionWgradArgs& args, const ConvolutionWgradPlan& plan)
      : args_(args),
        plan_(plan.blocks),
        b_step_(plan.b_step),
        tiles_(plan_.images * plan_.rows * plan_.columns),
        input_{args.x, args.x_stride, plan_.in_height, plan_.in_width, args.shape.in_channels,
               0,      args.x_scale,  args.x_shift,    args.x_silu},
        output_{args.grad_y, args.grad_y_stride, plan_.out_height, plan_.out_width,
                args.shape.out_channels, 0, nullptr, nullptr, false},
        accumulators_(args.workspace),
        a_(accumulators_ + plan.accumulator_size),
        b_(a_ + plan_.a_size),
        bias_(b_ + plan.b_size),
        scratch_(bias_ + plan_.panels * kPanel) {}

  void run() const {
    for (std::int64_t index = 0; index < plan_.blocks; ++index) add_block(index);
    parallel_for(plan_.panels, args_.threads, [&](std::int64_t panel) { finish_panel(panel); });
    if (args_.dbias == nullptr) return;
    for (std::int64_t o = 0; o < args_.shape.out_channels; ++o) args_.dbias[o] = bias_[o];
  }

 private:
  // All threads share one block after the other, so that the order of summation is always the same.
  void add_block(std::int64_t index) const {
    const ConvolutionBlock block = block_at(plan_, args_.shape.batch, index);
    const bool first = index == 0;
    for_each_slot(plan_.channel_blocks + plan_.panels, args_.threads,
                  [&](std::int64_t task, std::int64_t slot) {
                    float* const scratch = scratch_ + slot * plan_.scratch_size;
                    if (task < plan_.channel_blocks) return prepare_input(block, task, scratch);
                    prepare_gradient(block, task - plan_.channel_blocks, scratch, first);
                  });
    parallel_for(kPoints * plan_.groups, args_.threads, [&](std::int64_t task) {
      multiply_point(block, task / plan_.groups, task % plan_.groups, first);
    });
  }

  void prepare_input(const ConvolutionBlock& block, std::int64_t c, float* scratch) const {
    const InputTiles<kOut> input(input_, args_.shape.pad_before, plan_);
    input.transform(block, c * kPanel, scratch, a_ + c * tiles_ * kPanel);
  }

  void prepare_gradient(const ConvolutionBlock& block, std::int64_t panel, float* scratch,
                        bool first) const {
    const RowReader reader(output_, panel * kPanel);
    const TileOrder<kOut> order(plan_, block);
    const std::int64_t width = order.width(), row_step = width * kPanel;
    float* const begin = b_ + panel * tiles_ * kPanel;
    for (std::int64_t n = 0; n < block.images; ++n) {
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t y = 0; y < order.row(r + 1) - order.row(r); ++y) {
          reader.read(block.image + n, order.row(r) + y, order.column(0), width,
                      scratch + y * row_step);
        }
        for (std::int64_t t = 0; t < block.columns; ++t) {
          const float* const from = scratch + (order.column(t) - order.column(0)) * kPanel;
          float* const to = begin + order.index(n, r, t) * kPanel;
          order.with_sides(r, t, [&](auto height, auto wide) {
            for (int v = 0; v < kPanelVectors; ++v) {
              transform_tile<height, wide>(from + v * kWidth, row_step, to + v * kWidth);
            }
          });
        }
      }
    }
    // At the point (1, 1) a transformed tile is its sum: its part of the bias's gradient.
    const float* const totals = begin + (kIn + 1) * b_step_;
    for (int v = 0; v < kPanelVectors; ++v) {
      float* const place = bias_ + panel * kPanel + v * kWidth;
      Vector sum = first ? Vector{} : load(place);
      for (std::int64_t i = 0; i < block.images * block.rows * block.columns; ++i) {
        sum += load(totals + i * kPanel + v * kWidth);
      }
      store(place, sum);
    }
  }

  template <int kHeight, int kTileWidth>
  void transform_tile(const float* from, std::int64_t row_step, float* to) const {
    transform_rectangle<kHeight, kHeight + 2, kTileWidth, kTileWidth + 2>(
        [&](int y, int x) { return load(from + y * row_step + x * kPanel); },
        [](const auto& grad, auto& z) { Winograd<kHeight>::output_gradient(grad, z); },
        [](const auto& grad, auto& z) { Winograd<kTileWidth>::output_gradient(grad, z); },
        [&](int y, int x, Vector z) {
          const int point = point_of<kOut, kHeight>(y) * kIn + point_of<kOut, kTileWidth>(x);
          store(to + point * b_step_, z);
        });
  }

  void multiply_point(const ConvolutionBlock& block, std::int64_t point, std::int64_t group,
                      bool first) const {
    const auto tiles = TileOrder<kOut>(plan_, block).of_point(static_cast<int>(point) / kIn,
                                                              static_cast<int>(point) % kIn);
    const Segment whole = {tiles.first * kPanel, tiles.end - tiles.first};
    const std::int64_t panel = group * plan_.group;
    const std::int64_t inner = args_.shape.in_channels * kPanel;
    const float* const of_point = b_ + point * b_step_ + tiles.first * kPanel;
    const Panels b = {of_point + panel * tiles_ * kPanel, tiles_ * kPanel,
                          least(plan_.group, plan_.panels - panel)};
    for (std::int64_t c = 0; c < plan_.channel_blocks; ++c) {
      const AOperand<1, kPanel> a = {a_ + point * plan_.a_step + c * tiles_ * kPanel,
                                          &whole, 1};
      const AddTo add = {accumulators_ + (panel * kPoints + point) * inner + c * kPanel * kPanel,
                         kPoints * inner, first};
      multiply(a, b, least(kPanel, args_.shape.in_channels - c * kPanel), add);
    }
  }

  // (3, 3, in) of each of a panel's output channels, kWidth input channels at a time.
  void finish_panel(std::int64_t panel) const {
    const std::int64_t channels = args_.shape.in_channels, inner = channels * kPanel;
    const float* const from = accumulators_ + panel * kPoints * inner;
    for (int v = 0; v < kPanelVectors; ++v) {
      const std::int64_t out = panel * kPanel + v * kWidth;
      for (std::int64_t i = 0; i < channels && out < args_.shape.out_channels; i += kWidth) {
        const std::int64_t count = least(kWidth, channels - i);
        Vector taps[9][kWidth] = {};
        for (std::int64_t k = 0; k < count; ++k) {
          weights_of(from + (i + k) * kPanel + v * kWidth, inner, k, taps);
        }
        for (int tap = 0; tap < 9; ++tap) store_transposed(taps[tap], out, tap, i, count);
      }
    }
  }

  static void weights_of(const float* from, std::int64_t point_step, std::int64_t k,
                         Vector (&taps)[9][kWidth]) {
    transform_square<kIn, 3>(
        [&](int y, int x) { return load(from + (y * kIn + x) * point_step); },
        [](const auto& u, auto& g) { Winograd<kOut>::wgrad(u, g); },
        [&](int y, int x, Vector g) { taps[y * 3 + x][k] = g; });
  }

  void store_transposed(Vector (&tap)[kWidth], std::int64_t out, int index, std::int64_t in,
                    std::int64_t count) const {
    transpose_from<float, kWidth / 2>(tap);
    const std::int64_t channels = args_.shape.in_channels;
    for (std::int64_t o = 0; o < least(kWidth, args_.shape.out_channels - out); ++o) {
      float* const to = args_.dweights + ((out + o) * 9 + index) * channels + in;
      store_first<float>(to, tap[o], count);
    }
  }

  const ConvolutionWgradArgs& args_;
  const ConvolutionPlan& plan_;
  const std::int64_t b_step_, tiles_;
  const Image input_, output_;
  float *const accumulators_, *const a_, *const b_, *const bias_, *const scratch_;
};

}  // namespace

void convolution_wgrad(const ConvolutionWgradArgs& args, const ConvolutionWgradPlan& plan) {
  WinogradWgrad(args, plan).run();
}

}  // namespace advkd::ADVKD_ISA
