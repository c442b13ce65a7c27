/* One pass of gRDA over memory: v -= lr * gradient, w = v - clamp(v, -g, g). Compiled on first
 * use by grda_fused.py. The floor in memory traffic is two reads and two writes; an ordinary
 * store would also read the line of w that it replaces, so large weights are written past the
 * cache. */
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { LINE = 64, BUFFER = 4096 };

static void past_the_cache(char *to, const char *from, int64_t bytes) {
#ifdef __SSE2__
    for (; bytes >= 16; bytes -= 16, to += 16, from += 16)
        _mm_stream_si128((__m128i *)to, _mm_load_si128((const __m128i *)from));
#endif
    memcpy(to, from, bytes);
}

static void finish_stores(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* The thread `t` of `threads` takes the elements from total * t / threads on, so that all have
 * the same work however the tensors are sized. */
#define DEFINE_STEP(NAME, REAL)                                                                   \
    static void NAME##_run(int64_t n, REAL *restrict w, REAL *restrict v,                         \
                           const REAL *restrict d, REAL lr, REAL g) {                             \
        for (int64_t i = 0; i < n; i++) {                                                         \
            REAL x = v[i] - lr * d[i];                                                            \
            REAL c = x > g ? g : x;                                                               \
            c = c < -g ? -g : c;                                                                  \
            v[i] = x;                                                                             \
            w[i] = x - c;                                                                         \
        }                                                                                         \
    }                                                                                             \
    static void NAME##_stream(int64_t n, REAL *restrict w, REAL *restrict v,                      \
                              const REAL *restrict d, REAL lr, REAL g) {                          \
        const int64_t most = BUFFER / sizeof(REAL);                                               \
        REAL buffer[BUFFER / sizeof(REAL)] __attribute__((aligned(LINE)));                        \
        int64_t i = (int64_t)(-(uintptr_t)w % LINE / sizeof(REAL));                               \
        if (i > n) i = n;                                                                         \
        NAME##_run(i, w, v, d, lr, g);                                                            \
        for (; i < n; i += most) {                                                                \
            int64_t m = n - i < most ? n - i : most;                                              \
            NAME##_run(m, buffer, v + i, d + i, lr, g);                                           \
            past_the_cache((char *)(w + i), (const char *)buffer, m * (int64_t)sizeof(REAL));     \
        }                                                                                         \
    }                                                                                             \
    void NAME(int64_t count, const int64_t *sizes, REAL **w, REAL **v, REAL **d, double lr,       \
              double g, int stream, int threads) {                                                \
        int64_t total = 0;                                                                        \
        for (int64_t k = 0; k < count; k++) total += sizes[k];                                    \
        _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")                      \
        for (int t = 0; t < threads; t++) {                                                       \
            int64_t first = total * t / threads, last = total * (t + 1) / threads, start = 0;     \
            for (int64_t k = 0; k < count && start < last; start += sizes[k++]) {                 \
                int64_t a = first > start ? first - start : 0;                                    \
                int64_t b = last - start < sizes[k] ? last - start : sizes[k];                    \
                if (a >= b) continue;                                                             \
                (stream ? NAME##_stream : NAME##_run)(b - a, w[k] + a, v[k] + a, d[k] + a,        \
                                                      (REAL)lr, (REAL)g);                         \
            }                                                                                     \
            if (stream) finish_stores();                                                          \
        }                                                                                         \
    }

DEFINE_STEP(grda_float, float)
DEFINE_STEP(grda_double, double)
