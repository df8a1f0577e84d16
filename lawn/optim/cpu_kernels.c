/* The constrained updates of cpu_kernels.py, compiled once with REAL float and once with double.

   A block is a set of tensors that share one norm c (nearly always one tensor): those from at[b] to at[b + 1]. Each
   function updates all blocks in three passes over their memory. The first computes the inner products that project the
   gradient, the second the moments and the inner products of their update r, the third the weights. The projected
   update is tangent, so the norm of the new weights follows from these inner products. Where w.w is zero, nothing can be
   projected; the weights do not change and zero[b] is set.

   Sums run in REAL within a chunk and in double over chunks.

   The last functions of this file are the stages of an update. Between them, the inner products that they return in
   `sums` are added over ranks, where weights are sharded. Their blocks may differ in all numbers: those of vectorized
   runs do. */

#include <float.h>
#include <math.h>
#include <stdint.h>

#define CHUNK 2048
#define SERIAL 32768 /* blocks with at most this many elements use one thread */

typedef struct {
    double ww, wr, rr;
} Dots;

/* Computes the factors of w <- keep w - take r, which projects r on the tangent space at w, multiplies it by the step
   and rescales the result to norm c. The step is lr, multiplied by c / ||r|| of the projected r if `trust` (LAMB).
   Returns whether digits cancel in the norm of the result, which then has to be rescaled once more. */
static int coefficients(Dots d, double c, double lr, int trust, double *keep, double *take) {
    double along = d.wr / d.ww;
    double tangent = d.rr - along * d.wr; /* infinite if squares of r overflow REAL: taken for 0, and rescaled after */
    tangent = tangent > 4 * DBL_EPSILON * d.rr ? tangent : 0.0; /* NEGLIGIBLE of update.py */
    double step = trust && tangent > 0 ? lr * c / sqrt(tangent) : lr;
    double square = d.ww + step * step * tangent;
    double scale = c / sqrt(square);
    *keep = scale * (1 + step * along);
    *take = scale * step;
    return step * step * d.rr > 8 * square; /* CANCELLATION of update.py */
}

/* Small blocks are distributed over threads; each large block uses all threads. */
#define EACH_BLOCK(BODY)                                                                                               \
    _Pragma("omp parallel for schedule(static) if (!alone(blocks, at, n))") for (int64_t b = 0; b < blocks; b++) {     \
        if (elements(at[b], at[b + 1], n) <= SERIAL)                                                                   \
            BODY;                                                                                                      \
    }                                                                                                                  \
    for (int64_t b = 0; b < blocks; b++) {                                                                             \
        if (elements(at[b], at[b + 1], n) > SERIAL)                                                                    \
            BODY;                                                                                                      \
    }

#define PRAGMA(TEXT) _Pragma(#TEXT)

/* Loops over tensor t. Large tensors use all threads. A parallel region with an if clause would enter OpenMP for small
   ones as well, which takes longer than the update of a short slice. */
#define EACH_CHUNK(SUMS, ...)                                                                                          \
    if (n[t] > SERIAL) {                                                                                               \
        PRAGMA(omp parallel for schedule(static) SUMS)                                                                 \
        for (int64_t start = 0; start < n[t]; start += CHUNK)                                                          \
            __VA_ARGS__                                                                                                \
    } else {                                                                                                           \
        for (int64_t start = 0; start < n[t]; start += CHUNK)                                                          \
            __VA_ARGS__                                                                                                \
    }

#define EACH_ELEMENT(...)                                                                                              \
    if (n[t] > SERIAL) {                                                                                               \
        PRAGMA(omp parallel for simd schedule(static))                                                                 \
        for (int64_t i = 0; i < n[t]; i++)                                                                             \
            __VA_ARGS__                                                                                                \
    } else {                                                                                                           \
        PRAGMA(omp simd)                                                                                               \
        for (int64_t i = 0; i < n[t]; i++)                                                                             \
            __VA_ARGS__                                                                                                \
    }

static int64_t elements(int64_t from, int64_t to, const int64_t *n) {
    int64_t sum = 0;
    for (int64_t t = from; t < to; t++)
        sum += n[t];
    return sum;
}

/* Whether one thread updates all small blocks. */
static int alone(int64_t blocks, const int64_t *at, const int64_t *n) {
    int64_t small = 0;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t k = elements(at[b], at[b + 1], n);
        small += k <= SERIAL ? k : 0;
    }
    return small <= SERIAL;
}

