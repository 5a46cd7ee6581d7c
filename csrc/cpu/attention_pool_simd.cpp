// Attention pooling on one core: every row is read from memory once. A tile of rows comes into the cache with its
// products with the queries, and is used again there for the weighted sums, while the next tile is fetched.
#include "attention_pool.h"
#include "vector.h"

namespace r2m::R2M_ISA {
namespace {

constexpr float INFINITE = __builtin_inff();
constexpr int64_t CACHE_LINE = 64;
// Not into the first level: rows that are a power of two apart compete for the same places there.
constexpr int INTO_L2 = 2;

// Rows whose products with two vectors are taken at once: AVX2's 16 registers hold the sums of 4.
constexpr int ROWS_OF_TWO = LANES == 16 ? TILE : 4;

int64_t padded(int64_t D) { return (D + STEP - 1) / STEP * STEP; }

template <class T>
void arrange_vector(const float* vector, int64_t stride, int64_t D, float* arranged) {
  float block[STEP];
  for (int64_t i = 0; i < D; i += STEP) {
    for (int64_t j = 0; j < STEP; ++j) block[j] = i + j < D ? vector[(i + j) * stride] : 0;
    store(arranged + i, arrange<T>(load(block)));
  }
}

// Of the next tile, one half is fetched during the products of this one and the other during its sums, so that memory is
// never idle. This fetches FETCHED elements of `count` of its rows, a cache line at least.
template <class T>
constexpr int64_t FETCHED = STEP * sizeof(T) < CACHE_LINE ? CACHE_LINE / sizeof(T) : STEP;

template <class T>
inline void fetch(const T* const* rows, int count, int64_t i) {
  for (int r = 0; r < count; ++r)
    for (int64_t line = 0; line < int64_t(FETCHED<T> * sizeof(T)); line += CACHE_LINE)
      __builtin_prefetch((const char*)(rows[r] + i) + line, 0, INTO_L2);
}

// products[q][r] = vectors[q] . rows[r]. `next`: rows to be fetched meanwhile, or null.
template <class T, int Q, int R>
void multiply(
    const T* const* rows, const float* const* vectors, int64_t D, float (*products)[TILE], const T* const* next) {
  Vector sums[Q][R] = {};
  auto step = [&](int64_t i, auto load_row) __attribute__((always_inline)) {
    Pair vector[Q];
    for (int q = 0; q < Q; ++q) vector[q] = load(vectors[q] + i);
    for (int r = 0; r < R; ++r) {
      Pair row = load_row(rows[r] + i);
      for (int q = 0; q < Q; ++q) {
        sums[q][r] += vector[q].a * row.a;
        sums[q][r] += vector[q].b * row.b;
      }
    }
  };
  auto whole = [](const T* from) { return load(from); };
  int64_t i = 0;
  for (; i + FETCHED<T> <= D; i += FETCHED<T>) {
    if (next) fetch(next, R / 2, i);
    for (int64_t j = i; j < i + FETCHED<T>; j += STEP) step(j, whole);
  }
  for (; i + STEP <= D; i += STEP) step(i, whole);
  if (i < D) step(i, [&](const T* from) { return load(from, D - i); });
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) products[q][r] = sum(sums[q][r]);
}

template <class T, int Q>
void multiply_tile(
    const T* const* rows, const float* const* vectors, int64_t D, float (*products)[TILE], const T* const* next) {
  constexpr int R = Q == 2 ? ROWS_OF_TWO : TILE;
  for (int r = 0; r < TILE; r += R) {
    multiply<T, Q, R>(rows + r, vectors, D, (float (*)[TILE])(products[0] + r), next ? next + r / 2 : nullptr);
  }
}

// What a tile of rows does to two sums over rows: y = (y - shift x) decay + sum weights_y row, x = x decay + sum
// weights_x row.
struct Weights {
  float x[TILE], y[TILE];
  float decay, shift;
};

// Steps of sums over rows that are taken together, so that a weight is read once for all of them.
template <class T>
constexpr int STEPS = FETCHED<T> / STEP;

// Sums over rows, x alone (Q = 1) or both. `next` as above.
template <class T, int Q>
void accumulate(const T* const* rows, const Weights& weights, int64_t D, float* x, float* y, const T* const* next) {
  auto steps = [&]<int N>(int64_t i, auto load_row) __attribute__((always_inline)) {
    Pair sum_x[N], sum_y[N];
    for (int k = 0; k < N; ++k) {
      sum_x[k] = load(x + i + k * STEP);
      if (Q == 2) {
        sum_y[k] = load(y + i + k * STEP);
        sum_y[k].a = (sum_y[k].a - weights.shift * sum_x[k].a) * weights.decay;
        sum_y[k].b = (sum_y[k].b - weights.shift * sum_x[k].b) * weights.decay;
      }
      sum_x[k].a *= weights.decay;
      sum_x[k].b *= weights.decay;
    }
    for (int r = 0; r < TILE; ++r) {
      const Vector weight_x = all(weights.x[r]), weight_y = all(weights.y[r]);
      for (int k = 0; k < N; ++k) {
        Pair row = load_row(rows[r] + i + k * STEP);
        sum_x[k].a += weight_x * row.a;
        sum_x[k].b += weight_x * row.b;
        if (Q == 2) {
          sum_y[k].a += weight_y * row.a;
          sum_y[k].b += weight_y * row.b;
        }
      }
    }
    for (int k = 0; k < N; ++k) {
      store(x + i + k * STEP, sum_x[k]);
      if (Q == 2) store(y + i + k * STEP, sum_y[k]);
    }
  };
  auto whole = [](const T* from) { return load(from); };
  int64_t i = 0;
  for (; i + FETCHED<T> <= D; i += FETCHED<T>) {
    if (next) fetch(next, TILE / 2, i);
    steps.template operator()<STEPS<T>>(i, whole);
  }
  for (; i + STEP <= D; i += STEP) steps.template operator()<1>(i, whole);
  if (i < D) steps.template operator()<1>(i, [&](const T* from) { return load(from, D - i); });
}

void exp_of_tile(const float* from, float* to) {
  static_assert(TILE % LANES == 0 || LANES % TILE == 0);
  float padded[TILE < LANES ? LANES : TILE] = {};
  __builtin_memcpy(padded, from, TILE * sizeof(float));
  for (int i = 0; i < TILE; i += LANES) write(padded + i, exp(read<Vector>(padded + i)));
  __builtin_memcpy(to, padded, TILE * sizeof(float));
}

// The online softmax of one query. m: the largest score; l = sum p with p = exp(s - m); the mean of t = direction . row
// under p, as a centre and what it lacks, e = sum p (t - centre).
struct Softmax {
  float m = -INFINITE, l = 0, centre = 0, e = 0;

