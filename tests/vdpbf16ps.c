/* The VDPBF16PS instruction over arrays: for each lane i, c[i] += a[2i+1] b[2i+1], then
   c[i] += a[2i] b[2i]. Sizes are multiples of 16 lanes. */
#include <immintrin.h>
#include <stdint.h>

void vdpbf16ps(const uint16_t *a, const uint16_t *b, uint32_t *c, int64_t lanes) {
    for (int64_t i = 0; i < lanes; i += 16) {
        __m512bh x = (__m512bh)_mm512_loadu_si512((const void *)(a + 2 * i));
        __m512bh y = (__m512bh)_mm512_loadu_si512((const void *)(b + 2 * i));
        __m512 t = _mm512_castsi512_ps(_mm512_loadu_si512((const void *)(c + i)));
        t = _mm512_dpbf16_ps(t, x, y);
        _mm512_storeu_si512((void *)(c + i), _mm512_castps_si512(t));
    }
}
