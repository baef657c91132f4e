#include "cpu/philox.h"

#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {

static std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Numbers made by one task: a few blocks, so that handing it out costs nothing beside it.
constexpr std::int64_t kTaskNumbers = 16 * kNormals;

void philox_uint32(const PhiloxUint32Args& args) {
  const std::int64_t tasks_per_image = divide_up(args.count, kTaskNumbers);
  parallel_for(args.batch * tasks_per_image, args.threads, [&](std::int64_t task) {
    const std::int64_t image = task / tasks_per_image;
    const std::int64_t first = task % tasks_per_image * kTaskNumbers;
    const std::int64_t end = first + kTaskNumbers < args.count ? first + kTaskNumbers : args.count;
    const PhiloxStream stream(args.source, image);
    std::int64_t* const out = args.out + image * args.count;
    PhiloxQuads quads;
    for (std::int64_t block = first; block < end; block += kNormals) {
      philox_quads(stream, args.first_block + static_cast<std::uint32_t>(block / 4), quads);
      const std::int64_t n = block + kNormals < end ? kNormals : end - block;
      for (std::int64_t i = 0; i < n; ++i) out[block + i] = quads.word[i % 4][i / 4];
    }
  });
}

static void normals_nchw(const PhiloxNormalArgs& args) {
  const std::int64_t elements = args.shape.elements();
  const std::int64_t tasks_per_image = divide_up(elements, kTaskNumbers);
  parallel_for(args.shape.batch * tasks_per_image, args.threads, [&](std::int64_t task) {
    const std::int64_t image = task / tasks_per_image;
    const std::int64_t first = task % tasks_per_image * kTaskNumbers;
    const std::int64_t left = elements - first;
    fill_normals(PhiloxStream(args.source, image), first,
                 left < kTaskNumbers ? left : kTaskNumbers, args.out + image * elements + first);
  });
}

static void normals_nhwc(const PhiloxNormalArgs& args) {
  const std::int64_t channels = args.shape.channels, pixels = args.shape.pixels;
  const std::int64_t tasks_per_image = divide_up(pixels, kNormals);
  parallel_for(args.shape.batch * tasks_per_image, args.threads, [&](std::int64_t task) {
    const std::int64_t image = task / tasks_per_image;
    const std::int64_t first = task % tasks_per_image * kNormals;
    const std::int64_t n = first + kNormals < pixels ? kNormals : pixels - first;
    const PhiloxStream stream(args.source, image);
    float* const out = args.out + (image * pixels + first) * channels;
    float plane[kNormals];
    for (std::int64_t c = 0; c < channels; ++c) {
      fill_normals(stream, c * pixels + first, n, plane);
      for (std::int64_t i = 0; i < n; ++i) out[i * channels + c] = plane[i];
    }
  });
}

void philox_normal(const PhiloxNormalArgs& args) {
  if (args.shape.channels_last) {
    normals_nhwc(args);
  } else {
    normals_nchw(args);
  }
}

}  // namespace advkd::ADVKD_ISA
