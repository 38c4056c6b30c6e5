/* Attention, its tangent, its gradient and the tangent of that, a tile of the scores at a time.

   Notation as in ../fused/tiles.py: S = scale q k' + mask, lse its log-sum-exp by row, P = exp(S - lse), o = P v;
   tangents begin with d. A thread takes a head, and in it one tile after another through all steps, while the tile is in
   its cache. Depths are multiples of the lanes of a register. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __clang__
const char *const compiled_by = __VERSION__; /* Clang says its name there */
#else
const char *const compiled_by = "gcc " __VERSION__;
#endif

#ifdef __AVX512F__
enum { LANES = 16, HIGH = 6, WIDE = 4 }; /* of a product, the registers hold HIGH rows of WIDE vectors */
#else
enum { LANES = 8, HIGH = 6, WIDE = 2 };
#endif
enum { ROWS = 48, COLUMNS = 64 }; /* of a tile */
typedef int64_t I;
typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t N __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(p) (*(V *)(p))
#define TILE(name) float name[ROWS * COLUMNS] __attribute__((aligned(64)))

typedef struct {
  float *at; /* missing where it is NULL */
  I sample, head, row, column;
} Tensor; /* of samples, heads, rows and columns: how far they are from each other */

typedef struct {
  float *at;
  I row, column;
} Matrix; /* of one head */

/* What a call is given, in this order. G is the derivative by the output; GQ, GK and GV are those by q, k and v. */
enum { Q, K, VALUES, MASK, OUT, LSE, DQ, DK, DV, DOUT, DLSE, G, DG, GQ, GK, GV, DGQ, DGK, DGV, COUNT };

typedef struct {
  I samples, heads, rows, columns, depth, out_depth, causal, threads; /* depth is of q and k, out_depth of v */
} Shape;

static inline I least(I a, I b) { return a < b ? a : b; }

static void matrices(const Tensor *t, Shape s, I index, Matrix *m) {
  const I sample = index / s.heads, head = index % s.heads;
  for (int i = 0; i < COUNT; i++)
    m[i] = (Matrix){t[i].at ? t[i].at + sample * t[i].sample + head * t[i].head : NULL, t[i].row, t[i].column};
}

static inline float *from(Matrix x, I row) { return x.at + row * x.row; }

static void clear(Matrix x, I rows, I columns) {
  for (I i = 0; i < rows; i++) memset(from(x, i), 0, columns * sizeof(float));
}

