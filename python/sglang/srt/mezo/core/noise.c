/* Random numbers of noise.py's streams, added to a vector as they are drawn: no room is needed for them.
 *
 * The generator is NumPy's Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Which number
 * an element gets depends on its place alone, so threads take stretches of their own. Every operation is one that IEEE 754
 * rounds in one way, in the order of normal.py, and none are contracted (-ffp-contract=off): so the bits are equal wherever
 * numbers are drawn. The logarithm, sine and cosine are those of FreeBSD's msun (Sun Microsystems, 1993).
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bytes of a word are taken lowest first"
#endif

/* One object for every CPU: its first call picks the clone that fits. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline)) /* into each clone, with its instructions */

enum {
    WORDS = 4,           /* of 64 bits, from one count */
    SIGNS = 64 * WORDS,  /* from one count */
    STRETCH = 64 * SIGNS, /* signs that a thread takes at a time */
    FEWEST = 4 * STRETCH, /* numbers that are worth several threads */
    BLOCK = 1 << 15,     /* normal numbers that belong together: cosines, then as many sines */
    HALF = BLOCK / 2,
    COUNTS = BLOCK / (2 * WORDS), /* of a block: radii from the first half of them, angles from the second */
    PAIRS = 128,         /* of normal numbers that are worked out at a time */
};

static void philox(uint64_t count, uint64_t key0, uint64_t key1, uint64_t words[WORDS]) {
    uint64_t c0 = count, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        unsigned __int128 a = (unsigned __int128)UINT64_C(0xD2E7470EE14C6C93) * c0;
        unsigned __int128 b = (unsigned __int128)UINT64_C(0xCA5A826395121157) * c2;
        uint64_t n0 = (uint64_t)(b >> 64) ^ c1 ^ key0, n2 = (uint64_t)(a >> 64) ^ c3 ^ key1;
        c0 = n0, c1 = (uint64_t)b, c2 = n2, c3 = (uint64_t)a;
        key0 += UINT64_C(0x9E3779B97F4A7C15), key1 += UINT64_C(0xBB67AE8584CAA73B);
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

/* --- signs ------------------------------------------------------------------------------------------------------------- */

static uint32_t masks[256][8]; /* of the signs that the bits of a byte stand for, lowest first: a bit that is set is + */

__attribute__((constructor)) static void fill_masks(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0; bit < 8; bit++)
            masks[byte][bit] = (byte >> bit & 1) ? 0 : UINT32_C(1) << 31;
}

/* Numbers from `first` to below `end` of the direction; out and base are those at `first`. */
static void add_signs(float *out, const float *base, float scale, uint64_t seed, uint64_t stream, int64_t first, int64_t end) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    for (int64_t at = first; at < end;) {
        uint64_t words[WORDS];
        uint8_t bytes[sizeof words];
        philox((uint64_t)(at / SIGNS) + 1, seed, stream, words); /* NumPy steps the counter before it encrypts it */
        memcpy(bytes, words, sizeof words);
        int64_t begin = at - at % SIGNS, stop = begin + SIGNS < end ? begin + SIGNS : end;
        while (at < stop) {
            const uint32_t *mask = masks[bytes[(at - begin) / 8]];
            int64_t bit = (at - begin) % 8, n = stop - at < 8 - bit ? stop - at : 8 - bit;
            uint32_t signed_bits[8];
            float added[8];
            for (int i = 0; i < 8; i++)
                signed_bits[i] = bits ^ mask[i];
            memcpy(added, signed_bits, sizeof added);
            if (n == 8)
                for (int i = 0; i < 8; i++)
                    out[at - first + i] = base[at - first + i] + added[i];
            else
                for (int64_t i = 0; i < n; i++)
                    out[at - first + i] = base[at - first + i] + added[bit + i];
            at += n;
        }
    }
}

/* out = base + scale z, of the n numbers of a direction from `first` on; seed and stream are the generator's key. */
void mezo_add_signs(float *out, const float *base, int64_t n, float scale, uint64_t seed, uint64_t stream, int64_t first) {
    int64_t stretches = (n + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) if (n >= FEWEST)
    for (int64_t i = 0; i < stretches; i++) {
        int64_t at = i * STRETCH, end = at + STRETCH < n ? at + STRETCH : n;
        add_signs(out + at, base + at, scale, seed, stream, first + at, first + end);
    }
}

/* --- normal numbers ---------------------------------------------------------------------------------------------------- */

