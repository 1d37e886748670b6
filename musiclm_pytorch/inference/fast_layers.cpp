// What lies between the matrix products of a transformer's layer, and its attention, on a processor with AVX-512.
//
// `native_layers.py` compiles this file for the processor at hand and calls the functions at its end; the methods of
// its `NativeParts` have their plain reference in those of `TorchParts`. Threads are those of PyTorch's own OpenMP.
//
// Rows are tokens, of all items in order: row i * n + t is token t of item i.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace {

// ---- numbers ----

struct bfloat16 {
    uint16_t bits;
};

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float number(float x) { return x; }
inline float number(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

inline void put(float &to, float x) { to = x; }
inline void put(bfloat16 &to, float x) {
    // to the nearest, to an even one of two
    uint32_t bits = bits_of(x);
    to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x to 4e-6, for x up to 126; from -126 down it stays what it is there
inline float exp2_of(float x) {
    constexpr float rounder = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to whole numbers
    x = x > -126.0f ? x : -126.0f;
    float whole = x + rounder, part = x - (whole - rounder);
    float power = 1.3333558e-3f;
    for (float coefficient : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        power = power * part + coefficient;
    return from_bits(bits_of(power) + (bits_of(whole) << 23));
}

// x times the normal distribution up to x, by Abramowitz and Stegun's 7.1.26, to 1e-6 of x
inline float gelu(float x) {
    float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    float tail = 1.061405429f;
    for (float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        tail = tail * t + coefficient;
    // so far out it is less than 1e-14, and soon a subnormal number, of which some processors are slow
    tail *= z < 5.5f ? 0.5f * t * exp2_of(-1.44269504f * z * z) : 0.0f;
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

// ---- rows in the form that the next product takes ----

template <class Out> void finish(const float *row, int64_t size, Out *out, float *) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        put(out[i], row[i]);
}

// the largest absolute value, whose bits are in the order of the numbers
inline float largest(const float *row, int64_t size) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; i++)
        top = std::max(top, bits_of(row[i]) & 0x7fffffff);
    return from_bits(top);
}

// unsigned bytes around 128, and their scale
void finish(const float *row, int64_t size, uint8_t *out, float *scale) {
    *scale = std::max(largest(row, size), 1e-12f) / 127.0f;
    float inverse = 1.0f / *scale;
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        out[i] = uint8_t(int32_t(row[i] * inverse + 128.5f));
}

template <class In, class Out>
void norm_rows(const float *x, const In *product, const float *scale, const float *gamma, float *sum, Out *out,
               float *out_scale, int64_t rows, int64_t dim, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * dim;
        if (product) {
            float times = scale ? scale[r] : 1.0f;
            float *to = sum + r * dim;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++)
                to[i] = from[i] + times * number(product[r * dim + i]);
            from = to;
        }
        if (!out)
            continue;
        float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < dim; i++)
            mean += from[i];
        mean /= dim;
#pragma omp simd reduction(+ : variance)
        for (int64_t i = 0; i < dim; i++)
            variance += (from[i] - mean) * (from[i] - mean);
        float inverse = 1.0f / std::sqrt(variance / dim + 1e-5f);
        thread_local std::vector<float> normed;
        normed.resize(dim);
        float *row = normed.data();
#pragma omp simd
        for (int64_t i = 0; i < dim; i++)
            row[i] = (from[i] - mean) * inverse * gamma[i];
        finish(row, dim, out + r * dim, out_scale + r);
    }
}

template <class In, class Out>
void gate_rows(const In *product, const float *scale, Out *out, float *out_scale, int64_t rows, int64_t inner,
               int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const In *x = product + r * 2 * inner, *gate = x + inner;
        float times = scale ? scale[r] : 1.0f;
        thread_local std::vector<float> gated;
        gated.resize(inner);
        float *row = gated.data();
#pragma omp simd
        for (int64_t i = 0; i < inner; i++)
            row[i] = gelu(times * number(gate[i])) * (times * number(x[i]));
        finish(row, inner, out + r * inner, out_scale + r);
    }
}

template <class Out>
void cast_rows(const float *x, Out *out, float *out_scale, int64_t rows, int64_t dim, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        finish(x + r * dim, dim, out + r * dim, out_scale + r);
}

// ---- attention ----
//
// Its two products go through one kernel: ROWS rows times a tile of TILE columns, four bytes of each at a step. Four
// bytes are four 8-bit integers, two halves, or one float32. What is multiplied with is packed to be read in a line:
// (…, steps, TILE, 4 bytes).

