/* Convolutions by 3 x 3 with a quarter of the multiplications: F(4 x 4, 3 x 3) of winograd.py, on images with the
   channels innermost.

   A thread takes a block of tiles through all steps, the change of basis, the 36 matrix products and the change back,
   while they are in its cache. Channels are multiples of the lanes of a register. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __clang__
const char *const compiled_by = __VERSION__; /* Clang says its name there */
#else
const char *const compiled_by = "gcc " __VERSION__;
#endif

enum { LANES = 8 };
typedef int64_t I;
typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(p) (*(V *)(p))

typedef struct {
  I images, high, wide, inputs, outputs, padding; /* of the convolution */
  I block, threads;                               /* tiles at a time */
  I rows, columns, down, across, tiles;           /* of its result: pixels and tiles */
} Shape;

static Shape shape(const I *given) {
  Shape s;
  memcpy(&s, given, 8 * sizeof(I));
  s.rows = s.high + 2 * s.padding - 2, s.columns = s.wide + 2 * s.padding - 2;
  s.down = (s.rows + 3) / 4, s.across = (s.columns + 3) / 4, s.tiles = s.images * s.down * s.across;
  return s;
}

static inline I least(I a, I b) { return a < b ? a : b; }

/* The changes of basis in one dimension: of a tile of 6, of the derivative by a result of 4, and back to a result. */
static inline void tile(const V *x, V *y, int s) {
  const V a = x[4] - 4 * x[2], b = x[3] - 4 * x[1], c = x[4] - x[2], d = 2 * (x[3] - x[1]);
  y[0] = 4 * x[0] - 5 * x[2] + x[4], y[s] = a + b, y[2 * s] = a - b;
  y[3 * s] = c + d, y[4 * s] = c - d, y[5 * s] = 4 * x[1] - 5 * x[3] + x[5];
}

static inline void spread(const V *x, V *y, int s) {
  const V a = x[0] + x[2], b = x[1] + x[3], c = x[0] + 4 * x[2], d = 2 * x[1] + 8 * x[3];
  y[0] = x[0], y[s] = a + b, y[2 * s] = a - b, y[3 * s] = c + d, y[4 * s] = c - d, y[5 * s] = x[3];
}

static inline void result(const V *x, V *y, int s) {
  const V a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = x[3] - x[4];
  y[0] = x[0] + a + c, y[s] = b + 2 * d, y[2 * s] = a + 4 * c, y[3 * s] = b + 8 * d + x[5];
}

/* The 36 entries of a tile, each `step` after the one before, from its pixels. */
static inline void to_basis(const float *x, I line, I channels, int size, float *y, I step) {
  for (I c = 0; c < channels; c += LANES) {
    V half[6][6], part[6], out[6];
    for (int j = 0; j < size; j++) {
      for (int i = 0; i < size; i++) part[i] = AT(x + i * line + j * channels + c);
      if (size == 6) tile(part, &half[0][j], 6);
      else spread(part, &half[0][j], 6);
    }
    for (int i = 0; i < 6; i++) {
      if (size == 6) tile(half[i], out, 1);
      else spread(half[i], out, 1);
      for (int j = 0; j < 6; j++) AT(y + (i * 6 + j) * step + c) = out[j];
    }
  }
}

static void from_basis(const float *x, I step, I channels, const float *bias, float *y, I line, I high, I wide) {
  for (I c = 0; c < channels; c += LANES) {
    V half[4][6], part[6], out[4];
    const V shift = bias ? AT(bias + c) : (V){0};
    for (int j = 0; j < 6; j++) {
      for (int i = 0; i < 6; i++) part[i] = AT(x + (i * 6 + j) * step + c);
      result(part, &half[0][j], 6);
    }
    for (int i = 0; i < high; i++) {
      result(half[i], out, 1);
      for (int j = 0; j < wide; j++) AT(y + i * line + j * channels + c) = out[j] + shift;
    }
  }
}

/* Where the size x size pixels from here are, and in `line` how far their rows are from each other. */
static const float *pixels(const float *x, I high, I wide, I channels, I image, I row, I column, int size, float *copy,
                           I *line) {
  const I left = column < 0 ? -column : 0, right = least(size, wide - column);
  const float *from = x + (image * high * wide + column + left) * channels;
  *line = wide * channels;
  if (row >= 0 && left == 0 && row + size <= high && right == size) return from + row * *line;
  memset(copy, 0, size * size * channels * sizeof(float)); /* outside of the image */
  for (I i = 0; i < size; i++)
    if (row + i >= 0 && row + i < high && left < right)
      memcpy(copy + (i * size + left) * channels, from + (row + i) * *line, (right - left) * channels * sizeof(float));
  *line = size * channels;
  return copy;
}

static inline void images_to_basis(Shape s, const float *x, I high, I wide, I channels, I padding, int size, I first,
                                   I some, float *y, float *copy) {
  for (I t = 0; t < some; t++) {
    const I at = first + t, row = at / s.across % s.down * 4 - padding, column = at % s.across * 4 - padding;
    I line;
    const float *from = pixels(x, high, wide, channels, at / s.across / s.down, row, column, size, copy, &line);
    to_basis(from, line, channels, size, y + t * channels, s.block * channels);
  }
}

static void inputs_to_basis(Shape s, const float *x, I first, I some, float *y, float *copy) {
  images_to_basis(s, x, s.high, s.wide, s.inputs, s.padding, 6, first, some, y, copy);
}

static void outputs_to_basis(Shape s, const float *x, I first, I some, float *y, float *copy) {
  images_to_basis(s, x, s.rows, s.columns, s.outputs, 0, 4, first, some, y, copy);
}

