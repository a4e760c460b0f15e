/* One AdEMAMix step over a table of segments: one pass over memory, OpenMP over chunks of all of them.
 *
 * The arithmetic is that of optim/reference.py, operation for operation, and the formats and random bits are those
 * of optim/precision.py. Compile with -ffp-contract=off: a contracted multiply-add rounds once where the reference
 * rounds twice. GNU C with pointers as 64-bit integers.
 *
 * `tile` steps TILE elements, two vectors at a turn. With constants for types and formats it is a loop without branches,
 * and so the common combinations are compiled. What bounds it is the number of vector instructions: 16-bit codes are
 * rounded as 16-bit numbers, of which a vector holds twice as many. */
/* In front of this file the compiler is given schema.c_header(): Segment, BLOCK, SCALARS and the codes of formats, types,
 * masters and flags. */
#include <math.h>
#include <string.h>
#if defined __AVX2__ || defined __AVX512BW__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* -- vectors: F of floats, U and I of 32-bit integers, W of 16-bit ones, M of truths ---------------------------- */

#if defined __AVX512BW__ && defined __AVX512VL__
#define LANES 16
#elif defined __AVX2__
#define LANES 8
#else
#define LANES 4
#endif
#define TURN (2 * LANES)
#define TILE (4 * BLOCK) /* elements for which a place is worked out */
typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint16_t W __attribute__((vector_size(4 * LANES)));

