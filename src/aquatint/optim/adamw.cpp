// What `adamw_bf16.adamw_` and `adamw8bit.adamw8bit_` do on a CPU, and `soap.round_rows_`, bit for bit, in one pass over memory.
//
// Compilers make vector instructions of these loops. So two bfloat16 neighbours are one number of 32 bits, out of which a shift and a
// mask make two float32, and for which one hash has the random bits of both; and whatever has a branch is in a loop of its own. Every
// operation must be rounded on its own: -ffp-contract=off.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

typedef uint32_t Pair __attribute__((aligned(2), may_alias));  // the first of two neighbours is its lower half
typedef uint16_t Half __attribute__((may_alias));

constexpr int64_t BLOCK = 256, PIECE = 1 << 17;  // PIECE: weights that a thread takes at once
constexpr uint32_t MULTIPLIER = 1664525, LOWER = 0xFFFF, UPPER = 0xFFFF0000, NAN_BITS = 0x7FC00000, HIGHEST = 0x80008000;
constexpr uint32_t CHUNK = 1024;  // pairs: of all vectors as many are in the nearest cache

struct Coefficients {  // `formula.Coefficients`
    float beta1, rest1, beta2, rest2, decay, step_size, eps;
};

struct Key {  // `rounding.key_constants`
    uint32_t x, y, z;
};

struct Words {
    uint32_t x, y, z;
};

struct Numbers {
    float param, exp_avg, exp_avg_sq;
};

template <class To, class From>
inline To bits_as(From value) {
    To result;
    static_assert(sizeof result == sizeof value);
    std::memcpy(&result, &value, sizeof result);
    return result;
}

inline float lower(uint32_t pair) { return bits_as<float>(pair << 16); }

inline float upper(uint32_t pair) { return bits_as<float>(pair & UPPER); }

inline uint32_t folded(uint32_t word) { return word ^ (word >> 16); }

// `rounding.draw_bits` for a pair of neighbours.
inline Words drawn(uint32_t pair, const Key& key) {
    uint32_t x = pair * MULTIPLIER + key.x;
    uint32_t y = x * key.z + key.y;
    uint32_t z = x * y + key.z;
    x = folded(x), y = folded(y), z = folded(z);
    x += y * z;
    y += z * x;
    z += x * y;
    return {folded(x), folded(y), folded(z)};
}

// `rounding.round_stochastic` of two neighbours, but that what lies beyond the largest bfloat16 becomes infinite. The NaNs that a CPU
// makes of bfloat16 numbers have no lower bits, so that nothing is carried into theirs.
inline uint32_t rounded(float first, float second, uint32_t word) {
    return (bits_as<uint32_t>(first) + (word & LOWER)) >> 16 | ((bits_as<uint32_t>(second) + (word >> 16)) & UPPER);
}

// The highest bit of each half that is infinite, 0x7F80 or 0xFF80; other bits are anything.
inline uint32_t infinite(uint32_t pair) { return ~(((pair & 0x7FFF7FFF) ^ 0x7F807F80) + 0x7FFF7FFF); }

// Infinite halves as the largest numbers, which are one less.
inline uint32_t made_finite(uint32_t pair) { return pair - ((infinite(pair) & HIGHEST) >> 15); }

void make_finite(Pair* __restrict vector, uint32_t start, uint32_t stop) {
    for (uint32_t i = start; i < stop; ++i) vector[i] = made_finite(vector[i]);
}

// The nearest bfloat16, the even one of two, as a float32.
inline float nearest(float value) {
    uint32_t bits = bits_as<uint32_t>(value);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & UPPER;
    return bits_as<float>(value == value ? bits : NAN_BITS);
}

// `formula.advance`.
inline Numbers advance(const Coefficients& c, float grad, float param, float exp_avg, float exp_avg_sq) {
    exp_avg = exp_avg * c.beta1 + grad * c.rest1;
    exp_avg_sq = exp_avg_sq * c.beta2 + (grad * grad) * c.rest2;
    param = param * c.decay - (exp_avg * c.step_size) / (std::sqrt(exp_avg_sq) + c.eps);
    return {param, exp_avg, exp_avg_sq};
}

struct Vectors {  // of pairs
    const Pair* grad;
    Pair *param, *exp_avg, *exp_avg_sq, *compensation;
};