/* Computes w.w and, as `wr`, w.g. */
static Dots gradient_dots(int64_t from, int64_t to, REAL **w, REAL **g, const int64_t *n) {
    double ww = 0, wg = 0;
    for (int64_t t = from; t < to; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        EACH_CHUNK(reduction(+ : ww, wg), {
            int64_t end = start + CHUNK < n[t] ? start + CHUNK : n[t];
            REAL sww = 0, swg = 0;
            _Pragma("omp simd reduction(+ : sww, swg)")
            for (int64_t i = start; i < end; i++) {
                sww += wt[i] * wt[i];
                swg += wt[i] * gt[i];
            }
            ww += sww;
            wg += swg;
        })
    }
    return (Dots){ww, wg, 0};
}

/* Rescales the weights to norm c, unless they are zero. */
static void rescale(int64_t from, int64_t to, REAL **w, const int64_t *n, double c) {
    double ww = 0;
    for (int64_t t = from; t < to; t++)
        for (int64_t i = 0; i < n[t]; i++)
            ww += (double)w[t][i] * w[t][i];
    if (ww == 0)
        return;
    const double a = c / sqrt(ww);
    for (int64_t t = from; t < to; t++)
        for (int64_t i = 0; i < n[t]; i++)
            w[t][i] = a * w[t][i];
}

static Dots adam_moments(int64_t from, int64_t to, REAL **w, REAL **g, REAL **m, REAL **v, const int64_t *n,
                         double share, double beta1, double beta2, double eps_, double mscale_, double vscale_) {
    const REAL b1 = beta1, b2 = beta2, a1 = 1 - beta1, a2 = 1 - beta2, eps = eps_, mscale = mscale_, vscale = vscale_;
    const REAL along = share;
    double ww = 0, wr = 0, rr = 0;
    for (int64_t t = from; t < to; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        REAL *restrict mt = m[t], *restrict vt = v[t];
        EACH_CHUNK(reduction(+ : ww, wr, rr), {
            int64_t end = start + CHUNK < n[t] ? start + CHUNK : n[t];
            REAL sww = 0, swr = 0, srr = 0;
            _Pragma("omp simd reduction(+ : sww, swr, srr)")
            for (int64_t i = start; i < end; i++) {
                REAL p = gt[i] - along * wt[i];
                REAL mi = b1 * mt[i] + a1 * p;
                REAL vi = b2 * vt[i] + a2 * p * p;
                REAL r = mi / (SQRT(vi) * vscale + eps) * mscale;
                mt[i] = mi;
                vt[i] = vi;
                sww += wt[i] * wt[i];
                swr += wt[i] * r;
                srr += r * r;
            }
            ww += sww;
            wr += swr;
            rr += srr;
        })
    }
    return (Dots){ww, wr, rr};
}

static void adam_weights(int64_t from, int64_t to, REAL **w, REAL **m, REAL **v, const int64_t *n, double keep,
                         double take, double eps_, double mscale_, double vscale_) {
    const REAL eps = eps_, mscale = mscale_, vscale = vscale_, a = keep, b = take * mscale;
    for (int64_t t = from; t < to; t++) {
        REAL *restrict wt = w[t];
        const REAL *restrict mt = m[t], *restrict vt = v[t];
        EACH_ELEMENT(wt[i] = a * wt[i] - b * mt[i] / (SQRT(vt[i]) * vscale + eps);)
    }
}

static void adam_block(int64_t from, int64_t to, REAL **w, REAL **g, REAL **m, REAL **v, const int64_t *n, double c,
                       double lr, double beta1, double beta2, double eps, double mscale, double vscale, int trust,
                       uint8_t *zero) {
    Dots d = gradient_dots(from, to, w, g, n);
    if ((*zero = d.ww == 0))
        return;
    double keep, take;
    d = adam_moments(from, to, w, g, m, v, n, d.wr / d.ww, beta1, beta2, eps, mscale, vscale);
    int again = coefficients(d, c, lr, trust, &keep, &take);
    adam_weights(from, to, w, m, v, n, keep, take, eps, mscale, vscale);
    if (again)
        rescale(from, to, w, n, c);
}

