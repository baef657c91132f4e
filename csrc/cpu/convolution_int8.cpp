// Convolution with products of whole numbers (runtime/convolution_int8.h), for instruction sets that
// sum four products of bytes at once. A band's input becomes whole numbers, pixel after pixel, with
// its padding; the bytes that a row of the kernel covers are then consecutive, and a tile of pixels
// and output channels stays in registers while it walks over them.
#include "runtime/convolution_int8.h"

#include "cpu/convolution_tile.h"
#include "cpu/kernels.h"

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#elif !defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace advkd::ADVKD_ISA {
namespace {

typedef std::int32_t Integers __attribute__((vector_size(kWidth * sizeof(float))));

// Pixels and panels of a tile, whose sums fill the registers beside the weights.
constexpr int kTilePixels = kWidth == 16 ? 8 : 6;
constexpr int kTilePanels = kWidth == 16 ? 3 : 1;
constexpr std::int64_t kGroupBytes = 4 * kPanel;  // weights of four input channels

// NEON multiplies bytes with signs only: levels are stored 128 lower, with their highest bit flipped.
#ifdef __ARM_FEATURE_DOTPROD
constexpr int kLower = 128;
#else
constexpr int kLower = 0;
#endif

// sum + x[0] w[0] + … + x[3] w[3] in each lane of four bytes.
static inline Integers dot(Integers sum, Integers x, Integers w) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Integers)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
#else
  return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#endif
}

// Stores the lowest byte of each lane, kLower less.
static inline void store_bytes(std::uint8_t* to, Vector lanes) {
#if defined(__AVX512VNNI__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)lanes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#elif defined(__ARM_FEATURE_DOTPROD)
  const uint16x4_t halves = vmovn_u32((uint32x4_t)lanes);
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  const std::uint32_t four =
      vget_lane_u32(vreinterpret_u32_u8(veor_u8(bytes, vdup_n_u8(kLower))), 0);
  std::memcpy(to, &four, sizeof four);
#else
  const __m256i lowest = _mm256_set1_epi32(0x0C080400);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)lanes, lowest);
  const __m128i eight =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), eight);
#endif
}

