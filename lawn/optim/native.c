/* The constrained updates of native.py, compiled once with REAL float and once with double.

   A block is a set of k tensors that share one norm c (nearly always k = 1). Every function makes three passes over
   its memory: the dot products that project the gradient; the moments, and the dot products of the update r they
   give; the move. The projected update is tangent, so the norm after the move is known before it is made.

   Sums run in REAL over a chunk and in double over the chunks. */

#include <math.h>
#include <stdint.h>

#define CHUNK 2048
#define SERIAL 32768 /* below that many elements threads cost more than they give */

typedef struct {
    double ww, wr, rr;
} Dots;

/* w <- keep w - take r with keep and take such that r is projected on the tangent space at w, multiplied by the step,
   and the outcome has norm c. The step is lr, times c / ||r|| of the projected r if `trust` (LAMB). */
static void coefficients(Dots d, double c, double lr, int trust, double *keep, double *take) {
    double along = d.wr / d.ww;
    double tangent = fmax(d.rr - along * d.wr, 0.0);
    double step = trust && tangent > 0 ? lr * c / sqrt(tangent) : lr;
    double scale = c / sqrt(d.ww + step * step * tangent);
    *keep = scale * (1 + step * along);
    *take = scale * step;
}

static double gradient_along(int k, REAL **w, REAL **g, const int64_t *n) {
    double ww = 0, wg = 0;
    for (int t = 0; t < k; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
#pragma omp parallel for schedule(static) reduction(+ : ww, wg) if (n[t] > SERIAL)
        for (int64_t at = 0; at < n[t]; at += CHUNK) {
            int64_t end = at + CHUNK < n[t] ? at + CHUNK : n[t];
            REAL sww = 0, swg = 0;
#pragma omp simd reduction(+ : sww, swg)
            for (int64_t i = at; i < end; i++) {
                sww += wt[i] * wt[i];
                swg += wt[i] * gt[i];
            }
            ww += sww;
            wg += swg;
        }
    }
    return wg / ww;
}

/* r = m / (sqrt(v) * vscale + eps) * mscale, with the bias corrections in mscale and vscale */
void adam(int k, REAL **w, REAL **g, REAL **m, REAL **v, const int64_t *n, double c, double lr, double beta1,
          double beta2, double eps_, double mscale_, double vscale_, int trust) {
    const REAL b1 = beta1, b2 = beta2, a1 = 1 - beta1, a2 = 1 - beta2, eps = eps_, mscale = mscale_, vscale = vscale_;
    const REAL along = gradient_along(k, w, g, n);
    double ww = 0, wr = 0, rr = 0, keep, take;
    for (int t = 0; t < k; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        REAL *restrict mt = m[t], *restrict vt = v[t];
#pragma omp parallel for schedule(static) reduction(+ : ww, wr, rr) if (n[t] > SERIAL)
        for (int64_t at = 0; at < n[t]; at += CHUNK) {
            int64_t end = at + CHUNK < n[t] ? at + CHUNK : n[t];
            REAL sww = 0, swr = 0, srr = 0;
#pragma omp simd reduction(+ : sww, swr, srr)
            for (int64_t i = at; i < end; i++) {
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
        }
    }
    coefficients((Dots){ww, wr, rr}, c, lr, trust, &keep, &take);
    const REAL a = keep, b = take * mscale;
    for (int t = 0; t < k; t++) {
        REAL *restrict wt = w[t];
        const REAL *restrict mt = m[t], *restrict vt = v[t];
#pragma omp parallel for simd schedule(static) if (n[t] > SERIAL)
        for (int64_t i = 0; i < n[t]; i++)
            wt[i] = a * wt[i] - b * mt[i] / (SQRT(vt[i]) * vscale + eps);
    }
}

/* heavy ball: b <- momentum b + g, r = b */
void sgd(int k, REAL **w, REAL **g, REAL **m, const int64_t *n, double c, double lr, double momentum) {
    const REAL mu = momentum;
    const REAL along = gradient_along(k, w, g, n);
    double ww = 0, wr = 0, rr = 0, keep, take;
    for (int t = 0; t < k; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        REAL *restrict mt = m[t];
#pragma omp parallel for schedule(static) reduction(+ : ww, wr, rr) if (n[t] > SERIAL)
        for (int64_t at = 0; at < n[t]; at += CHUNK) {
            int64_t end = at + CHUNK < n[t] ? at + CHUNK : n[t];
            REAL sww = 0, swr = 0, srr = 0;
#pragma omp simd reduction(+ : sww, swr, srr)
            for (int64_t i = at; i < end; i++) {
                REAL r = mu * mt[i] + (gt[i] - along * wt[i]);
                mt[i] = r;
                sww += wt[i] * wt[i];
                swr += wt[i] * r;
                srr += r * r;
            }
            ww += sww;
            wr += swr;
            rr += srr;
        }
    }
    coefficients((Dots){ww, wr, rr}, c, lr, 0, &keep, &take);
    const REAL a = keep, b = take;
    for (int t = 0; t < k; t++) {
        REAL *restrict wt = w[t];
        const REAL *restrict mt = m[t];
#pragma omp parallel for simd schedule(static) if (n[t] > SERIAL)
        for (int64_t i = 0; i < n[t]; i++)
            wt[i] = a * wt[i] - b * mt[i];
    }
}

/* For the wrapper, before the base optimizer's step: copy w to before and put the projected gradient into out. */
void project(int k, REAL **w, REAL **g, REAL **before, REAL **out, const int64_t *n) {
    const REAL along = gradient_along(k, w, g, n);
    for (int t = 0; t < k; t++) {
        const REAL *restrict wt = w[t], *restrict gt = g[t];
        REAL *restrict bt = before[t], *restrict ot = out[t];
#pragma omp parallel for simd schedule(static) if (n[t] > SERIAL)
        for (int64_t i = 0; i < n[t]; i++) {
            bt[i] = wt[i];
            ot[i] = gt[i] - along * wt[i];
        }
    }
}

/* After it: the update r = before - w is projected at before, taken, and rescaled to norm c. */
void retract(int k, REAL **w, REAL **before, const int64_t *n, double c) {
    double ww = 0, wr = 0, rr = 0, keep, take;
    for (int t = 0; t < k; t++) {
        const REAL *restrict wt = w[t], *restrict bt = before[t];
#pragma omp parallel for schedule(static) reduction(+ : ww, wr, rr) if (n[t] > SERIAL)
        for (int64_t at = 0; at < n[t]; at += CHUNK) {
            int64_t end = at + CHUNK < n[t] ? at + CHUNK : n[t];
            REAL sww = 0, swr = 0, srr = 0;
#pragma omp simd reduction(+ : sww, swr, srr)
            for (int64_t i = at; i < end; i++) {
                REAL r = bt[i] - wt[i];
                sww += bt[i] * bt[i];
                swr += bt[i] * r;
                srr += r * r;
            }
            ww += sww;
            wr += swr;
            rr += srr;
        }
    }
    coefficients((Dots){ww, wr, rr}, c, 1.0, 0, &keep, &take);
    const REAL a = keep, b = take;
    for (int t = 0; t < k; t++) {
        REAL *restrict wt = w[t];
        const REAL *restrict bt = before[t];
#pragma omp parallel for simd schedule(static) if (n[t] > SERIAL)
        for (int64_t i = 0; i < n[t]; i++)
            wt[i] = a * bt[i] - b * (bt[i] - wt[i]);
    }
}
