// The replay sampler: sample k of a run -> corpus, window and epoch, and from there tokens, labels, loss mask and
// language tags. A pure function of its arguments; it remembers nothing but what it can compute again, so threads may
// share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "corpus.h"
#include "permutation.h"
#include "schedule.h"

namespace megatron_lpr {

struct Pick {
  std::uint32_t corpus;
  std::uint64_t window;
  std::uint64_t epoch;
};

struct SamplerSettings {
  WindowRule windows;
  std::uint64_t seed;
  std::int64_t eod_id;
  std::uint64_t vocab_size;  // 0: tokens are not checked
  std::uint64_t num_languages;
  bool document_ids;  // fill numbers the documents of each sample
};

class Sampler {
 public:
  Sampler(const std::vector<CorpusSpec>& corpora, const std::vector<MixtureSpec>& mixtures,
          const SamplerSettings& settings)
      : settings_(settings), schedule_(mixtures, roles(corpora)) {
    const std::uint64_t seq_length = settings.windows.seq_length;
    if (seq_length == 0 || seq_length > (1ULL << 31)) throw std::invalid_argument("seq_length is out of range");
    corpora_.reserve(corpora.size());
    for (const CorpusSpec& spec : corpora) {
      for (const std::int64_t tag : spec.tags)
        if (tag == 0 || static_cast<std::uint64_t>(tag < 0 ? -tag : tag) > settings.num_languages)
          throw std::invalid_argument("a language tag is out of range");
      if (spec.tags.empty()) throw std::invalid_argument("a corpus needs a language tag");
      corpora_.emplace_back(spec, settings.windows, settings.seed, settings.document_ids, settings.vocab_size);
    }
  }

  std::uint64_t seq_length() const { return settings_.windows.seq_length; }
  bool document_ids() const { return settings_.document_ids; }
  const SampledCorpus& corpus(std::size_t index) const { return corpora_.at(index); }

  // Samples of each corpus among the run's first k.
  std::vector<std::uint64_t> samples_before(std::uint64_t k) const { return schedule_.counts(k); }

  // Calls visit(pick) for samples first, ..., first + count - 1.
  template <typename Visit>
  void for_each(std::uint64_t first, std::uint64_t count, Visit&& visit) const {
    OrderCache orders(corpora_.size());
    schedule_.for_each(first, count, [&](std::uint32_t corpus, std::uint64_t index) {
      const EpochOrder& order = orders.find(*this, corpus, index);
      visit(Pick{corpus, order.permute(index - order.first_index), order.epoch});
    });
  }

  // Writes samples [first, first + count) as rows of seq_length positions.
  void fill(std::uint64_t first, std::uint64_t count, Row row) const {
    const std::uint64_t length = seq_length();
    for_each(first, count, [&](const Pick& pick) {
      const std::uint64_t valid = corpora_[pick.corpus].read(pick.window, pick.epoch, row);
      std::fill(row.tokens + valid, row.tokens + length, settings_.eod_id);
      std::fill(row.labels + valid, row.labels + length, settings_.eod_id);
      std::fill(std::fill_n(row.loss_mask, valid, 1.0F), row.loss_mask + length, 0.0F);
      std::fill(row.tags + valid, row.tags + length, std::int64_t{0});
      if (row.documents != nullptr) {
        std::fill(row.documents + valid, row.documents + length, -1);
        row.documents += length;
      }
      row.tokens += length;
      row.labels += length;
      row.loss_mask += length;
      row.tags += length;
    });
  }

  // Valid positions per language in samples [first, first + count); reads no token.
  std::vector<std::uint64_t> count(std::uint64_t first, std::uint64_t count) const {
    std::vector<std::uint64_t> positions(settings_.num_languages, 0);
    const std::vector<std::uint64_t> before = schedule_.counts(first), after = schedule_.counts(first + count);
    for (std::size_t corpus = 0; corpus < corpora_.size(); ++corpus)
      if (before[corpus] < after[corpus]) corpora_[corpus].count_range(before[corpus], after[corpus], positions);
    return positions;
  }

 private:
  struct EpochOrder {
    std::uint32_t corpus;
    std::uint64_t epoch;
    std::uint64_t first_index;
    std::uint64_t samples;
    Permutation permute;
  };

  // Keys of the permutations that were used last: a place for each corpus, or several corpora for each place.
  class OrderCache {
   public:
    explicit OrderCache(std::size_t corpora) : places_(std::min<std::size_t>(corpora, 512)) {}

    const EpochOrder& find(const Sampler& sampler, std::uint32_t id, std::uint64_t index) {
      std::optional<EpochOrder>& place = places_[id % static_cast<std::uint32_t>(places_.size())];
      if (!place || place->corpus != id || index - place->first_index >= place->samples) {
        const SampledCorpus& corpus = sampler.corpora_[id];
        const std::uint64_t samples = corpus.samples(), epoch = index / samples;
        place.emplace(EpochOrder{id, epoch, epoch * samples, samples,
                                 Permutation(samples, {sampler.settings_.seed, corpus.stream(), epoch})});
      }
      return *place;
    }

   private:
    std::vector<std::optional<EpochOrder>> places_;
  };

  static std::vector<bool> roles(const std::vector<CorpusSpec>& corpora) {
    std::vector<bool> is_expanded;
    for (const CorpusSpec& spec : corpora) is_expanded.push_back(spec.expanded);
    return is_expanded;
  }

  SamplerSettings settings_;
  Schedule schedule_;
  std::vector<SampledCorpus> corpora_;
};

}  // namespace megatron_lpr
