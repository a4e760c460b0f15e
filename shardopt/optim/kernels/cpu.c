/* One AdEMAMix step over a table of segments: one pass over memory, OpenMP over chunks of all of them.
 *
 * The arithmetic is that of optim/reference.py, operation for operation, and the formats and random bits are those
 * of optim/precision.py. Compile with -ffp-contract=off: a contracted multiply-add rounds once where the reference
 * rounds twice. Plain C99 with pointers as 64-bit integers; the loops are written for the auto-vectoriser. */
/* In front of this file the compiler is given schema.c_header(): Segment, BLOCK, SCALARS and the codes of formats, types,
 * masters and flags. */
#include <math.h>
#include <string.h>

#define TILE 1024 /* elements that have their random bits drawn at a time */
#define PART 256  /* elements of a tile in fp32: all of its tensors together fit the nearest cache */
#define INLINE static inline __attribute__((always_inline))

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
typedef union { uint32_t words[TILE / 2 + 1]; uint16_t bits[TILE + 2]; } Random;
typedef struct {
#define FIELD(key, bit, before, multiplier, after) Random key;
    WORDS(FIELD)
#undef FIELD
} Randoms;

INLINE uint32_t word(uint32_t x, int before, uint32_t multiplier, int after) {
    x ^= x >> before;
    x *= multiplier;
    return x ^ (x >> after);
}

/* The words of elements at .. at + n for the tensors of `which`. The bits of the first are number (start + at) & 1. */
INLINE void fill(Randoms *r, const Segment *s, int64_t at, int n, int which) {
    const uint64_t stream = mix64(s->key + (uint64_t)s->step * 0x9E3779B97F4A7C15ull);
    const uint64_t begin = (uint64_t)(s->start + at) >> 1, end = ((uint64_t)(s->start + at + n) + 1) >> 1;
    for (uint64_t number = begin; number < end;) {
        const uint64_t change = ((number >> 32) + 1) << 32, until = change < end ? change : end;
        const uint64_t keys = mix64(stream + (number >> 32) * 0xD1B54A32D192ED03ull);
        const uint32_t a = (uint32_t)keys, b = (uint32_t)(keys >> 32), first = (uint32_t)begin;
        for (int i = (int)(number - begin); i < (int)(until - begin); i++) {
            uint32_t x = (first + (uint32_t)i) ^ a;
            x = (x ^ (x >> 17)) * 0xED5AD4BBu;
            x = ((x ^ (x >> 11)) + b) * 0xAC4C1B51u;
#define FILL(key, bit, before, multiplier, after) if (which & bit) r->key.words[i] = word(x, before, multiplier, after);
            WORDS(FILL)
#undef FILL
        }
        number = until;
    }
}

/* -- single values -------------------------------------------------------------------------------------- */

INLINE uint32_t to_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float from_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE float from_bf16(uint16_t u) { return from_bits((uint32_t)u << 16); }

/* By random bits. What is finite stays so: past the largest bf16 it is cut off. So is a NaN, which arithmetic leaves quiet,
 * with the topmost of its mantissa's bits set. In 16-bit numbers, of which a vector holds twice as many. */
INLINE uint16_t to_bf16(float x, uint16_t bits) {
    const uint16_t high = (uint16_t)(to_bits(x) >> 16), twice = (uint16_t)(high + high);
    const uint16_t sum = (uint16_t)((uint16_t)to_bits(x) + bits);
    return (uint16_t)(sum < bits && twice < (uint16_t)0xFEFE ? high + 1 : high);
}

/* Half away from zero, which a split master can be joined to again. */
INLINE uint16_t nearest_bf16(float x) {
    const uint32_t raw = to_bits(x);
    return (uint16_t)((raw & 0x7FFFFFFFu) > 0x7F800000u ? ((raw >> 16) | 0x40u) : (raw + 0x8000u) >> 16);
}

/* By integers: not every compiler has _Float16. Subnormals of fp16 are those of fp32, scaled. */
INLINE float from_fp16(uint16_t h) {
    const uint32_t sign = ((uint32_t)h & 0x8000u) << 16, magnitude = ((uint32_t)h & 0x7FFFu) << 13;
    const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
    return from_bits(sign | (magnitude < 0x0F800000u ? finite : magnitude | 0x7F800000u));
}