INLINE U load(const void *p) { U x; memcpy(&x, p, sizeof x); return x; }
INLINE W load16(const void *p) { W x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(void *p, U x) { memcpy(p, &x, sizeof x); }

/* least and most are the second argument where one of the two is a NaN.
 * upper: the LANES 16-bit numbers from `first` (0 or LANES) on, of TURN that lie at p, each times 2^16.
 * highs, lows: the upper, lower halves of two vectors' numbers. bytes: stores codes of block8, the largest for more. difference: of what is less, 0.
 * to_nearest: whole numbers, halves to even ones. above: one more where xy, of 32 bits, is above the bound.
 * carried: high, and one more where low + bits is 2^16 or more; to_bf16 only below the largest bf16: what is finite stays so,
 * and so does a NaN, which arithmetic leaves quiet, with the topmost of its mantissa's bits set; below: block16's largest code.
 * above_zero: codes, at least 1 where the value is above 0. */
#if LANES == 16
typedef __mmask16 M;
INLINE U pick(M m, U a, U b) { return (U)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE M below(U a, U b) { return _mm512_cmplt_epu32_mask((__m512i)a, (__m512i)b); }
INLINE F least(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F most(F a, F b) { return _mm512_max_ps(a, b); }
INLINE U larger(U a, U b) { return (U)_mm512_max_epu32((__m512i)a, (__m512i)b); }
INLINE U smaller(U a, U b) { return (U)_mm512_min_epu32((__m512i)a, (__m512i)b); }
INLINE uint32_t largest_of(U x) { return _mm512_reduce_max_epu32((__m512i)x); }
INLINE F root(F x) { return _mm512_sqrt_ps(x); }
INLINE U upper(const uint16_t *p, int first) {
    static const uint16_t order[2][32] = {
        {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15},
        {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31}};
    return (U)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, (__m512i)load(order[first / LANES]), (__m512i)load(p));
}
INLINE F from_bytes(const void *p, int is_signed) {
    const __m128i x = _mm_loadu_si128((const __m128i *)p);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
}
INLINE W halves(U a, U b, int high) {
    static const uint16_t order[2][32] = {
        {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62},
        {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63}};
    return (W)_mm512_permutex2var_epi16((__m512i)a, (__m512i)load(order[high]), (__m512i)b);
}
INLINE W carried(W high, W low, W bits) {
    const __mmask32 over = _mm512_cmplt_epu16_mask((__m512i)(W)(low + bits), (__m512i)bits);
    return (W)_mm512_mask_add_epi16((__m512i)high, over, (__m512i)high, _mm512_set1_epi16(1));
}
INLINE W carried_to_bf16(W high, W low, W bits) {
    const __mmask32 finite = _mm512_cmplt_epu16_mask((__m512i)(W)(high + high), _mm512_set1_epi16((short)0xFEFE));
    const __mmask32 over = _mm512_mask_cmplt_epu16_mask(finite, (__m512i)(W)(low + bits), (__m512i)bits);
    return (W)_mm512_mask_add_epi16((__m512i)high, over, (__m512i)high, _mm512_set1_epi16(1));
}
INLINE W carried_below(W high, W low, W bits, int is_nu) {
    const __mmask32 over = _mm512_cmplt_epu16_mask((__m512i)(W)(low + bits), (__m512i)bits);
    const __m512i x = (__m512i)high, one = _mm512_set1_epi16(1);
    return (W)(is_nu ? _mm512_mask_adds_epu16(x, over, x, one) : _mm512_mask_adds_epi16(x, over, x, one));
}
INLINE W above_zero(W codes, F x, F y) {
    const F zero = {0};
    const __mmask32 above = _mm512_kunpackw(less(zero, y), less(zero, x));
    return (W)_mm512_mask_max_epu16((__m512i)codes, above, (__m512i)codes, _mm512_set1_epi16(1));
}
INLINE void bytes(void *p, W x, int is_nu) {
    _mm256_storeu_si256((__m256i *)p, is_nu ? _mm512_cvtusepi16_epi8((__m512i)x) : _mm512_cvtsepi16_epi8((__m512i)x));
}
INLINE U to_nearest(F x) { return (U)_mm512_cvtps_epi32(x); }
INLINE W difference(W x, W y) { return (W)_mm512_subs_epu16((__m512i)x, (__m512i)y); }
INLINE W upper_product(W x, W y) { return (W)_mm512_mulhi_epu16((__m512i)x, (__m512i)y); }
INLINE W above(W whole, W x, W y, W bound) {
    const __m512i high = (__m512i)upper_product(x, y);
    const __mmask32 stays = _mm512_mask_cmple_epu16_mask(_mm512_testn_epi16_mask(high, high), (__m512i)(W)(x * y), (__m512i)bound);
    return (W)_mm512_mask_blend_epi16(stays, (__m512i)(W)(whole + (uint16_t)1), (__m512i)whole);
}
#else
typedef I M;
INLINE U pick(M m, U a, U b) { return ((U)m & a) | (~(U)m & b); }
INLINE M less(F a, F b) { return a < b; }
INLINE M below(U a, U b) { return a < b; }
INLINE F least(F a, F b) { return (F)pick(a < b, (U)a, (U)b); }
INLINE F most(F a, F b) { return (F)pick(a > b, (U)a, (U)b); }
INLINE U larger(U a, U b) { return pick(a > b, a, b); }
INLINE U smaller(U a, U b) { return pick(a < b, a, b); }
INLINE uint32_t largest_of(U x) {
    uint32_t found = 0;
    for (int l = 0; l < LANES; l++) found = x[l] > found ? x[l] : found;
    return found;
}
INLINE W carried_below(W high, W low, W bits, int is_nu) {
    return high - ((W)((W)(low + bits) < bits) & (W)(high < (uint16_t)(is_nu ? 0xFFFF : 0x7FFF)));
}
INLINE W carried(W high, W low, W bits) { return high - (W)((W)(low + bits) < bits); }
INLINE W carried_to_bf16(W high, W low, W bits) {
    return high - ((W)((W)(low + bits) < bits) & (W)((W)(high + high) < (uint16_t)0xFEFE));
}
#if LANES == 8
INLINE F root(F x) { return _mm256_sqrt_ps(x); }
INLINE U upper(const uint16_t *p, int first) {
    return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + first))) << 16;
}
INLINE F from_bytes(const void *p, int is_signed) {
    const __m128i x = _mm_loadl_epi64((const __m128i *)p);
    return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
}
INLINE W halves(U a, U b, int high) {
    const __m256i x = (__m256i)(high ? a >> 16 : a & 0xFFFFu), y = (__m256i)(high ? b >> 16 : b & 0xFFFFu);
    return (W)_mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xD8);
}
INLINE void bytes(void *p, W x, int is_nu) {
    const __m256i v = (__m256i)x, packed = is_nu ? _mm256_packus_epi16(v, v) : _mm256_packs_epi16(v, v);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
INLINE U to_nearest(F x) { return (U)_mm256_cvtps_epi32(x); }
INLINE W upper_product(W x, W y) { return (W)_mm256_mulhi_epu16((__m256i)x, (__m256i)y); }
#else
INLINE F root(F x) { F y; for (int l = 0; l < LANES; l++) y[l] = sqrtf(x[l]); return y; }
INLINE U upper(const uint16_t *p, int first) { U y; for (int l = 0; l < LANES; l++) y[l] = (uint32_t)p[first + l] << 16; return y; }
INLINE F from_bytes(const void *p, int is_signed) {
    F y;
    for (int l = 0; l < LANES; l++) y[l] = is_signed ? (float)((const int8_t *)p)[l] : (float)((const uint8_t *)p)[l];
    return y;
}
INLINE W halves(U a, U b, int high) {
    W y;
    for (int l = 0; l < LANES; l++) y[l] = (uint16_t)(a[l] >> 16 * high), y[LANES + l] = (uint16_t)(b[l] >> 16 * high);
    return y;
}
INLINE void bytes(void *p, W x, int is_nu) {
    for (int l = 0; l < TURN; l++) {
        const int code = is_nu ? x[l] : (int16_t)x[l], most = is_nu ? 255 : 127;
        ((uint8_t *)p)[l] = (uint8_t)(code > most ? most : code);
    }
}
INLINE U to_nearest(F x) { I y; for (int l = 0; l < LANES; l++) y[l] = (int32_t)lrintf(x[l]); return (U)y; }
INLINE W upper_product(W x, W y) { W z; for (int l = 0; l < TURN; l++) z[l] = (uint16_t)((uint32_t)x[l] * y[l] >> 16); return z; }
#endif
INLINE W difference(W x, W y) { return (x - y) & (W)(x > y); }
INLINE W above(W whole, W x, W y, W bound) { return whole - ((W)(upper_product(x, y) != 0) | (W)(x * y > bound)); }
INLINE W above_zero(W codes, F x, F y) { return codes - ((W)(codes == 0) & halves((U)(x > 0.0f), (U)(y > 0.0f), 0)); }
#endif
INLINE W highs(U a, U b) { return halves(a, b, 1); }
INLINE W lows(U a, U b) { return halves(a, b, 0); }
INLINE uint32_t to_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE U all(uint32_t x) { return (U){0} + x; }
INLINE F every(float x) { return (F)all(to_bits(x)); }
INLINE F choose(M m, F a, F b) { return (F)pick(m, (U)a, (U)b); }
INLINE float from_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* -- random bits ---------------------------------------------------------------------------------------- */

static uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

#if defined __BYTE_ORDER__ && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the halves of a random word lie in memory as on a little-endian machine"
#endif

/* A tile's random bits of each tensor that is rounded. Two elements share a word: the low half is the even one's. */
typedef union { uint32_t words[TILE / 2 + LANES]; uint16_t bits[TILE + TURN]; } Random;
typedef struct {
#define FIELD(key, bit, before, multiplier, after) Random key __attribute__((aligned(64)));
    WORDS(FIELD)
#undef FIELD
} Randoms;

INLINE U last_round(U x, int before, uint32_t multiplier, int after) {
    x = (x ^ (x >> before)) * multiplier;
    return x ^ (x >> after);
}

/* What the words of an element share, from FIRST times its number and the first key. */
#define FIRST 0xED5AD4BBu
INLINE U shared_rounds(U x, U b) { return ((x ^ (x >> 16)) + b) * 0xAC4C1B51u; }

INLINE U lanes_from(uint64_t first) {
    static const uint32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(lanes) + (uint32_t)first;
}

#define KEPT 20 /* log2 of how many words have the same keys */
INLINE uint64_t keys_of(uint64_t stream, uint64_t number) { return mix64(stream + (number >> KEPT) * 0xD1B54A32D192ED03ull); }

/* The words of a tile for the tensors of `which`, wherever it begins: the bits of its first element are number index & 1. */
static void fill(Randoms *r, uint64_t stream, uint64_t index, int n, int which) {
    const uint64_t number = index >> 1, keys = keys_of(stream, number), next = keys_of(stream, number + (1ull << KEPT));
    const uint32_t end = (uint32_t)((number >> KEPT) + 1) << KEPT;
    for (int i = 0; i <= n / 2; i += LANES) {
        const U at = lanes_from(number + (uint64_t)i);
        const M passed = below(at - end, all(1u << KEPT)); /* where the keys change */
        const U a = pick(passed, all((uint32_t)next), all((uint32_t)keys));
        const U b = pick(passed, all((uint32_t)(next >> 32)), all((uint32_t)(keys >> 32))), x = shared_rounds(at * FIRST + a, b);
#define FILL(key, bit, before, multiplier, after) if (which & bit) store(r->key.words + i, last_round(x, before, multiplier, after));
        WORDS(FILL)
#undef FILL
    }
}

/* The same of elements that lie in rows: n of them from the one of this index on, which is number `column` of its row. */
static void fill_rows(Randoms *r, uint64_t stream, uint64_t index, int64_t column, int64_t row, int64_t stride, int n, int which) {
    for (int done = 0, some; done < n; done += some, index += (uint64_t)(stride - column), column = 0) {
        Randoms one;
        some = row - column < n - done ? (int)(row - column) : n - done;
        fill(&one, stream, index, some, which);
#define COPY(key, bit, before, multiplier, after) if (which & bit) memcpy(r->key.bits + done, one.key.bits + (index & 1), 2 * (size_t)some);
        WORDS(COPY)
#undef COPY
    }
}

/* -- values ---------------------------------------------------------------------------------------------- */

INLINE U magnitude(F x) { return (U)x & 0x7FFFFFFFu; }

/* To bf16, half away from zero, which a split master can be joined to again: above the lower halves. */
INLINE U nearest_bf16(F x) {
    return pick(below(all(0x7F800000u), magnitude(x)), (U)x | 0x400000u, (U)x + 0x8000u) & 0xFFFF0000u;
}

/* By integers: not every compiler has _Float16. Subnormals of fp16 are those of fp32, scaled. */
INLINE F from_fp16(U h) {
    const U sign = (h & 0x8000u) << 16, size = (h & 0x7FFFu) << 13, finite = (U)((F)size * 0x1p112f);
    return (F)(sign | pick(below(size, all(0x0F800000u)), finite, size | 0x7F800000u));
}

/* To nearest, ties to even. */
INLINE U to_fp16(F x) {
    const U size = magnitude(x), normal = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
    /* below 2^-14 adding a half lets the hardware round to the multiples of fp16's least value */
    const U small = (U)((F)size + 0.5f) - 0x3F000000u;
    U code = pick(below(size, all(0x38800000u)), small, normal);
    code = pick(below(size, all(0x477FF000u)), code, all(0x7C00u));
    code = pick(below(all(0x7F800000u), size), all(0x7E00u), code);
    return code | (((U)x >> 16) & 0x8000u);
}

/* Elements at + first .. of an array; `first` is 0 or LANES. */
INLINE F load_value(const void *from, int at, int first, int type) {
    if (type == FP32) return (F)load((const float *)from + at + first);
    const U half = upper((const uint16_t *)from + at, first);
    return type == BF16 ? (F)half : from_fp16(half >> 16);
}

/* A weight set to zero by hand leaves its old low half behind: below zero there is nothing to subtract from. */
INLINE F joined(U high, U low) { /* both above lower halves */
    const U whole = high + (U)((I)low >> 16);
    return (F)pick(below(magnitude((F)high), low >> 31), high, whole);
}

/* -- state tensors ---------------------------------------------------------------------------------------- */

/* A tile of a state tensor. Only functions that are inlined get the address of one, so that it can lie in registers. */
typedef struct {
    void *codes;
    float *scale;
    const uint16_t *bits;
    float *values; /* new ones of a block in a block format (block8: roots of nu), until its scale is known */
    U largest; /* of them */
    F by, further; /* what decodes it: block16 by both factors where their product is not a number (`twice`) */
} State;

INLINE void begin(State *s, int block, int format, int twice) {
    if (format < BLOCK16 || format > BLOCK8) return;
    const float scale = s->scale[block];
    s->largest = all(0);
    s->by = every(format == BLOCK8 ? scale : twice ? 0x1p112f : scale * 0x1p112f);
    s->further = every(scale);
}

INLINE F decode(const State *s, int at, int first, int format, int is_nu, int twice) {
    if (format <= BF16) return load_value(s->codes, at, first, format);
    if (format == BLOCK16) {
        const U code = upper((const uint16_t *)s->codes + at, first);
        const F x = (F)(is_nu ? code >> 4 : (U)((I)code >> 4) & 0x87FFFFFFu) * s->by;
        return twice ? x * s->further : x;
    }
    const F x = from_bytes((const uint8_t *)s->codes + at + first, !is_nu);
    return is_nu ? x * x * s->by : x * s->by;
}

/* Two vectors of new values: into codes, or aside. `bounded` where no value lies above the largest bf16 and the lower half of
 * a NaN is 0: then nothing but fractions is carried. */
INLINE void encode(State *s, int at, F x, F y, W bits, int format, int is_nu, int bounded) {
    if (format == BF16) {
        const W high = highs((U)x, (U)y), low = lows((U)x, (U)y);
        store((uint16_t *)s->codes + at, (U)(bounded ? carried(high, low, bits) : carried_to_bf16(high, low, bits)));
        return;
    }
    float *to = format == FP32 ? (float *)s->codes + at : s->values + at % BLOCK;
    store(to, (U)x);
    store(to + LANES, (U)y);
    /* magnitudes order like their bits; a negative nu cannot be */
    if (format == FP32 || (format == BLOCK8 && is_nu)) return;
    s->largest = larger(s->largest, is_nu ? larger((U)x, (U)y) : larger(magnitude(x), magnitude(y)));
}

/* fp32 whose upper halves are block16's code without its sign. */
INLINE U scaled16(F x, F by, int twice, int is_nu) {
    const F v = x * by;
    if (!twice) return (U)v << 4;
    const F again = v * 0x1p-112f; /* what lies above 2^127 is above the largest code */
    return smaller(is_nu ? (U)again : magnitude(again), all((is_nu ? 0xFFFFu : 0x7FFFu) << 12)) << 4;
}

INLINE void codes16(const float *values, uint16_t *codes, const uint16_t *bits, F by, int n, int twice, int is_nu) {
    for (int at = 0; at < n; at += TURN) {
        const F x = (F)load(values + at), y = (F)load(values + at + LANES);
        const U a = scaled16(x, by, twice, is_nu), b = scaled16(y, by, twice, is_nu);
        const W code = carried_below(highs(a, b), lows(a, b), load16(bits + at), is_nu);
        store(codes + at, (U)(is_nu ? above_zero(code, x, y) : code | (highs((U)x, (U)y) & (uint16_t)0x8000)));
    }
}

INLINE float factor16(uint32_t largest, int is_nu, float *scale) {
    const uint32_t top = is_nu ? 31u : 15u, size = largest >> 23, exponent = size < top ? top : size > 253u ? 253u : size;
    *scale = from_bits((exponent - (top - 15u)) << 23);
    return from_bits((254u - exponent + (top - 15u)) << 23);
}

INLINE void block16(const float *values, uint16_t *codes, const uint16_t *bits, float inverse, int n, int is_nu) {
    if (inverse < 0x1p-14f) codes16(values, codes, bits, every(inverse), n, 1, is_nu);
    else codes16(values, codes, bits, every(inverse * 0x1p-112f), n, 0, is_nu);
}

/* block8: even steps, of nu's root as of the others. In 2^-16 of a step, whose lower half is then rounded by the bits. */
INLINE W code8(F x, F y, F inverse, W bits, int is_nu) {
    const U a = to_nearest(x * inverse), b = to_nearest(y * inverse);
    const W whole = highs(a, b), rest = lows(a, b);
    if (!is_nu) return carried(whole, rest, bits);
    /* between k^2 and (k + 1)^2, up with the probability that keeps the mean of nu itself: rest - rest (1 - rest) / (2 k + 1) */
    const W odd = whole + whole + (uint16_t)1;
    return above_zero(above(whole, difference(rest, bits), odd, upper_product(rest, (W){0} - rest)), x, y);
}

INLINE float factor8(uint32_t largest, int is_nu, float *scale) {
    *scale = from_bits(largest) * (is_nu ? (float)(1.0 / (255.0 * 255.0)) : (float)(1.0 / 127.0));
    const float step = is_nu ? sqrtf(*scale) : *scale;
    return step >= (is_nu ? 0x1p-63f : 0x1p-110f) ? 0x1p16f / step : 0.0f;
}

INLINE void block8(const float *values, uint8_t *codes, const uint16_t *bits, float factor, int n, int is_nu) {
    const F inverse = every(factor);
    for (int at = 0; at < n; at += TURN) {
        const F x = (F)load(values + at), y = (F)load(values + at + LANES);
        bytes(codes + at, code8(x, y, inverse, load16(bits + at), is_nu), is_nu);
    }
}

/* Writes the scale of a block, once the largest value is known; what its values are to be multiplied with, NaN where one is not
 * finite. */
INLINE float factor_of(const State *s, int block, int format, int is_nu) {
    if (format <= BF16) return 0.0f;
    const uint32_t largest = largest_of(s->largest);
    float *scale = s->scale + block;
    if (largest >= 0x7F800000u) return *scale = from_bits(0x7FC00000u);
    return format == BLOCK16 ? factor16(largest, is_nu, scale) : factor8(largest, is_nu, scale);
}

#define FINISH(name, codes_of, Code, is_nu)                                                                          \
    static __attribute__((noinline)) void name(const float *values, void *codes, const uint16_t *bits, float factor, int n) { \
        if (factor == factor) codes_of(values, (Code *)codes, bits, factor, n, is_nu);                               \
        else memset(codes, 0, (size_t)n * sizeof(Code)); /* a value that is not finite: all reads as NaN */           \
    }
FINISH(finish_signed16, block16, uint16_t, 0)
FINISH(finish_nu16, block16, uint16_t, 1)
FINISH(finish_signed8, block8, uint8_t, 0)
FINISH(finish_nu8, block8, uint8_t, 1)
#undef FINISH

/* n elements from `at`, the start of a block, on. */
INLINE void finish(const State *s, int at, float factor, int n, int format, int is_nu) {
    const uint16_t *bits = s->bits + at;
    if (format == BLOCK16) (is_nu ? finish_nu16 : finish_signed16)(s->values, (uint16_t *)s->codes + at, bits, factor, n);
    if (format == BLOCK8) (is_nu ? finish_nu8 : finish_signed8)(s->values, (uint8_t *)s->codes + at, bits, factor, n);
}

/* -- the update ----------------------------------------------------------------------------------------- */

typedef struct {
#define FIELD(name) float name;
    SCALARS(FIELD)
#undef FIELD
    float rate1, rate2, rate3;
    uint64_t stream;
} Scalars;

static Scalars scalars_of(const Segment *s) {
    Scalars c;
#define FIELD(name) c.name = (float)s->name;
    SCALARS(FIELD)
#undef FIELD
    c.rate1 = (float)(1.0 - s->beta1);
    c.rate2 = (float)(1.0 - s->beta2);
    c.rate3 = (float)(1.0 - s->beta3);
    c.stream = mix64(s->key + (uint64_t)s->step * 0x9E3779B97F4A7C15ull);
    return c;
}

/* reference.average: from the side of the larger share */
INLINE F average(F x, F new, float beta, float rate, int any_beta) {
    return any_beta && beta < 0.5f ? new + (x - new) * beta : x + (new - x) * rate;
}

INLINE F second_moment(F nu, F g, const Scalars *c, int yogi, int any_beta) {
    const F squared = least(every(0x1p127f), g * g); /* reference.LARGEST_SQUARE */
    if (!yogi) return average(nu, squared, c->beta2, c->rate2, any_beta);
    const F d = nu - squared, zero = every(0.0f);
    const F sign = choose(less(zero, d), every(1.0f), choose(less(d, zero), every(-1.0f), zero));
    return nu - sign * (squared * c->rate2);
}

typedef struct { /* what a row's loop depends on: types and formats, and what is usual where it is 0 */
    int weight, grad, master, m1, m2, nu, weight_ema, yogi, maximize, stays, any_beta, aside, twice;
} Kind;

static Kind kind_of(const Segment *s) {
    return (Kind){s->weight_type, s->grad_type, s->master_kind, s->m1_format, s->m2_format, s->nu_format, s->weight_ema_format,
        (s->flags & YOGI) != 0, (s->flags & MAXIMIZE) != 0, s->lr == 0.0, s->beta1 < 0.5 || s->beta2 < 0.5 || s->beta3 < 0.5, 0, 0};
}

typedef struct { /* where elements of a row lie */
    void *weight, *master;
    const void *grad;
    void *codes[4];
    float *scale[4];
    uint64_t index; /* of the first in the whole parameter */
    int64_t column, row, stride; /* and its place in its row, where elements lie in rows; else 0 */
} Place;

#define SIZE(code) ((code) == NONE ? 0 : (code) == FP32 ? 4 : (code) == BLOCK8 ? 1 : 2)
#define MASTER_SIZE(kind) ((kind) == FP32_MASTER ? 4 : (kind) == SPLIT_MASTER ? 2 : 0)

INLINE uint64_t index_of(const Segment *s, int64_t at) {
    return (uint64_t)(s->row ? s->start + at / s->row * s->stride + at % s->row : s->start + at);
}

INLINE Place place_of(const Segment *s, const Kind k, int64_t at) {
#define AT(field, size) ((char *)(uintptr_t)s->field + at * (size))
#define SCALE(field) ((float *)(uintptr_t)s->field + at / BLOCK)
    return (Place){AT(weight, SIZE(k.weight)), AT(master, MASTER_SIZE(k.master)), AT(grad, SIZE(k.grad)),
        {AT(m1, SIZE(k.m1)), AT(m2, SIZE(k.m2)), AT(nu, SIZE(k.nu)), AT(weight_ema, SIZE(k.weight_ema))},
        {SCALE(m1_scale), SCALE(m2_scale), SCALE(nu_scale), SCALE(weight_ema_scale)}, index_of(s, at),
        s->row ? at % s->row : 0, s->row, s->stride};
#undef AT
#undef SCALE
}

/* Fetches what will be read soon: the processor's own guesses end with a page of each tensor. Where sizes are not known when
 * this is compiled, it would cost more than it saves. */
#define AHEAD 128 /* elements */
INLINE void fetch(const void *from, int at, int size) {
    for (int byte = 0; __builtin_constant_p(size) && byte < TURN * size; byte += 64)
        __builtin_prefetch((const char *)from + (int64_t)(at + AHEAD) * size + byte);
}

/* n elements, at most a tile, from the start of a block on, n a multiple of TURN. */
INLINE void tile(const Place p, const Scalars c, int n, const Kind k) {
    const int rounds_weight = k.weight == BF16 && k.master == NO_MASTER && !k.stays;
    const int which = (k.m1 > FP32 ? M1_BITS : 0) | (k.m2 > FP32 ? M2_BITS : 0) | (k.nu > FP32 ? NU_BITS : 0)
        | (k.weight_ema > FP32 ? WEIGHT_EMA_BITS : 0) | (rounds_weight ? WEIGHT_BITS : 0);
    /* averages of bf16 numbers, of m1 and m2 with gradients and of nu with squares of at most 2^127, lie between them */
    const int bounded = k.grad == BF16 && !k.yogi && !k.any_beta;
    Randoms r;
    const int in_blocks = k.m1 > BF16 || k.m2 > BF16 || k.nu > BF16 || k.weight_ema > BF16;
    const int cut = p.row % BLOCK != 0, odd = k.aside && !cut ? (int)(p.index & 1) : 0;
    const uint64_t keys = keys_of(c.stream, p.index >> 1);
    const U b = all((uint32_t)(keys >> 32));
    U words = lanes_from(p.index >> 1) * FIRST + (uint32_t)keys;
    if (k.aside && cut) fill_rows(&r, c.stream, p.index, p.column, p.row, p.stride, n, which);
    else if (k.aside) fill(&r, c.stream, p.index, n, which);
    float values[4][BLOCK] __attribute__((aligned(64)));
#define STATE(number, key) {p.codes[number], p.scale[number], r.key.bits + odd, values[number], {0}, {0}, {0}}
    State m1s = STATE(0, m1), m2s = STATE(1, m2), nus = STATE(2, nu), emas = STATE(3, weight_ema);
#undef STATE
    for (int from = 0, end; from < n; from = end) {
        const int here = from / BLOCK;
        end = in_blocks && n - from > BLOCK ? from + BLOCK : n;
        begin(&m1s, here, k.m1, k.twice), begin(&m2s, here, k.m2, k.twice), begin(&nus, here, k.nu, k.twice);
        begin(&emas, here, k.weight_ema, k.twice);
        /* in the order of latencies: roots and quotients begin early, and what rounds the state runs beside them */
#pragma GCC unroll 1
        for (int at = from; at < end; at += TURN, words += LANES * FIRST) {
            fetch(p.grad, at, SIZE(k.grad)), fetch(p.weight, at, SIZE(k.weight)), fetch(p.master, at, MASTER_SIZE(k.master));
            fetch(p.codes[0], at, SIZE(k.m1)), fetch(p.codes[1], at, SIZE(k.m2)), fetch(p.codes[2], at, SIZE(k.nu));
            fetch(p.codes[3], at, SIZE(k.weight_ema));
            F w[2], g[2], m1[2], m2[2], nu[2], ema[2] = {{0}, {0}}, root_of_nu[2], u[2];
            for (int v = 0; v < 2; v++) {
                g[v] = load_value(p.grad, at, v * LANES, k.grad);
                if (k.maximize) g[v] = -g[v];
                nu[v] = second_moment(decode(&nus, at, v * LANES, k.nu, 1, k.twice), g[v], &c, k.yogi, k.any_beta);
                root_of_nu[v] = nu[v];
            }
            if (c.eps_root != 0.0f) /* seldom: else an addition less */
                for (int v = 0; v < 2; v++) root_of_nu[v] = nu[v] + c.eps_root;
            for (int v = 0; v < 2; v++) root_of_nu[v] = root(root_of_nu[v]);
            if (k.nu == BLOCK8) { /* which stores the root */
                nus.largest = larger(nus.largest, larger((U)nu[0], (U)nu[1]));
                for (int v = 0; v < 2; v++) nu[v] = c.eps_root != 0.0f ? root(nu[v]) : root_of_nu[v];
            }
            for (int v = 0; v < 2; v++) {
                m1[v] = g[v];
                if (k.m1 != NONE) m1[v] = average(decode(&m1s, at, v * LANES, k.m1, 0, k.twice), g[v], c.beta1, c.rate1, k.any_beta);
                m2[v] = average(decode(&m2s, at, v * LANES, k.m2, 0, k.twice), g[v], c.beta3, c.rate3, k.any_beta);
                u[v] = (m1[v] * c.m1_factor + m2[v] * c.m2_factor) / (root_of_nu[v] + c.eps);
            }
#define NOTHING(key, bit, before, multiplier, after) W key##_bits = {0};
            WORDS(NOTHING)
#undef NOTHING
            if (which) {
                const U x = shared_rounds(words, b);
#define BITS(key, bit, before, multiplier, after)                                                                    \
                if (which & bit) {                                                                                   \
                    key##_bits = k.aside ? load16(r.key.bits + odd + at) : (W)last_round(x, before, multiplier, after); \
                    if (!k.aside && k.key > BF16) store(r.key.bits + at, (U)key##_bits);                             \
                }
                WORDS(BITS)
#undef BITS
            }
            if (k.m1 != NONE) encode(&m1s, at, m1[0], m1[1], m1_bits, k.m1, 0, bounded);
            encode(&m2s, at, m2[0], m2[1], m2_bits, k.m2, 0, bounded);
            encode(&nus, at, nu[0], nu[1], nu_bits, k.nu, 1, bounded);
            for (int v = 0; v < 2; v++) {
                w[v] = k.master == FP32_MASTER ? (F)load((const float *)p.master + at + v * LANES)
                    : load_value(p.weight, at, v * LANES, k.weight);
                if (k.master == SPLIT_MASTER) w[v] = joined((U)w[v], upper((const uint16_t *)p.master + at, v * LANES));
                if (!k.stays) w[v] = w[v] - (u[v] + w[v] * c.decay);
                if (k.weight_ema == NONE) continue;
                ema[v] = decode(&emas, at, v * LANES, k.weight_ema, 0, k.twice);
                ema[v] = ema[v] + (w[v] - ema[v]) * c.weight_ema_rate;
            }
            if (k.weight_ema != NONE) encode(&emas, at, ema[0], ema[1], weight_ema_bits, k.weight_ema, 0, 0);
            if (k.stays) continue;
            const U x = (U)w[0], y = (U)w[1];
            if (k.weight == FP32 || k.master == FP32_MASTER) {
                float *to = (float *)(k.weight == FP32 ? p.weight : p.master) + at;
                store(to, x);
                store(to + LANES, y);
            }
            if (k.weight == FP32) continue;
            W codes;
            if (k.weight != BF16) codes = lows(to_fp16(w[0]), to_fp16(w[1]));
            else if (rounds_weight) codes = carried_to_bf16(highs(x, y), lows(x, y), weight_bits);
            else {
                const U a = nearest_bf16(w[0]), b = nearest_bf16(w[1]);
                codes = highs(a, b);
                if (k.master == SPLIT_MASTER) store((uint16_t *)p.master + at, (U)lows(x - a, y - b));
            }
            store((uint16_t *)p.weight + at, (U)codes);
        }
        /* all scales first: one waits for a division or two, and they do not wait for one another */
        const int count = end - from;
        const float m1_by = factor_of(&m1s, here, k.m1, 0), m2_by = factor_of(&m2s, here, k.m2, 0);
        const float nu_by = factor_of(&nus, here, k.nu, 1), ema_by = factor_of(&emas, here, k.weight_ema, 0);
        finish(&m1s, from, m1_by, count, k.m1, 0), finish(&m2s, from, m2_by, count, k.m2, 0);
        finish(&nus, from, nu_by, count, k.nu, 1), finish(&emas, from, ema_by, count, k.weight_ema, 0);
    }
}

/* Whether a block16 scale of a tile is NaN or so large that its product with 2^112 is not a number. */
INLINE int twice_in(const float *scale, int format, int n) {
    int found = 0;
    for (int b = 0; format == BLOCK16 && b * BLOCK < n; b++) found |= !(scale[b] <= 0x1p15f);
    return found;
}
INLINE int any_twice(const Place *p, const Kind *k, int n) {
    return twice_in(p->scale[0], k->m1, n) | twice_in(p->scale[1], k->m2, n) | twice_in(p->scale[2], k->nu, n)
        | twice_in(p->scale[3], k->weight_ema, n);
}

/* Whether the keys of the random words change within n elements that lie together. */
INLINE int any_keys(const Place *p, int n) { return p->index >> (KEPT + 1) != (p->index + (uint64_t)n - 1) >> (KEPT + 1); }

static __attribute__((noinline)) void some(const Place *p, const Scalars *c, const Kind *kind, int n) {
    Kind k = *kind;
    k.twice = any_twice(p, kind, n);
    k.aside |= any_keys(p, n);
    tile(*p, *c, n, k);
}

/* -- rows ------------------------------------------------------------------------------------------------- */

/* The elements at .. end of a row, whole blocks. */
INLINE void blocks(const Segment *row, const Scalars *scalars, const Kind k, int64_t at, int64_t end) {
    const Segment s = *row;
    const Scalars c = *scalars;
    for (int n; at < end; at += n) {
        const Place p = place_of(&s, k, at);
        const int64_t together = p.row && p.row % BLOCK == 0 ? p.row - p.column : TILE;
        n = (int)(end - at < together ? end - at : together);
        if (n > TILE) n = TILE;
        if (any_twice(&p, &k, n) || any_keys(&p, n)) some(&p, &c, &k, n);
        else tile(p, c, n, k);
    }
}

typedef void Blocks(const Segment *, const Scalars *, const Kind *, int64_t, int64_t);

static void any(const Segment *s, const Scalars *c, const Kind *k, int64_t at, int64_t end) { blocks(s, c, *k, at, end); }

/* The common combinations: weights W with master M, gradients G, state F, an average of the weights E or none. */
#define STATES(X, W, M, G) X(W, M, G, FP32, NONE) X(W, M, G, BF16, NONE) X(W, M, G, BLOCK16, NONE) X(W, M, G, BLOCK8, NONE)
#define COMMON(X)                                                                                                    \
    STATES(X, FP32, NO_MASTER, FP32) STATES(X, BF16, NO_MASTER, BF16) STATES(X, BF16, FP32_MASTER, BF16)              \
    STATES(X, BF16, SPLIT_MASTER, BF16) X(BF16, NO_MASTER, FP32, BF16, NONE) X(BF16, FP32_MASTER, FP32, BF16, NONE)   \
    X(BF16, SPLIT_MASTER, FP32, BF16, NONE) X(FP32, NO_MASTER, FP32, FP32, FP32) X(FP32, NO_MASTER, FP32, BF16, BF16)
#define DEFINE(W, M, G, F, E)                                                                                        \
    static void blocks_##W##_##M##_##G##_##F##_##E(const Segment *s, const Scalars *c, const Kind *k, int64_t at, int64_t end) { \
        (void)k;                                                                                                     \
        blocks(s, c, (Kind){W, G, M, F, F, F, E, 0, 0, 0, 0, 0, 0}, at, end);                                       \
    }
COMMON(DEFINE)
#undef DEFINE

static Blocks *blocks_of(const Kind *k) {
    if (k->m1 != k->m2 || k->m1 != k->nu || k->yogi || k->maximize || k->stays || k->any_beta || k->aside) return any;
#define FIND(W, M, G, F, E)                                                                                          \
    if (k->weight == W && k->master == M && k->grad == G && k->m1 == F && k->weight_ema == E) return blocks_##W##_##M##_##G##_##F##_##E;
    COMMON(FIND)
#undef FIND
    return any;
}

/* Copies n elements of `size` bytes, from number `at` on in the order of their indices, between an array and a tensor that
 * is laid out otherwise; `shape` is the number of its dimensions (at most 64), then the size and stride of each. */
static void walk(char *tensor, char *array, const int64_t *shape, int64_t at, int n, size_t size, int into_tensor) {
    const int last = (int)shape[0] - 1;
    const int64_t *sizes = shape + 1, *strides = shape + 2;
    int64_t index[64], offset = 0;
    for (int d = last; d >= 0; at /= sizes[2 * d], d--) {
        index[d] = at % sizes[2 * d];
        offset += index[d] * strides[2 * d];
    }
    while (n > 0) {
        const int64_t left = sizes[2 * last] - index[last], stride = strides[2 * last];
        const int run = left < n ? (int)left : n;
#define COPY(type)                                                                                                  \
        for (int i = 0; i < run; i++) {                                                                             \
            type *element = (type *)tensor + offset + i * stride, *slot = (type *)array + i;                        \
            if (into_tensor) *element = *slot;                                                                      \
            else *slot = *element;                                                                                  \
        }
        if (size == 4) COPY(uint32_t) else COPY(uint16_t)
#undef COPY
        array += (size_t)run * size, n -= run, index[last] += run, offset += run * stride;
        for (int d = last; d > 0 && index[d] == sizes[2 * d]; d--) {
            offset += strides[2 * (d - 1)] - index[d] * strides[2 * d];
            index[d] = 0, index[d - 1]++;
        }
    }
}

/* At most a block, in copies: less than one, or of tensors that are not laid out in order. Behind the end of the copies
 * the last element is repeated, which changes no block's largest value. */
static void part(const Segment *s, const Scalars *c, const Kind *k, int64_t at, int n) {
    uint64_t copies[7][BLOCK / 2] __attribute__((aligned(64)));
    const Place p = place_of(s, *k, at);
    void *const tensors[7] = {(void *)(uintptr_t)p.grad, p.weight, p.master, p.codes[0], p.codes[1], p.codes[2], p.codes[3]};
    const int sizes[7] = {SIZE(k->grad), SIZE(k->weight), MASTER_SIZE(k->master), SIZE(k->m1), SIZE(k->m2), SIZE(k->nu),
        SIZE(k->weight_ema)};
    const int64_t *shapes[7] = {(const int64_t *)(uintptr_t)s->grad_shape, (const int64_t *)(uintptr_t)s->weight_shape};
    char *const starts[2] = {(char *)(uintptr_t)s->grad, (char *)(uintptr_t)s->weight};
    const int whole = (n + TURN - 1) / TURN * TURN;
    for (int t = 0; t < 7; t++) {
        const size_t size = (size_t)sizes[t];
        char *copy = (char *)copies[t];
        if (!size) continue;
        if (shapes[t]) walk(starts[t], copy, shapes[t], s->local + at, n, size, 0);
        else memcpy(copy, tensors[t], (size_t)n * size);
#define REPEAT(type) for (int i = n; i < whole; i++) ((type *)copy)[i] = ((type *)copy)[n - 1];
        if (size == 4) REPEAT(uint32_t) else if (size == 2) REPEAT(uint16_t) else REPEAT(uint8_t)
#undef REPEAT
    }
    const Place here = {copies[1], copies[2], copies[0], {copies[3], copies[4], copies[5], copies[6]},
        {p.scale[0], p.scale[1], p.scale[2], p.scale[3]}, p.index, p.column, p.row, p.stride};
    some(&here, c, k, whole);
    for (int t = k->stays ? 3 : 1; t < 7; t++) {
        if (shapes[t]) walk(starts[t], (char *)copies[t], shapes[t], s->local + at, n, (size_t)sizes[t], 1);
        else if (sizes[t]) memcpy(tensors[t], copies[t], (size_t)(n * sizes[t]));
    }
}

static void chunk(const Segment *s, int64_t from, int64_t n) {
    Kind k = kind_of(s);
    const Scalars c = scalars_of(s);
    /* words that begin in the middle, or are not of elements that follow one another in a block */
    k.aside = (index_of(s, from) & 1) || (s->stride & 1) || s->row % BLOCK;
    const int64_t end = from + n, whole = s->weight_shape ? from : from + n / BLOCK * BLOCK;
    if (whole > from) blocks_of(&k)(s, &c, &k, from, whole);
    for (int64_t at = whole; at < end; at += BLOCK) part(s, &c, &k, at, end - at < BLOCK ? (int)(end - at) : BLOCK);
}

/* Chunk `number` of a segment. */
INLINE void numbered(const Segment *s, int64_t number, int64_t chunk_length) {
    const int64_t from = number * chunk_length;
    if (!(s->flags & SKIP)) chunk(s, from, s->length - from < chunk_length ? s->length - from : chunk_length);
}

/* Segment i takes chunks ends[i - 1] .. ends[i], each of `chunk_length` elements (a multiple of BLOCK). */
void shardopt_step(const Segment *segments, const int64_t *ends, int64_t count, int64_t chunk_length, int threads) {
    const int64_t total = count ? ends[count - 1] : 0;
    if (threads == 1) { /* no team, and no search */
        for (int64_t i = 0, piece = 0; i < count; i++)
            for (int64_t number = 0; piece < ends[i]; piece++, number++) numbered(segments + i, number, chunk_length);
        return;
    }
    /* a compiler without OpenMP runs this on one thread */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t piece = 0; piece < total; piece++) {
        int64_t lo = 0, hi = count - 1;
        while (lo < hi) { /* the first segment that ends after this piece */
            const int64_t mid = (lo + hi) / 2;
            if (ends[mid] > piece) hi = mid;
            else lo = mid + 1;
        }
        numbered(segments + lo, piece - (lo ? ends[lo - 1] : 0), chunk_length);
    }
}

