/* Random signs of noise.py's streams, added to a vector as they are drawn: no room is needed for them.
 *
 * The generator is NumPy's Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Which sign
 * a number has depends on its place alone, so threads take stretches of their own. The sum is rounded once, as PyTorch's
 * `base + scale * z` is, whose product is exact; it is built without -ffast-math.
 */

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bytes of a word are taken lowest first"
#endif

enum {
    WORDS = 4,               /* of 64 bits, from one count */
    SIGNS = 64 * WORDS,      /* from one count */
    STRETCH = 64 * SIGNS,    /* numbers that a thread takes at a time */
    FEWEST = 4 * STRETCH,    /* numbers that are worth several threads */
};

static uint32_t masks[256][8]; /* of the signs that the bits of a byte stand for, lowest first: a bit that is set is + */

__attribute__((constructor)) static void fill_masks(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0; bit < 8; bit++)
            masks[byte][bit] = (byte >> bit & 1) ? 0 : UINT32_C(1) << 31;
}

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