constexpr int ROWS = 6, LANES = 16, VECTORS = 4, TILE = LANES * VECTORS, STEP = 4;

// 2^x by a polynomial of its fractional part, the highest power first
inline __m512 power_of(__m512 x, std::initializer_list<float> coefficients) {
    __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), power = _mm512_setzero_ps();
    for (float coefficient : coefficients)
        power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(power, x);
}

int64_t ceil_to(int64_t size, int64_t of) { return (size + of - 1) / of * of; }

struct Floats {
    using Number = float;
    using Sum = __m512;
    static Sum begin(const int32_t *) { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static __m512 as_float(Sum sum) { return sum; }
    // 2^x to 3e-7
    static __m512 exp2_of(__m512 x) {
        return power_of(x, {1.87757690e-3f, 8.98934030e-3f, 5.58263171e-2f, 2.40153618e-1f, 6.93153073e-1f, 1.0f});
    }
    static void put_weights(float *to, __m512 first, __m512 second) {
        _mm512_storeu_ps(to, first);
        _mm512_storeu_ps(to + LANES, second);
    }
};

#ifdef __AVX512BF16__
struct Halves {
    using Number = bfloat16;
    using Sum = __m512;
    static Sum begin(const int32_t *) { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static __m512 as_float(Sum sum) { return sum; }
    // 2^x to 8e-5, a fraction of what rounding to a half takes
    static __m512 exp2_of(__m512 x) {
        return power_of(x, {7.80245520e-2f, 2.26067185e-1f, 6.95833491e-1f, 0.999925228f});
    }
    static void put_weights(bfloat16 *to, __m512 first, __m512 second) {
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
};
#else
using Halves = Floats; // never chosen
#endif

#ifdef __AVX512VNNI__
// Queries are bytes around 128, keys bytes around 0: the sum begins with what the 128 would add, subtracted.
struct Bytes {
    using Number = uint8_t;
    using Sum = __m512i;
    static Sum begin(const int32_t *offsets) { return _mm512_loadu_si512(offsets); }
    static Sum add(Sum sum, __m512i a, __m512i b) {
        // of _mm512_dpbusd_epi32, GCC 12 makes copies of the sums, half of them in memory
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }
    static __m512 as_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};
#else
using Bytes = Floats; // never chosen
#endif

template <class Kind>
inline void multiply(const typename Kind::Number *const *a, const uint32_t *b, int64_t steps,
                     typename Kind::Sum (&sums)[ROWS][VECTORS]) {
    for (int64_t s = 0; s < steps; s++) {
        __m512i tile[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            tile[v] = _mm512_loadu_si512(b + s * TILE + v * LANES);
        for (int r = 0; r < ROWS; r++) {
            int32_t word;
            std::memcpy(&word, (const char *)a[r] + s * STEP, STEP);
            __m512i both = _mm512_set1_epi32(word);
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = Kind::add(sums[r][v], both, tile[v]);
        }
    }
}

// Of all heads, n tokens an item with room for `room`, in memory that is the caller's.
template <class Score, class Value> struct Packed {
    static constexpr int together = STEP / sizeof(typename Score::Number);
    static constexpr int values_together = STEP / sizeof(typename Value::Number);

    int64_t items, heads, n, dim, room, steps, value_tiles;
    typename Score::Number *queries; // (items * heads, room, steps * together)
    uint32_t *keys;                  // (items * heads, tiles, steps, TILE)
    uint32_t *values;                // (items * heads, value tiles, room / values_together, TILE)
    float *query_scales, *key_scales;
    int32_t *offsets;
    int64_t bytes = 0; // of memory

    Packed(char *memory, int64_t items, int64_t heads, int64_t n, int64_t dim)
        : items(items), heads(heads), n(n), dim(dim), room(ceil_to(n, TILE)),
          steps(ceil_to(dim, together) / together), value_tiles(ceil_to(dim, TILE) / TILE) {
        const int64_t tokens = items * heads * room;
        auto take = [&](auto *&part, int64_t size) {
            part = (std::remove_reference_t<decltype(part)>)(memory + bytes);
            bytes += ceil_to(size * sizeof *part, 64);
        };
        take(queries, tokens * steps * together);
        take(keys, tokens * steps);
        take(values, tokens / values_together * value_tiles * TILE);
        take(query_scales, tokens);
        take(key_scales, tokens);
        take(offsets, tokens);
    }
};

inline float length_of(const float *x, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++)
        sum += x[i] * x[i];
    return std::max(std::sqrt(sum), 1e-12f);
}

// Normalises queries and keys, multiplies the queries by the gain, and packs the tokens of a tile of a head.
template <class In, class Score, class Value>
void pack(const Packed<Score, Value> &packed, const In *q, const In *kv, const float *scale, const float *gain,
          int64_t threads) {
    using Number = typename Score::Number;
    constexpr bool bytes = sizeof(Number) == 1;
    constexpr int together = Packed<Score, Value>::together, values_together = Packed<Score, Value>::values_together;
    const int64_t dim = packed.dim, width = packed.heads * dim, n = packed.n, room = packed.room, steps = packed.steps;
    const int64_t wide = steps * together, value_width = packed.value_tiles * TILE, tiles = room / TILE;

#pragma omp parallel num_threads(threads)
    {
        // a token's numbers, and those of a tile in a row each, zeros behind them
        std::vector<float> numbers(dim);
        std::vector<Number> keys(TILE * wide);
        std::vector<typename Value::Number> values(TILE * value_width);

#pragma omp for schedule(static)
        for (int64_t task = 0; task < packed.items * packed.heads * tiles; task++) {
            const int64_t tile = task % tiles, head = task / tiles, item = head / packed.heads;
            const int64_t column = head % packed.heads * dim, start = head * room + tile * TILE;
            float *x = numbers.data();

            for (int64_t t = 0; t < TILE; t++) {
                // what is behind the last token is masked: copies of it will do
                const int64_t row = item * n + std::min(tile * TILE + t, n - 1), place = start + t;
                auto read = [&](const In *from) {
#pragma omp simd
                    for (int64_t i = 0; i < dim; i++)
                        x[i] = number(from[i]);
                };

                read(q + row * width + column);
                float inverse = 1.0f / length_of(x, dim);
#pragma omp simd
                for (int64_t i = 0; i < dim; i++)
                    x[i] *= inverse * gain[i];
                Number *query = packed.queries + place * wide;
                std::fill(query + dim, query + wide, Number{});
                finish(x, dim, query, packed.query_scales + place);

                read(kv + row * 2 * width + column);
                inverse = 1.0f / length_of(x, dim);
                Number *key = keys.data() + t * wide;
                if constexpr (bytes) {
                    finish(x, dim, key, packed.key_scales + place);
                    packed.key_scales[place] *= inverse;
                    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t i = 0; i < dim; i++) {
                        key[i] -= 128;
                        sum += int8_t(key[i]);
                    }
                    packed.offsets[place] = -128 * sum;
                } else {
#pragma omp simd
                    for (int64_t i = 0; i < dim; i++)
                        x[i] *= inverse;
                    finish(x, dim, key, nullptr);
                }

                read(kv + row * 2 * width + width + column);
                const float times = scale ? scale[row] : 1.0f;
                auto *value = values.data() + t * value_width;
#pragma omp simd
                for (int64_t i = 0; i < dim; i++)
                    put(value[i], x[i] * times);
            }

            for (int64_t s = 0; s < steps; s++)
                for (int64_t t = 0; t < TILE; t++)
                    std::memcpy(packed.keys + start * steps + s * TILE + t, &keys[t * wide + s * together], STEP);

            const int64_t value_steps = room / values_together;
            for (int64_t c = 0; c < packed.value_tiles; c++)
                for (int64_t s = 0; s < TILE / values_together; s++) {
                    const int64_t step = tile * TILE / values_together + s;
                    const int64_t place = ((head * packed.value_tiles + c) * value_steps + step) * TILE;
                    auto *to = (typename Value::Number *)(packed.values + place);
                    const auto *from = values.data() + s * values_together * value_width + c * TILE;
#pragma omp simd
                    for (int64_t i = 0; i < TILE; i++)
                        for (int part = 0; part < values_together; part++)
                            to[i * values_together + part] = from[part * value_width + i];
                }
        }
    }
}

// The bias of a pair of tokens is `table[head][base - codes[query] + codes[key]]`, in units of log 2.
struct Bias {
    const float *table; // null: none
    int64_t columns, base;
    const int32_t *codes; // (items or 1, n)
    int64_t codes_of_item; // 0: all have the same
};

constexpr float NO_KEY = -1e30f; // in place of minus infinity, of which no difference can be taken

// softmax(q kᵀ + bias + mask) v into `out`, (items * n, heads * dim). Of an item, `mask` `(items, room)` holds 0 for a
// key and NO_KEY for what is none.
template <class Score, class Value>
void attend_packed(const Packed<Score, Value> &packed, const Bias &bias, const float *mask, float *out,
                   int64_t threads) {
    const int64_t n = packed.n, room = packed.room, dim = packed.dim, steps = packed.steps, heads = packed.heads;
    const int64_t blocks = ceil_to(n, ROWS) / ROWS, wide = steps * packed.together;
    constexpr bool bytes = sizeof(typename Score::Number) == 1;

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(ROWS * room);
        std::vector<typename Value::Number> weights(ROWS * room);
        std::vector<int32_t> codes(room);
        std::vector<char> in_line(room / LANES);
        int64_t prepared = -1;

#pragma omp for schedule(static)
        for (int64_t task = 0; task < packed.items * heads * blocks; task++) {
            const int64_t head = task / blocks, item = head / heads, first = task % blocks * ROWS;
            if (bias.table && prepared != item) {
                // where codes follow each other their biases do, too, and are read at once
                std::copy_n(bias.codes + item * bias.codes_of_item, n, codes.begin());
                for (int64_t j = 0; j < room; j += LANES) {
                    bool follows = true;
                    for (int64_t l = 1; l < LANES && j + l < n; l++)
                        follows &= codes[j + l] == codes[j] + l;
                    in_line[j / LANES] = follows;
                }
                prepared = item;
            }

            // the last block ends in copies of its last query
            int64_t query[ROWS];
            const typename Score::Number *rows[ROWS];
            const float *biases[ROWS];
            __m512 top[ROWS], scale[ROWS];
            for (int r = 0; r < ROWS; r++) {
                query[r] = std::min(first + r, n - 1);
                rows[r] = packed.queries + (head * room + query[r]) * wide;
                if (bias.table)
                    biases[r] = bias.table + head % heads * bias.columns + bias.base - codes[query[r]];
                if constexpr (bytes)
                    scale[r] = _mm512_set1_ps(packed.query_scales[head * room + query[r]]);
                top[r] = _mm512_set1_ps(NO_KEY);
            }

            for (int64_t j = 0; j < room; j += TILE) {
                const int64_t place = head * room + j;
                typename Score::Sum sums[ROWS][VECTORS];
                for (int r = 0; r < ROWS; r++)
                    for (int v = 0; v < VECTORS; v++)
                        sums[r][v] = Score::begin(packed.offsets + place + v * LANES);
                multiply<Score>(rows, packed.keys + place * steps, steps, sums);
                for (int v = 0; v < VECTORS; v++) {
                    const int64_t key = j + v * LANES;
                    const __m512 key_mask = _mm512_loadu_ps(mask + item * room + key);
                    const __m512i key_codes = _mm512_loadu_si512(codes.data() + key);
                    for (int r = 0; r < ROWS; r++) {
                        __m512 score = Score::as_float(sums[r][v]), added = key_mask;
                        if (bias.table) {
                            const __m512 read = in_line[key / LANES] ? _mm512_loadu_ps(biases[r] + codes[key])
                                                                     : _mm512_i32gather_ps(key_codes, biases[r], 4);
                            added = _mm512_add_ps(added, read);
                        }
                        if constexpr (bytes) {
                            const __m512 key_scale = _mm512_loadu_ps(packed.key_scales + place + v * LANES);
                            score = _mm512_fmadd_ps(score, _mm512_mul_ps(key_scale, scale[r]), added);
                        } else {
                            score = _mm512_add_ps(score, added);
                        }
                        top[r] = _mm512_max_ps(top[r], score);
                        _mm512_storeu_ps(scores.data() + r * room + key, score);
                    }
                }
            }

            const typename Value::Number *weight_rows[ROWS];
            float inverse[ROWS];
            for (int r = 0; r < ROWS; r++) {
                const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top[r]));
                __m512 sum = _mm512_setzero_ps();
                typename Value::Number *to = weights.data() + r * room;
                for (int64_t j = 0; j < room; j += 2 * LANES) {
                    const float *from = scores.data() + r * room + j;
                    __m512 one = Value::exp2_of(_mm512_sub_ps(_mm512_loadu_ps(from), highest));
                    __m512 other = Value::exp2_of(_mm512_sub_ps(_mm512_loadu_ps(from + LANES), highest));
                    sum = _mm512_add_ps(sum, _mm512_add_ps(one, other));
                    Value::put_weights(to + j, one, other);
                }
                inverse[r] = 1.0f / _mm512_reduce_add_ps(sum);
                weight_rows[r] = to;
            }