/* To nearest, ties to even. */
INLINE uint16_t to_fp16(float x) {
    const uint32_t raw = to_bits(x), magnitude = raw & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    /* below 2^-14 adding a half lets the hardware round to the multiples of fp16's least value */
    const uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t code = magnitude < 0x38800000u ? small : normal;
    code = magnitude >= 0x477FF000u ? 0x7C00u : code;
    code = magnitude > 0x7F800000u ? 0x7E00u : code;
    return (uint16_t)(code | ((raw >> 16) & 0x8000u));
}

/* A weight set to zero by hand leaves its old low half behind: below zero there is nothing to subtract from. */
INLINE float joined(uint16_t high, int16_t low) {
    const uint32_t raw = (uint32_t)high << 16;
    return from_bits(((raw & 0x7FFFFFFFu) == 0) & (low < 0) ? raw : raw + (uint32_t)(int32_t)low);
}

/* -- the update ----------------------------------------------------------------------------------------- */

typedef struct {
#define FIELD(name) float name;
    SCALARS(FIELD)
#undef FIELD
    float rate1, rate2, rate3, sign;
} Scalars;

static Scalars scalars_of(const Segment *s) {
    Scalars c;
#define FIELD(name) c.name = (float)s->name;
    SCALARS(FIELD)
#undef FIELD
    c.rate1 = (float)(1.0 - s->beta1);
    c.rate2 = (float)(1.0 - s->beta2);
    c.rate3 = (float)(1.0 - s->beta3);
    c.sign = (s->flags & MAXIMIZE) ? -1.0f : 1.0f;
    return c;
}

/* reference.average: from the side of the larger share */
INLINE float average(float x, float new, float beta, float rate, int any_beta) {
    return any_beta && beta < 0.5f ? new + (x - new) * beta : x + (new - x) * rate;
}

INLINE float second_moment(float nu, float g, const Scalars *c, int yogi, int any_beta) {
    float squared = g * g;
    squared = squared > 0x1p127f ? 0x1p127f : squared; /* reference.LARGEST_SQUARE */
    if (yogi) {
        float d = nu - squared, by = squared * c->rate2;
        return nu - (d > 0.0f ? by : d < 0.0f ? -by : 0.0f);
    }
    return average(nu, squared, c->beta2, c->rate2, any_beta);
}

INLINE float moved(float w, float m1, float m2, float nu, const Scalars *c) {
    float u = (m1 * c->bias_correction1 + m2 * c->alpha) / (sqrtf(nu * c->bias_correction2 + c->eps_root) + c->eps);
    return w - (u + w * c->weight_decay) * c->lr;
}

/* -- the common formats, one fused loop each -------------------------------------------------------------- */

INLINE void fused(const Segment *s, int64_t from, int n, int weight_type, int master, int grad_type, int format) {
    const Scalars c = scalars_of(s);
    const int rounds_state = format == BF16, rounds_weight = weight_type == BF16 && master == NO_MASTER;
    const int which = (rounds_state ? M1_BITS | M2_BITS | NU_BITS : 0) | (rounds_weight ? WEIGHT_BITS : 0);
    const int odd = (int)((s->start + from) & 1);
    Randoms r;
    if (which) fill(&r, s, from, n, which);
    float *restrict wf = (float *)(uintptr_t)s->weight + from;
    uint16_t *restrict wh = (uint16_t *)(uintptr_t)s->weight + from;
    float *restrict master32 = (float *)(uintptr_t)s->master + from;
    int16_t *restrict low = (int16_t *)(uintptr_t)s->master + from;
    const float *restrict gf = (const float *)(uintptr_t)s->grad + from;
    const uint16_t *restrict gh = (const uint16_t *)(uintptr_t)s->grad + from;
    float *restrict m1f = (float *)(uintptr_t)s->m1 + from, *restrict m2f = (float *)(uintptr_t)s->m2 + from;
    float *restrict nuf = (float *)(uintptr_t)s->nu + from;
    uint16_t *restrict m1h = (uint16_t *)(uintptr_t)s->m1 + from, *restrict m2h = (uint16_t *)(uintptr_t)s->m2 + from;
    uint16_t *restrict nuh = (uint16_t *)(uintptr_t)s->nu + from;
    const uint16_t *restrict m1r = r.m1.bits + odd, *restrict m2r = r.m2.bits + odd, *restrict nur = r.nu.bits + odd;
    const uint16_t *restrict wr = r.weight.bits + odd;
#pragma GCC ivdep
    for (int i = 0; i < n; i++) {
        float g = (grad_type == FP32 ? gf[i] : from_bf16(gh[i])) * c.sign, w;
        if (master == FP32_MASTER) w = master32[i];
        else if (master == SPLIT_MASTER) w = joined(wh[i], low[i]);
        else w = weight_type == FP32 ? wf[i] : from_bf16(wh[i]);
        float m1 = format == FP32 ? m1f[i] : from_bf16(m1h[i]);
        float m2 = format == FP32 ? m2f[i] : from_bf16(m2h[i]);
        float nu = format == FP32 ? nuf[i] : from_bf16(nuh[i]);
        m1 = average(m1, g, c.beta1, c.rate1, 0);
        m2 = average(m2, g, c.beta3, c.rate3, 0);
        nu = second_moment(nu, g, &c, 0, 0);
        w = moved(w, m1, m2, nu, &c);
        if (format == FP32) {
            m1f[i] = m1;
            m2f[i] = m2;
            nuf[i] = nu;
        } else {
            m1h[i] = to_bf16(m1, m1r[i]);
            m2h[i] = to_bf16(m2, m2r[i]);
            nuh[i] = to_bf16(nu, nur[i]);
        }
        if (weight_type == FP32) wf[i] = w;
        else if (rounds_weight) wh[i] = to_bf16(w, wr[i]);
        else {
            uint16_t high = nearest_bf16(w);
            wh[i] = high;
            if (master == FP32_MASTER) master32[i] = w;
            else low[i] = (int16_t)(uint16_t)(to_bits(w) - ((uint32_t)high << 16));
        }
    }
}

