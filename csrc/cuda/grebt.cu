// GREBT and its closed-form gradient, in one launch. Some lanes of a warp take a group: a lane has its rewards k, k +
// lanes, ..., which it reads from the cache again for every sum. The order of sums follows from K alone.
#include "launch.cuh"

#include <cmath>
#include <cstdint>

namespace r2m {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // on a multiprocessor: 64 registers a thread, of which at most 58 are needed

// Groups with larger rewards, whose squares or differences overflow, are computed in a smaller unit: a power of two.
constexpr float kLarge = 0x1p60f, kSmallUnit = 0x1p-80f, kInSmallUnits = 0x1p80f;

// A tensor [n, K].
struct Groups {
  const void* data;
  int64_t stride_n, stride_k;
  Dtype dtype;

  template <typename T>
  __device__ T at(int64_t n, int64_t k) const {
    const int64_t place = n * stride_n + k * stride_k;
    if (dtype == FLOAT64) return static_cast<T>(static_cast<const double*>(data)[place]);
    return with_dtype<__nv_bfloat16, __half>(dtype, [&](auto zero) {
      return static_cast<T>(static_cast<float>(static_cast<const decltype(zero)*>(data)[place]));
    });
  }
};

struct Arguments {
  Groups rewards, pair_scores;
  int64_t groups, K;
  int lanes;  // of a group, a power of two
  float alpha, eps, group_weight;
  float *loss, *statistics, *gradient;
  int64_t* pair;
};

// A member of the pair, sign * score and sign * index: the winner with sign 1 and the loser with -1 are then both the
// first of the highest. As in torch, NaN is the highest. Without a score it is behind all that have one.
struct Candidate {
  double score = -INFINITY;
  int64_t index = INT64_MAX;