template <bool COMPENSATES>
void step_pairs(const Coefficients& coefficients, const Key& constants, uint32_t first, uint32_t count, const Vectors& vectors) {
    const Coefficients c = coefficients;
    const Key key = constants;
    const Pair* __restrict grad = vectors.grad;
    Pair* __restrict param = vectors.param;
    Pair* __restrict exp_avg = vectors.exp_avg;
    Pair* __restrict exp_avg_sq = vectors.exp_avg_sq;
    Pair* __restrict compensation = vectors.compensation;
    for (uint32_t start = 0; start < count; start += CHUNK) {
        const uint32_t stop = std::min(count, start + CHUNK);
        uint32_t seen = 0;  // whether anything is infinite: it hardly ever is, and to mend each pair at once takes longer
        for (uint32_t i = start; i < stop; ++i) {
            const uint32_t g = grad[i], p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
            float one = lower(p), other = upper(p);
            if (COMPENSATES) one += lower(compensation[i]), other += upper(compensation[i]);
            const Numbers a = advance(c, lower(g), one, lower(m), lower(v)), b = advance(c, upper(g), other, upper(m), upper(v));
            const Words words = drawn(first + i, key);
            const uint32_t new_m = rounded(a.exp_avg, b.exp_avg, words.x), new_v = rounded(a.exp_avg_sq, b.exp_avg_sq, words.y);
            uint32_t rest;
            if (COMPENSATES) {
                one = nearest(a.param), other = nearest(b.param);
                param[i] = bits_as<uint32_t>(one) >> 16 | bits_as<uint32_t>(other);
                compensation[i] = rest = rounded(a.param - one, b.param - other, words.z);
            } else {
                param[i] = rest = rounded(a.param, b.param, words.z);
            }
            exp_avg[i] = new_m, exp_avg_sq[i] = new_v;
            seen |= infinite(new_m) | infinite(new_v) | infinite(rest);
        }
        if (seen & HIGHEST)
            for (Pair* vector : {exp_avg, exp_avg_sq, COMPENSATES ? compensation : param}) make_finite(vector, start, stop);
    }
}

void step_pairs(const Coefficients& c, const Key& key, uint32_t first, uint32_t count, const Vectors& vectors) {
    (vectors.compensation ? step_pairs<true> : step_pairs<false>)(c, key, first, count, vectors);
}

// One weight of a pair whose other is not there.
void step_one(const Coefficients& c, const Key& key, uint32_t pair, bool is_second, const Vectors& vectors) {
    const Pair* sources[] = {vectors.grad, vectors.param, vectors.exp_avg, vectors.exp_avg_sq, vectors.compensation};
    Pair pairs[5] = {};
    for (int i = 0; i < 5; ++i)
        if (sources[i]) std::memcpy(reinterpret_cast<char*>(&pairs[i]) + 2 * is_second, sources[i], 2);
    step_pairs(c, key, pair, 1, {&pairs[0], &pairs[1], &pairs[2], &pairs[3], vectors.compensation ? &pairs[4] : nullptr});
    for (int i = 1; i < 5; ++i)
        if (sources[i]) std::memcpy(const_cast<Pair*>(sources[i]), reinterpret_cast<char*>(&pairs[i]) + 2 * is_second, 2);
}

// Calls part(start, count) for pieces that cover `count`, by torch's own threads.
template <class Part>
void in_parallel(int64_t count, int64_t size, int num_threads, const Part& part) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (count > size)
    for (int64_t start = 0; start < count; start += size) part(start, std::min(size, count - start));
}

// `blockwise.dequantise` of a block.
void decode(const uint8_t* __restrict code, float scale, const float* __restrict values, float* __restrict result) {
    for (int i = 0; i < BLOCK; ++i) result[i] = values[code[i]] * scale;
}

// `blockwise.quantise` of a block, by a `blockwise.code_table`. Of numbers without a sign, as of their bits, a NaN is the largest.
void encode(const float* __restrict values, const int32_t* __restrict table, uint8_t* __restrict code, float* __restrict scale) {
    uint32_t largest = 0, is_positive = 0;
    for (int i = 0; i < BLOCK; ++i) largest = std::max(largest, bits_as<uint32_t>(values[i]) & 0x7FFFFFFF);
    for (int i = 0; i < BLOCK; ++i) is_positive |= uint32_t(bits_as<uint32_t>(values[i]) == largest);
    *scale = bits_as<float>(is_positive ? largest : largest | 0x80000000);
    float divisor = largest ? *scale : 1.0f;
    alignas(64) int32_t shares[BLOCK], entries[BLOCK];
    for (int i = 0; i < BLOCK; ++i) shares[i] = bits_as<int32_t>(values[i] / divisor);
    for (int i = 0; i < BLOCK; ++i) {
        entries[i] = table[uint32_t(shares[i]) >> 16];
        asm volatile("");  // one by one: vectors of look-ups take longer
    }
    for (int i = 0; i < BLOCK; ++i)
        code[i] = uint8_t((entries[i] >> 16) + ((entries[i] & 0xFFFF) < ((shares[i] ^ shares[i] >> 31) & 0xFFFF)));
}

struct Moment {
    uint8_t* code;
    float* scale;
    const float* values;
    const int32_t* table;
};

inline float widened(float value) { return value; }

inline float widened(uint16_t value) { return bits_as<float>(uint32_t(value) << 16); }

inline void put(float value, uint16_t, float& target) { target = value; }

// As `rounded`, but that the scale of a block may bring in a NaN that is not of this CPU.
inline void put(float value, uint16_t random_bits, uint16_t& target) {
    uint32_t bits = bits_as<uint32_t>(value == value ? value : bits_as<float>(NAN_BITS));
    uint16_t result = uint16_t((bits + random_bits) >> 16);
    target = uint16_t(result - ((result & 0x7FFF) == 0x7F80));
}

