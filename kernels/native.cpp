// What a CPU does between two matrix products, a loop each instead of a dozen of torch's operators.
// kernels/native.py compiles this file once for a dtype (-D T=bf16 or float) and calls it. N is rows,
// D numbers in each; sums are in float.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

static_assert(sizeof(long) == 8, "long counts the numbers of a cache");

struct bf16 { uint16_t bits; };

static inline float load(float x) { return x; }
static inline float load(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline void store(float* to, float x) { *to = x; }
static inline void store(bf16* to, float x) {                  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

// e^x within 2 ulp; 0 below -87, e^87 above 87. In operators that the compiler can do for 16 numbers
// at once.
static inline float exponential(float given) {
    float x = given < -87.f ? -87.f : given > 87.f ? 87.f : given;      // NaN passes
    float n = std::rint(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, .5f})
        p = p * r + c;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    float result = (p * r * r + r + 1.f) * power;
    return given < -87.f ? 0.f : result;
}

// 0 below -87, or a gate of -1e38 times e^-87 would be -1
static inline float sigmoid(float x) {
    float result = 1.f / (1.f + exponential(-x));
    return x < -87.f ? 0.f : result;
}

// gelu_tanh(x) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
static inline float inner(float x) { return 1.5957691216f * (x + .044715f * x * x * x); }
static inline float inner_slope(float x) { return 1.5957691216f * (1.f + .134145f * x * x); }

// ------------------------------------------------------------------------------------------------
// RMSNorm of `heads` vectors of D numbers in each of N rows, which start `stride` numbers apart; with
// a residual (N, D) of x + residual, which is written to `sum`

extern "C" void rms_norm(const T* x, const T* residual, const T* weight, T* sum, T* out,
                         float* rstd, long N, long heads, long stride, long D, float eps,
                         float offset, long threads) {
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long i = 0; i < N; i++)
        for (long h = 0; h < heads; h++) {
            const T* from = x + i * stride + h * D;
            T* to = out + (i * heads + h) * D;
            if (residual) {
                #pragma omp simd
                for (long d = 0; d < D; d++)
                    store(sum + i * D + d, load(from[d]) + load(residual[i * D + d]));
                from = sum + i * D;
            }
            float squares = 0;
            #pragma omp simd reduction(+ : squares)
            for (long d = 0; d < D; d++) squares += load(from[d]) * load(from[d]);
            float scale = 1.f / std::sqrt(squares / D + eps);
            #pragma omp simd
            for (long d = 0; d < D; d++)
                store(to + d, load(from[d]) * scale * (load(weight[d]) + offset));
            rstd[i * heads + h] = scale;
        }
}

// partial [threads, D]: each thread's part of the weight's gradient. grad_sum: what reaches x + residual
// by the other way, or null.
extern "C" void rms_norm_backward(const T* grad, const T* grad_sum, const T* x, const T* weight,
                                  const float* rstd, T* dx, float* partial, long N, long D,
                                  float offset, long threads) {
    #pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long part = 0; part < threads; part++) {
        float* dw = partial + part * D;
        for (long i = N * part / threads; i < N * (part + 1) / threads; i++) {
            const T *g = grad + i * D, *from = x + i * D, *more = grad_sum + i * D;
            float scale = rstd[i], along = 0;
            #pragma omp simd reduction(+ : along)
            for (long d = 0; d < D; d++)
                along += load(g[d]) * (load(weight[d]) + offset) * load(from[d]);
            along *= scale * scale / D;
            #pragma omp simd
            for (long d = 0; d < D; d++) {
                float gd = load(g[d]), xd = load(from[d]), other = grad_sum ? load(more[d]) : 0.f;
                dw[d] += gd * xd * scale;
                store(dx + i * D + d,
                      other + scale * (gd * (load(weight[d]) + offset) - xd * along));
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Rotary positions: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head. `table`
// holds cos and sin [N, 2, D / 2]; turned back with `direction` -1, as the backward pass needs.

extern "C" void rotate(const T* x, const float* table, T* out, long N, long heads, long stride,
                       long D, float direction, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < N; i++)
        for (long h = 0; h < heads; h++) {
            const T* from = x + i * stride + h * D;
            const float* cos = table + i * D;
            T* to = out + (i * heads + h) * D;
            #pragma omp simd
            for (long d = 0; d < D / 2; d++) {
                float a = load(from[d]), b = load(from[d + D / 2]);
                float sin = direction * cos[d + D / 2];
                store(to + d, a * cos[d] - b * sin);
                store(to + d + D / 2, b * cos[d] + a * sin);
            }
        }
}

// ------------------------------------------------------------------------------------------------
// The gated MLP's product: act(gate) * up, and its gradients

extern "C" void gated(const T* gate, const T* up, T* out, long N, long D, long gate_stride,
                      long up_stride, long silu, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < N; i++) {
        const T *gates = gate + i * gate_stride, *ups = up + i * up_stride;
        #pragma omp simd
        for (long d = 0; d < D; d++) {
            float g = load(gates[d]);
            store(out + i * D + d, g * sigmoid(silu ? g : inner(g)) * load(ups[d]));
        }
    }
}

extern "C" void gated_backward(const T* grad, const T* gate, const T* up, T* dgate, T* dup,
                               long N, long D, long silu, long threads) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < N; i++)
        #pragma omp simd
        for (long d = i * D; d < (i + 1) * D; d++) {
            float y = load(grad[d]), g = load(gate[d]);
            float s = sigmoid(silu ? g : inner(g)), slope = silu ? 1.f : inner_slope(g);
            store(dup + d, y * g * s);
            float bend = s * (1.f - s) == 0.f ? 0.f : g * s * (1.f - s) * slope;    // slope: inf
            store(dgate + d, y * load(up[d]) * (s + bend));
        }
}