/* -- every other combination: tiles in fp32 --------------------------------------------------------------- */

static void load_values(float *restrict out, const void *from, int64_t at, int n, int type) {
    const uint16_t *restrict p = (const uint16_t *)from + at;
    if (type == FP32) memcpy(out, (const float *)from + at, (size_t)n * 4);
    else if (type == BF16) for (int i = 0; i < n; i++) out[i] = from_bf16(p[i]);
    else for (int i = 0; i < n; i++) out[i] = from_fp16(p[i]);
}

static void load_state(float *restrict out, uint64_t codes, uint64_t scales, int64_t at, int n, int format, int is_nu) {
    const float *restrict scale = (const float *)(uintptr_t)scales + at / BLOCK;
    if (format == BLOCK16) {
        const uint16_t *restrict p = (const uint16_t *)(uintptr_t)codes + at;
        const uint32_t mask = is_nu ? 0xFFFFu : 0x7FFFu;
        for (int from = 0; from < n; from += BLOCK) {
            const float by = scale[from / BLOCK];
            const int to = from + BLOCK < n ? from + BLOCK : n;
            for (int i = from; i < to; i++) {
                float x = from_bits((p[i] & mask) << 12) * 0x1p112f * by;
                out[i] = !is_nu && (p[i] & 0x8000u) ? -x : x;
            }
        }
    } else if (format == BLOCK8) {
        const int8_t *restrict p = (const int8_t *)(uintptr_t)codes + at;
        const uint8_t *restrict q = (const uint8_t *)p;
        for (int from = 0; from < n; from += BLOCK) {
            const float by = scale[from / BLOCK];
            const int to = from + BLOCK < n ? from + BLOCK : n;
            if (is_nu) for (int i = from; i < to; i++) out[i] = (float)q[i] * (float)q[i] * by;
            else for (int i = from; i < to; i++) out[i] = (float)p[i] * by;
        }
    } else load_values(out, (const void *)(uintptr_t)codes, at, n, format);
}

static float largest_of(const float *restrict x, int n) {
    uint32_t largest = 0; /* magnitudes order like their bits, and integers have a vector maximum */
    for (int i = 0; i < n; i++) {
        const uint32_t a = to_bits(x[i]) & 0x7FFFFFFFu;
        largest = a > largest ? a : largest;
    }
    return from_bits(largest);
}

/* A block with a value that is not finite reads as NaN: codes 0 under a scale of NaN. */
INLINE int nonfinite(float largest, void *codes, size_t bytes, float *scale) {
    if (to_bits(largest) < 0x7F800000u) return 0;
    memset(codes, 0, bytes);
    *scale = from_bits(0x7FC00000u);
    return 1;
}

