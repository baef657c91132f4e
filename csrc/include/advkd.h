/* advkd: images of a distilled student, in one network pass. C99; no other library is needed.
 *
 * A model is opened from a file that `advkd export --format advkd` wrote (docs/file-format.md), and
 * is then constant: any number of threads may use it at once, each with a workspace of its own.
 * After it is open nothing is allocated, no thread is started, and no state is shared. Nothing here
 * throws, prints or ends the process.
 *
 *     advkd_model *model;
 *     char error[ADVKD_ERROR_SIZE];
 *     if (advkd_open_file("student.advkd", &model, error) != ADVKD_OK) ...
 *     advkd_request request = {.seed = 0, .count = 1};
 *     size_t size = advkd_workspace_size(model, &request);
 *     advkd_generate(model, &request, malloc(size), size, pixels);
 *
 * An image depends on the model, the seed and its number. Noise has the same bits on every
 * platform. On one instruction set pixels are the bits of the Python package's; between two they
 * agree within 5e-5 of [-1, 1].
 */
#ifndef ADVKD_H
#define ADVKD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32) && defined(ADVKD_SHARED)
#define ADVKD_API __declspec(dllexport)
#elif defined(__GNUC__)
#define ADVKD_API __attribute__((visibility("default")))
#else
#define ADVKD_API
#endif

/* Bytes of a buffer that holds any error text, its end included. */
#define ADVKD_ERROR_SIZE 256

/* Images that one network pass takes at most; more are generated in several passes. */
#define ADVKD_MOST_TOGETHER 16

typedef enum advkd_status {
  ADVKD_OK = 0,
  ADVKD_ERROR_FILE,      /* the file cannot be read */
  ADVKD_ERROR_FORMAT,    /* the file is no model, is damaged, or of a version not known here */
  ADVKD_ERROR_MEMORY,    /* the system gives no memory */
  ADVKD_ERROR_ARGUMENT,  /* a null pointer, or a number out of range */
  ADVKD_ERROR_LABEL,     /* a label is not one of the model's classes, or it has none */
  ADVKD_ERROR_EXIT,      /* the model has no such head */
  ADVKD_ERROR_WORKSPACE  /* the workspace is too small */
} advkd_status;

typedef enum advkd_format {
  ADVKD_FLOAT32 = 0, /* [-1, 1] */
  ADVKD_UINT8 = 1    /* [0, 255], rounded to the nearest, halves to the even number */
} advkd_format;

typedef struct advkd_model advkd_model;

/* What a model makes. Sides are in pixels; images are square. */
typedef struct advkd_info {
  int32_t size;     /* of the last head's images */
  int32_t channels; /* 1: grey, 3: red, green, blue */
  int32_t classes;  /* labels lie in [0, classes); 0: the model takes none */
  int32_t heads;    /* that give an image, so exit_at lies in [1, heads] */
  int64_t arena;    /* bytes of activations of one image */
  int64_t weights;  /* bytes of weights in memory */
} advkd_info;

/* What to generate. Fields that are left zero have a meaning, so `{.seed = 7, .count = 16}` is a
 * whole request. */
typedef struct advkd_request {
  uint64_t seed;         /* any */
  int64_t first;         /* number of the first image, >= 0; first + count < 2^63 */
  int64_t count;         /* images, >= 0 */
  const int64_t *labels; /* (count,), NULL: drawn from the seed, or none where there are none */
  int32_t exit_at;       /* the head to leave by, 1 .. heads; 0: the last */
  int32_t together;      /* images of a network pass, 1 .. ADVKD_MOST_TOGETHER; 0: the most. Fewer
                            take less workspace */
  advkd_format format;
} advkd_request;

/* The version of this library, such as "0.2.0". */
ADVKD_API const char *advkd_version(void);

/* The instruction set in use: "portable", "avx2", "avx512", "neon" or "wasm". The best that the
 * processor runs, or the one that the environment variable ADVKD_ISA named at the first use. Empty
 * where that one is unknown; then no model opens. */
ADVKD_API const char *advkd_isa(void);

/* What a status means, as a clause of English. Never NULL. */
ADVKD_API const char *advkd_status_text(advkd_status status);

/* Opens a model from `size` bytes, which are read here and not needed afterwards. On success *model
 * belongs to the caller, who gives it to advkd_close; on failure it is NULL. `error`, which may be
 * NULL, has ADVKD_ERROR_SIZE bytes and takes a clause that says why, empty on success. */
ADVKD_API advkd_status advkd_open_memory(const void *data, size_t size, advkd_model **model,
                                         char *error);

/* The same from the file of that name. */
ADVKD_API advkd_status advkd_open_file(const char *path, advkd_model **model, char *error);

/* Frees a model that no thread uses any more. NULL is allowed. */
ADVKD_API void advkd_close(advkd_model *model);

/* Describes an open model. */
ADVKD_API void advkd_describe(const advkd_model *model, advkd_info *info);

/* The name of a class as UTF-8, which lives as long as the model; NULL where it has no name. */
ADVKD_API const char *advkd_class_name(const advkd_model *model, int32_t label);

/* Pixels of a side of the images of head exit_at (0: the last); 0 where there is no such head. */
ADVKD_API int32_t advkd_image_size(const advkd_model *model, int32_t exit_at);

/* Bytes of the workspace that a request needs; 0 where the request is not valid. */
ADVKD_API size_t advkd_workspace_size(const advkd_model *model, const advkd_request *request);

/* Writes the images to `out`, (count, side, side, channels), as float or uint8_t. The workspace may
 * lie at any address (at a multiple of 64 it is fastest) and holds nothing of worth afterwards. It
 * runs on the calling thread. On failure nothing has been written. */
ADVKD_API advkd_status advkd_generate(const advkd_model *model, const advkd_request *request,
                                      void *workspace, size_t workspace_size, void *out);

#ifdef __cplusplus
}
#endif

#endif