/* r = m / (sqrt(v) * vscale + eps) * mscale with the bias corrections mscale and vscale of each block. */
void adam(int64_t blocks, const int64_t *at, const int64_t *n, const double *c, uint8_t *zero, REAL **w, REAL **g,
          REAL **m, REAL **v, const double *mscale, const double *vscale, double lr, double beta1, double beta2,
          double eps, int trust) {
    EACH_BLOCK(adam_block(at[b], at[b + 1], w, g, m, v, n, c[b], lr, beta1, beta2, eps, mscale[b], vscale[b], trust,
                          zero + b))
}

static Dots sgd_buffers(int64_t from, int64_t to, REAL **w, REAL **g, REAL **m, const int64_t *n, double share,
                        double momentum) {
    const REAL mu = momentum, along = share;
    double ww = 0, wr = 0, rr = 0;
    for (int64_t t = from; t < to; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        REAL *restrict mt = m[t];
        EACH_CHUNK(reduction(+ : ww, wr, rr), {
            int64_t end = start + CHUNK < n[t] ? start + CHUNK : n[t];
            REAL sww = 0, swr = 0, srr = 0;
            _Pragma("omp simd reduction(+ : sww, swr, srr)")
            for (int64_t i = start; i < end; i++) {
                REAL r = mu * mt[i] + (gt[i] - along * wt[i]);
                mt[i] = r;
                sww += wt[i] * wt[i];
                swr += wt[i] * r;
                srr += r * r;
            }
            ww += sww;
            wr += swr;
            rr += srr;
        })
    }
    return (Dots){ww, wr, rr};
}

static void sgd_weights(int64_t from, int64_t to, REAL **w, REAL **m, const int64_t *n, double keep, double take) {
    const REAL a = keep, b = take;
    for (int64_t t = from; t < to; t++) {
        REAL *restrict wt = w[t];
        const REAL *restrict mt = m[t];
        EACH_ELEMENT(wt[i] = a * wt[i] - b * mt[i];)
    }
}

static void sgd_block(int64_t from, int64_t to, REAL **w, REAL **g, REAL **m, const int64_t *n, double c, double lr,
                      double momentum, uint8_t *zero) {
    Dots d = gradient_dots(from, to, w, g, n);
    if ((*zero = d.ww == 0))
        return;
    double keep, take;
    d = sgd_buffers(from, to, w, g, m, n, d.wr / d.ww, momentum);
    int again = coefficients(d, c, lr, 0, &keep, &take);
    sgd_weights(from, to, w, m, n, keep, take);
    if (again)
        rescale(from, to, w, n, c);
}

/* Heavy ball: b <- momentum b + g, r = b. */
void sgd(int64_t blocks, const int64_t *at, const int64_t *n, const double *c, uint8_t *zero, REAL **w, REAL **g,
         REAL **m, double lr, double momentum) {
    EACH_BLOCK(sgd_block(at[b], at[b + 1], w, g, m, n, c[b], lr, momentum, zero + b))
}

static void tangent_block(int64_t from, int64_t to, REAL **w, REAL **g, REAL **before, REAL **out, const int64_t *n,
                          double share) {
    const REAL along = share;
    for (int64_t t = from; t < to; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        REAL *restrict bt = before[t], *restrict ot = out[t];
        EACH_ELEMENT({
            bt[i] = wt[i];
            ot[i] = gt[i] - along * wt[i];
        })
    }
}

static void project_block(int64_t from, int64_t to, REAL **w, REAL **g, REAL **before, REAL **out, const int64_t *n) {
    Dots d = gradient_dots(from, to, w, g, n);
    tangent_block(from, to, w, g, before, out, n, d.ww == 0 ? 0 : d.wr / d.ww);
}

/* Before a step of the base optimizer: copies w to before and writes the projected gradient to out. */
void project(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, REAL **before, REAL **out) {
    EACH_BLOCK(project_block(at[b], at[b + 1], w, g, before, out, n))
}