  // n more rows with scores s. Their weights are p in the first sum over rows, and in the second p (t - centre) with the
  // centre that is the mean with them; the shift moves what is in that sum to the new centre. So it stays centred at
  // every step, or what all rows have in common would cancel digits. A row that outweighs all others is exactly the mean.
  void add(const float* s, const float* t, int n, Weights& weights) {
    float top = -INFINITE;
    for (int r = 0; r < n; ++r) top = s[r] > top ? s[r] : top;
    float largest = top > m ? top : m;
    float safe = largest == -INFINITE ? 0 : largest;  // exp(-inf - 0) = 0 before the first row
    float below[TILE];
    for (int r = 0; r < TILE; ++r) below[r] = r < n ? s[r] - safe : -INFINITE;
    float* p = weights.x;
    exp_of_tile(below, p);
    weights.decay = exp(m - safe);
    const float before = l * weights.decay;
    l = before;
    for (int r = 0; r < n; ++r) l += p[r];
    if (t) {
      float near = centre;
      for (int r = n - 1; r >= 0 && top > m; --r) near = s[r] == top ? t[r] : near;
      float total = e * weights.decay + before * (centre - near);
      for (int r = 0; r < n; ++r) total += p[r] * (t[r] - near);
      const float mean = near + total / (l == 0 ? 1 : l);
      weights.shift = before == 0 ? 0 : mean - centre;
      e = e * weights.decay - before * weights.shift;
      for (int r = 0; r < TILE; ++r) {
        weights.y[r] = r < n ? p[r] * (t[r] - mean) : 0;
        e += weights.y[r];
      }
      centre = mean;
    }
    m = largest;
  }
};

int64_t scratch(int64_t H, int64_t D) {
  return H * (4 * padded(D) * sizeof(float) + sizeof(Softmax) + sizeof(Weights) + 2 * TILE * sizeof(float));
}

template <class T>
void pool(const Chunk& chunk) {
  const int64_t H = chunk.H, D = chunk.D, width = padded(D);
  const bool direction = chunk.direction, sums = chunk.pooled, both = chunk.gradient;
  const int64_t forms = direction ? 2 : 1, kinds = both ? 2 : 1;
  float* vectors = chunk.scratch;               // [H, forms, width]
  float* totals = vectors + H * forms * width;  // [H, kinds, width]
  auto* states = (Softmax*)(totals + H * kinds * width);
  auto* weights = (Weights*)(states + H);
  auto* products = (float (*)[TILE])(weights + H);  // [H * forms]
  for (int64_t h = 0; h < H; ++h) states[h] = {};
  for (int64_t h = 0; h < H; ++h) {
    arrange_vector<T>(chunk.query + h * D, 1, D, vectors + h * forms * width);
    if (direction)
      arrange_vector<T>(chunk.direction + h * chunk.stride_gh, chunk.stride_gd, D, vectors + (h * forms + 1) * width);
  }
  for (int64_t i = 0; sums && i < H * kinds * width; ++i) totals[i] = 0;

  const T* const* rows = (const T* const*)chunk.rows;
  for (int64_t begin = 0; begin < chunk.count; begin += TILE, rows += TILE) {
    const int n = chunk.count - begin < TILE ? chunk.count - begin : TILE;
    const T* const* next = begin + TILE < chunk.count ? rows + TILE : nullptr;
    const T* const* upper_half = next ? next + TILE / 2 : nullptr;
    int64_t q = 0;
    for (; q + 2 <= H * forms; q += 2) {
      const float* two[] = {vectors + q * width, vectors + (q + 1) * width};
      multiply_tile<T, 2>(rows, two, D, products + q, q == 0 ? upper_half : nullptr);
    }
    if (q < H * forms) {
      const float* one[] = {vectors + q * width};
      multiply_tile<T, 1>(rows, one, D, products + q, q == 0 ? upper_half : nullptr);
    }
    for (int64_t h = 0; h < H; ++h) {
      const float* s = products[h * forms];
      const float* t = direction ? products[h * forms + 1] : nullptr;
      states[h].add(s, t, n, weights[h]);
      for (int r = 0; chunk.scores && r < n; ++r) {
        float* score = chunk.scores + h * chunk.stride_sh + chunk.positions[begin + r];
        score[0] = s[r];
        if (direction) score[chunk.stride_sf] = t[r];
      }
    }
    for (int64_t h = 0; sums && h < H; ++h) {
      float* x = totals + h * kinds * width;
      if (both) accumulate<T, 2>(rows, weights[h], D, x, x + width, h == 0 ? next : nullptr);
      else accumulate<T, 1>(rows, weights[h], D, x, nullptr, h == 0 ? next : nullptr);
    }
  }

  for (int64_t h = 0; h < H; ++h) {
    const Softmax& state = states[h];
    const float l = state.l == 0 ? 1 : state.l;
    chunk.largest[h] = state.m;
    chunk.sum[h] = state.l;
    if (direction) chunk.value[h] = state.centre + state.e / l;
    const float* x = totals + h * kinds * width;
    const float part = 1 / l, rest = state.e / l;
    for (int64_t i = 0; sums && i < D; i += STEP) {
      auto put = [&](float* to, Pair sum) {
        Pair ordered = in_order<T>(sum);
        if (i + STEP <= D) store(to, ordered);
        else store(to, ordered, D - i);
      };
      Pair c = load(x + i);
      c = {c.a * part, c.b * part};
      put(chunk.pooled + h * D + i, c);
      if (!both) continue;
      Pair v = load(x + width + i);
      put(chunk.gradient + h * D + i, {v.a * part - rest * c.a, v.b * part - rest * c.b});
    }
  }
}

// With shares a of the chunks: t = sum a t_i, c = sum a c_i, V = sum a (V_i + (t_i - t) (c_i - c)), centred at the chunk
// with the largest score.
void merge(const Merge& parts) {
  const int64_t chunks = parts.chunks, stride = parts.stride, D = parts.D;
  int64_t anchor = 0;
  for (int64_t i = 1; i < chunks; ++i)
    if (parts.part_largest[i * stride] > parts.part_largest[anchor * stride]) anchor = i;
  const float m = parts.part_largest[anchor * stride];
  const float safe = m == -INFINITE ? 0 : m;
  const float t_anchor = parts.part_value ? parts.part_value[anchor * stride] : 0;
  float l = 0, x = 0;
  auto weight = [&](int64_t i) {
    float part = parts.part_sum[i * stride];
    return part == 0 ? 0 : part * exp(parts.part_largest[i * stride] - safe);
  };
  for (int64_t i = 0; i < chunks; ++i) {
    l += weight(i);
    if (parts.part_value) x += weight(i) * (parts.part_value[i * stride] - t_anchor);
  }
  const float safe_l = l == 0 ? 1 : l;
  const float t = t_anchor + x / safe_l;
  *parts.largest = m;
  *parts.sum = l;
  if (parts.value) *parts.value = t;
  if (!parts.pooled) return;

  float rest = 0;  // sum a (t_i - t): 0 but for rounding
  for (int64_t d = 0; d < D; ++d) parts.pooled[d] = 0;
  for (int64_t d = 0; parts.gradient && d < D; ++d) parts.gradient[d] = 0;
  const float* at_anchor = parts.part_pooled + anchor * stride * D;
  for (int64_t i = 0; i < chunks; ++i) {
    const float share = weight(i) / safe_l;
    const float* c = parts.part_pooled + i * stride * D;
    if (!parts.gradient) {
      for (int64_t d = 0; d < D; ++d) parts.pooled[d] += share * (c[d] - at_anchor[d]);
      continue;
    }
    const float* v = parts.part_gradient + i * stride * D;
    const float apart = parts.part_value[i * stride] - t;
    rest += share * apart;
    for (int64_t d = 0; d < D; ++d) {
      float difference = c[d] - at_anchor[d];
      parts.pooled[d] += share * difference;
      parts.gradient[d] += share * (v[d] + apart * difference);
    }
  }
  for (int64_t d = 0; parts.gradient && d < D; ++d) parts.gradient[d] -= rest * parts.pooled[d];
  for (int64_t d = 0; d < D; ++d) parts.pooled[d] += at_anchor[d];
}

template <class T>
void outer(const OuterProduct& product) {
  const int64_t D = product.D, width = padded(D);
  T* row = (T*)product.row;
  for (int64_t i = 0; i < D; i += STEP) {
    Pair sum{};
    for (int64_t q = 0; q < 2 * product.H; ++q) {
      Pair vector = load(product.vectors + q * width + i);
      sum.a += product.factors[q] * vector.a;
      sum.b += product.factors[q] * vector.b;
    }
    if (i + STEP <= D) store(row + i, sum);
    else store(row + i, sum, D - i);
  }
}

}  // namespace

extern const PoolKernels pool_kernels = {
    padded,
    scratch,
    {pool<float>, pool<bfloat16>, pool<float16>},
    {arrange_vector<float>, arrange_vector<bfloat16>, arrange_vector<float16>},
    {outer<float>, outer<bfloat16>, outer<float16>},
    merge,
};

}  // namespace r2m::R2M_ISA