template <class Weight>
void step_block(const Coefficients& c, const Key& key, uint32_t first, const Weight* __restrict grad, Weight* __restrict param,
                const Moment& first_moment, const Moment& second_moment, int64_t block) {
    alignas(64) float exp_avg[BLOCK], exp_avg_sq[BLOCK];
    alignas(64) uint32_t words[BLOCK / 2];
    uint8_t *code = first_moment.code + block * BLOCK, *code_sq = second_moment.code + block * BLOCK;
    decode(code, first_moment.scale[block], first_moment.values, exp_avg);
    decode(code_sq, second_moment.scale[block], second_moment.values, exp_avg_sq);
    for (int i = 0; i < BLOCK / 2; ++i) words[i] = drawn(first + i, key).z;
    const Half* random_bits = reinterpret_cast<const Half*>(words);
    for (int i = 0; i < BLOCK; ++i) {
        Numbers n = advance(c, widened(grad[i]), widened(param[i]), exp_avg[i], exp_avg_sq[i]);
        exp_avg[i] = n.exp_avg, exp_avg_sq[i] = n.exp_avg_sq;
        put(n.param, random_bits[i], param[i]);
    }
    encode(exp_avg, first_moment.table, code, first_moment.scale + block);
    encode(exp_avg_sq, second_moment.table, code_sq, second_moment.scale + block);
}

template <class Weight>
void step_blocks(const Coefficients& c, const Key& key, int64_t first, int64_t count, int num_threads, const void* grad, void* param,
                 const Moment& first_moment, const Moment& second_moment) {
    auto gradients = static_cast<const Weight*>(grad);
    auto weights = static_cast<Weight*>(param);
    in_parallel(count, PIECE / BLOCK, num_threads, [=](int64_t start, int64_t size) {
        for (int64_t block = start; block < start + size; ++block)
            step_block(c, key, uint32_t(first + block * (BLOCK / 2)), gradients + block * BLOCK, weights + block * BLOCK, first_moment,
                       second_moment, block);
    });
}

void round_block(const Key& key, int64_t start, int size, const float* const* values, uint16_t* const* targets) {
    alignas(64) uint32_t words[3][BLOCK / 2];
    for (int i = 0; i < BLOCK / 2; ++i) {
        const Words w = drawn(uint32_t(start / 2 + i), key);
        words[0][i] = w.x, words[1][i] = w.y, words[2][i] = w.z;
    }
    for (int k = 0; k < 3; ++k) {
        const Half* random_bits = reinterpret_cast<const Half*>(words[k]);
        const float* __restrict value = values[k] + start;
        uint16_t* __restrict target = targets[k] + start;
        for (int i = 0; i < size; ++i) put(value[i], random_bits[i], target[i]);
    }
}

}  // namespace

extern "C" {

// `rounding.copy_stochastic_` of three vectors of `count` float32, for which a place has a number each.
void round_three(const Key* key, int64_t count, int num_threads, const float* const* values, uint16_t* const* targets) {
    in_parallel(count, PIECE, num_threads, [=](int64_t start, int64_t size) {
        for (int64_t i = start; i < start + size; i += BLOCK)
            round_block(*key, i, int(std::min(BLOCK, start + size - i)), values, targets);
    });
}

// `count` bfloat16 weights, the first at place `start`; `compensation` may be null.
void adamw(const Coefficients* c, const Key* key, int64_t start, int64_t count, int num_threads, const uint16_t* grad, uint16_t* param,
           uint16_t* exp_avg, uint16_t* exp_avg_sq, uint16_t* compensation) {
    auto from = [=](int64_t weight) {
        auto pairs = [=](uint16_t* vector) { return vector ? reinterpret_cast<Pair*>(vector + weight) : nullptr; };
        return Vectors{pairs(const_cast<uint16_t*>(grad)), pairs(param), pairs(exp_avg), pairs(exp_avg_sq), pairs(compensation)};
    };
    int64_t head = std::min(start % 2, count), num_pairs = (count - head) / 2, first = (start + head) / 2;
    if (head) step_one(*c, *key, uint32_t(start / 2), true, from(0));
    in_parallel(num_pairs, PIECE / 2, num_threads, [&](int64_t pair, int64_t size) {
        step_pairs(*c, *key, uint32_t(first + pair), uint32_t(size), from(head + 2 * pair));
    });
    if ((count - head) % 2) step_one(*c, *key, uint32_t(first + num_pairs), false, from(count - 1));
}

// `count` blocks of weights, the first weight at place `start`, which is even.
void adamw8bit(const Coefficients* c, const Key* key, int64_t start, int64_t count, int num_threads, int is_bfloat16, const void* grad,
               void* param, const Moment* exp_avg, const Moment* exp_avg_sq) {
    (is_bfloat16 ? step_blocks<uint16_t> : step_blocks<float>)(*c, *key, start / 2, count, num_threads, grad, param, *exp_avg, *exp_avg_sq);
}
}
