// The exact order of a role's corpora: which corpus does the role's n-th sample come from, and how many samples did
// that corpus give before? With integer weights q_c of sum Q and shares w_c = q_c / Q, after every n samples
//
//   |count_c - n w_c| < 1 - w_c / 2,   that is   floor((n + 1/2) w_c) <= count_c <= ceil((n - 1/2) w_c).
//
// So sample j of corpus c has a window of slots, from release floor(j / w_c + 1/2) to deadline
// ceil((j + 1) / w_c - 1/2) - 1, and the order is a schedule of unit jobs, earliest deadline first.
//
// It exists: slots [s, t) must hold at most sum_c floor((t + 1/2) w_c) - ceil((s - 1/2) w_c) <= t - s + 1 samples, and
// equality would need every (2 t + 1) q_c / (2 Q) to be an integer, whose sum t + 1/2 is none; so at most t - s (Hall).
//
// Random access: the counts at a block's first slot n are chosen without a look at earlier slots. Each is its lower
// bound, or one more. Earlier slots have room where, for the corpora S whose last sample so far was released at or
// after a slot, counts(S) <= ceil((n - 1/2) w(S)); later slots where, for the corpora D whose next sample is due
// before a slot, counts(D) >= floor((n + 1/2) w(D)). Both can be kept together: counts(D) - counts(S) needs at most
// w(D u S) <= 1 more than the bounds of single corpora give, less than 1 unless D u S is everything and all
// quantities are integers, among them ones that sum to n + 1/2. The choice is a schedule again, of one slot for each
// "one more": oldest release first in time, earliest deadline first in rank. Blocks between such states are independent
// where no window spans a whole block, so the smallest weight decides a block's length: at
// least 1 / w_c slots, of six bytes each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <stdexcept>
#include <utility>
#include <vector>

#include "roles.h"

namespace megatron_lpr {

class QuotaOrder {
 public:
  static constexpr std::uint64_t kMaxTotal = 1ULL << 60;
  static constexpr std::size_t kMaxCorpora = 32767;

  static constexpr std::uint64_t kMaxRatio = 1ULL << 24;

  struct Block {
    std::vector<std::uint64_t> before;  // samples of each corpus before the block
    std::vector<std::uint16_t> corpus;  // of each slot
    std::vector<std::uint32_t> index;   // samples of that corpus before the slot in the block
  };

  // Positive weights, each at least 1 in 2^24 of their sum. A small sum makes the order one block that repeats.
  explicit QuotaOrder(std::vector<std::uint64_t> weights) : weights_(std::move(weights)), cache_(new Cache) {
    if (weights_.size() > kMaxCorpora) throw std::invalid_argument("a role has at most 32767 corpora");
    for (const std::uint64_t weight : weights_) {
      if (weight == 0 || weight > kMaxTotal) throw std::invalid_argument("a corpus weight is out of range");
      total_ += weight;
      if (total_ > kMaxTotal) throw std::invalid_argument("corpus weights must sum to at most 2^60");
    }
    for (const std::uint64_t weight : weights_) {
      if (weight < (total_ - 1) / kMaxRatio + 1) throw std::invalid_argument("a corpus weight is below 1 in 2^24");
      length_ = std::max(length_, (total_ - 1) / weight + 1);
    }
    length_ = std::max<std::uint64_t>(length_, weights_.size());
    repeats_ = total_ <= std::max(length_, kMaxPeriod);
    if (repeats_) length_ = total_;
  }

  bool empty() const { return weights_.empty(); }
  std::size_t size() const { return weights_.size(); }

  // Samples of each corpus among the role's first n.
  std::vector<std::uint64_t> counts(std::uint64_t n) const {
    if (empty()) return {};
    const auto block = find(n / length_);
    std::vector<std::uint64_t> result = block->before;
    for (std::uint64_t i = 0; i < n % length_; ++i) ++result[block->corpus[i]];
    if (repeats_)
      for (std::size_t c = 0; c < result.size(); ++c) result[c] += n / length_ * weights_[c];
    return result;
  }

  // Samples n, n + 1, ... of the role.
  class Walk {
   public:
    struct Draw {
      std::uint32_t corpus;
      std::uint64_t index;  // samples of the corpus before this one
    };

    Walk(const QuotaOrder& order, std::uint64_t n)
        : order_(&order),
          next_block_(order.empty() ? 0 : n / order.length_),
          position_(order.empty() ? 0 : n % order.length_) {}

    Draw next() {
      if (!block_ || position_ == block_->corpus.size()) advance();
      const std::uint32_t c = block_->corpus[position_];
      return {c, block_->before[c] + block_->index[position_++] + round_ * order_->weights_[c]};
    }

   private:
    void advance() {
      if (block_) position_ = 0;
      if (order_->repeats_) round_ = next_block_;
      if (!block_ || !order_->repeats_) block_ = order_->find(next_block_);
      ++next_block_;
    }

    const QuotaOrder* order_;
    std::uint64_t next_block_;
    std::uint64_t position_;
    std::uint64_t round_ = 0;  // repetitions of the block before; 0 where blocks do not repeat
    std::shared_ptr<const Block> block_;
  };

 private:
  static constexpr std::uint64_t kMaxPeriod = 1ULL << 16;
  static constexpr std::uint64_t kMinBlock = 1ULL << 12;
  static constexpr std::size_t kKeptBlocks = 2;