/* One block each: x into codes, by the random bits `r`. */
INLINE void block16(uint16_t *restrict p, float *scale, const float *restrict x, const uint16_t *restrict r, int n,
                    int is_nu) {
    const uint32_t top = is_nu ? 31u : 15u, limit = is_nu ? 0xFFFFu : 0x7FFFu;
    const float most = largest_of(x, n);
    if (nonfinite(most, p, (size_t)n * 2, scale)) return;
    uint32_t exponent = to_bits(most) >> 23;
    exponent = exponent < top ? top : exponent > 253u ? 253u : exponent;
    const float inverse = from_bits((254u - exponent + (top - 15u)) << 23);
    *scale = from_bits((exponent - (top - 15u)) << 23);
    for (int i = 0; i < n; i++) {
        const uint32_t raw = to_bits(x[i] * inverse * 0x1p-112f);
        uint32_t code = ((raw & 0x7FFFFFFFu) + (uint32_t)(r[i] >> 4)) >> 12;
        code = code > limit ? limit : code;
        if (is_nu) code = (code == 0) & (x[i] > 0.0f) ? 1u : code;
        else code |= (raw >> 16) & 0x8000u;
        p[i] = (uint16_t)code;
    }
}

INLINE void block8(uint8_t *restrict p, float *scale, const float *restrict x, const uint16_t *restrict r, int n,
                   int is_nu) {
    const float most = largest_of(x, n);
    if (nonfinite(most, p, (size_t)n, scale)) return;
    const float by = most * (is_nu ? (float)(1.0 / (255.0 * 255.0)) : (float)(1.0 / 127.0));
    const float inverse = by >= 0x1p-126f ? 1.0f / by : 0.0f;
    *scale = by;
    for (int i = 0; i < n; i++) {
        const float uniform = (float)r[i] * 0x1p-16f, v = x[i] * inverse;
        float code;
        if (is_nu) {
            const float below = floorf(sqrtf(v));
            code = below + (v - below * below > uniform * (2.0f * below + 1.0f) ? 1.0f : 0.0f);
            code = code < 255.0f ? code : 255.0f;
            code = (code == 0.0f) & (x[i] > 0.0f) ? 1.0f : code;
        } else {
            code = floorf(v + uniform);
            code = code < 127.0f ? code : 127.0f;
            code = code > -127.0f ? code : -127.0f;
        }
        p[i] = (uint8_t)(int32_t)code;
    }
}

static void store_state(const float *restrict x, uint64_t codes, uint64_t scales, int64_t at, int n, int format, int is_nu,
                        const uint16_t *restrict r) {
    float *scale = (float *)(uintptr_t)scales + at / BLOCK;
    if (format == FP32) memcpy((float *)(uintptr_t)codes + at, x, (size_t)n * 4);
    else if (format == BF16) {
        uint16_t *restrict p = (uint16_t *)(uintptr_t)codes + at;
        for (int i = 0; i < n; i++) p[i] = to_bf16(x[i], r[i]);
    } else {
        for (int from = 0; from < n; from += BLOCK, scale++) {
            const int count = from + BLOCK < n ? BLOCK : n - from;
            uint16_t *p16 = (uint16_t *)(uintptr_t)codes + at + from;
            uint8_t *p8 = (uint8_t *)(uintptr_t)codes + at + from;
            /* with constants for what varies, so that each loop is compiled by itself */
            if (format == BLOCK16 && is_nu) block16(p16, scale, x + from, r + from, count, 1);
            else if (format == BLOCK16) block16(p16, scale, x + from, r + from, count, 0);
            else if (is_nu) block8(p8, scale, x + from, r + from, count, 1);
            else block8(p8, scale, x + from, r + from, count, 0);
        }
    }
}

/* `fill` with constants for `which`: state of three rounded tensors in one pass, others one by one. */
static void draw(Randoms *r, const Segment *s, int64_t at, int n, int which) {
    const int common = M1_BITS | M2_BITS | NU_BITS;
    if ((which & common) == common) {
        fill(r, s, at, n, common);
        which &= ~common;
    }
#define ONE(key, bit, before, multiplier, after) if (which & bit) fill(r, s, at, n, bit);
    WORDS(ONE)
#undef ONE
}

/* The update of a part in place; with constants for the flags it is one loop of vectors. */
INLINE void update(float *restrict w, const float *restrict g, float *restrict m1, float *restrict m2,
                   float *restrict nu, int n, const Scalars *s, int has_m1, int yogi, int moves, int any_beta) {
    const Scalars c = *s;
    for (int i = 0; i < n; i++) {
        const float gi = g[i] * c.sign, fast = has_m1 ? average(m1[i], gi, c.beta1, c.rate1, any_beta) : gi;
        if (has_m1) m1[i] = fast;
        m2[i] = average(m2[i], gi, c.beta3, c.rate3, any_beta);
        nu[i] = second_moment(nu[i], gi, &c, yogi, any_beta);
        if (moves) w[i] = moved(w[i], fast, m2[i], nu[i], &c);
    }
}