/* -- facts about tensors, for the checks in front of a step ------------------------------------------------ */

typedef struct { /* torch's C shim; a tensor is a pointer to an at::Tensor, which is a pointer itself */
    int32_t (*address)(void *, void **), (*numel)(void *, int64_t *), (*storage_numel)(void *, int64_t *);
    int32_t (*offset)(void *, int64_t *), (*dtype)(void *, int32_t *), (*layout)(void *, int32_t *);
    int32_t (*device)(void *, int32_t *), (*device_index)(void *, int32_t *), (*is_contiguous)(void *, uint8_t *);
    int32_t (*is_defined)(void *, uint8_t *);
    void *(*grad)(void *); /* of the shim alone not: c10::TensorImpl::grad, of what an at::Tensor points to */
} Shim;

typedef struct { /* what the shim says of a tensor */
    void *address;
    int64_t numel, room, offset; /* room: elements of its storage */
    int32_t dtype, layout;
    uint8_t contiguous;
} Told;

/* False where the shim cannot tell: the tensor is not strided. */
INLINE int tell(const Shim *ask, void *tensor, Told *t) {
    return !ask->layout(tensor, &t->layout) && t->layout == 0 && !ask->address(tensor, &t->address)
        && !ask->numel(tensor, &t->numel) && !ask->storage_numel(tensor, &t->room) && !ask->offset(tensor, &t->offset)
        && !ask->dtype(tensor, &t->dtype) && !ask->is_contiguous(tensor, &t->contiguous);
}

