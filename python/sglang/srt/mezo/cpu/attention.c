/* Attention over keys and values where they lie in a paged KV pool: no gather, no padding, no mask.
 *
 * What comes out for a token is the same to the last bit wherever its row was cut into cached and fresh tokens, and
 * whatever other rows there are, so that a resumed run meets the KV it had. Nor does it depend on the values of tokens that it
 * does not see, be they infinite or no numbers.
 *
 * One call does one layer. Work is split by bundle (rows with one and the same cached prefix, which is read once for all
 * of them) and by some key-value heads of it. The calling process shares its OpenMP threads with PyTorch.
 */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* Four queries' sums of 2 * LANES numbers are in registers: AVX2 has 16 of eight numbers. */
#define LANES 8
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

/* Fresh tokens of one sequence: `fresh` of the batch's tokens from `start` on, after `prefix` cached ones. */
typedef struct {
    int64_t request, prefix, fresh, start;
} Row;

typedef struct {
    const float *q;      /* (tokens, heads, dim), tokens q_stride apart */
    const float *k, *v;  /* (places, kv_heads, dim) and (places, kv_heads, v_dim) */
    float *out;          /* (tokens, heads, v_dim) */
    const int32_t *table; /* (requests, table_stride): the place of every token of a request */
    const Row *rows;
    const int64_t *bundles; /* bundle i holds rows bundles[i] .. bundles[i + 1] */
    int64_t q_stride, table_stride, heads, kv_heads, dim, v_dim;
    int64_t window;  /* tokens that a query sees before itself; negative for all */
    int64_t causal;
    float scaling;
    float cap;       /* scores are cap tanh(score / cap); 0 for none */
} Call;

/* One query of a bundle: the keys low .. high of its row, and their scores. */
typedef struct {
    const float *q;
    float *out, *scores;
    int64_t low, high;
} Query;

/* What one thread keeps in its cache, in bytes. */
#define SCRATCH (192 << 10)

/* Places lie anywhere in the pool: the processor does not guess the next ones. Keys are fetched AHEAD of their turn, values a
 * block ahead. */
#define AHEAD 4
#define BLOCK 16
INLINE void fetch(const float *numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(numbers + i);
}

/* The scores of one key, in the same order of additions for every query; four queries at a time, so that it is loaded once for them. */
INLINE void dots(const Query *queries, int64_t count, const float *key, int64_t at, int64_t dim) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *a = queries[i].q, *b = queries[i + 1].q, *c = queries[i + 2].q, *d = queries[i + 3].q;
        float w = 0, x = 0, y = 0, z = 0;
        for (int64_t j = 0; j < dim; j++) {
            w += a[j] * key[j];
            x += b[j] * key[j];
            y += c[j] * key[j];
            z += d[j] * key[j];
        }
        queries[i].scores[at] = w, queries[i + 1].scores[at] = x, queries[i + 2].scores[at] = y, queries[i + 3].scores[at] = z;
    }
    for (; i < count; i++) {
        float w = 0;
        for (int64_t j = 0; j < dim; j++) w += queries[i].q[j] * key[j];
        queries[i].scores[at] = w;
    }
}

/* The keys at .. at + count, counted from `at`, that any and that all of four queries see: begin .. end, and first .. last. */
typedef struct {
    int64_t begin, first, last, end;
} Span;

INLINE Span span_of(const Query *four, int64_t at, int64_t count) {
    Span s = {count, 0, count, 0};
    for (int n = 0; n < 4; n++) {
        int64_t low = four[n].low > at ? four[n].low - at : 0, high = four[n].high - at < count ? four[n].high - at : count;
        if (low < s.begin) s.begin = low;
        if (low > s.first) s.first = low;
        if (high < s.last) s.last = high;
        if (high > s.end) s.end = high;
    }
    if (s.first > s.last) s.first = s.last = s.end;
    return s;
}

/* Adds the keys from .. to; `some` says that not all of the four queries see all of them. What a query does not see is not read
 * for it: 0 times what is no number would be none. */
INLINE void add_to_four(const Query *four, Lanes sums[4][2], const float *v, int64_t stride, const int32_t *places, int64_t next, int64_t from, int64_t to, int64_t at, int some) {
    const float *a = four[0].scores + at, *b = four[1].scores + at, *c = four[2].scores + at, *d = four[3].scores + at;
    for (int64_t j = from; j < to; j++) {
        const float *value = v + places[j] * stride;
        __builtin_prefetch(v + places[j + next] * stride);
        Lanes x = *(const Lanes *)value, y = *(const Lanes *)(value + LANES);
        if (!some || (four[0].low <= at + j && at + j < four[0].high)) sums[0][0] += a[j] * x, sums[0][1] += a[j] * y;
        if (!some || (four[1].low <= at + j && at + j < four[1].high)) sums[1][0] += b[j] * x, sums[1][1] += b[j] * y;
        if (!some || (four[2].low <= at + j && at + j < four[2].high)) sums[2][0] += c[j] * x, sums[2][1] += c[j] * y;
        if (!some || (four[3].low <= at + j && at + j < four[3].high)) sums[3][0] += d[j] * x, sums[3][1] += d[j] * y;
    }
}