  __device__ bool above(const Candidate& other) const {
    return score > other.score || (std::isnan(score) && !std::isnan(other.score));
  }
  __device__ bool before(const Candidate& other) const {
    return above(other) || (!other.above(*this) && index < other.index);
  }
};

__global__ void __launch_bounds__(kThreads, kBlocks) grebt_kernel(const __grid_constant__ Arguments arguments) {
  const int lanes = arguments.lanes, lane = threadIdx.x % lanes;
  const int64_t n = blockIdx.x * int64_t(kThreads / lanes) + threadIdx.x / lanes;
  const int64_t K = n < arguments.groups ? arguments.K : 0;  // lanes without a group come along for the shuffles
  const auto over_lanes = [&](auto x, auto combine) {        // the same bits in all lanes of a group
    for (int partner = lanes / 2; partner > 0; partner /= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, partner));
    }
    return x;
  };
  const auto sum_over_group = [&](auto term) {
    float sum = 0.f;
    for (int64_t k = lane; k < K; k += lanes) sum += term(k);
    return over_lanes(sum, [](float x, float y) { return x + y; });
  };

  const auto choose = [&](int sign) {
    Candidate best;
    for (int64_t k = lane; k < K; k += lanes) {
      const Candidate candidate{sign * arguments.pair_scores.at<double>(n, k), sign * k};
      if (candidate.before(best)) best = candidate;
    }
    for (int partner = lanes / 2; partner > 0; partner /= 2) {
      const Candidate other{
          __shfl_xor_sync(kAllLanes, best.score, partner), __shfl_xor_sync(kAllLanes, best.index, partner)};
      if (other.before(best)) best = other;
    }
    return best;
  };
  const Candidate highest = choose(1), lowest = choose(-1);
  const int64_t winner = highest.index, loser = -lowest.index;

  const auto reward = [&](int64_t k) { return arguments.rewards.at<float>(n, k); };
  // Scores with NaN have no order; the winner's is NaN then, and so are the margin and all that follows.
  const float unordered = std::isnan(highest.score) ? NAN : 0.f;
  const float margin = K > 0 ? reward(winner) - reward(loser) + unordered : 0.f;
  const float small = expf(-fabsf(margin));  // in (0, 1]
  const float bt = fmaxf(-margin, 0.f) + log1pf(small);
  const float sigmoid = (margin > 0.f ? small : 1.f) / (1.f + small);  // of -margin
  // A group whose pair is tied in scores and rewards prefers nothing: of the subgradients there, 0 is the smallest.
  const bool tied = margin == 0.f && highest.score == -lowest.score;
  const float pull = tied ? 0.f : (1.f - arguments.alpha) * sigmoid;

  // Summed relative to the first, so that equal rewards have exactly their value as mean, and std 0.
  float largest = 0.f;
  for (int64_t k = lane; k < K; k += lanes) largest = fmaxf(largest, fabsf(reward(k)));
  largest = over_lanes(largest, [](float x, float y) { return fmaxf(x, y); });
  const float unit = largest > kLarge ? kSmallUnit : 1.f;
  const auto r = [&](int64_t k) { return reward(k) * unit; };
  const float size = arguments.K, first = K > 0 ? r(0) : 0.f;
  const float mean = first + sum_over_group([&](int64_t k) { return r(k) - first; }) / size;
  const float rest = sum_over_group([&](int64_t k) { return r(k) - mean; }) / size;  // the rounding of the mean
  const auto centred = [&](int64_t k) { return r(k) - mean - rest; };
  const float std = sqrtf(sum_over_group([&](int64_t k) { return centred(k) * centred(k); }) / size);
  const bool varies = std != 0.f;  // NaN too
  const float scale = varies ? std + arguments.eps * unit : 1.f;
  const auto z = [&](int64_t k) { return centred(k) / scale; };

  // With below = max(z) - z and its mean under p: log p = -below - log(total), so that GRE = log(total) + mean.
  float top = -INFINITY;
  for (int64_t k = lane; k < K; k += lanes) top = fmaxf(top, z(k));
  top = over_lanes(top, [](float x, float y) { return fmaxf(x, y); });
  const auto below = [&](int64_t k) { return top - z(k); };
  const float total = sum_over_group([&](int64_t k) { return expf(-below(k)); });
  const auto p = [&](int64_t k) { return expf(-below(k)) / total; };
  const float mean_below = sum_over_group([&](int64_t k) { return p(k) * below(k); });
  const float entropy = logf(total) + mean_below;

  // See torch_impl.grebt_loss.
  const auto dz = [&](int64_t k) { return p(k) * (below(k) - mean_below); };
  const float mean_dz = sum_over_group(dz) / size;
  const float mean_z_dz = sum_over_group([&](int64_t k) { return z(k) * dz(k); }) / size;
  for (int64_t k = lane; k < K; k += lanes) {
    const float dr = varies ? (dz(k) - mean_dz - centred(k) / std * mean_z_dz) / scale * unit : 0.f;
    const int sign = (k == loser) - (k == winner);
    arguments.gradient[n * K + k] = arguments.group_weight * (arguments.alpha * dr + pull * sign);
  }
  if (K > 0 && lane == 0) {
    const int64_t N = arguments.groups;
    arguments.loss[n] = arguments.group_weight * ((1.f - arguments.alpha) * bt + arguments.alpha * entropy);
    arguments.statistics[n] = bt;
    arguments.statistics[N + n] = entropy;
    arguments.statistics[2 * N + n] = std * (unit < 1.f ? kInSmallUnits : 1.f);
    arguments.pair[n] = winner;
    arguments.pair[N + n] = loser;
  }
}

// ------------------------------------------------------------------------------------------------------------- Host

Groups groups_of(const char* name, const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(name, tensor, true)};
}

}  // namespace

void grebt_loss(
    const Tensor& rewards, const Tensor& pair_scores, double alpha, double eps, double group_weight, const Tensor& loss,
    const Tensor& statistics, const Tensor& pair, const Tensor& gradient) {
  const Device device(rewards);
  Arguments arguments{};
  arguments.rewards = groups_of("rewards", rewards);
  arguments.pair_scores = groups_of("pair_scores", pair_scores);
  arguments.groups = rewards.size(0);
  arguments.K = rewards.size(1);
  arguments.lanes = 1;
  while (arguments.lanes < kWarp && arguments.lanes < arguments.K) arguments.lanes *= 2;
  arguments.alpha = alpha;
  arguments.eps = eps;
  arguments.group_weight = group_weight;
  arguments.loss = loss.mutable_data_ptr<float>();
  arguments.statistics = statistics.mutable_data_ptr<float>();
  arguments.gradient = gradient.mutable_data_ptr<float>();
  arguments.pair = pair.mutable_data_ptr<int64_t>();
  const int64_t of_a_block = kThreads / arguments.lanes, blocks = ceil_div(arguments.groups, of_a_block);
  launch(device, grebt_kernel, {grid_of(blocks), dim3(kThreads)}, arguments);
}

}  // namespace r2m
