// The C API over runtime/model.h: checks what it is given, and lets no exception out.
#include "advkd.h"

#include <cmath>
#include <limits>

#include "capi/guard.h"
#include "runtime/dispatch.h"
#include "runtime/model.h"
#include "runtime/model_file.h"

struct advkd_model {
  advkd::Model model;
};

namespace {

using advkd::guarded;
using advkd::write_error;

// The head that exit_at means, or -1.
int head_of(const advkd::Model& model, std::int32_t exit_at) {
  const int heads = static_cast<int>(model.heads().size());
  if (exit_at < 0 || exit_at > heads) return -1;
  return exit_at == 0 ? heads - 1 : exit_at - 1;
}

advkd_status check(const advkd::Model& model, const advkd_request& request) {
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  if (request.first < 0 || request.count < 0 || request.count > most - request.first ||
      request.together < 0 || request.together > ADVKD_MOST_TOGETHER ||
      (request.format != ADVKD_FLOAT32 && request.format != ADVKD_UINT8)) {
    return ADVKD_ERROR_ARGUMENT;
  }
  if (head_of(model, request.exit_at) < 0) return ADVKD_ERROR_EXIT;
  if (request.labels == nullptr) return ADVKD_OK;
  for (std::int64_t i = 0; i < request.count; ++i) {
    if (request.labels[i] < 0 || request.labels[i] >= model.classes()) return ADVKD_ERROR_LABEL;
  }
  return ADVKD_OK;
}

// What a checked request means.
advkd::Generation generation_of(const advkd::Model& model, const advkd_request& request) {
  const std::size_t head = static_cast<std::size_t>(head_of(model, request.exit_at));
  const std::int64_t usual = model.usual_together(head, request.count);
  const bool fewer = request.together > 0 && request.together < usual;
  return {request.seed, request.first, request.count, request.labels,
          fewer ? request.together : usual, head};
}

// Compares so that NaN becomes the lower bound.
float clamped(float value) { return value > -1.0f ? (value < 1.0f ? value : 1.0f) : -1.0f; }

void write_pixels(const float* from, std::int64_t count, advkd_format format, void* out,
                  std::int64_t at) {
  if (format == ADVKD_FLOAT32) {
    float* const to = static_cast<float*>(out) + at;
    for (std::int64_t i = 0; i < count; ++i) to[i] = clamped(from[i]);
    return;
  }
  std::uint8_t* const to = static_cast<std::uint8_t*>(out) + at;
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<std::uint8_t>(std::nearbyint((clamped(from[i]) + 1.0f) * 127.5f));
  }
}

}  // namespace

extern "C" {

const char* advkd_version(void) { return ADVKD_VERSION; }

const char* advkd_isa(void) {
  const char* isa = "";
  guarded(nullptr, ADVKD_ERROR_ARGUMENT, [&] { isa = advkd::kernels().isa; });
  return isa;
}

const char* advkd_status_text(advkd_status status) {
  switch (status) {
    case ADVKD_OK:
      return "it worked";
    case ADVKD_ERROR_FILE:
      return "the file cannot be read";
    case ADVKD_ERROR_FORMAT:
      return "the file is no model, is damaged, or of an unknown version";
    case ADVKD_ERROR_MEMORY:
      return "the system gives no memory";
    case ADVKD_ERROR_ARGUMENT:
      return "an argument is null or out of range";
    case ADVKD_ERROR_LABEL:
      return "a label is not one of the model's classes";
    case ADVKD_ERROR_EXIT:
      return "the model has no such head to leave by";
    case ADVKD_ERROR_WORKSPACE:
      return "the workspace is too small";
  }
  return "an unknown status";
}

advkd_status advkd_open_memory(const void* data, size_t size, advkd_model** model, char* error) {
  write_error(error, "");
  if (model != nullptr) *model = nullptr;
  if (data == nullptr || model == nullptr) {
    write_error(error, "data or model is a null pointer");
    return ADVKD_ERROR_ARGUMENT;
  }
  return guarded(error, ADVKD_ERROR_FORMAT, [&] {
    const auto bytes = static_cast<const unsigned char*>(data);
    *model = new advkd_model{advkd::Model(advkd::read_model_file(bytes, size))};
  });
}

void advkd_close(advkd_model* model) { delete model; }

void advkd_describe(const advkd_model* model, advkd_info* info) {
  if (info == nullptr) return;
  *info = {};
  if (model == nullptr) return;
  const advkd::Model& m = model->model;
  const advkd::PlanData& last = m.heads().back().many->data();
  const auto bytes = static_cast<std::int64_t>(sizeof(float));
  info->size = static_cast<std::int32_t>(m.heads().back().size);
  info->channels = static_cast<std::int32_t>(m.channels());
  info->classes = static_cast<std::int32_t>(m.classes());
  info->heads = static_cast<std::int32_t>(m.heads().size());
  info->arena = last.arena * bytes;
  info->weights = m.weights() * bytes;
}

const char* advkd_class_name(const advkd_model* model, int32_t label) {
  if (model == nullptr || label < 0) return nullptr;
  const auto& names = model->model.class_names();
  const auto index = static_cast<std::size_t>(label);
  return index < names.size() ? names[index].c_str() : nullptr;
}

int32_t advkd_image_size(const advkd_model* model, int32_t exit_at) {
  const int head = model == nullptr ? -1 : head_of(model->model, exit_at);
  if (head < 0) return 0;
  return static_cast<std::int32_t>(model->model.heads()[static_cast<std::size_t>(head)].size);
}

size_t advkd_workspace_size(const advkd_model* model, const advkd_request* request) {
  if (model == nullptr || request == nullptr) return 0;
  if (check(model->model, *request) != ADVKD_OK) return 0;
  return static_cast<size_t>(model->model.workspace(generation_of(model->model, *request)));
}

advkd_status advkd_generate(const advkd_model* model, const advkd_request* request,
                            void* workspace, size_t workspace_size, void* out) {
  if (model == nullptr || request == nullptr) return ADVKD_ERROR_ARGUMENT;
  const advkd_status status = check(model->model, *request);
  if (status != ADVKD_OK) return status;
  if (request->count == 0) return ADVKD_OK;
  if (workspace == nullptr || out == nullptr) return ADVKD_ERROR_ARGUMENT;
  const advkd::Generation what = generation_of(model->model, *request);
  if (workspace_size < static_cast<size_t>(model->model.workspace(what))) {
    return ADVKD_ERROR_WORKSPACE;
  }
  const std::int64_t side = model->model.heads()[what.head].size;
  const std::int64_t pixels = side * side * model->model.channels();
  model->model.generate(what, workspace,
                        [&](std::int64_t first, std::int64_t count, const float* images) {
                          write_pixels(images, count * pixels, request->format, out,
                                       first * pixels);
                        });
  return ADVKD_OK;
}

}  // extern "C"
