// What a fuzzer runs: opens bytes as a model file and, where they open, generates an image by each
// head. Nothing but a refusal may come of bytes that are no model.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "advkd.h"

namespace {

// Bytes of workspace and of an image; a plan may ask for more, which its user would refuse.
constexpr std::size_t kMostMemory = 16 << 20;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory of exactly that size, so that the sanitizer sees what lies beyond.
std::unique_ptr<void, Free> memory_of(std::size_t size) {
  return std::unique_ptr<void, Free>(std::malloc(size));
}

void require(bool holds) {
  if (!holds) std::abort();
}

void generate(const advkd_model* model, int channels, const advkd_request& request) {
  const std::size_t side = static_cast<std::size_t>(advkd_image_size(model, request.exit_at));
  const std::size_t pixels = side * side * static_cast<std::size_t>(channels);
  const std::size_t out_size =
      pixels * (request.format == ADVKD_FLOAT32 ? sizeof(float) : 1) *
      static_cast<std::size_t>(request.count);
  const std::size_t size = advkd_workspace_size(model, &request);
  require(size > 0 && side > 0);
  if (size > kMostMemory || out_size > kMostMemory) return;
  const auto workspace = memory_of(size), out = memory_of(out_size), again = memory_of(out_size);
  // What is read without having been written shows in the image, whatever it happens to be.
  std::memset(workspace.get(), 0x3f, size);
  require(advkd_generate(model, &request, workspace.get(), size, out.get()) == ADVKD_OK);
  std::memset(workspace.get(), 0xff, size);
  require(advkd_generate(model, &request, workspace.get(), size, again.get()) == ADVKD_OK);
  require(std::memcmp(out.get(), again.get(), out_size) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  advkd_model* model;
  char error[ADVKD_ERROR_SIZE];
  const advkd_status status = advkd_open_memory(data, size, &model, error);
  require((status == ADVKD_OK) == (model != nullptr) && (status == ADVKD_OK) == (*error == '\0'));
  if (model == nullptr) return 0;
  advkd_info info;
  advkd_describe(model, &info);
  for (std::int32_t label = 0; label <= info.classes && label < 64; ++label) {
    advkd_class_name(model, label);
  }
  // One image and several are computed by different plans.
  for (std::int32_t head = 1; head <= info.heads; ++head) {
    advkd_request request = {};
    request.exit_at = head;
    request.count = head == info.heads ? 4 : 1;
    request.format = head == info.heads ? ADVKD_UINT8 : ADVKD_FLOAT32;
    generate(model, info.channels, request);
  }
  advkd_close(model);
  return 1;
}