  struct Cache {
    std::mutex mutex;
    std::deque<std::pair<std::uint64_t, std::shared_ptr<const Block>>> blocks;  // newest first
  };

  std::uint64_t lower_bound(std::uint64_t weight, std::uint64_t n) const {
    return static_cast<std::uint64_t>((2 * Wide{n} + 1) * weight / (2 * Wide{total_}));
  }
  // ceil((n - 1/2) w), for the sum of the weights of any corpora.
  std::uint64_t upper_bound(std::uint64_t weight, std::uint64_t n) const {
    if (n == 0) return 0;
    return static_cast<std::uint64_t>(((2 * Wide{n} - 1) * weight + 2 * Wide{total_} - 1) / (2 * Wide{total_}));
  }
  std::uint64_t release(std::uint64_t weight, std::uint64_t j) const {
    return static_cast<std::uint64_t>((2 * Wide{j} * total_ + weight) / (2 * Wide{weight}));
  }
  std::uint64_t deadline(std::uint64_t weight, std::uint64_t j) const {
    return static_cast<std::uint64_t>((2 * (Wide{j} + 1) * total_ - weight - 1) / (2 * Wide{weight}));
  }

  std::shared_ptr<const Block> find(std::uint64_t number) const {
    if (repeats_) number = 0;
    const std::lock_guard<std::mutex> lock(cache_->mutex);
    for (const auto& [kept, block] : cache_->blocks)
      if (kept == number) return block;
    auto block = std::make_shared<const Block>(lay_out(number));
    cache_->blocks.emplace_front(number, block);
    if (cache_->blocks.size() > kKeptBlocks) cache_->blocks.pop_back();
    return block;
  }

  // Counts at slot n that leave earlier and later slots room.
  std::vector<std::uint64_t> state(std::uint64_t n) const {
    struct Choice {
      std::uint64_t release;  // of the last sample that may be done, plus one; 0 where none is
      std::uint32_t corpus;
      bool open;
    };
    std::vector<std::uint64_t> counts(size());
    std::vector<Choice> by_release(size());
    std::uint64_t done = 0;
    for (std::uint32_t c = 0; c < size(); ++c) {
      const std::uint64_t least = lower_bound(weights_[c], n), most = upper_bound(weights_[c], n);
      counts[c] = least;
      done += least;
      by_release[c] = {most == 0 ? 0 : release(weights_[c], most - 1) + 1, c, most > least};
    }
    std::uint64_t missing = n - done, weight_after = total_, done_after = done;
    if (missing == 0) return counts;
    std::sort(by_release.begin(), by_release.end(), [](const Choice& a, const Choice& b) {
      return std::pair(a.release, a.corpus) < std::pair(b.release, b.corpus);
    });
    using Candidate = std::pair<std::uint64_t, std::uint32_t>;  // deadline, corpus
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<Candidate>> pool;
    for (std::size_t i = 0; i < size(); ++i) {
      const auto [release, c, open] = by_release[i];
      if (open) pool.emplace(deadline(weights_[c], counts[c]), c);
      weight_after -= weights_[c];
      done_after -= lower_bound(weights_[c], n);
      if (i + 1 < size() && by_release[i + 1].release == release) continue;
      const std::uint64_t room_after = upper_bound(weight_after, n) - done_after;
      for (; missing > room_after; --missing) {
        if (pool.empty()) throw std::logic_error("no exact order exists for these corpus weights");
        ++counts[pool.top().second];
        pool.pop();
      }
    }
    return counts;
  }

  Block lay_out(std::uint64_t number) const {
    const std::uint64_t first = number * length_;
    Block block{state(first), {}, {}};
    const std::vector<std::uint64_t> after = state(first + length_);
    std::vector<std::uint32_t> given(size(), 0);
    using Event = std::pair<std::uint64_t, std::uint32_t>;  // slot in the block, corpus
    using Queue = std::priority_queue<Event, std::vector<Event>, std::greater<Event>>;
    Queue upcoming, released;
    const auto plan_next = [&](std::uint32_t c) {
      const std::uint64_t j = block.before[c] + given[c];
      if (j < after[c]) upcoming.emplace(std::max(release(weights_[c], j), first) - first, c);
    };
    for (std::uint32_t c = 0; c < size(); ++c) plan_next(c);
    block.corpus.reserve(length_);
    block.index.reserve(length_);
    for (std::uint64_t slot = 0; slot < length_; ++slot) {
      for (; !upcoming.empty() && upcoming.top().first <= slot; upcoming.pop()) {
        const std::uint32_t c = upcoming.top().second;
        released.emplace(std::min(deadline(weights_[c], block.before[c] + given[c]) - first, length_ - 1), c);
      }
      if (released.empty() || released.top().first < slot)
        throw std::logic_error("no exact order exists for these corpus weights");
      const std::uint32_t c = released.top().second;
      released.pop();
      block.corpus.push_back(static_cast<std::uint16_t>(c));
      block.index.push_back(given[c]++);
      plan_next(c);
    }
    return block;
  }

  std::vector<std::uint64_t> weights_;
  std::uint64_t total_ = 0;
  std::uint64_t length_ = kMinBlock;  // slots of a block
  bool repeats_ = false;
  std::unique_ptr<Cache> cache_;
};

}  // namespace megatron_lpr
