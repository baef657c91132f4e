/* advkd-generate: images of a student to a PNG or PPM file, through the C API alone. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "advkd.h"

static const char usage[] =
    "usage: advkd-generate MODEL [--num N] [--seed S] [--first I] [--class C] [--exit-at K]\n"
    "                      [--out FILE.png] [--raw FILE]\n"
    "\n"
    "Generates N images (default 16) of MODEL, a file that `advkd export --format advkd` wrote, and\n"
    "writes them as one grid to FILE.png (default grid.png). --raw writes the numbers instead,\n"
    "float32 (N, side, side, channels) in [-1, 1]. --class is a number or a name.\n";

enum { tile = 64, most_images = 1 << 16 };

struct options {
  const char *model, *out, *raw, *label;
  advkd_request request;
};

static int fail(const char *what, const char *detail) {
  fprintf(stderr, "advkd-generate: %s%s%s\n", what, *detail == '\0' ? "" : ": ", detail);
  return 1;
}

/* A whole number in [low, high]; 0 where the text is none. */
static int parse(const char *text, uint64_t low, uint64_t high, uint64_t *value) {
  char *end;
  errno = 0;
  *value = strtoull(text, &end, 10);
  return *text >= '0' && *text <= '9' && *end == '\0' && errno == 0 && *value >= low &&
         *value <= high;
}

static int parse_options(int argc, char **argv, struct options *options) {
  for (int i = 1; i < argc; ++i) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    uint64_t number = 0;
    if (strncmp(name, "--", 2) != 0) {
      if (options->model != NULL) return fail("more than one MODEL", name);
      options->model = name;
      continue;
    }
    if (value == NULL) return fail("an option without a value", name);
    ++i;
    int known = 1;
    if (strcmp(name, "--out") == 0) {
      options->out = value;
    } else if (strcmp(name, "--raw") == 0) {
      options->raw = value;
    } else if (strcmp(name, "--class") == 0) {
      options->label = value;
    } else if (strcmp(name, "--num") == 0) {
      known = parse(value, 1, most_images, &number);
      options->request.count = (int64_t)number;
    } else if (strcmp(name, "--seed") == 0) {
      known = parse(value, 0, UINT64_MAX, &options->request.seed);
    } else if (strcmp(name, "--first") == 0) {
      known = parse(value, 0, INT64_MAX - most_images, &number);
      options->request.first = (int64_t)number;
    } else if (strcmp(name, "--exit-at") == 0) {
      known = parse(value, 1, INT32_MAX, &number);
      options->request.exit_at = (int32_t)number;
    } else {
      return fail("an unknown option", name);
    }
    if (!known) return fail("a value that the option does not take", name);
  }
  return options->model == NULL ? fail("no MODEL is given", "") : 0;
}

/* The class of that number or name, or -1. */
static int64_t label_of(const advkd_model *model, int32_t classes, const char *text) {
  uint64_t number;
  for (int32_t label = 0; label < classes; ++label) {
    const char *name = advkd_class_name(model, label);
    if (name != NULL && strcmp(name, text) == 0) return label;
  }
  if (classes > 0 && parse(text, 0, (uint64_t)classes - 1, &number)) return (int64_t)number;
  return -1;
}

/* Bytes that are written to a file or counted in a checksum. */
struct png {
  FILE *file;
  uint32_t crc, adler_a, adler_b;
};

static void put(struct png *png, const unsigned char *bytes, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    png->crc ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) png->crc = png->crc >> 1 ^ (png->crc & 1 ? 0xEDB88320u : 0);
  }
  fwrite(bytes, 1, count, png->file);
}

static void put_number(struct png *png, uint32_t number) {
  const unsigned char bytes[4] = {(unsigned char)(number >> 24), (unsigned char)(number >> 16),
                                  (unsigned char)(number >> 8), (unsigned char)number};
  put(png, bytes, 4);
}

static void begin_chunk(struct png *png, const char *name, uint32_t length) {
  put_number(png, length);
  png->crc = 0xFFFFFFFFu;
  put(png, (const unsigned char *)name, 4);
}

static void end_chunk(struct png *png) { put_number(png, png->crc ^ 0xFFFFFFFFu); }

/* One row as a stored block of zlib: a length, its complement, a filter byte, the pixels. */
static void put_row(struct png *png, const unsigned char *row, uint32_t bytes, int last) {
  const uint32_t length = bytes + 1;
  const unsigned char head[6] = {(unsigned char)last,      (unsigned char)length,
                                 (unsigned char)(length >> 8), (unsigned char)~length,
                                 (unsigned char)(~length >> 8), 0};
  put(png, head, 6);
  put(png, row, bytes);
  png->adler_b = (png->adler_b + png->adler_a) % 65521; /* of the filter byte, 0 */
  for (uint32_t i = 0; i < bytes; ++i) {
    png->adler_a = (png->adler_a + row[i]) % 65521;
    png->adler_b = (png->adler_b + png->adler_a) % 65521;
  }
}