/* out += weights . values over those of `count` keys from `at` on that a query sees, for one query from number `from` on. */
INLINE void add_to_one(const Query *query, const float *v, int64_t stride, const int32_t *places, int64_t count, int64_t at, int64_t from, int64_t v_dim) {
    int64_t low = query->low > at ? query->low - at : 0, high = query->high - at < count ? query->high - at : count;
    for (int64_t j = low; j < high; j++)
        for (int64_t m = from; m < v_dim; m++) query->out[m] += query->scores[at + j] * v[places[j] * stride + m];
}

/* The same for `num` queries: four of them and 2 * LANES numbers at a time, kept in registers. Values are fetched for the key
 * `next` after each. */
INLINE void add_values(const Query *queries, int64_t num, const float *v, int64_t stride, const int32_t *places, int64_t next, int64_t count, int64_t at, int64_t v_dim) {
    int64_t i = 0;
    for (; i + 4 <= num; i += 4) {
        const Query *four = queries + i;
        Span span = span_of(four, at, count);
        int64_t from = 0;
        for (; from + 2 * LANES <= v_dim; from += 2 * LANES) {
            Lanes sums[4][2];
            for (int n = 0; n < 4; n++)
                for (int m = 0; m < 2; m++) sums[n][m] = *(const Lanes *)(four[n].out + from + m * LANES);
            add_to_four(four, sums, v + from, stride, places, next, span.begin, span.first, at, 1);
            add_to_four(four, sums, v + from, stride, places, next, span.first, span.last, at, 0);
            add_to_four(four, sums, v + from, stride, places, next, span.last, span.end, at, 1);
            for (int n = 0; n < 4; n++)
                for (int m = 0; m < 2; m++) *(Lanes *)(four[n].out + from + m * LANES) = sums[n][m];
        }
        for (int n = 0; n < 4; n++) add_to_one(four + n, v, stride, places, count, at, from, v_dim);
    }
    for (; i < num; i++) add_to_one(queries + i, v, stride, places, count, at, 0, v_dim);
}

INLINE void softmax(const Query *query, float scaling, float cap) {
    float *s = query->scores, top = -FLT_MAX, sum = 0;
    if (cap != 0) {
        for (int64_t j = query->low; j < query->high; j++) s[j] = cap * tanhf(s[j] * scaling / cap);
        scaling = 1;
    }
    for (int64_t j = query->low; j < query->high; j++) top = s[j] > top ? s[j] : top;
    for (int64_t j = query->low; j < query->high; j++) s[j] = expf((s[j] - top) * scaling), sum += s[j];
    for (int64_t j = query->low; j < query->high; j++) s[j] /= sum;
}

/* Writes the queries of `num_rows` rows for one key-value head, their scores `longest` apart, and returns where the next ones go. */
INLINE Query *set_queries(const Call *c, const Row *rows, int64_t num_rows, int64_t head, Query *query, float *scores, int64_t longest) {
    int64_t group = c->heads / c->kv_heads, prefix = rows->prefix;
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t t = 0; t < rows[r].fresh; t++)
            for (int64_t g = 0; g < group; g++, scores += longest) {
                int64_t token = rows[r].start + t, h = head * group + g, high = prefix + (c->causal ? t + 1 : rows[r].fresh);
                int64_t low = c->window < 0 || prefix + t < c->window ? 0 : prefix + t - c->window;
                float *out = c->out + (token * c->heads + h) * c->v_dim;
                memset(out, 0, c->v_dim * sizeof(float));
                *query++ = (Query){c->q + token * c->q_stride + h * c->dim, out, scores, low, high};
            }
    return query;
}

/* Some key-value heads of one bundle. Their keys and values lie side by side in a place of the pool. */
typedef struct {
    const Row *rows;
    int64_t num_rows, first, num; /* the heads first .. first + num */
    int64_t total;                /* queries of one head; those of a head follow each other */
} Part;

