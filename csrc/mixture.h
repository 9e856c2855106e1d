// Sample k of a run -> corpus, and how many samples that corpus gave before: a piecewise schedule of exact mixtures.
//
// In each piece two nested levels, each with its own counter: the role (expanded or original), then the corpora of
// the role. For k samples since the piece began, and a corpus of share w_c inside role r of share w_r,
//
//   |count_c - k w_r w_c| <= |count_c - n_r w_c| + w_c |n_r - k w_r| < (1 - w_c / 2) + w_c / 2 = 1.
//
// When a piece ends, every corpus goes on from its count: nothing is repeated or skipped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "quota.h"
#include "roles.h"

namespace megatron_lpr {

struct MixtureSpec {
  std::uint64_t first_sample;           // of the run
  RoleSplit roles;                      // share of expanded samples
  std::vector<std::uint64_t> weights;   // share of each corpus within its role; 0 leaves it out
};

class Mixture {
 public:
  Mixture(const MixtureSpec& spec, const std::vector<bool>& is_expanded)
      : roles_(spec.roles), expanded_(spec.weights, is_expanded, true), original_(spec.weights, is_expanded, false) {
    if ((roles_.uses_expanded() && expanded_.order.empty()) || (roles_.uses_original() && original_.order.empty()))
      throw std::invalid_argument("a role with a share of the mixture has no corpus");
  }

  // Adds each corpus' samples among the mixture's first k.
  void add_counts(std::uint64_t k, std::vector<std::uint64_t>& counts) const {
    const std::uint64_t expanded = roles_.expanded_before(k);
    expanded_.add_counts(expanded, counts);
    original_.add_counts(k - expanded, counts);
  }

  struct Draw {
    std::uint32_t corpus;
    std::uint64_t index;  // samples of the corpus before this one in the mixture
  };

  // Samples k, k + 1, ... of the mixture.
  class Walk {
   public:
    Walk(const Mixture& mixture, std::uint64_t k)
        : mixture_(mixture),
          roles_(mixture.roles_, k),
          expanded_(mixture.expanded_.order, mixture.roles_.expanded_before(k)),
          original_(mixture.original_.order, k - mixture.roles_.expanded_before(k)) {}

    Draw next() {
      const bool expanded = roles_.next_is_expanded();
      const auto [member, index] = expanded ? expanded_.next() : original_.next();
      return {(expanded ? mixture_.expanded_ : mixture_.original_).ids[member], index};
    }

   private:
    const Mixture& mixture_;
    RoleSplit::Walk roles_;
    QuotaOrder::Walk expanded_;
    QuotaOrder::Walk original_;
  };

 private:
  struct Role {
    Role(const std::vector<std::uint64_t>& weights, const std::vector<bool>& is_expanded, bool expanded)
        : ids(select(weights, is_expanded, expanded)), order(pick(weights, ids)) {}

    void add_counts(std::uint64_t n, std::vector<std::uint64_t>& counts) const {
      const std::vector<std::uint64_t> own = order.counts(n);
      for (std::size_t member = 0; member < own.size(); ++member) counts[ids[member]] += own[member];
    }

    static std::vector<std::uint32_t> select(const std::vector<std::uint64_t>& weights,
                                             const std::vector<bool>& is_expanded, bool expanded) {
      std::vector<std::uint32_t> ids;
      for (std::uint32_t id = 0; id < weights.size(); ++id)
        if (is_expanded[id] == expanded && weights[id] != 0) ids.push_back(id);
      return ids;
    }
    static std::vector<std::uint64_t> pick(const std::vector<std::uint64_t>& weights,
                                           const std::vector<std::uint32_t>& ids) {
      std::vector<std::uint64_t> result;
      for (const std::uint32_t id : ids) result.push_back(weights[id]);
      return result;
    }

    std::vector<std::uint32_t> ids;  // members, as indices of corpora
    QuotaOrder order;
  };

  RoleSplit roles_;
  Role expanded_;
  Role original_;
};

class Schedule {
 public:
  static constexpr std::uint64_t kMaxSamples = 1ULL << 62;

  // `pieces` in order; the first begins at sample 0.
  Schedule(const std::vector<MixtureSpec>& pieces, const std::vector<bool>& is_expanded) {
    std::vector<std::uint64_t> before(is_expanded.size(), 0);
    for (const MixtureSpec& spec : pieces) {
      if (pieces_.empty() ? spec.first_sample != 0 : spec.first_sample <= pieces_.back().first_sample)
        throw std::invalid_argument("a schedule begins at sample 0 and its pieces follow in order");
      if (spec.weights.size() != is_expanded.size()) throw std::invalid_argument("a mixture needs a weight per corpus");
      if (!pieces_.empty()) pieces_.back().mixture.add_counts(spec.first_sample - pieces_.back().first_sample, before);
      pieces_.push_back({spec.first_sample, before, Mixture(spec, is_expanded)});
    }
    if (pieces_.empty()) throw std::invalid_argument("a schedule needs a mixture");
  }

  // Samples of each corpus among the run's first k.
  std::vector<std::uint64_t> counts(std::uint64_t k) const {
    if (k > kMaxSamples) throw std::out_of_range("sample index past 2^62");
    const Piece& piece = pieces_[find(k)];
    std::vector<std::uint64_t> result = piece.before;
    piece.mixture.add_counts(k - piece.first_sample, result);
    return result;
  }

  // Calls visit(corpus, samples of the corpus before this one) for samples first, ..., first + count - 1.
  template <typename Visit>
  void for_each(std::uint64_t first, std::uint64_t count, Visit&& visit) const {
    if (first > kMaxSamples || count > kMaxSamples - first) throw std::out_of_range("sample index past 2^62");
    while (count > 0) {
      const std::size_t number = find(first);
      const Piece& piece = pieces_[number];
      const std::uint64_t left = number + 1 < pieces_.size() ? pieces_[number + 1].first_sample - first : count;
      const std::uint64_t here = std::min(count, left);
      Mixture::Walk walk(piece.mixture, first - piece.first_sample);
      for (std::uint64_t i = 0; i < here; ++i) {
        const Mixture::Draw draw = walk.next();
        visit(draw.corpus, piece.before[draw.corpus] + draw.index);
      }
      first += here;
      count -= here;
    }
  }

 private:
  struct Piece {
    std::uint64_t first_sample;
    std::vector<std::uint64_t> before;  // samples of each corpus before the piece
    Mixture mixture;
  };

  std::size_t find(std::uint64_t k) const {
    const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), k,
                                        [](std::uint64_t sample, const Piece& p) { return sample < p.first_sample; });
    return static_cast<std::size_t>(after - pieces_.begin()) - 1;
  }

  std::vector<Piece> pieces_;
};

}  // namespace megatron_lpr