static Dots difference_dots(int64_t from, int64_t to, REAL **w, REAL **before, const int64_t *n) {
    double ww = 0, wr = 0, rr = 0;
    for (int64_t t = from; t < to; t++) {
        const REAL *restrict wt = w[t], *restrict bt = before[t];
        EACH_CHUNK(reduction(+ : ww, wr, rr), {
            int64_t end = start + CHUNK < n[t] ? start + CHUNK : n[t];
            REAL sww = 0, swr = 0, srr = 0;
            _Pragma("omp simd reduction(+ : sww, swr, srr)")
            for (int64_t i = start; i < end; i++) {
                REAL r = bt[i] - wt[i];
                sww += bt[i] * bt[i];
                swr += bt[i] * r;
                srr += r * r;
            }
            ww += sww;
            wr += swr;
            rr += srr;
        })
    }
    return (Dots){ww, wr, rr};
}

static void combine_block(int64_t from, int64_t to, REAL **w, REAL **before, const int64_t *n, double keep,
                          double take) {
    const REAL a = keep, b = take;
    for (int64_t t = from; t < to; t++) {
        REAL *restrict wt = w[t];
        const REAL *restrict bt = before[t];
        EACH_ELEMENT(wt[i] = a * bt[i] - b * (bt[i] - wt[i]);)
    }
}

static void retract_block(int64_t from, int64_t to, REAL **w, REAL **before, const int64_t *n, double c,
                          uint8_t *zero) {
    double keep, take;
    Dots d = difference_dots(from, to, w, before, n);
    *zero = d.ww == 0;
    int again = coefficients(d, c, 1.0, 0, &keep, &take);
    combine_block(from, to, w, before, n, *zero ? 1 : keep, *zero ? 0 : take);
    if (again && !*zero)
        rescale(from, to, w, n, c);
}

/* After a step of the base optimizer: projects its update before - w at before, applies it and rescales to norm c. */
void retract(int64_t blocks, const int64_t *at, const int64_t *n, const double *c, uint8_t *zero, REAL **w,
             REAL **before) {
    EACH_BLOCK(retract_block(at[b], at[b + 1], w, before, n, c[b], zero + b))
}

static void store(double *sums, double first, double second) {
    sums[0] = first;
    sums[1] = second;
}

/* w.w and w.g of each block. */
void products(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, double *sums) {
    EACH_BLOCK({
        Dots d = gradient_dots(at[b], at[b + 1], w, g, n);
        store(sums + 2 * b, d.ww, d.wr);
    })
}

/* The moments of `adam`, with w.g / w.w of each whole weight in `along`; then w.r and r.r. */
void adam_advance(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, REAL **m, REAL **v,
                  const double *along, const double *mscale, const double *vscale, const double *beta1,
                  const double *beta2, const double *eps, double *sums) {
    EACH_BLOCK({
        Dots d = adam_moments(at[b], at[b + 1], w, g, m, v, n, along[b], beta1[b], beta2[b], eps[b], mscale[b],
                              vscale[b]);
        store(sums + 2 * b, d.wr, d.rr);
    })
}

/* w <- keep w - take r. */
void adam_move(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, REAL **m, REAL **v,
               const double *keep, const double *take, const double *mscale, const double *vscale, const double *eps) {
    EACH_BLOCK(adam_weights(at[b], at[b + 1], w, m, v, n, keep[b], take[b], eps[b], mscale[b], vscale[b]))
}

/* The same two of `sgd`. */
void sgd_advance(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, REAL **m,
                 const double *along, const double *momentum, double *sums) {
    EACH_BLOCK({
        Dots d = sgd_buffers(at[b], at[b + 1], w, g, m, n, along[b], momentum[b]);
        store(sums + 2 * b, d.wr, d.rr);
    })
}

void sgd_move(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, REAL **m, const double *keep,
              const double *take) {
    EACH_BLOCK(sgd_weights(at[b], at[b + 1], w, m, n, keep[b], take[b]))
}

/* `project` with w.g / w.w of each whole weight. */
void tangents(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **g, REAL **before, REAL **out,
              const double *along) {
    EACH_BLOCK(tangent_block(at[b], at[b + 1], w, g, before, out, n, along[b]))
}

/* The two stages of `retract`: w.r and r.r; then w <- keep before - take r. */
void differences(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **before, double *sums) {
    EACH_BLOCK({
        Dots d = difference_dots(at[b], at[b + 1], w, before, n);
        store(sums + 2 * b, d.wr, d.rr);
    })
}

void combine(int64_t blocks, const int64_t *at, const int64_t *n, REAL **w, REAL **before, const double *keep,
             const double *take) {
    EACH_BLOCK(combine_block(at[b], at[b + 1], w, before, n, keep[b], take[b]))
}