            const int64_t value_steps = room / packed.values_together;
            for (int64_t c = 0; c < packed.value_tiles; c++) {
                __m512 sums[ROWS][VECTORS];
                for (int r = 0; r < ROWS; r++)
                    for (int v = 0; v < VECTORS; v++)
                        sums[r][v] = _mm512_setzero_ps();
                const int64_t tile = head * packed.value_tiles + c;
                multiply<Value>(weight_rows, packed.values + tile * value_steps * TILE, value_steps, sums);
                for (int r = 0; r < ROWS && first + r < n; r++) {
                    float *to = out + (item * n + query[r]) * heads * dim + head % heads * dim;
                    for (int v = 0; v < VECTORS; v++) {
                        const int64_t start = c * TILE + v * LANES, left = std::min<int64_t>(dim - start, LANES);
                        if (left > 0)
                            _mm512_mask_storeu_ps(to + start, __mmask16((1u << left) - 1),
                                                  _mm512_mul_ps(sums[r][v], _mm512_set1_ps(inverse[r])));
                    }
                }
            }
        }
    }
}

} // namespace

// ---- what Python calls: all integers are int64 ----

Floats kind_of(float);
Halves kind_of(bfloat16);
Bytes kind_of(uint8_t);

// Calls `run` with a number of the type of products, half or float32, and one of what the next product takes.
template <class Run> auto dispatch(int64_t half, int64_t bytes, Run run) {
    if (half)
        return bytes ? run(bfloat16{}, uint8_t{}) : run(bfloat16{}, bfloat16{});
    return bytes ? run(float{}, uint8_t{}) : run(float{}, float{});
}

