/* A linear layer, y = x W' + b, for processors with AVX2: the weight is read where it lies, row after row.
 *
 * Rows of x are laid eight side by side, so that a number of W meets eight of them in one instruction, and 12 vectors of sums
 * stay in registers, of which AVX2 has 16. A sum runs over the columns in one and the same order, so what comes out for a row
 * is the same to the last bit whatever other rows there are. (For that it is built without -ffast-math.)
 *
 * The calling process shares its OpenMP threads with PyTorch.
 */

#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET __attribute__((target("arch=x86-64-v3")))
#else
#define TARGET
#endif
#define INLINE static inline __attribute__((always_inline))

enum {
    LANES = 8,
    SUMS = 12,        /* vectors of sums */
    BLOCK = 768,      /* columns that are summed at a time: what a tile reads stays in the near caches, and sums are not too long */
    PANELS = 32,      /* of LANES rows, that are laid out at a time */
    CHUNK = 4 * SUMS, /* outputs that a thread takes at a time */
};
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef struct {
    const float *x;      /* (rows, columns), rows x_stride apart */
    const float *weight; /* (outputs, columns) */
    const float *bias;   /* (outputs), or NULL */
    float *y;            /* (rows, outputs) */
    int64_t rows, columns, outputs, x_stride;
} Call;

/* What one or two panels add to y with a block of columns. */
typedef struct {
    const float *panel;      /* (columns, LANES), the second `apart` behind it */
    int64_t apart, columns, rows;
    int64_t row, column;     /* of x, the first */
} Tile;

/* For `outputs` rows of W from `out` on, and `panels` panels: both known to the compiler. */
TARGET INLINE void multiply(const Call *c, const Tile *t, int64_t out, int outputs, int panels) {
    const float *weight = c->weight + out * c->columns + t->column;
    Lanes sums[SUMS][2];
    for (int j = 0; j < outputs; j++)
        for (int p = 0; p < panels; p++) sums[j][p] = (Lanes){0} + (c->bias && !t->column ? c->bias[out + j] : 0);
    for (int64_t i = 0; i < t->columns; i++) {
        Lanes x[2];
        for (int p = 0; p < panels; p++) x[p] = *(const Lanes *)(t->panel + p * t->apart + i * LANES);
#pragma GCC unroll 12
        for (int j = 0; j < outputs; j++)
            for (int p = 0; p < panels; p++) sums[j][p] += x[p] * weight[j * c->columns + i];
    }
    float numbers[SUMS][2 * LANES];
    for (int j = 0; j < outputs; j++)
        for (int p = 0; p < panels; p++) *(Lanes *)(numbers[j] + p * LANES) = sums[j][p];
    float *y = c->y + t->row * c->outputs + out;
    if (t->column)
        for (int64_t row = 0; row < t->rows; row++)
            for (int j = 0; j < outputs; j++) y[row * c->outputs + j] += numbers[j][row];
    else
        for (int64_t row = 0; row < t->rows; row++)
            for (int j = 0; j < outputs; j++) y[row * c->outputs + j] = numbers[j][row];
}

TARGET static void one_panel(const Call *c, const Tile *t, int64_t out, int64_t end) {
    for (; out + SUMS <= end; out += SUMS) multiply(c, t, out, SUMS, 1);
    for (; out < end; out++) multiply(c, t, out, 1, 1);
}

TARGET static void two_panels(const Call *c, const Tile *t, int64_t out, int64_t end) {
    for (; out + SUMS / 2 <= end; out += SUMS / 2) multiply(c, t, out, SUMS / 2, 2);
    for (; out < end; out++) multiply(c, t, out, 1, 2);
}

/* Rows of x from `row` on, as (column, LANES); rows behind the last are 0. */
static void lay_out(const Call *c, int64_t row, float *panel) {
    for (int64_t lane = 0; lane < LANES; lane++) {
        const float *x = c->x + (row + lane) * c->x_stride;
        if (row + lane < c->rows)
            for (int64_t i = 0; i < c->columns; i++) panel[i * LANES + lane] = x[i];
        else
            for (int64_t i = 0; i < c->columns; i++) panel[i * LANES + lane] = 0;
    }
}

/* Outputs out .. end of `rows` rows of x from `row` on, whose panels are laid out. */
static void chunk(const Call *c, const float *panels, int64_t row, int64_t rows, int64_t out, int64_t end) {
    for (int64_t column = 0; column < c->columns; column += BLOCK)
        for (int64_t low = out; low < end; low += SUMS)
            for (int64_t done = 0; done < rows; done += 2 * LANES) {
                int64_t left = rows - done, columns = c->columns - column < BLOCK ? c->columns - column : BLOCK;
                Tile t = {panels + done * c->columns + column * LANES, c->columns * LANES, columns, left < 2 * LANES ? left : 2 * LANES, row + done, column};
                (left > LANES ? two_panels : one_panel)(c, &t, low, low + SUMS < end ? low + SUMS : end);
            }
}

/* Returns 0, or -1 where memory is short. */
int mezo_linear(const Call *c) {
    int64_t most = c->rows < PANELS * LANES ? (c->rows + LANES - 1) / LANES * LANES : PANELS * LANES;
    float *panels = aligned_alloc(LANES * sizeof(float), most * c->columns * sizeof(float));
    if (!panels) return -1;
#pragma omp parallel
    for (int64_t row = 0; row < c->rows; row += PANELS * LANES) {
        int64_t rows = c->rows - row < most ? c->rows - row : most;
#pragma omp for
        for (int64_t done = 0; done < rows; done += LANES) lay_out(c, row + done, panels + done * c->columns);
#pragma omp for schedule(dynamic)
        for (int64_t out = 0; out < c->outputs; out += CHUNK) chunk(c, panels, row, rows, out, out + CHUNK < c->outputs ? out + CHUNK : c->outputs);
    }
    free(panels);
    return 0;
}
