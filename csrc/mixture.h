// Which corpus does sample k come from, and how many samples did that corpus give before? Exact, without
// iterating over the samples before k.
//
// Two nested levels, each with its own counter: the role (expanded or original), then the corpora of the role.
//
//   RoleSplit    Of the first k samples, R(k) = round(k * w) are expanded and k - R(k) original, so both counts
//                are within 1/2 of their share.
//   CorpusCycle  Within a role, integer weights q_c (coprime, sum Q) repeat with period Q. One period is laid
//                out once so that after every n samples of the role |count_c - n * q_c / Q| < 1 - q_c / (2 Q).
//
// Together, for every k and every corpus c of role r with shares w_r and w_c = q_c / Q inside r:
//   |count_c - k * w_r * w_c| <= |count_c - n_r * w_c| + w_c * |n_r - k * w_r| < (1 - w_c / 2) + w_c / 2 = 1.
//
// Why a period exists: let the j-th sample of corpus c be allowed in the slots that keep its bound. Then slots
// [s, t) must hold at most floor((t + 1/2) w_c) - ceil((s - 1/2) w_c) <= (t - s + 1) w_c samples of c, in sum at
// most t - s + 1. Equality would need (2 t + 1) q_c / (2 Q) to be an integer for every c, which coprime q_c
// exclude (an odd number over an even one), so at most t - s: by Hall's theorem every sample finds a slot, and
// earliest deadline first finds it. Before slot p at least sum ceil((p + 1/2) w_c) > p samples are released, so no
// slot stays empty. At n = Q the bound leaves count_c = q_c only, so the period closes.
#pragma once

#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace megatron_lpr {

// R(k) for the share numerator / denominator of expanded samples; denominator at most 2^62, k below 2^62.
class RoleSplit {
 public:
  RoleSplit(std::uint64_t numerator, std::uint64_t denominator) : numerator_(numerator), denominator_(denominator) {
    if (denominator == 0 || denominator > (1ULL << 62) || numerator > denominator)
      throw std::invalid_argument("a role's share must be a fraction in [0, 1] with a denominator of at most 2^62");
  }

  bool uses_expanded() const { return numerator_ > 0; }
  bool uses_original() const { return numerator_ < denominator_; }

  struct Pick {
    bool expanded;
    std::uint64_t index;  // how many samples of the same role come before
  };

  Pick pick(std::uint64_t k) const {
    using Wide = unsigned __int128;
    const Wide step = 2 * static_cast<Wide>(numerator_);
    const Wide unit = 2 * static_cast<Wide>(denominator_);
    const Wide position = k * step + denominator_;
    const auto expanded_before = static_cast<std::uint64_t>(position / unit);
    const bool expanded = position - expanded_before * unit + step >= unit;
    return {expanded, expanded ? expanded_before : k - expanded_before};
  }

 private:
  std::uint64_t numerator_;
  std::uint64_t denominator_;
};

class CorpusCycle {
 public:
  static constexpr std::uint64_t kMaxPeriod = 1ULL << 18;
  static constexpr std::size_t kMaxCorpora = 32767;

  // `weights` are positive, without a common divisor, and sum to at most kMaxPeriod.
  explicit CorpusCycle(std::vector<std::uint64_t> weights) : weights_(std::move(weights)) {
    std::uint64_t divisor = 0;
    for (const std::uint64_t weight : weights_) {
      if (weight == 0 || weight > kMaxPeriod) throw std::invalid_argument("a corpus weight is out of range");
      divisor = std::gcd(divisor, weight);
      period_ += weight;
    }
    if (weights_.size() > kMaxCorpora || period_ > kMaxPeriod || divisor > 1)
      throw std::invalid_argument("corpus weights must be coprime, at most 32767, and sum to at most 2^18");
    lay_out();
  }

  bool empty() const { return weights_.empty(); }

  struct Pick {
    std::uint32_t corpus;
    std::uint64_t index;  // how many samples of the same corpus come before
  };

  Pick pick(std::uint64_t n) const {
    const Slot& slot = slots_[n % period_];
    return {slot.corpus, n / period_ * weights_[slot.corpus] + slot.index};
  }

 private:
  struct Slot {
    std::uint32_t corpus;
    std::uint32_t index;
  };

  // First and last slot in which sample j of a corpus keeps |count - n w| < 1 - w / 2.
  std::uint64_t release(std::uint32_t corpus, std::uint64_t j) const {
    const std::uint64_t weight = weights_[corpus];
    return (2 * j * period_ + weight) / (2 * weight);
  }
  std::uint64_t deadline(std::uint32_t corpus, std::uint64_t j) const {
    const std::uint64_t weight = weights_[corpus];
    return (2 * (j + 1) * period_ - weight - 1) / (2 * weight);
  }

  void lay_out() {
    using Event = std::tuple<std::uint64_t, std::uint32_t, std::uint32_t>;  // slot, corpus, j
    using Queue = std::priority_queue<Event, std::vector<Event>, std::greater<Event>>;
    Queue upcoming, released;
    for (std::uint32_t corpus = 0; corpus < weights_.size(); ++corpus) upcoming.emplace(0, corpus, 0);
    slots_.reserve(period_);
    for (std::uint64_t slot = 0; slot < period_; ++slot) {
      while (!upcoming.empty() && std::get<0>(upcoming.top()) <= slot) {
        const auto [_, corpus, j] = upcoming.top();
        upcoming.pop();
        released.emplace(deadline(corpus, j), corpus, j);
      }
      if (released.empty() || std::get<0>(released.top()) < slot)
        throw std::logic_error("no exact order exists for these corpus weights");
      const auto [_, corpus, j] = released.top();
      released.pop();
      slots_.push_back({corpus, j});
      upcoming.emplace(release(corpus, j + 1), corpus, j + 1);
    }
  }

  std::vector<std::uint64_t> weights_;
  std::uint64_t period_ = 0;
  std::vector<Slot> slots_;
};

}  // namespace megatron_lpr