static inline Integers load_integers(const void* from) {
  Integers v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

class Int8Method {
 public:
  Int8Method(const ConvolutionArgs& args, const Int8Plan& plan)
      : args_(args),
        plan_(plan),
        input_(input_of(args)),
        run_(args.shape.kernel * plan.pixel_bytes),
        pitch_(plan.in_width * plan.pixel_bytes) {
    input_.levels = {};  // what is read is made whole here
  }

  void run_band(std::int64_t image, std::int64_t band, float* memory) const {
    const ConvolutionShape& s = args_.shape;
    const std::int64_t row = band * plan_.rows, rows = least(plan_.rows, s.out_height() - row);
    std::uint8_t* const bytes = reinterpret_cast<std::uint8_t*>(memory);
    quantize(image, row * s.stride - s.pad_before, (rows - 1) * s.stride + s.kernel, bytes);
    const std::int64_t first = (image * s.out_height() + row) * s.out_width();
    for (std::int64_t p = 0; p < plan_.panels;) {
      const std::int64_t panels = least(kTilePanels, plan_.panels - p);
      const OutputWriters writers(args_, image, p * kPanel, panels * kPanel);
      const float* const packed = args_.packed + p * plan_.panel_floats;
      Pixels pixels = {bytes, 0, first, rows * s.out_width()};
      if (panels == 1) multiply<kTilePixels, 1>(pixels, packed, writers);
      if constexpr (kTilePanels > 1) {
        if (panels == 2) multiply<kTilePixels, 2>(pixels, packed, writers);
        if (panels == 3) multiply<kTilePixels, 3>(pixels, packed, writers);
      }
      p += panels;
    }
  }

 private:
  // The output pixels that are left of a band.
  struct Pixels {
    const std::uint8_t* at;  // the first input pixel of the next one
    std::int64_t column;
    std::int64_t number, left;
  };

  // Writes the levels of a block of channels, pixel after pixel.
  struct LevelBytes {
    std::uint8_t* to;
    const std::int64_t pixel_bytes;
    const Levels levels;

    void operator()(int vector, Vector value) const {
      store_bytes(to + vector * kWidth, level_of(value, levels));
    }
    void next() { to += pixel_bytes; }
  };

  // The levels of input rows [row, row + rows) with their padding.
  void quantize(std::int64_t image, std::int64_t row, std::int64_t rows, std::uint8_t* to) const {
    const ConvolutionShape& s = args_.shape;
    const std::int64_t before = s.pad_before * plan_.pixel_bytes;
    const std::int64_t inside = s.in_width() * plan_.pixel_bytes;
    for (; rows > 0; --rows, ++row, to += pitch_) {
      if (row < 0 || row >= s.in_height()) {
        fill(to, pitch_);
        continue;
      }
      // A last block may be longer than the pixel has bytes: what it spoils is written after it.
      for (std::int64_t c = (s.in_channels - 1) / kPanel; c >= 0; --c) {
        const LevelBytes bytes = {to + before + c * kPanel, plan_.pixel_bytes, args_.x_levels};
        RowReader(input_, c * kPanel).visit(image, row, 0, s.in_width(), bytes);
      }
      fill(to, before);
      fill(to + before + inside, pitch_ - before - inside);
    }
  }

  void fill(std::uint8_t* to, std::int64_t count) const {
    const int zero = static_cast<int>(args_.x_levels.zero) ^ kLower;
    std::memset(to, zero, static_cast<std::size_t>(count));
  }

  // All pixels in tiles of kRows, then of half as many, …
  template <int kRows, int kPanels>
  void multiply(Pixels& pixels, const float* packed, const OutputWriters& writers) const {
    while (pixels.left >= kRows) {
      const std::uint8_t* at[kRows];
      for (int r = 0; r < kRows; ++r) {
        at[r] = pixels.at;
        advance(pixels);
      }
      make_tile<kRows, kPanels>(at, packed, writers, pixels.number - kRows);
    }
    if constexpr (kRows > 1) multiply<kRows / 2, kPanels>(pixels, packed, writers);
  }

  void advance(Pixels& pixels) const {
    const std::int64_t stride = args_.shape.stride, width = args_.shape.out_width();
    pixels.at += stride * plan_.pixel_bytes;
    if (++pixels.column == width) {
      pixels.at += stride * (pitch_ - width * plan_.pixel_bytes);
      pixels.column = 0;
    }
    ++pixels.number;
    --pixels.left;
  }

  // A function of its own, so that its loop has the registers for itself.
  template <int kRows, int kPanels>
  __attribute__((noinline)) void make_tile(const std::uint8_t* const (&at)[kRows],
                                           const float* packed, const OutputWriters& writers,
                                           std::int64_t pixel) const {
    constexpr int kVectors = kPanels * kPanelVectors;
    const std::int64_t step = plan_.panel_floats, run = run_, pitch = pitch_;
    Integers sums[kRows][kVectors];
    const std::uint8_t* x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      x[r] = at[r];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = load_integers(head(packed, v));
        if (kLower != 0) sums[r][v] += load_integers(head(packed, v) + 2 * kPanel) * kLower;
      }
    }
    const float* w = packed + kInt8Head;
    for (int row = 0; row < args_.shape.kernel; ++row) {
      for (std::int64_t i = 0; i < run; i += 4, w += kGroupBytes / sizeof(float)) {
        Integers weights[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          weights[v] = load_integers(w + v / kPanelVectors * step + v % kPanelVectors * kWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          std::int32_t four;
          std::memcpy(&four, x[r] + i, sizeof four);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            sums[r][v] = dot(sums[r][v], Integers{} + four, weights[v]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) x[r] += pitch;
    }
    Vector products[kVectors][kRows];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector unit = load(head(packed, v) + kPanel);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        products[v][r] = __builtin_convertvector(sums[r][v], Vector) * unit;
      }
    }
    write(products[0], kRows, writers, pixel);
  }

  // Writes a tile, `rows` products for each vector. A function of its own, lest each tile have the
  // code, and lest some compilers add what follows to a product before they round it.
  __attribute__((noinline)) static void write(const Vector* products, std::int64_t rows,
                                              const OutputWriters& writers, std::int64_t pixel) {
    for (int v = 0; v < writers.count(); ++v) {
      for (std::int64_t r = 0; r < rows; ++r, ++products) {
        writers[v].write(pixel + r, *products);
      }
    }
  }

  // The sums' first values for a vector of output channels; kPanel behind them is their unit, and
  // again the sum of the weights.
  const float* head(const float* packed, int vector) const {
    return packed + vector / kPanelVectors * plan_.panel_floats + vector % kPanelVectors * kWidth;
  }

  const ConvolutionArgs& args_;
  const Int8Plan& plan_;
  Image input_;
  const std::int64_t run_;    // bytes of a pixel's neighborhood in one row
  const std::int64_t pitch_;  // bytes of a row
};

}  // namespace

void convolution_int8(const ConvolutionArgs& args) {
  const Int8Plan plan(args.shape);
  const Int8Method method(args, plan);
  for_each_slot(args.shape.batch * plan.bands, args.threads,
                [&](std::int64_t task, std::int64_t slot) {
                  method.run_band(task / plan.bands, task % plan.bands,
                                  args.workspace + slot * plan.band_floats);
                });
}

}  // namespace advkd::ADVKD_ISA