INLINE void score(const Call *c, const Part *p, const Query *queries, int64_t dim) {
    const float *k = c->k + p->first * dim;
    int64_t stride = c->kv_heads * dim, group = c->heads / c->kv_heads, prefix = p->rows->prefix;
    const int32_t *places = c->table + p->rows->request * c->table_stride;
    for (int64_t j = 0; j < prefix; j++) {
        if (j + AHEAD < prefix) fetch(k + places[j + AHEAD] * stride, p->num * dim);
        for (int64_t n = 0; n < p->num; n++) dots(queries + n * p->total, p->total, k + places[j] * stride + n * dim, j, dim);
    }
    for (int64_t n = 0; n < p->num; n++)
        for (int64_t r = 0; r < p->num_rows; queries += p->rows[r].fresh * group, r++) {
            const int32_t *fresh = c->table + p->rows[r].request * c->table_stride + prefix;
            for (int64_t t = 0; t < p->rows[r].fresh; t++) {
                int64_t blind = c->causal ? t * group / 4 * 4 : 0; /* queries before it, in fours */
                dots(queries + blind, p->rows[r].fresh * group - blind, k + fresh[t] * stride + n * dim, prefix + t, dim);
            }
        }
}

INLINE void weigh(const Call *c, const Part *p, const Query *queries, int64_t v_dim) {
    const float *v = c->v + p->first * v_dim;
    int64_t stride = c->kv_heads * v_dim, group = c->heads / c->kv_heads, prefix = p->rows->prefix;
    const int32_t *places = c->table + p->rows->request * c->table_stride;
    for (int64_t j = 0; j < prefix; j += BLOCK) {
        int64_t count = prefix - j < BLOCK ? prefix - j : BLOCK, after = prefix - j - count, next = after < BLOCK ? after : BLOCK;
        for (int64_t n = 0; n < p->num; n++) add_values(queries + n * p->total, p->total, v + n * v_dim, stride, places + j, next, count, j, v_dim);
    }
    for (int64_t n = 0; n < p->num; n++)
        for (int64_t r = 0; r < p->num_rows; queries += p->rows[r].fresh * group, r++) {
            const int32_t *fresh = c->table + p->rows[r].request * c->table_stride + prefix;
            add_values(queries, p->rows[r].fresh * group, v + n * v_dim, stride, fresh, 0, p->rows[r].fresh, prefix, v_dim);
        }
}

INLINE void attend_sized(const Call *c, int64_t bundle, int64_t first, int64_t num, int64_t dim, int64_t v_dim, char *scratch, int64_t longest) {
    Part part = {c->rows + c->bundles[bundle], c->bundles[bundle + 1] - c->bundles[bundle], first, num, 0};
    for (int64_t r = 0; r < part.num_rows; r++) part.total += part.rows[r].fresh * (c->heads / c->kv_heads);
    Query *queries = (Query *)scratch, *end = queries;
    float *scores = (float *)(queries + num * part.total);
    for (int64_t n = 0; n < num; n++) end = set_queries(c, part.rows, part.num_rows, first + n, end, scores + n * part.total * longest, longest);
    score(c, &part, queries, dim);
    for (Query *query = queries; query < end; query++) softmax(query, c->scaling, c->cap);
    weigh(c, &part, queries, v_dim);
}

CLONES static void attend_heads(const Call *c, int64_t bundle, int64_t first, int64_t num, char *scratch, int64_t longest) {
    if (c->dim == 64 && c->v_dim == 64)
        attend_sized(c, bundle, first, num, 64, 64, scratch, longest);
    else if (c->dim == 128 && c->v_dim == 128)
        attend_sized(c, bundle, first, num, 128, 128, scratch, longest);
    else
        attend_sized(c, bundle, first, num, c->dim, c->v_dim, scratch, longest);
}

/* As many heads at a time as keep their scores in the cache, and leave some work for every thread. */
static int64_t heads_of_an_item(const Call *c, int64_t num_bundles, int64_t bytes_of_head) {
    int64_t span = SCRATCH / bytes_of_head, fair = num_bundles * c->kv_heads / (4 * omp_get_max_threads());
    span = span < fair ? span : fair;
    span = span < c->kv_heads ? span : c->kv_heads;
    return span > 1 ? span : 1;
}

/* Returns 0, or -1 where memory is short. */
int mezo_attend(const Call *c, int64_t num_bundles) {
    int64_t queries = 0, longest = 0;
    for (int64_t b = 0; b < num_bundles; b++) {
        int64_t sum = 0;
        for (int64_t r = c->bundles[b]; r < c->bundles[b + 1]; r++) {
            int64_t keys = c->rows[r].prefix + c->rows[r].fresh;
            sum += c->rows[r].fresh;
            longest = keys > longest ? keys : longest;
        }
        queries = sum > queries ? sum : queries;
    }
    longest = (longest + 15) / 16 * 16;
    int64_t head = queries * (c->heads / c->kv_heads) * (sizeof(Query) + longest * sizeof(float));
    int64_t span = heads_of_an_item(c, num_bundles, head), items = (c->kv_heads + span - 1) / span;
    int failed = 0;
#pragma omp parallel
    {
        char *scratch = malloc(span * head);
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_bundles * items; item++) {
            int64_t first = item % items * span, num = c->kv_heads - first < span ? c->kv_heads - first : span;
            if (scratch) attend_heads(c, item / items, first, num, scratch, longest);
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}