// ------------------------------------------------------------------------------------------------
// Attention of a decode step: kernels/decode_attention.py says what it computes

struct Keys { const T *k, *v; long first, last; };      // tokens first <= t < last

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t bits16 __attribute__((vector_size(64)));

struct Numbers { v16 even, odd; };                      // 32 neighbours; of floats, two halves

static inline Numbers unpack(const float* x) {
    Numbers n;
    std::memcpy(&n, x, sizeof n);
    return n;
}
static inline Numbers unpack(const bf16* x) {
    bits16 pairs;
    std::memcpy(&pairs, x, sizeof pairs);
    return {(v16)(pairs << 16), (v16)(pairs & 0xffff0000u)};
}
static inline void pack(float* to, Numbers n) { std::memcpy(to, &n, sizeof n); }
static inline void pack(bf16* to, Numbers n) {
    for (int i = 0; i < 16; i++) store(to + 2 * i, n.even[i]), store(to + 2 * i + 1, n.odd[i]);
}

static inline float sum(v16 x) {
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 half[2];
    std::memcpy(half, &x, sizeof x);
    v8 y = half[0] + half[1];
    v4 quarter[2];
    std::memcpy(quarter, &y, sizeof y);
    v4 z = quarter[0] + quarter[1];
    return (z[0] + z[1]) + (z[2] + z[3]);
}

// G queries of 32 W numbers on the keys of one kv head
template <int W, int G>
static void attend(const T* q, const Keys* parts, T* out, float scale, std::vector<float>& buffer) {
    const long D = 32 * W, total = parts[0].last - parts[0].first + parts[1].last - parts[1].first;
    buffer.resize(G * total);
    float* scores = buffer.data();
    Numbers query[G][W], sums[G][W] = {};
    for (int j = 0; j < G; j++)
        for (int w = 0; w < W; w++) {
            query[j][w] = unpack(q + j * D + 32 * w);
            query[j][w].even *= scale, query[j][w].odd *= scale;
        }
    for (const Keys* part = parts; part < parts + 2; part++)
        for (long t = part->first; t < part->last; t++, scores++) {
            v16 dots[G] = {};
            for (int w = 0; w < W; w++) {
                __builtin_prefetch(part->v + t * D + 32 * w);
                Numbers key = unpack(part->k + t * D + 32 * w);
                for (int j = 0; j < G; j++)
                    dots[j] += query[j][w].even * key.even + query[j][w].odd * key.odd;
            }
            for (int j = 0; j < G; j++) scores[j * total] = sum(dots[j]);
        }
    float masses[G];
    for (int j = 0; j < G; j++) {
        float *weights = buffer.data() + j * total, top = -INFINITY, mass = 0;
        #pragma omp simd reduction(max : top)
        for (long t = 0; t < total; t++) top = weights[t] > top ? weights[t] : top;
        #pragma omp simd reduction(+ : mass)
        for (long t = 0; t < total; t++) mass += weights[t] = exponential(weights[t] - top);
        masses[j] = mass;
    }
    scores = buffer.data();
    for (const Keys* part = parts; part < parts + 2; part++)
        for (long t = part->first; t < part->last; t++, scores++)
            for (int w = 0; w < W; w++) {
                Numbers value = unpack(part->v + t * D + 32 * w);
                for (int j = 0; j < G; j++) {
                    sums[j][w].even += scores[j * total] * value.even;
                    sums[j][w].odd += scores[j * total] * value.odd;
                }
            }
    for (int j = 0; j < G; j++)
        for (int w = 0; w < W; w++) {
            sums[j][w].even /= masses[j], sums[j][w].odd /= masses[j];
            pack(out + j * D + 32 * w, sums[j][w]);
        }
}

