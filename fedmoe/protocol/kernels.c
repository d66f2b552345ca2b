/* The wire formats in one pass over memory, bit for bit as fedmoe/protocol/formats.py defines them with torch.

It is compiled without libraries, and must not be compiled with -ffast-math or fused multiply-add: each operation rounds
by itself. Blocks of BLOCK values share a scale; whole blocks have a constant length, so that compilers vectorise them.
Nothing here reads or writes outside the arrays that kernels.py has measured. */

#include <stdint.h>

#define BLOCK 64
#define INLINE static inline __attribute__((always_inline))

/* Parts lie at any address, and are read as what they are not. */
typedef float __attribute__((aligned(1), may_alias)) loose_float;
typedef uint16_t __attribute__((aligned(1), may_alias)) loose_uint16;

static const float TINY = 1.17549435082228750797e-38f; /* the smallest normal number */
static const float MAGIC = 12582912.0f; /* 1.5 * 2^23: the sum's lowest bits are the nearest integer, ties to even */

enum format { FP32 = 32, BF16 = 16, INT8 = 8, INT4 = 4 }; /* bits a value */

INLINE uint32_t bits_of(float value) {
    union { float value; uint32_t bits; } both = {value};
    return both.bits;
}

INLINE float float_of(uint32_t bits) {
    union { uint32_t bits; float value; } both = {bits};
    return both.value;
}