static inline float sum_of(V x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

static float dot(const float *x, const float *y, I n) {
  V sum = {0};
  for (I j = 0; j < n; j += LANES) sum += AT(x + j) * AT(y + j);
  return sum_of(sum);
}

/* d[i][j] (+)= sum over k of a[i][k] b[k][j], in blocks that the registers hold. */
#define BLOCK(NAME, HIGH, WIDE)                                                                                        \
  static inline void NAME(I k, const float *a, I ai, I ak, const float *b, I bk, float *d, I di, int more) {           \
    V sum[HIGH][WIDE], line[WIDE];                                                                                     \
    for (int i = 0; i < HIGH; i++)                                                                                     \
      for (int j = 0; j < WIDE; j++) sum[i][j] = (V){0};                                                               \
    for (I l = 0; l < k; l++) {                                                                                        \
      for (int j = 0; j < WIDE; j++) line[j] = AT(b + l * bk + j * LANES);                                             \
      for (int i = 0; i < HIGH; i++) {                                                                                 \
        const V one = a[i * ai + l * ak] - (V){0};                                                                     \
        for (int j = 0; j < WIDE; j++) sum[i][j] += one * line[j];                                                     \
      }                                                                                                                \
    }                                                                                                                  \
    for (int i = 0; i < HIGH; i++)                                                                                     \
      for (int j = 0; j < WIDE; j++) AT(d + i * di + j * LANES) = sum[i][j] + (more ? AT(d + i * di + j * LANES) : (V){0});\
  }
BLOCK(six_by_many, HIGH, WIDE)
BLOCK(two_by_many, 2, WIDE)
BLOCK(one_by_many, 1, WIDE)
BLOCK(two_by_one, 2, 1)
BLOCK(one_by_one, 1, 1)

static void multiply(I m, I n, I k, const float *a, I ai, I ak, const float *b, I bk, float *d, I di, int more) {
  for (I j = 0; j < n;) {
    const int many = j + WIDE * LANES <= n;
    I i = 0;
    for (; many && i + HIGH <= m; i += HIGH) six_by_many(k, a + i * ai, ai, ak, b + j, bk, d + i * di + j, di, more);
    for (; i + 2 <= m; i += 2)
      (many ? two_by_many : two_by_one)(k, a + i * ai, ai, ak, b + j, bk, d + i * di + j, di, more);
    if (i < m) (many ? one_by_many : one_by_one)(k, a + i * ai, ai, ak, b + j, bk, d + i * di + j, di, more);
    j += many ? WIDE * LANES : LANES;
  }
}

/* exp(x) to within two units of the last place, for x <= 88; 0 below -87. */
static inline V exponential(V x) {
  const V whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f, low = (V){0} - 87.0f; /* the nearest integer */
  const V rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;                  /* ln 2 in two parts */
  V y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const N power = (__builtin_convertvector(whole, N) + 127) << 23;
  return (V)((N)(y * (V)power) & ~(N)(x < low));
}

static float log_sum_exp(const float *x, I n) {
  V top = AT(x), sum = {0};
  for (I j = LANES; j < n; j += LANES) {
    const N above = (N)(AT(x + j) > top);
    top = (V)(((N)AT(x + j) & above) | ((N)top & ~above));
  }
  float highest = top[0];
  for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
  if (highest == -INFINITY) return INFINITY; /* so that all weights are 0 */
  for (I j = 0; j < n; j += LANES) sum += exponential(AT(x + j) - highest);
  return highest + logf(sum_of(sum));
}

static inline I padded(I columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* x' times a factor, with zeros beyond the last of its columns, of which there are whole tiles. */
static void transpose(Matrix x, I rows, I columns, float factor, float *y) {
  const I line = padded(rows);
  for (I first = 0; first < line; first += COLUMNS)
    for (I l = 0; l < columns; l++)
      for (I j = first; j < first + COLUMNS; j++) y[l * line + j] = j < rows ? factor * from(x, j)[l] : 0;
}

/* (q, dq) (k, dk)' for a tangent, as a tile. */
static inline void of_pair(I some, I depth, const float *q, I qi, const float *dq, I dqi, const float *kt,
                           const float *dkt, I line, float *tile) {
  multiply(some, COLUMNS, depth, dq, dqi, 1, kt, line, tile, COLUMNS, 0);
  multiply(some, COLUMNS, depth, q, qi, 1, dkt, line, tile, COLUMNS, 1);
}

/* Some rows from `row` of a tile of the scores, minus infinity where a row does not see a column. */
static void scores(Shape s, const Matrix *m, const float *kt, I row, I some, I column, float *x, I line) {
  multiply(some, COLUMNS, s.depth, from(m[Q], row), m[Q].row, 1, kt + column, padded(s.columns), x, line, 0);
  for (I i = 0; i < some; i++) {
    I seen = least(COLUMNS, s.columns - column);
    if (s.causal) seen = least(seen, row + i + 1 > column ? row + i + 1 - column : 0);
    if (m[MASK].at)
      for (I j = 0; j < seen; j++) x[i * line + j] += from(m[MASK], row + i)[(column + j) * m[MASK].column];
    for (I j = seen; j < COLUMNS; j++) x[i * line + j] = -INFINITY;
  }
}

static inline I end(Shape s, I row, I some) { return s.causal ? least(s.columns, row + some) : s.columns; }

/* Of one head; returns 0 if there is no memory. */
static int outputs(Shape s, float scale, int known, const Matrix *m) {
  const I e = s.out_depth, whole = padded(s.columns), line = known ? COLUMNS : whole;
  const int tangent = m[DK].at != NULL;
  float *const kt = malloc((2 * s.depth * whole + ROWS * line) * sizeof(float));
  if (!kt) return 0;
  float *const dkt = kt + s.depth * whole, *const weights = dkt + s.depth * whole;
  transpose(m[K], s.columns, s.depth, scale, kt);
  if (tangent) transpose(m[DK], s.columns, s.depth, scale, dkt);
  for (I row = 0; row < s.rows; row += ROWS) {
    const I some = least(ROWS, s.rows - row), until = end(s, row, some);
    float *const out = from(m[OUT], row);
    float *const dout = tangent ? from(m[DOUT], row) : NULL;
    float lse[ROWS], dlse[ROWS];
    if (!known) {
      for (I c = 0; c < until; c += COLUMNS) scores(s, m, kt, row, some, c, weights + c, line);
      for (I i = 0; i < some; i++) *from(m[LSE], row + i) = log_sum_exp(weights + i * line, padded(until));
    }
    for (I i = 0; i < some; i++) lse[i] = *from(m[LSE], row + i), dlse[i] = 0;
    for (I c = 0; c < until; c += COLUMNS) {
      const I wide = least(COLUMNS, s.columns - c);
      float *const w = known ? weights : weights + c;
      TILE(change);
      if (known) scores(s, m, kt, row, some, c, w, line);
      for (I i = 0; i < some; i++)
        for (I j = i * line; j < i * line + COLUMNS; j += LANES) AT(w + j) = exponential(AT(w + j) - lse[i]);
      if (!known) multiply(some, e, wide, w, line, 1, from(m[VALUES], c), m[VALUES].row, out, m[OUT].row, c > 0);
      if (!tangent) continue;
      of_pair(some, s.depth, from(m[Q], row), m[Q].row, from(m[DQ], row), m[DQ].row, kt + c, dkt + c, whole, change);
      for (I i = 0; i < some; i++) {
        V sum = {0};
        for (I j = 0; j < COLUMNS; j += LANES) sum += AT(change + i * COLUMNS + j) *= AT(w + i * line + j);
        dlse[i] += sum_of(sum);
      }
      multiply(some, e, wide, change, COLUMNS, 1, from(m[VALUES], c), m[VALUES].row, dout, m[DOUT].row, c > 0);
      multiply(some, e, wide, w, line, 1, from(m[DV], c), m[DV].row, dout, m[DOUT].row, 1);
    }
    for (I i = 0; tangent && i < some; i++) {
      *from(m[DLSE], row + i) = dlse[i];
      for (I j = 0; j < e; j++) dout[i * m[DOUT].row + j] -= dlse[i] * out[i * m[OUT].row + j];
    }
  }
  free(kt);
  return 1;
}

static int gradients(Shape s, float scale, const Matrix *m) {
  const I d = s.depth, e = s.out_depth, whole = padded(s.columns);
  const int plain = m[GQ].at != NULL, tangent = m[DGQ].at != NULL;
  float *const kt = malloc(2 * (d + e) * whole * sizeof(float));
  if (!kt) return 0;
  float *const vt = kt + d * whole, *const dkt = vt + e * whole, *const dvt = dkt + d * whole;
  transpose(m[K], s.columns, d, scale, kt);
  transpose(m[VALUES], s.columns, e, 1, vt);
  if (plain) clear(m[GK], s.columns, d), clear(m[GV], s.columns, e);
  if (tangent) {
    transpose(m[DK], s.columns, d, scale, dkt);
    transpose(m[DV], s.columns, e, 1, dvt);
    clear(m[DGK], s.columns, d), clear(m[DGV], s.columns, e);
  }
  for (I row = 0; row < s.rows; row += ROWS) {
    const I some = least(ROWS, s.rows - row), until = end(s, row, some);
    const float *const q = from(m[Q], row), *const g = from(m[G], row);
    const float *const dq = from(m[DQ], row), *const dg = from(m[DG], row);
    float lse[ROWS], dlse[ROWS], along[ROWS], dalong[ROWS];
    for (I i = 0; i < some; i++) {
      const float *const out = from(m[OUT], row + i), *const here = g + i * m[G].row;
      along[i] = dot(here, out, e), lse[i] = *from(m[LSE], row + i);
      if (tangent) dlse[i] = *from(m[DLSE], row + i), dalong[i] = dot(dg + i * m[DG].row, out, e) + dot(here, from(m[DOUT], row + i), e);
    }
    for (I c = 0; c < until; c += COLUMNS) {
      const I wide = least(COLUMNS, s.columns - c);
      const float *const k = from(m[K], c);
      TILE(weights);
      TILE(by); /* the derivative by the scores */
      TILE(change);
      TILE(dby);
      scores(s, m, kt, row, some, c, weights, COLUMNS);
      multiply(some, COLUMNS, e, g, m[G].row, 1, vt + c, whole, by, COLUMNS, 0);
      if (tangent) {
        of_pair(some, d, q, m[Q].row, dq, m[DQ].row, kt + c, dkt + c, whole, change);
        of_pair(some, e, g, m[G].row, dg, m[DG].row, vt + c, dvt + c, whole, dby);
      }
      for (I i = 0; i < some; i++)
        for (I j = i * COLUMNS; j < (i + 1) * COLUMNS; j += LANES) {
          const V w = AT(weights + j) = exponential(AT(weights + j) - lse[i]), b = AT(by + j) - along[i];
          AT(by + j) = b * w * scale;
          if (!tangent) continue;
          const V relative = AT(change + j) - dlse[i];
          AT(dby + j) = (AT(dby + j) - dalong[i] + relative * b) * w * scale;
          AT(change + j) = relative * w;
        }
      if (plain) {
        multiply(some, d, wide, by, COLUMNS, 1, k, m[K].row, from(m[GQ], row), m[GQ].row, c > 0);
        multiply(wide, d, some, by, 1, COLUMNS, q, m[Q].row, from(m[GK], c), m[GK].row, 1);
        multiply(wide, e, some, weights, 1, COLUMNS, g, m[G].row, from(m[GV], c), m[GV].row, 1);
      }
      if (tangent) {
        multiply(some, d, wide, dby, COLUMNS, 1, k, m[K].row, from(m[DGQ], row), m[DGQ].row, c > 0);
        multiply(some, d, wide, by, COLUMNS, 1, from(m[DK], c), m[DK].row, from(m[DGQ], row), m[DGQ].row, 1);
        multiply(wide, d, some, dby, 1, COLUMNS, q, m[Q].row, from(m[DGK], c), m[DGK].row, 1);
        multiply(wide, d, some, by, 1, COLUMNS, dq, m[DQ].row, from(m[DGK], c), m[DGK].row, 1);
        multiply(wide, e, some, change, 1, COLUMNS, g, m[G].row, from(m[DGV], c), m[DGV].row, 1);
        multiply(wide, e, some, weights, 1, COLUMNS, dg, m[DG].row, from(m[DGV], c), m[DGV].row, 1);
      }
    }
  }
  free(kt);
  return 1;
}

/* What is not missing of: the output and the log-sum-exp, unless these are known; their tangents; the gradient of
   <g, out> by q, k and v, and its tangent. Returns 0 if there is no memory. */
int attention(const I *shape, float scale, int known, const Tensor *given) {
  Shape s;
  memcpy(&s, shape, sizeof s);
  int enough = 1;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic) reduction(&& : enough)
  for (I head = 0; head < s.samples * s.heads; head++) {
    Matrix m[COUNT];
    matrices(given, s, head, m);
    if (!(m[G].at ? gradients(s, scale, m) : outputs(s, scale, known, m))) enough = 0;
  }
  return enough;
}