template <int W>
static void attend(const T* q, const Keys* parts, T* out, float scale, long g,
                   std::vector<float>& buffer) {
    for (const long D = 32 * W; g > 0; g -= 3, q += 3 * D, out += 3 * D)    // registers for three
        (g == 1 ? attend<W, 1> : g == 2 ? attend<W, 2> : attend<W, 3>)(q, parts, out, scale, buffer);
}

// K kv heads and g query heads for each. Rows of q, k and v start q_row, k_row and v_row numbers
// apart; entries of a cache row_entry and prefix_entry, and an entry's heads row_head, prefix_head.
extern "C" void decode(const T* q, const T* k, const T* v, T* out, T* row_k, T* row_v,
                       const T* prefix_k, const T* prefix_v, const int32_t* entries,
                       const int32_t* lengths, const int32_t* prefixes,
                       const int32_t* prefix_lengths, long N, long K, long g, long D, long q_row,
                       long k_row, long v_row, long row_entry, long row_head, long prefix_entry,
                       long prefix_head, long window, float scale, long threads) {
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer;
        #pragma omp for collapse(2)
        for (long b = 0; b < N; b++)
            for (long h = 0; h < K; h++) {
                const long before = prefix_lengths[b], length = lengths[b];
                const long own = entries[b] * row_entry + h * row_head;
                const long shared = prefixes[b] * prefix_entry + h * prefix_head;
                std::memcpy(row_k + own + length * D, k + b * k_row + h * D, D * sizeof(T));
                std::memcpy(row_v + own + length * D, v + b * v_row + h * D, D * sizeof(T));
                const long from = window ? std::max(0l, before + length + 1 - window) : 0;
                const Keys parts[] = {
                    {prefix_k + shared, prefix_v + shared, from, std::max(from, before)},
                    {row_k + own, row_v + own, std::max(0l, from - before), length + 1}};
                auto run = D == 64 ? attend<2> : D == 128 ? attend<4> : attend<8>;
                run(q + b * q_row + h * g * D, parts, out + (b * K + h) * g * D, scale, g, buffer);
            }
    }
}

// ------------------------------------------------------------------------------------------------
// The draw: sampling/draw.py says what it computes

extern "C" void draw(const T* logits, const double* uniforms, int64_t* tokens, float* logprobs,
                     long B, long V, float temperature, long threads) {
    const long SIZE = 256, blocks = (V + SIZE - 1) / SIZE;
    const float inverse = temperature ? 1.f / temperature : 1.f;        // 0: greedy
    #pragma omp parallel for num_threads(threads)
    for (long b = 0; b < B; b++) {
        const T* z = logits + b * V;
        float top = -INFINITY;
        #pragma omp simd reduction(max : top)
        for (long i = 0; i < V; i++) top = load(z[i]) > top ? load(z[i]) : top;
        auto mass = [&](long i) { return exponential((load(z[i]) - top) * inverse); };
        std::vector<double> cdf(blocks);
        double total = 0;
        for (long block = 0; block < blocks; block++) {
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (long i = block * SIZE; i < std::min(V, (block + 1) * SIZE); i++) sum += mass(i);
            cdf[block] = total += sum;
        }
        const double target = uniforms[b] * total;
        auto found = std::upper_bound(cdf.begin(), cdf.end(), target);
        if (found == cdf.end()) found = std::lower_bound(cdf.begin(), cdf.end(), total);
        const long block = std::min(found - cdf.begin(), blocks - 1);       // NaN is found nowhere
        double inside = block ? cdf[block - 1] : 0;
        long token = block * SIZE;
        for (long i = token; i < std::min(V, (block + 1) * SIZE) && inside <= target; i++)
            if (const float part = mass(i)) token = i, inside += part;
        if (!temperature)
            for (token = 0; token < V - 1 && load(z[token]) != top;) token++;
        tokens[b] = token;
        logprobs[b] = float((load(z[token]) - top) * inverse - std::log(total));
    }
}

// ------------------------------------------------------------------------------------------------
// fp32 masters in four bytes: training/adamw.py says how

extern "C" void join(const bf16* weight, const int16_t* remainder, float* master, long N,
                     long threads) {
    #pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < N; i++) {
        uint32_t bits = (uint32_t(weight[i].bits) << 16) + uint32_t(int32_t(remainder[i]));
        std::memcpy(master + i, &bits, 4);
    }
}

extern "C" void split(const float* master, bf16* weight, int16_t* remainder, long N,
                      long threads) {
    #pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < N; i++) {
        uint32_t bits;
        std::memcpy(&bits, master + i, 4);
        weight[i].bits = uint16_t((bits + 0x8000u) >> 16);
        remainder[i] = int16_t(bits - (uint32_t(weight[i].bits) << 16));
    }
}
