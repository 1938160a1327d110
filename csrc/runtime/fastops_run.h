/* Runs models that fastops.light.save has written, without PyTorch: link libfastops_run. C99 and C++.
 *
 *   fastops_run_model* model = fastops_run_open("model.fops", 1);
 *   fastops_run_tensor x = {.type = FASTOPS_RUN_FLOAT32, .rank = 2, .dims = {1, 64}, .data = pixels}, y;
 *   if (model == NULL || fastops_run(model, &x, 1, &y, 1) != 0) puts(fastops_run_error());
 *   else use(y.data, y.dims);
 *   fastops_run_close(model);
 *
 * A model is used by one thread at a time; two models are independent, also two of the same file. Nothing throws.
 */
#ifndef FASTOPS_RUN_H
#define FASTOPS_RUN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_FASTOPS_RUN_BUILDS)
#define FASTOPS_RUN_API __attribute__((visibility("default")))
#else
#define FASTOPS_RUN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FASTOPS_RUN_MOST_DIMS 8

enum {
  FASTOPS_RUN_FLOAT32,
  FASTOPS_RUN_FLOAT64,
  FASTOPS_RUN_BFLOAT16,
  FASTOPS_RUN_FLOAT16,
  FASTOPS_RUN_INT8,
  FASTOPS_RUN_UINT8,
  FASTOPS_RUN_INT32,
  FASTOPS_RUN_INT64,
  FASTOPS_RUN_FLOAT8
};

typedef struct fastops_run_model fastops_run_model;

/* Dense, the last dimension innermost. */
typedef struct fastops_run_tensor {
  int32_t type;
  int32_t rank;
  int64_t dims[FASTOPS_RUN_MOST_DIMS];
  const void* data;
} fastops_run_tensor;

/* Opens a file, which is mapped into memory and must stay as it is while the model is open. `threads` is how many
 * threads compute, the calling one among them. NULL: it cannot be, and fastops_run_error() says why. */
FASTOPS_RUN_API fastops_run_model* fastops_run_open(const char* path, int threads);
FASTOPS_RUN_API void fastops_run_close(fastops_run_model* model);

/* The inputs and outputs that there are, and their names, which live as long as the model. */
FASTOPS_RUN_API size_t fastops_run_inputs(const fastops_run_model* model);
FASTOPS_RUN_API size_t fastops_run_outputs(const fastops_run_model* model);
FASTOPS_RUN_API const char* fastops_run_input_name(const fastops_run_model* model, size_t i);
FASTOPS_RUN_API const char* fastops_run_output_name(const fastops_run_model* model, size_t i);
/* Type and shape of an input, without data. A size of -1 is any; rank -1 is any shape. */
FASTOPS_RUN_API fastops_run_tensor fastops_run_input(const fastops_run_model* model, size_t i);

/* Runs the model on its inputs. Fills the outputs, whose data stay where they are until the next run or close. 0: done.
 * Otherwise nothing is known of the outputs, and fastops_run_error() says why.
 *
 * The first run on inputs of other shapes decides which kernels run, and packs the weights for them. That is kept for
 * four combinations of shapes. */
FASTOPS_RUN_API int fastops_run(fastops_run_model* model, const fastops_run_tensor* inputs, size_t input_count,
                                fastops_run_tensor* outputs, size_t output_count);

/* Bytes of packed weights and results that the model has besides its file. */
FASTOPS_RUN_API size_t fastops_run_memory(const fastops_run_model* model);

/* What the last call of this thread that failed said. */
FASTOPS_RUN_API const char* fastops_run_error(void);
/* The version of the library, and the instruction set that its kernels use here ("avx2"). */
FASTOPS_RUN_API const char* fastops_run_version(void);
FASTOPS_RUN_API const char* fastops_run_isa(void);

#ifdef __cplusplus
}
#endif

#endif
