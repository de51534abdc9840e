// A 3×3 convolution, padded by 1, of channels-last float32, by Winograd's F(4×4, 3×3): 36 products
// where the definition has 144 (Lavin and Gray 2016, arXiv 1509.09308).
//
//     Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A      for each tile of 4×4 pixels of the image
//
// d: the 6×6 pixels that a tile sees; g: the 3×3 weights. A block of tiles is transformed, which
// gives a matrix [tiles, C] for each of the 36 places; each is multiplied by the weights' [C, K] of
// that place; and the products are transformed back. A block's matrices stay in the core's cache.
//
// Lanes are channels, of which there are multiples of 16; both sides of the image, multiples of 4.
// GCC's and Clang's vectors become what the processor has.
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

#pragma GCC push_options
#pragma GCC optimize("O3")

namespace ddpm_winograd {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // that a core keeps in registers, with what they are made of
#elif defined(__AVX2__)
constexpr int LANES = 8, SUMS = 12;
#else
constexpr int LANES = 4, SUMS = 24;
#endif
constexpr int PLACES = 36;
constexpr size_t LINE = 16;  // of a cache, in floats
constexpr size_t BLOCK_BYTES = 400 << 10;  // of a core's second cache, beside the weights

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

// r = Bᵀ d
static inline void into(const Vector d[6], Vector r[6]) {
    const Vector even = d[4] - 4.f * d[2], odd = d[3] - 4.f * d[1];
    const Vector fourth = d[4] - d[2], twice = 2.f * (d[3] - d[1]);
    r[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    r[1] = even + odd;
    r[2] = even - odd;
    r[3] = fourth + twice;
    r[4] = fourth - twice;
    r[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}

// r = Aᵀ m
static inline void back(const Vector m[6], Vector r[4]) {
    const Vector near = m[1] + m[2], nearer = m[1] - m[2], far = m[3] + m[4], farther = m[3] - m[4];
    r[0] = m[0] + near + far;
    r[1] = nearer + 2.f * farther;
    r[2] = near + 4.f * far;
    r[3] = nearer + 8.f * farther + m[5];
}

// ROWS rows of v [·, C] times WIDE vectors of u [C, K], into m [·, K].
template <int ROWS, int WIDE>
static inline void multiply(const float* v, const float* u, float* m, size_t C, size_t K) {
    Vector sums[ROWS][WIDE];
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int k = 0; k < WIDE; k++) sums[r][k] = Vector{};
    for (size_t c = 0; c < C; c++) {
        Vector weights[WIDE];
#pragma GCC unroll 4
        for (int k = 0; k < WIDE; k++) weights[k] = load(u + c * K + k * LANES);
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int k = 0; k < WIDE; k++) sums[r][k] += v[r * C + c] * weights[k];
    }
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int k = 0; k < WIDE; k++) store(m + r * K + k * LANES, sums[r][k]);
}

template <int WIDE>
static inline void multiply_all(
    const float* v, const float* u, float* m, size_t rows, size_t C, size_t K) {
    constexpr size_t MOST = SUMS / WIDE;
    size_t r = 0;
    for (; r + MOST <= rows; r += MOST) multiply<MOST, WIDE>(v + r * C, u, m + r * K, C, K);
    for (; r + 2 <= rows; r += 2) multiply<2, WIDE>(v + r * C, u, m + r * K, C, K);
    for (; r < rows; r++) multiply<1, WIDE>(v + r * C, u, m + r * K, C, K);
}

struct Sizes {
    size_t N, H, W, C, K;  // images, rows and columns of the result, channels of x and of y
    int halved;            // 1: x is half as high and wide, and each of its pixels stands for 2×2
};

