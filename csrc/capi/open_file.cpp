// Opening by name, where there are files.
#include <cstdio>
#include <memory>
#include <vector>

#include "advkd.h"
#include "capi/guard.h"

namespace {

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

constexpr std::size_t kChunk = 1 << 16;
constexpr long kLongest = 1L << 30;  // bytes that are asked for at once

// The bytes of a file, or 0 where that is not known.
std::size_t length_of(std::FILE* file) {
  const long length = std::fseek(file, 0, SEEK_END) == 0 ? std::ftell(file) : 0;
  std::rewind(file);
  return length > 0 && length <= kLongest ? static_cast<std::size_t>(length) : 0;
}

// False where the file cannot be read to its end.
bool read_file(const char* path, std::vector<unsigned char>& bytes) {
  const File file(std::fopen(path, "rb"), std::fclose);
  if (file == nullptr) return false;
  bytes.reserve(length_of(file.get()) + kChunk);  // or it would be copied as it grows
  for (std::size_t size = 0;;) {
    bytes.resize(size + kChunk);
    const std::size_t read = std::fread(bytes.data() + size, 1, kChunk, file.get());
    size += read;
    if (read == 0) {
      bytes.resize(size);
      return std::ferror(file.get()) == 0;
    }
  }
}

}  // namespace

extern "C" advkd_status advkd_open_file(const char* path, advkd_model** model, char* error) {
  advkd::write_error(error, "");
  if (model != nullptr) *model = nullptr;
  if (path == nullptr || model == nullptr) {
    advkd::write_error(error, "path or model is a null pointer");
    return ADVKD_ERROR_ARGUMENT;
  }
  std::vector<unsigned char> bytes;
  bool is_read = false;
  const advkd_status status = advkd::guarded(error, ADVKD_ERROR_FILE, [&] {
    is_read = read_file(path, bytes);
  });
  if (status != ADVKD_OK) return status;
  if (!is_read) {
    advkd::write_error(error, "the file cannot be read");
    return ADVKD_ERROR_FILE;
  }
  return advkd_open_memory(bytes.data(), bytes.size(), model, error);
}