static void tiled(const Segment *s, int64_t from, int64_t n) {
    const Scalars c = scalars_of(s);
    void *weight = (void *)(uintptr_t)s->weight, *master = (void *)(uintptr_t)s->master;
    const int yogi = (s->flags & YOGI) != 0, has_m1 = s->m1_format != NONE, moves = s->lr != 0.0;
    float w[PART], g[PART], m1[PART], m2[PART], nu[PART], weight_ema[PART];
    const int which = (s->m1_format > FP32 ? M1_BITS : 0) | (s->m2_format > FP32 ? M2_BITS : 0)
        | (s->nu_format > FP32 ? NU_BITS : 0) | (s->weight_ema_format > FP32 ? WEIGHT_EMA_BITS : 0)
        | (s->weight_type == BF16 && s->master_kind == NO_MASTER ? WEIGHT_BITS : 0);
    const int common = has_m1 && !yogi && moves && s->beta1 >= 0.5 && s->beta2 >= 0.5 && s->beta3 >= 0.5;
    const int odd = (int)((s->start + from) & 1); /* parts are of an even length */
    Randoms r;
    for (int64_t at = from; at < from + n; at += PART) {
        const int count = (int)(from + n - at < PART ? from + n - at : PART);
        draw(&r, s, at, count, which);
        if (s->master_kind == FP32_MASTER) load_values(w, master, at, count, FP32);
        else if (s->master_kind == SPLIT_MASTER) {
            const uint16_t *high = (const uint16_t *)weight + at;
            const int16_t *low = (const int16_t *)master + at;
            for (int i = 0; i < count; i++) w[i] = joined(high[i], low[i]);
        } else load_values(w, weight, at, count, s->weight_type);
        load_values(g, (const void *)(uintptr_t)s->grad, at, count, s->grad_type);
        if (has_m1) load_state(m1, s->m1, s->m1_scale, at, count, s->m1_format, 0);
        load_state(m2, s->m2, s->m2_scale, at, count, s->m2_format, 0);
        load_state(nu, s->nu, s->nu_scale, at, count, s->nu_format, 1);
        if (common) update(w, g, m1, m2, nu, count, &c, 1, 0, 1, 0);
        else if (yogi) update(w, g, m1, m2, nu, count, &c, has_m1, 1, moves, 1);
        else update(w, g, m1, m2, nu, count, &c, has_m1, 0, moves, 1);
        if (s->weight_ema_format != NONE) {
            load_state(weight_ema, s->weight_ema, s->weight_ema_scale, at, count, s->weight_ema_format, 0);
            for (int i = 0; i < count; i++) weight_ema[i] = weight_ema[i] + (w[i] - weight_ema[i]) * c.weight_ema_rate;
            store_state(weight_ema, s->weight_ema, s->weight_ema_scale, at, count, s->weight_ema_format, 0,
                        r.weight_ema.bits + odd);
        }
        if (has_m1) store_state(m1, s->m1, s->m1_scale, at, count, s->m1_format, 0, r.m1.bits + odd);
        store_state(m2, s->m2, s->m2_scale, at, count, s->m2_format, 0, r.m2.bits + odd);
        store_state(nu, s->nu, s->nu_scale, at, count, s->nu_format, 1, r.nu.bits + odd);
        if (!moves) continue;
        if (s->master_kind == FP32_MASTER) memcpy((float *)master + at, w, (size_t)count * 4);
        if (s->weight_type == FP32) memcpy((float *)weight + at, w, (size_t)count * 4);
        else if (s->weight_type == BF16) {
            uint16_t *high = (uint16_t *)weight + at;
            int16_t *low = (int16_t *)master + at;
            if (s->master_kind == NO_MASTER) for (int i = 0; i < count; i++) high[i] = to_bf16(w[i], r.weight.bits[odd + i]);
            else for (int i = 0; i < count; i++) high[i] = nearest_bf16(w[i]);
            if (s->master_kind == SPLIT_MASTER)
                for (int i = 0; i < count; i++) low[i] = (int16_t)(uint16_t)(to_bits(w[i]) - ((uint32_t)high[i] << 16));
        } else {
            uint16_t *half = (uint16_t *)weight + at;
            for (int i = 0; i < count; i++) half[i] = to_fp16(w[i]);
        }
    }
}

