/* measured MODEL: generates with the library and prints two numbers: KiB that were resident at most
 * after the first image, and what was allocated between opening and closing. Takes glibc, whose
 * allocator is replaced by one that counts; so the C++ runtime's allocations are seen, too. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "advkd.h"

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);
extern void *__libc_memalign(size_t boundary, size_t size);

static long allocations;

void *malloc(size_t size) {
  ++allocations;
  return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size) {
  ++allocations;
  return __libc_realloc(memory, size);
}

void *memalign(size_t boundary, size_t size) {
  ++allocations;
  return __libc_memalign(boundary, size);
}

void *aligned_alloc(size_t boundary, size_t size) { return memalign(boundary, size); }

int posix_memalign(void **memory, size_t boundary, size_t size) {
  *memory = memalign(boundary, size);
  return 0;
}

/* VmHWM of this process. */
static long resident(void) {
  char line[256];
  long kib = 0;
  FILE *file = fopen("/proc/self/status", "r");
  if (file == NULL) return 0;
  while (fgets(line, sizeof line, file) != NULL) {
    if (strncmp(line, "VmHWM:", 6) == 0) kib = strtol(line + 6, NULL, 10);
  }
  fclose(file);
  return kib;
}

/* Generates so many images; returns how often memory was allocated, or -1 for a failure. */
static long generate(const advkd_model *model, int32_t exit_at, int64_t count,
                     advkd_format format) {
  const advkd_request request = {.count = count, .exit_at = exit_at, .format = format};
  advkd_info info;
  advkd_describe(model, &info);
  const size_t size = advkd_workspace_size(model, &request);
  const size_t side = (size_t)advkd_image_size(model, exit_at);
  void *workspace = malloc(size);
  void *out = malloc((size_t)count * side * side * (size_t)info.channels * sizeof(float));
  const long before = allocations;
  const advkd_status status = advkd_generate(model, &request, workspace, size, out);
  const long made = allocations - before;
  free(out);
  free(workspace);
  return status == ADVKD_OK ? made : -1;
}

int main(int argc, char **argv) {
  advkd_model *model;
  char error[ADVKD_ERROR_SIZE];
  if (argc != 2) return 2;
  if (advkd_open_file(argv[1], &model, error) != ADVKD_OK) return fprintf(stderr, "%s\n", error), 1;
  if (allocations == 0) return fprintf(stderr, "allocations are not counted\n"), 1;
  long made = generate(model, 0, 1, ADVKD_FLOAT32);
  printf("%ld\n", resident());
  advkd_info info;
  advkd_describe(model, &info);
  for (int32_t head = 1; head <= info.heads; ++head) {
    for (int64_t count = 1; count < 40; count = 3 * count + 2) {
      const long more = generate(model, head, count, count % 2 == 0 ? ADVKD_UINT8 : ADVKD_FLOAT32);
      if (made < 0 || more < 0) return fprintf(stderr, "it does not generate\n"), 1;
      made += more;
    }
  }
  printf("%ld\n", made);
  advkd_close(model);
  return 0;
}