INLINE double of_bits(uint64_t bits) {
    double number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE uint64_t bits_of(double number) {
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* A signed word as a number inside (0, 1), exactly. */
INLINE double uniform(int32_t word) {
    return ((double)word + 2147483648.5) * 0x1p-32;
}

/* Of a normal number. The exponent comes as a number by way of the low bits of 2^52 + 2^51, which every CPU can. */
INLINE double logarithm(double x) {
    uint64_t bits = bits_of(x) + ((UINT64_C(0x3ff00000) - UINT64_C(0x3fe6a09e)) << 32);
    double exponent = of_bits((bits >> 52) + UINT64_C(0x4338000000000000)) - (0x1.8p52 + 1023.0);
    double f = of_bits((bits & UINT64_C(0x000fffffffffffff)) + (UINT64_C(0x3fe6a09e) << 32)) - 1.0;
    double s = f / (2.0 + f), z = s * s, w = z * z;
    double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    double odd = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    double half = 0.5 * f * f;
    return exponent * 6.93147180369123816490e-01 - ((half - (s * (half + (odd + even)) + exponent * 1.90821492927058770002e-10)) - f);
}

/* Cosine and sine of so many turns, from 0 to 1: of what is left of them beside whole quarters, which only swap and negate. */
INLINE void turn(double turns, double *cosine, double *sine) {
    double quarters = turns * 4.0, shifted = quarters + 0x1.8p52;
    uint64_t quarter = bits_of(shifted);
    double x = (quarters - (shifted - 0x1.8p52)) * 1.57079632679489661923, z = x * x;
    double s = -1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10))));
    double c = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11))));
    double half = 0.5 * z, near = 1.0 - half;
    double sin_x = x + x * z * s, cos_x = near + (((1.0 - near) - half) + z * z * c);
    uint64_t swap = -(quarter & 1); /* all bits or none */
    uint64_t a = bits_of(cos_x), b = bits_of(sin_x), changed = (a ^ b) & swap;
    *cosine = of_bits((a ^ changed) ^ (((quarter + 1) & 2) << 62));
    *sine = of_bits((b ^ changed) ^ ((quarter & 2) << 62));
}

/* Pairs from `pair` on of the block whose first count is `count`. */
CLONES static void normal_pairs(uint64_t count, int64_t pair, uint64_t seed, uint64_t stream, float cosines[PAIRS], float sines[PAIRS]) {
    uint64_t words[2][PAIRS / 2];
    int32_t of_radius[PAIRS], of_angle[PAIRS];
    for (int i = 0; i < PAIRS / (2 * WORDS); i++) {
        uint64_t at = count + (uint64_t)(pair / (2 * WORDS) + i) + 1; /* NumPy steps the counter before it encrypts it */
        philox(at, seed, stream, words[0] + i * WORDS);
        philox(at + COUNTS / 2, seed, stream, words[1] + i * WORDS);
    }
    memcpy(of_radius, words[0], sizeof of_radius);
    memcpy(of_angle, words[1], sizeof of_angle);
    for (int i = 0; i < PAIRS; i++) {
        double radius = sqrt(-2.0 * logarithm(uniform(of_radius[i]))), cosine, sine;
        turn(uniform(of_angle[i]), &cosine, &sine);
        cosines[i] = (float)(cosine * radius);
        sines[i] = (float)(sine * radius);
    }
}

/* out = base + scale numbers, rounded once, of those numbers that lie from `first` to below `end`; out and base are those at
 * `first`. */
CLONES static void add_within(float *out, const float *base, float scale, const float numbers[PAIRS], int64_t place, int64_t first, int64_t end) {
    int64_t from = place < first ? first - place : 0, to = place + PAIRS > end ? end - place : PAIRS;
    for (int64_t i = from; i < to; i++)
        out[place + i - first] = fmaf(scale, numbers[i], base[place + i - first]);
}

/* As `mezo_add_signs`, of normal numbers. */
void mezo_add_normal(float *out, const float *base, int64_t n, float scale, uint64_t seed, uint64_t stream, int64_t first) {
    int64_t end = first + n;
#pragma omp parallel for schedule(static) if (n >= FEWEST)
    for (int64_t block = first / BLOCK; block < (end + BLOCK - 1) / BLOCK; block++) {
        for (int64_t pair = 0; pair < HALF; pair += PAIRS) {
            int64_t cosine = block * BLOCK + pair, sine = cosine + HALF;
            float cosines[PAIRS], sines[PAIRS];
            if ((cosine >= end || cosine + PAIRS <= first) && (sine >= end || sine + PAIRS <= first))
                continue;
            normal_pairs((uint64_t)block * COUNTS, pair, seed, stream, cosines, sines);
            add_within(out, base, scale, cosines, cosine, first, end);
            add_within(out, base, scale, sines, sine, first, end);
        }
    }
}