/* Grey or RGB pixels, uncompressed. */
static int write_png(FILE *file, const unsigned char *pixels, uint32_t width, uint32_t height,
                     uint32_t channels) {
  static const unsigned char signature[8] = {137, 80, 78, 71, 13, 10, 26, 10};
  static const unsigned char zlib_head[2] = {0x78, 0x01};
  const uint32_t row = width * channels;
  struct png png = {file, 0, 1, 0};
  put(&png, signature, sizeof signature);
  begin_chunk(&png, "IHDR", 13);
  put_number(&png, width);
  put_number(&png, height);
  const unsigned char kind[5] = {8, channels == 3 ? 2 : 0, 0, 0, 0};
  put(&png, kind, sizeof kind);
  end_chunk(&png);
  begin_chunk(&png, "IDAT", 2 + height * (row + 6) + 4);
  put(&png, zlib_head, sizeof zlib_head);
  for (uint32_t y = 0; y < height; ++y) put_row(&png, pixels + y * row, row, y + 1 == height);
  put_number(&png, png.adler_b << 16 | png.adler_a);
  end_chunk(&png);
  begin_chunk(&png, "IEND", 0);
  end_chunk(&png);
  return ferror(file) == 0;
}

/* The images side by side, each enlarged by a whole factor. */
static unsigned char *grid_of(const unsigned char *images, uint32_t count, uint32_t side,
                              uint32_t channels, uint32_t *width, uint32_t *height) {
  const uint32_t scale = side < tile ? tile / side : 1, cell = side * scale;
  uint32_t columns = 1;
  while (columns * columns < count) ++columns;
  const uint32_t rows = (count + columns - 1) / columns;
  *width = columns * cell;
  *height = rows * cell;
  unsigned char *grid = calloc((size_t)*width * *height, channels);
  if (grid == NULL) return NULL;
  for (uint32_t y = 0; y < *height; ++y) {
    for (uint32_t x = 0; x < *width; ++x) {
      const size_t image = (size_t)(y / cell) * columns + x / cell;
      if (image >= count) continue;
      const size_t pixel = (image * side + y % cell / scale) * side + x % cell / scale;
      memcpy(grid + ((size_t)y * *width + x) * channels, images + pixel * channels, channels);
    }
  }
  return grid;
}

static int write_images(const struct options *options, const void *images, size_t bytes,
                        uint32_t side, uint32_t channels) {
  const char *path = options->raw != NULL ? options->raw : options->out;
  uint32_t width = 0, height = 0;
  unsigned char *grid = NULL;
  if (options->raw == NULL) {
    if (channels != 1 && channels != 3) return fail("a PNG has 1 or 3 channels: use --raw", "");
    grid = grid_of(images, (uint32_t)options->request.count, side, channels, &width, &height);
    if (grid == NULL) return fail("the system gives no memory", "");
    /* A stored block holds no longer row. */
    if (width * channels > 65534) return fail("the grid is too wide: use --raw or fewer", "");
  }
  FILE *file = fopen(path, "wb");
  if (file == NULL) return fail("cannot write", path);
  const int whole = grid == NULL ? fwrite(images, 1, bytes, file) == bytes
                                 : write_png(file, grid, width, height, channels);
  free(grid);
  return fclose(file) == 0 && whole ? 0 : fail("cannot write", path);
}

static int generate(const struct options *options, const advkd_model *model) {
  advkd_info info;
  advkd_describe(model, &info);
  advkd_request request = options->request;
  request.format = options->raw != NULL ? ADVKD_FLOAT32 : ADVKD_UINT8;
  const uint32_t side = (uint32_t)advkd_image_size(model, request.exit_at);
  const size_t numbers = (size_t)request.count * side * side * (size_t)info.channels;
  const size_t bytes = numbers * (options->raw != NULL ? sizeof(float) : 1);
  int64_t *labels = NULL;
  if (options->label != NULL) {
    const int64_t label = label_of(model, info.classes, options->label);
    if (label < 0) return fail("the model has no such class", options->label);
    labels = malloc((size_t)request.count * sizeof *labels);
    if (labels == NULL) return fail("the system gives no memory", "");
    for (int64_t i = 0; i < request.count; ++i) labels[i] = label;
    request.labels = labels;
  }
  const size_t size = advkd_workspace_size(model, &request);
  void *workspace = malloc(size), *images = malloc(bytes);
  int status = 1;
  if (workspace == NULL || images == NULL) {
    fail("the system gives no memory", "");
  } else {
    const advkd_status done = advkd_generate(model, &request, workspace, size, images);
    status = done != ADVKD_OK ? fail(advkd_status_text(done), "")
                              : write_images(options, images, bytes, side,
                                             (uint32_t)info.channels);
  }
  free(images);
  free(workspace);
  free(labels);
  return status;
}

int main(int argc, char **argv) {
  struct options options = {NULL, "grid.png", NULL, NULL, {.count = 16}};
  if (argc == 1 || strcmp(argv[1], "--help") == 0) return fputs(usage, stdout) < 0;
  if (parse_options(argc, argv, &options) != 0) return 2;
  advkd_model *model;
  char error[ADVKD_ERROR_SIZE];
  if (advkd_open_file(options.model, &model, error) != ADVKD_OK) return fail(options.model, error);
  const int status = generate(&options, model);
  advkd_close(model);
  return status;
}
