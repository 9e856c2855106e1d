// Sample k of a run -> corpus, and how many samples that corpus gave before: mixtures, one after the other. When one ends
// every corpus goes on from its count: nothing is repeated or skipped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "mixture.h"

namespace megatron_lpr {

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
