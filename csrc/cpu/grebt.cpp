// GREBT and its closed-form gradient on CPUs, a group at a time, in float64: there are few numbers, and with its digits
// none of the differences below needs care.
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <vector>

namespace r2m {
namespace {

// Rewards that are worth another thread: some 20 us of work.
constexpr int64_t REWARDS_OF_A_THREAD = 1024;

template <class T>
void read_row(const Tensor& tensor, int64_t n, std::vector<double>& row) {
  const T* from = data<T>(tensor) + n * tensor.stride(0);
  const int64_t stride = tensor.stride(1);
  for (size_t k = 0; k < row.size(); ++k) row[k] = static_cast<double>(from[k * stride]);
}

// What copies a row of the tensor's dtype into float64, exactly.
auto reader(const char* name, const Tensor& tensor) {
  const Dtype dtype = dtype_of(name, tensor, true);
  if (dtype == FLOAT64) return &read_row<double>;
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  return with_dtype<BFloat16, Half>(dtype, [](auto zero) { return &read_row<decltype(zero)>; });
}

// Indices of the first of the highest scores and of the last of the lowest. As in torch, NaN is both.
struct Pair {
  int64_t winner = 0, loser = 0;

  explicit Pair(const std::vector<double>& scores) {
    for (size_t k = 1; k < scores.size(); ++k) {
      const double score = scores[k];
      if (score > scores[winner] || (std::isnan(score) && !std::isnan(scores[winner]))) winner = k;
      if (score <= scores[loser] || std::isnan(score)) loser = k;
    }
  }
};

struct Preference {
  double bt, sigmoid;  // softplus and sigmoid of -margin: BT and its derivative by the loser's reward
};

Preference bradley_terry(double margin) {
  const double small = std::exp(-std::abs(margin));  // in (0, 1]
  return {std::fmax(-margin, 0) + std::log1p(small), (margin > 0 ? small : 1) / (1 + small)};
}

struct Spread {
  double entropy, std;
};

// GRE of the rewards r, in whose place its gradient comes out. `below` and `p` are scratch of its size.
Spread group_reward_entropy(std::vector<double>& r, double eps, std::vector<double>& below, std::vector<double>& p) {
  const size_t K = r.size();
  // Summed relative to the first, so that equal rewards have exactly their value as mean, and std 0.
  const double first = r[0];
  double sum = 0, squares = 0;
  for (double reward : r) sum += reward - first;
  const double mean = first + sum / K;
  double top = first - mean;
  for (double& x : r) {
    x -= mean;
    squares += x * x;
    top = std::max(top, x);
  }
  const double std = std::sqrt(squares / K);
  // A spread for which float32 has no normal number counts as none: at eps = 0 its gradient would overflow.
  const bool varies = !(std < std::numeric_limits<float>::min());  // NaN too
  const double scale = varies ? std + eps : 1;

  // With below = max(z) - z and its mean under p: log p = -below - log(total), so that GRE = log(total) + mean.
  double total = 0, mean_below = 0;
  for (size_t k = 0; k < K; ++k) {
    below[k] = (top - r[k]) / scale;
    p[k] = std::exp(-below[k]);
    total += p[k];
    mean_below += p[k] * below[k];
  }
  mean_below /= total;

  // See torch_impl.grebt_loss.
  std::vector<double>& dz = p;
  double sum_dz = 0, sum_z_dz = 0;
  for (size_t k = 0; k < K; ++k) {
    dz[k] = p[k] / total * (below[k] - mean_below);
    sum_dz += dz[k];
    sum_z_dz += r[k] / scale * dz[k];
  }
  for (size_t k = 0; k < K; ++k) r[k] = varies ? (dz[k] - sum_dz / K - r[k] / std * (sum_z_dz / K)) / scale : 0;
  return {std::log(total) + mean_below, std};
}

}  // namespace

void grebt_loss(
    const Tensor& rewards, const Tensor& pair_scores, double alpha, double eps, double group_weight, const Tensor& loss,
    const Tensor& statistics, const Tensor& pair, const Tensor& gradient) {
  const int64_t N = rewards.size(0), K = rewards.size(1);
  const auto read_rewards = reader("rewards", rewards), read_scores = reader("pair_scores", pair_scores);
  const int64_t grain = std::max<int64_t>(REWARDS_OF_A_THREAD / K, 1);
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> scores(K), r(K), below(K), p(K);
    for (int64_t n = begin; n < end; ++n) {
      read_scores(pair_scores, n, scores);
      read_rewards(rewards, n, r);
      const Pair chosen(scores);
      // Scores with NaN have no order; the winner's is NaN then, and so are the margin and all that follows.
      const double highest = scores[chosen.winner], lowest = scores[chosen.loser];
      const double margin = std::isnan(highest) ? highest : r[chosen.winner] - r[chosen.loser];
      const Preference preference = bradley_terry(margin);
      // A group whose pair is tied in scores and rewards prefers nothing: of the subgradients there, 0 is the smallest.
      const bool tied = margin == 0 && highest == lowest;
      const double pull = tied ? 0 : (1 - alpha) * preference.sigmoid;
      const Spread spread = group_reward_entropy(r, eps, below, p);  // r: its gradient

      data(loss)[n] = group_weight * ((1 - alpha) * preference.bt + alpha * spread.entropy);
      data(statistics)[n] = preference.bt;
      data(statistics)[N + n] = spread.entropy;
      data(statistics)[2 * N + n] = spread.std;
      data<int64_t>(pair)[n] = chosen.winner;
      data<int64_t>(pair)[N + n] = chosen.loser;
      float* row = data(gradient) + n * K;
      for (int64_t k = 0; k < K; ++k) {
        const int sign = (k == chosen.loser) - (k == chosen.winner);
        row[k] = group_weight * (alpha * r[k] + pull * sign);
      }
    }
  });
}

}  // namespace r2m
