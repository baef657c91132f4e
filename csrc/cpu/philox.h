// Philox numbers and the normals made of them, many side by side.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "runtime/normals.h"

namespace advkd::ADVKD_ISA {

// Counters that are worked on side by side, so that the compiler turns them into vectors.
constexpr int kQuads = 64;
constexpr int kNormals = 4 * kQuads;

struct PhiloxStream {
  std::uint32_t key_low, key_high;
  std::uint32_t step, index_low, index_high;

  PhiloxStream(const NoiseSource& source, std::int64_t image)
      : key_low(static_cast<std::uint32_t>(source.seed)),
        key_high(static_cast<std::uint32_t>(source.seed >> 32)),
        step(source.step),
        index_low(static_cast<std::uint32_t>(source.image_index[image])),
        index_high(static_cast<std::uint32_t>(
            static_cast<std::uint64_t>(source.image_index[image]) >> 32)) {}
};

struct PhiloxQuads {
  std::uint32_t word[4][kQuads];
};

static inline void philox_quads(const PhiloxStream& stream, std::uint32_t first_quad,
                                PhiloxQuads& out) {
  for (int i = 0; i < kQuads; ++i) {
    const PhiloxBlock block =
        philox_block(first_quad + static_cast<std::uint32_t>(i), stream.step, stream.index_low,
                     stream.index_high, stream.key_low, stream.key_high);
    out.word[0][i] = block.word[0];
    out.word[1][i] = block.word[1];
    out.word[2][i] = block.word[2];
    out.word[3][i] = block.word[3];
  }
}

// Normals of the elements 4 * first_quad, ... ; kNormals of them.
static inline void normals_of_quads(const PhiloxStream& stream, std::uint32_t first_quad,
                                    float* out) {
  PhiloxQuads quads;
  philox_quads(stream, first_quad, quads);
  for (int pair = 0; pair < 2; ++pair) {
    float sines[kQuads], cosines[kQuads];
    for (int i = 0; i < kQuads; ++i) {
      const float radius = box_muller_radius(quads.word[2 * pair][i]);
      const SineCosine turn = box_muller_angle(quads.word[2 * pair + 1][i]);
      cosines[i] = radius * turn.cosine;
      sines[i] = radius * turn.sine;
    }
    for (int i = 0; i < kQuads; ++i) {
      out[4 * i + 2 * pair] = cosines[i];
      out[4 * i + 2 * pair + 1] = sines[i];
    }
  }
}

// Normals of the elements [first, first + count), in C, H, W order.
static inline void fill_normals(const PhiloxStream& stream, std::int64_t first, std::int64_t count,
                                float* out) {
  while (count > 0) {
    const std::int64_t skipped = first % 4;
    float block[kNormals];
    normals_of_quads(stream, static_cast<std::uint32_t>(first / 4), block);
    const std::int64_t taken = count < kNormals - skipped ? count : kNormals - skipped;
    std::memcpy(out, block + skipped, static_cast<std::size_t>(taken) * sizeof(float));
    first += taken;
    count -= taken;
    out += taken;
  }
}

}  // namespace advkd::ADVKD_ISA