/* Add the squares of one block to eight sums, which compilers keep in vectors. */
INLINE void add_squares(const float *values, double *sums) {
    for (int i = 0; i < BLOCK; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += (double)values[i + lane] * values[i + lane];
}

INLINE double total_of(const double *sums) {
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

/* The scale and the codes of one block; the codes of a block whose scale is not finite are 0. */
INLINE float quantise(const loose_float *values, const loose_float *minus, int count, float limit, uint32_t kept,
                      int8_t *codes, double *sums) {
    float difference[BLOCK];
    uint32_t largest = 0; /* of the bits without the sign, which are ordered like the numbers; NaN is above infinity */
    for (int i = 0; i < count; i++) difference[i] = minus ? values[i] - minus[i] : values[i];
    for (int i = count; i < BLOCK; i++) difference[i] = 0;
    add_squares(difference, sums);
    for (int i = 0; i < count; i++) {
        uint32_t bits = bits_of(difference[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float scale = float_of(bits_of(float_of(largest) / limit) & kept);
    if ((bits_of(scale) & 0x7f800000) == 0x7f800000) {
        for (int i = 0; i < count; i++) codes[i] = 0;
        return scale;
    }
    float step = scale < TINY ? TINY : scale;
    for (int i = 0; i < count; i++) codes[i] = (int8_t)bits_of(difference[i] / step + MAGIC);
    return scale;
}

/* Encode `count` values, or their difference to `minus` unless that is NULL, in format int8 or int4; returns the sum of
what was encoded, squared. */
double fedmoe_encode(int format, const loose_float *values, const loose_float *minus, int64_t count, void *scales,
                   int8_t *data) {
    double sums[8] = {0};
    int64_t half = (count + 1) / 2;
    for (int64_t at = 0; at < count; at += BLOCK) {
        int8_t codes[BLOCK];
        int here = count - at < BLOCK ? (int)(count - at) : BLOCK;
        const loose_float *other = minus ? minus + at : 0;
        float limit = format == INT4 ? 7.0f : 127.0f;
        uint32_t kept = format == INT4 ? 0xffff0000 : 0xffffffff; /* of the scale's bits */
        float scale = here < BLOCK ? quantise(values + at, other, here, limit, kept, codes, sums)
                      : other      ? quantise(values + at, other, BLOCK, limit, kept, codes, sums)
                                   : quantise(values + at, 0, BLOCK, limit, kept, codes, sums);
        if (format == INT8) {
            ((loose_float *)scales)[at / BLOCK] = scale;
            for (int i = 0; i < here; i++) data[at + i] = codes[i];
            continue;
        }
        ((loose_uint16 *)scales)[at / BLOCK] = (uint16_t)(bits_of(scale) >> 16);
        int low = half - at >= here ? here : half > at ? (int)(half - at) : 0; /* codes of the first half */
        for (int i = 0; i < low; i++) data[at + i] = codes[i];
        for (int i = low; i < here; i++) data[at + i - half] = (int8_t)(data[at + i - half] + codes[i] * 16);
    }
    return total_of(sums);
}

/* True if the scale times 128, the largest code, is beyond fp32: from 2^121 on, and if it is infinite or NaN. */
INLINE int is_huge(float scale) { return (bits_of(scale) & 0x7f800000) >= (uint32_t)(127 + 121) << 23; }

/* Decode `count` values of one block that lie from `at` on; returns the sum of their squares. */
INLINE double decode(int format, const void *scales, const int8_t *data, int64_t at, int64_t half, int count,
                     float *values) {
    if (format == FP32 || format == BF16) {
        double sums[8] = {0};
        for (int i = 0; i < count; i++)
            values[i] = format == FP32 ? ((const loose_float *)data)[at + i]
                                       : float_of((uint32_t)((const loose_uint16 *)data)[at + i] << 16);
        for (int i = count; i < BLOCK; i++) values[i] = 0;
        add_squares(values, sums);
        return total_of(sums);
    }
    float scale = format == INT8 ? ((const loose_float *)scales)[at / BLOCK]
                                 : float_of((uint32_t)((const loose_uint16 *)scales)[at / BLOCK] << 16);
    int32_t squares = 0; /* of the codes: at most 64 * 128 * 128 */
    int low = format == INT8 || half - at >= count ? count : half > at ? (int)(half - at) : 0;
    for (int i = 0; i < low; i++) {
        int32_t code = format == INT8 ? data[at + i] : ((data[at + i] & 15) ^ 8) - 8;
        squares += code * code;
        values[i] = (float)code * scale;
    }
    for (int i = low; i < count; i++) {
        int32_t code = (int8_t)(data[at + i - half] + 8) >> 4;
        squares += code * code;
        values[i] = (float)code * scale;
    }
    if (is_huge(scale)) { /* a value may be infinite although its code and the scale are not */
        double sum = 0;
        for (int i = 0; i < count; i++) sum += (double)values[i] * values[i];
        return sum;
    }
    return (double)scale * scale * squares;
}

INLINE void add(const loose_float *restrict now, float factor, const float *restrict values, loose_float *restrict out,
                int count) {
    for (int i = 0; i < count; i++) out[i] = now[i] + factor * values[i];
}

INLINE void add_in_place(loose_float *restrict out, float factor, const float *restrict values, int count) {
    for (int i = 0; i < count; i++) out[i] = out[i] + factor * values[i];
}

INLINE double fold(int format, const void *scales, const int8_t *data, int64_t count, const loose_float *now,
                   float factor, loose_float *out) {
    double total = 0;
    int64_t half = (count + 1) / 2;
    for (int64_t at = 0; at < count; at += BLOCK) {
        float values[BLOCK];
        int here = count - at < BLOCK ? (int)(count - at) : BLOCK;
        int is_whole = here == BLOCK && (at + BLOCK <= half || at >= half);
        total += is_whole ? decode(format, scales, data, at, half, BLOCK, values)
                          : decode(format, scales, data, at, half, here, values);
        if (now == out) is_whole ? add_in_place(out + at, factor, values, BLOCK) : add_in_place(out + at, factor, values, here);
        else is_whole ? add(now + at, factor, values, out + at, BLOCK) : add(now + at, factor, values, out + at, here);
    }
    return total;
}

/* out = now + factor * decoded; returns the sum of the decoded values' squares, which is not finite if a scale is not. */
double fedmoe_fold(int format, const void *scales, const int8_t *data, int64_t count, const loose_float *now,
                   float factor, loose_float *out) {
    switch (format) {
    case INT4: return fold(INT4, scales, data, count, now, factor, out);
    case INT8: return fold(INT8, scales, data, count, now, factor, out);
    case BF16: return fold(BF16, scales, data, count, now, factor, out);
    default: return fold(FP32, scales, data, count, now, factor, out);
    }
}