// v [36, ·, C], at one tile: Bᵀ d B of all channels.
static inline void transform(const float* x, float* v, size_t between, size_t tile, const Sizes& s) {
    const size_t down = s.H / 4, across = s.W / 4;
    const size_t n = tile / (down * across), top = tile / across % down * 4, left = tile % across * 4;
    const size_t height = s.H >> s.halved, width = s.W >> s.halved;
    const float* pixels[6][6];  // null beyond the edge, where all is 0
    for (size_t a = 0; a < 6; a++)
        for (size_t b = 0; b < 6; b++) {
            const size_t i = top + a - 1, j = left + b - 1;  // beyond the first edge: very large
            pixels[a][b] = i < s.H && j < s.W
                ? x + ((n * height + (i >> s.halved)) * width + (j >> s.halved)) * s.C
                : nullptr;
        }
    for (size_t c = 0; c < s.C; c += LANES) {
        Vector half[6][6];
        for (int b = 0; b < 6; b++) {
            Vector d[6], r[6];
            for (int a = 0; a < 6; a++) d[a] = pixels[a][b] ? load(pixels[a][b] + c) : Vector{};
            into(d, r);
            for (int a = 0; a < 6; a++) half[a][b] = r[a];
        }
        for (int a = 0; a < 6; a++) {
            Vector r[6];
            into(half[a], r);
            for (int b = 0; b < 6; b++) {
                float* const to = v + (a * 6 + b) * between + c;
                store(to, r[b]);
                __builtin_prefetch(to + LANES, 1);  // the next, of these channels or of this tile's
            }
        }
    }
}

// y at one tile: Aᵀ m A of m [36, ·, K], with the bias.
static inline void transform_back(
    const float* m, size_t between, const float* bias, float* y, size_t tile, const Sizes& s) {
    const size_t down = s.H / 4, across = s.W / 4;
    const size_t n = tile / (down * across), top = tile / across % down * 4, left = tile % across * 4;
    float* corner = y + ((n * s.H + top) * s.W + left) * s.K;
    for (size_t k = 0; k < s.K; k += LANES) {
        const Vector added = load(bias + k);
        Vector half[4][6];
        for (int b = 0; b < 6; b++) {
            Vector column[6], r[4];
            for (int a = 0; a < 6; a++) column[a] = load(m + (a * 6 + b) * between + k);
            back(column, r);
            for (int a = 0; a < 4; a++) half[a][b] = r[a];
        }
        for (int a = 0; a < 4; a++) {
            Vector r[4];
            back(half[a], r);
            for (int b = 0; b < 4; b++) store(corner + (a * s.W + b) * s.K + k, r[b] + added);
        }
    }
}

// Of the calling thread, which keeps it.
static inline float* scratch(size_t floats) {
    struct Memory {
        float* at = nullptr;
        size_t floats = 0;
        ~Memory() { std::free(at); }
    };
    static thread_local Memory memory;
    if (memory.floats < floats) {
        std::free(memory.at);
        memory.floats = 0;
        const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        memory.at = static_cast<float*>(std::aligned_alloc(64, bytes));
        if (!memory.at) throw std::bad_alloc();
        memory.floats = floats;
    }
    return memory.at;
}

// x [N, H, W, C] (or halved), u = G g Gᵀ [36, C, K], bias [K]; y [N, H, W, K].
static inline void convolve(
    const float* x, const float* u, const float* bias, float* y, const Sizes& s) {
    const size_t tiles = s.N * (s.H / 4) * (s.W / 4);
    const size_t fit = BLOCK_BYTES / (PLACES * sizeof(float) * (s.C + s.K)) / 12 * 12;
    const size_t block = std::min(tiles, std::clamp<size_t>(fit, 12, 48));
    // From place to place an odd number of the cache's lines, or many would have the same slot.
    const size_t of_v = block * s.C + LINE, of_m = block * s.K + LINE;
    float* const v = scratch(PLACES * (of_v + of_m));
    float* const m = v + PLACES * of_v;
    for (size_t first = 0; first < tiles; first += block) {
        const size_t here = std::min(block, tiles - first);
        for (size_t i = 0; i < here; i++) transform(x, v + i * s.C, of_v, first + i, s);
        for (size_t place = 0; place < PLACES; place++) {
            const float* rows = v + place * of_v;
            const float* weights = u + place * s.C * s.K;
            float* out = m + place * of_m;
            size_t k = 0;
            for (; k + 4 * LANES <= s.K; k += 4 * LANES)
                multiply_all<4>(rows, weights + k, out + k, here, s.C, s.K);
            for (; k + 2 * LANES <= s.K; k += 2 * LANES)
                multiply_all<2>(rows, weights + k, out + k, here, s.C, s.K);
            for (; k < s.K; k += LANES)
                multiply_all<1>(rows, weights + k, out + k, here, s.C, s.K);
        }
        for (size_t i = 0; i < here; i++)
            transform_back(m + i * s.K, of_m, bias, y, first + i, s);
    }
}

}  // namespace ddpm_winograd

#pragma GCC pop_options