extern "C" {

extern const int64_t fast_layers_tile = TILE, fast_layers_lanes = LANES;
extern const float fast_layers_no_key = NO_KEY;

// bits: 1 products of bfloat16, 2 of bytes
extern const int64_t fast_layers_knows =
#ifdef __AVX512BF16__
    1 +
#endif
#ifdef __AVX512VNNI__
    2 +
#endif
    0;

void fast_layers_norm(int64_t half, int64_t bytes, const float *x, const void *product, const float *scale,
                      const float *gamma, float *sum, void *out, float *out_scale, int64_t rows, int64_t dim,
                      int64_t threads) {
    dispatch(half, bytes, [&](auto number, auto taken) {
        norm_rows(x, (decltype(number) *)product, scale, gamma, sum, (decltype(taken) *)out, out_scale, rows, dim,
                  threads);
    });
}

void fast_layers_gate(int64_t half, int64_t bytes, const void *product, const float *scale, void *out,
                      float *out_scale, int64_t rows, int64_t inner, int64_t threads) {
    dispatch(half, bytes, [&](auto number, auto taken) {
        gate_rows((decltype(number) *)product, scale, (decltype(taken) *)out, out_scale, rows, inner, threads);
    });
}

void fast_layers_cast(int64_t half, int64_t bytes, const float *x, void *out, float *out_scale, int64_t rows,
                      int64_t dim, int64_t threads) {
    dispatch(half, bytes, [&](auto, auto taken) {
        cast_rows(x, (decltype(taken) *)out, out_scale, rows, dim, threads);
    });
}

// bytes of memory that `fast_layers_attend` needs
int64_t fast_layers_memory(int64_t half, int64_t bytes, int64_t items, int64_t heads, int64_t n, int64_t dim) {
    return dispatch(half, bytes, [&](auto number, auto taken) {
        return Packed<decltype(kind_of(taken)), decltype(kind_of(number))>(nullptr, items, heads, n, dim).bytes;
    });
}

void fast_layers_attend(int64_t half, int64_t bytes, const void *q, const void *kv, const float *scale,
                        const float *gain, const float *table, const int32_t *codes, const float *mask, char *memory,
                        float *out, int64_t columns, int64_t base, int64_t codes_of_item, int64_t items, int64_t heads,
                        int64_t n, int64_t dim, int64_t threads) {
    const Bias bias{table, columns, base, codes, codes_of_item};
    dispatch(half, bytes, [&](auto number, auto taken) {
        Packed<decltype(kind_of(taken)), decltype(kind_of(number))> packed(memory, items, heads, n, dim);
        pack(packed, (decltype(number) *)q, (decltype(number) *)kv, scale, gain, threads);
        attend_packed(packed, bias, mask, out, threads);
    });
}
}
