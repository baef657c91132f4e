// Direct convolution as one product: pixels times (kernel rows, kernel columns, channels). The
// input of a block is prepared once for each column of the kernel, shifted by it, so that the
// pixels of all its rows lie kPanel floats apart whatever the image's width.
#include "cpu/convolution_tile.h"
#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {
namespace {

class Direct {
 public:
  Direct(const ConvolutionArgs& args, const ConvolutionPlan& plan)
      : args_(args),
        plan_(plan),
        input_(input_of(args)),
        kernel_(args.shape.kernel),
        stride_(args.shape.stride),
        half_((plan.rows - 1) + (kernel_ + stride_ - 1) / stride_),
        plane_(half_ * stride_ * plan.columns * kPanel),
        image_size_(plan.channel_blocks * kernel_ * plane_),
        segments_(segments_of(args)),
        segment_count_(kernel_ * kernel_ * plan.channel_blocks) {
    Segment* next = segments_of(args);
    for (std::int64_t y = 0; y < kernel_; ++y) {
      for (std::int64_t x = 0; x < kernel_; ++x) {
        for (std::int64_t c = 0; c < plan.channel_blocks; ++c) {
          new (next++) Segment((c * kernel_ + x) * plane_ + row_offset(y),
                               least(kPanel, args.shape.in_channels - c * kPanel));
        }
      }
    }
  }

  void prepare(const ConvolutionBlock& block, std::int64_t c, float* a, float* scratch) const {
    const RowReader reader(input_, c * kPanel);
    const std::int64_t rows = (block.rows - 1) * stride_ + kernel_;
    const std::int64_t width = (block.columns - 1) * stride_ + kernel_;
    const std::int64_t row = block.row * stride_ - args_.shape.pad_before;
    const std::int64_t column = block.column * stride_ - args_.shape.pad_before;
    for (std::int64_t n = 0; n < block.images; ++n) {
      float* const to = a + n * image_size_ + c * kernel_ * plane_;
      for (std::int64_t r = 0; r < rows; ++r) {
        reader.read(block.image + n, row + r, column, width, scratch);
        for (std::int64_t x = 0; x < kernel_; ++x) {
          spread(scratch + x * kPanel, block.columns, to + x * plane_ + row_offset(r));
        }
      }
    }
  }

  // Packed weights are multiplied as they are.
  void transform(std::int64_t, std::int64_t, float*) const {}

  void multiply(const ConvolutionBlock& block, std::int64_t panel, std::int64_t panels,
                const float* a, const float* packed, float* products) const {
    const Panels b = {packed, plan_.packed_panel, panels};
    // Rows of a narrower block are as far apart as those of the others.
    const bool whole = block.columns == plan_.columns;
    const std::int64_t runs = whole ? 1 : block.rows;
    const std::int64_t pixels = block.rows * block.columns / runs;
    for (std::int64_t n = 0; n < block.images; ++n) {
      const OutputWriters writers(args_, block.image + n, panel * kPanel, panels * kPanel);
      for (std::int64_t r = 0; r < runs; ++r) {
        const float* const from = a + n * image_size_ + r * plan_.columns * kPanel;
        for (std::int64_t first = 0; first < pixels; first += kChunk) {
          const std::int64_t count = least(kChunk, pixels - first);
          multiply_rows({from + first * kPanel, segments_, segment_count_, count}, b, products);
          write(block, block.image + n, r * block.columns + first, count, writers, products,
                panels * kPanel);
        }
      }
    }
  }

 private:
  // Pixels whose products are written while they are in the L1 cache.
  static constexpr std::int64_t kChunk = 48;

  // `count` pixels of a block from number `first` on.
  void write(const ConvolutionBlock& block, std::int64_t image, std::int64_t first,
             std::int64_t count, const OutputWriters& writers, const float* from,
             std::int64_t step) const {
    std::int64_t row = first / block.columns, column = first % block.columns;
    for (std::int64_t i = 0; i < count; ++i, from += step) {
      const std::int64_t line = image * plan_.out_height + block.row + row;
      const std::int64_t pixel = line * plan_.out_width + block.column + column;
      for (int v = 0; v < writers.count(); ++v) writers[v].write(pixel, load(from + v * kWidth));
      if (++column == block.columns) ++row, column = 0;
    }
  }

  // Input rows a stride apart follow one another, so that those of output rows do.
  std::int64_t row_offset(std::int64_t row) const {
    return (row % stride_ * half_ + row / stride_) * plan_.columns * kPanel;
  }

  void spread(const float* from, std::int64_t count, float* to) const {
    for (std::int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kPanelVectors; ++v) {
        store(to + i * kPanel + v * kWidth, load(from + i * stride_ * kPanel + v * kWidth));
      }
    }
  }

  const ConvolutionArgs& args_;
  const ConvolutionPlan& plan_;
  const Image input_;
  const std::int64_t kernel_, stride_;
  const std::int64_t half_;  // input rows of one residue modulo the stride
  const std::int64_t plane_, image_size_;
  const Segment* const segments_;
  const std::int64_t segment_count_;
};

}  // namespace

void convolution_direct(const ConvolutionArgs& args, const ConvolutionPlan& plan) {
  BlockRunner<Direct>(args, plan, Direct(args, plan)).run();
}

}  // namespace advkd::ADVKD_ISA