enum { MOVED = 1, CHANGED = 2, UNTOLD = 4 };

/* After a backward all that a tensor consists of is out of the caches: Python's object, torch's behind it, and behind that one
 * its storage and its gradient. Fetches these of tensors further on, each when the one before has come. Where torch's object points to
 * them is a guess: a wrong one fetches in vain, and no more. */
INLINE void fetch_tensors(void *const *tensors, int64_t i, int64_t count) {
    if (i + 24 < count) __builtin_prefetch(tensors[i + 24]);
    if (i + 16 < count) {
        const char *own = *(const char *const *)tensors[i + 16];
        for (int line = 0; own != NULL && line < 4; line++) __builtin_prefetch(own + 64 * line);
    }
    if (i + 8 < count) {
        void *const *own = *(void *const *const *)tensors[i + 8];
        if (own != NULL) __builtin_prefetch(own[2]), __builtin_prefetch(own[3]);
    }
}

/* Rows of `facts`: each tensor's address, number of elements and kind (facts.py). Tells whether any addresses, any numbers or
 * kinds are not those of `known`, and whether there are tensors about which the shim says nothing, whose kind is then -1. The last `gradients` tensors are looked up first: those of the tensors as many places before them. */
int64_t shardopt_describe(const Shim *ask, void **tensors, int64_t count, int64_t gradients, int64_t *facts, const int64_t *known) {
    static void *nothing = NULL;
    int64_t found = 0;
    for (int64_t i = count - gradients; i < count; i++) {
        fetch_tensors(tensors, i - gradients, count - gradients);
        uint8_t defined = 0;
        void *grad = ask->grad(*(void **)tensors[i - gradients]);
        tensors[i] = !ask->is_defined(grad, &defined) && defined ? grad : &nothing;
    }
    int64_t *addresses = facts, *numels = facts + count, *kinds = facts + 2 * count;
    for (int64_t i = 0; i < count; i++) {
        fetch_tensors(tensors, i, count);
        void *tensor = tensors[i];
        Told t = {0};
        int64_t kind = 0;
        if (*(void **)tensor != NULL) {
            const int64_t before = kinds[i];
            if (!tell(ask, tensor, &t)) kind = -1, found |= UNTOLD;
            else {
                const int whole = t.numel == 0 || (t.address != NULL && t.room >= t.offset + t.numel);
                kind = 1 | (int64_t)(t.contiguous != 0) << 1 | (int64_t)whole << 2 | (int64_t)(uint8_t)t.dtype << 8;
                /* another device has other addresses */
                const int same = t.address != NULL && (int64_t)(uintptr_t)t.address == addresses[i] && before > 0;
                int32_t device = 0, index = 0;
                if (same) kind |= before & ~(int64_t)0xFFFF;
                else if (ask->device(tensor, &device) || ask->device_index(tensor, &index)) kind = -1, found |= UNTOLD;
                else kind |= (int64_t)(uint8_t)device << 16 | (int64_t)(uint16_t)index << 24;
            }
        }
        addresses[i] = (int64_t)(uintptr_t)t.address, numels[i] = t.numel, kinds[i] = kind;
        if (addresses[i] != known[i]) found |= MOVED;
        if (t.numel != known[count + i] || kind != known[2 * count + i]) found |= CHANGED;
    }
    return found;
}