static void chunk(const Segment *s, int64_t from, int64_t n) {
    const int f = s->m1_format;
    const int plain = (f == FP32 || f == BF16) && s->m2_format == f && s->nu_format == f && s->weight_ema_format == NONE
        && !(s->flags & YOGI) && s->lr != 0.0 && s->beta1 >= 0.5 && s->beta2 >= 0.5 && s->beta3 >= 0.5;
    const int rounds = f == BF16 || (s->weight_type == BF16 && s->master_kind == NO_MASTER);
    const int64_t part = rounds ? TILE : n;
#define CASE(W, M, G, F)                                                                                     \
    if (plain && s->weight_type == W && s->master_kind == M && s->grad_type == G && f == F) {                \
        for (int64_t at = from; at < from + n; at += part)                                                   \
            fused(s, at, (int)(from + n - at < part ? from + n - at : part), W, M, G, F);                    \
        return;                                                                                              \
    }
    CASE(FP32, NO_MASTER, FP32, FP32)
    CASE(FP32, NO_MASTER, FP32, BF16)
#define GRADIENTS(M) CASE(BF16, M, BF16, FP32) CASE(BF16, M, BF16, BF16) CASE(BF16, M, FP32, FP32) CASE(BF16, M, FP32, BF16)
    GRADIENTS(NO_MASTER)
    GRADIENTS(FP32_MASTER)
    GRADIENTS(SPLIT_MASTER)
#undef GRADIENTS
#undef CASE
    tiled(s, from, n);
}

/* Segment i takes chunks ends[i - 1] .. ends[i], each of `chunk_length` elements (a multiple of BLOCK). */
void shardopt_step(const Segment *segments, const int64_t *ends, int64_t count, int64_t chunk_length, int threads) {
    const int64_t total = count ? ends[count - 1] : 0;
    (void)threads; /* a compiler without OpenMP runs this on one thread */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t piece = 0; piece < total; piece++) {
        int64_t lo = 0, hi = count - 1;
        while (lo < hi) { /* the first segment that ends after this piece */
            const int64_t mid = (lo + hi) / 2;
            if (ends[mid] > piece) hi = mid;
            else lo = mid + 1;
        }
        const Segment *s = segments + lo;
        if (s->flags & SKIP) continue;
        const int64_t from = (piece - (lo ? ends[lo - 1] : 0)) * chunk_length;
        chunk(s, from, s->length - from < chunk_length ? s->length - from : chunk_length);
    }
}

/* -- facts about tensors, for the checks in front of a step ------------------------------------------------ */

typedef struct { /* torch's C shim; a tensor is a pointer to an at::Tensor, which is a pointer itself */
    int32_t (*address)(void *, void **), (*numel)(void *, int64_t *), (*storage_numel)(void *, int64_t *);
    int32_t (*offset)(void *, int64_t *), (*dtype)(void *, int32_t *), (*layout)(void *, int32_t *);
    int32_t (*device)(void *, int32_t *), (*device_index)(void *, int32_t *), (*is_contiguous)(void *, uint8_t *);
} Shim;

/* Of each tensor its address, number of elements and kind (facts.py); how many cannot be told, whose kind is then -1. */
int64_t shardopt_describe(const Shim *ask, void *const *tensors, int64_t count, int64_t *facts) {
    int64_t untold = 0;
    for (int64_t i = 0; i < count; i++) {
        void *tensor = tensors[i], *address = NULL;
        int64_t numel = 0, room = 0, offset = 0, kind = 0;
        int32_t dtype = 0, layout = 0, device = 0, index = 0;
        uint8_t contiguous = 0;
        if (*(void **)tensor != NULL) {
            const int failed = ask->layout(tensor, &layout) || layout != 0 /* strided */ || ask->numel(tensor, &numel)
                || ask->dtype(tensor, &dtype) || ask->device(tensor, &device) || ask->device_index(tensor, &index)
                || ask->address(tensor, &address) || ask->storage_numel(tensor, &room) || ask->offset(tensor, &offset)
                || ask->is_contiguous(tensor, &contiguous);
            const int whole = numel == 0 || (address != NULL && room >= offset + numel);
            kind = 1 | (int64_t)(contiguous != 0) << 1 | (int64_t)whole << 2 | (int64_t)(uint8_t)dtype << 8
                | (int64_t)(uint8_t)device << 16 | (int64_t)(uint16_t)index << 24;
            if (failed) kind = -1, untold++;
        }
        facts[i] = (int64_t)(uintptr_t)address;
        facts[count + i] = numel;
        facts[2 * count + i] = kind;
    }
    return untold;
}