static void outputs_from_basis(Shape s, const float *x, I first, I some, const float *bias, float *y) {
  for (I t = 0; t < some; t++) {
    const I at = first + t, row = at / s.across % s.down * 4, column = at % s.across * 4;
    float *to = y + ((at / s.across / s.down * s.rows + row) * s.columns + column) * s.outputs;
    from_basis(x + t * s.outputs, s.block * s.outputs, s.outputs, bias, to, s.columns * s.outputs,
               least(4, s.rows - row), least(4, s.columns - column));
  }
}

/* d[i][j] (+)= sum over k of a[i][k] b[k][j], in blocks that the registers hold. */
#define BLOCK(NAME, HIGH, WIDE)                                                                                        \
  static inline void NAME(I k, const float *a, I ai, I ak, const float *b, float *d, I n, int more) {                  \
    V sum[HIGH][WIDE], line[WIDE];                                                                                     \
    for (int i = 0; i < HIGH; i++)                                                                                     \
      for (int j = 0; j < WIDE; j++) sum[i][j] = more ? AT(d + i * n + j * LANES) : (V){0};                            \
    for (I l = 0; l < k; l++) {                                                                                        \
      for (int j = 0; j < WIDE; j++) line[j] = AT(b + l * n + j * LANES);                                              \
      for (int i = 0; i < HIGH; i++) {                                                                                 \
        const V one = a[i * ai + l * ak] - (V){0};                                                                     \
        for (int j = 0; j < WIDE; j++) sum[i][j] += one * line[j];                                                     \
      }                                                                                                                \
    }                                                                                                                  \
    for (int i = 0; i < HIGH; i++)                                                                                     \
      for (int j = 0; j < WIDE; j++) AT(d + i * n + j * LANES) = sum[i][j];                                            \
  }
BLOCK(six_by_two, 6, 2)
BLOCK(two_by_two, 2, 2)
BLOCK(two_by_one, 2, 1)

static void multiply(I m, I n, I k, const float *a, I ai, I ak, const float *b, float *d, int more) {
  for (I j = 0; j < n; j += 2 * LANES) {
    I i = 0;
    if (j + 2 * LANES <= n) {
      for (; i + 6 <= m; i += 6) six_by_two(k, a + i * ai, ai, ak, b + j, d + i * n + j, n, more);
      for (; i < m; i += 2) two_by_two(k, a + i * ai, ai, ak, b + j, d + i * n + j, n, more);
    } else
      for (; i < m; i += 2) two_by_one(k, a + i * ai, ai, ak, b + j, d + i * n + j, n, more);
  }
}

/* y = bias + the sum of conv2d(xs[i], kernels[i]), with kernels (36, inputs, outputs) in their basis. The bias may be
   missing. Returns 0 if there is no memory. */
int convolve(const I *given, I count, const float **xs, const float **kernels, const float *bias, float *y) {
  const Shape s = shape(given);
  int enough = 1;
#pragma omp parallel num_threads(s.threads) reduction(&& : enough)
  {
    float *in = calloc(36 * s.block * (s.inputs + s.outputs) + 36 * s.inputs, sizeof(float)), *out = NULL, *copy = NULL;
    if (in) out = in + 36 * s.block * s.inputs, copy = out + 36 * s.block * s.outputs;
    else enough = 0;
#pragma omp for
    for (I first = 0; first < s.tiles; first += s.block) {
      if (!in) continue; /* all threads meet at this loop */
      const I some = least(s.block, s.tiles - first);
      for (I i = 0; i < count; i++) {
        inputs_to_basis(s, xs[i], first, some, in, copy);
        for (I p = 0; p < 36; p++)
          multiply((some + 1) / 2 * 2, s.outputs, s.inputs, in + p * s.block * s.inputs, s.inputs, 1,
                   kernels[i] + p * s.inputs * s.outputs, out + p * s.block * s.outputs, i > 0);
      }
      outputs_from_basis(s, out, first, some, bias, y);
    }
    free(in);
  }
  return enough;
}

/* The derivative of the sum of <ys[i], conv2d(xs[i], kernel)> by the kernel in its basis (36, inputs, outputs):
   sums (threads, 36, inputs, outputs), still to be added up. 0 if memory lacks. */
int correlate(const I *given, I count, const float **xs, const float **ys, float *sums) {
  const Shape s = shape(given);
  int enough = 1;
#pragma omp parallel for num_threads(s.threads) schedule(static, 1) reduction(&& : enough)
  for (I part = 0; part < s.threads; part++) {
    float *in = calloc(36 * (s.block + 1) * (s.inputs + s.outputs), sizeof(float));
    if (!in) {
      enough = 0;
      continue;
    }
    float *out = in + 36 * s.block * s.inputs, *copy = out + 36 * s.block * s.outputs;
    const I from = s.tiles * part / s.threads, until = s.tiles * (part + 1) / s.threads;
    memset(sums + part * 36 * s.inputs * s.outputs, 0, 36 * s.inputs * s.outputs * sizeof(float));
    for (I first = from; first < until; first += s.block)
      for (I i = 0; i < count; i++) {
        const I some = least(s.block, until - first);
        inputs_to_basis(s, xs[i], first, some, in, copy);
        outputs_to_basis(s, ys[i], first, some, out, copy);
        for (I p = 0; p < 36; p++)
          multiply(s.inputs, s.outputs, some, in + p * s.block * s.inputs, 1, s.inputs, out + p * s.block * s.outputs,
                   sums + (part * 36 + p) * s.inputs * s.outputs, 1);
      }
    free(in);
  }
  return enough;
}