/* -- Python's dicts and lists ------------------------------------------------------------------------------ */

typedef struct { /* an item of a dict from a place on, its size, sets an item; an item of a list, its size */
    int32_t (*next)(void *, int64_t *, void **, void **);
    int64_t (*size)(void *);
    int32_t (*set)(void *, void *, void *);
    void *(*at)(void *, int64_t);
    int64_t (*length)(void *);
} Python;

typedef struct { void *key, *value; int64_t apart; } Item; /* apart: whose value may be another */

/* 0 unless each of `count` dicts has its very `items`, in their order, and no more; 1 if so, but for values apart; else 2. */
int64_t shardopt_holds(const Python *ask, void *const *dicts, const int64_t *sizes, int64_t count, const Item *items) {
    int64_t found = 2;
    for (int64_t i = 0; i < count; i++) {
        void *key, *value;
        int64_t place = 0;
        if (ask->size(dicts[i]) != sizes[i]) return 0;
        for (; ask->next(dicts[i], &place, &key, &value); items++) {
            if (key != items->key || (value != items->value && !items->apart)) return 0;
            if (value != items->value) found = 1;
        }
    }
    return found;
}

/* True while each of `count` lists has its very `members`. */
int64_t shardopt_lists(const Python *ask, void *const *lists, const int64_t *sizes, int64_t count, void *const *members) {
    for (int64_t i = 0; i < count; i++) {
        if (ask->length(lists[i]) != sizes[i]) return 0;
        for (int64_t k = 0; k < sizes[i]; k++)
            if (ask->at(lists[i], k) != *members++) return 0;
    }
    return 1;
}

/* Gives each of `count` dicts the value under the key, and lets that be what its item is expected to be; 0 if all is well. */
int64_t shardopt_put(const Python *ask, void *const *dicts, Item *const *items, int64_t count, void *key, void *value) {
    for (int64_t i = 0; i < count; i++) {
        if (ask->set(dicts[i], key, value)) return -1;
        items[i]->value = value;
    }
    return 0;
}
