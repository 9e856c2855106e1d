// The replay sampler: sample k of a run -> corpus, window and epoch, and from there tokens, labels, loss mask
// and language tags. A pure function of its arguments; immutable, so threads may share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mixture.h"
#include "permutation.h"
#include "reader.h"

namespace megatron_lpr {

struct CorpusSpec {
  std::string prefix;
  std::uint64_t stream;  // selects the corpus' permutations
  bool expanded;
  std::int64_t tag;      // language tag of every token
  std::uint64_t weight;  // share within its role; 0 leaves the corpus out
};

struct Pick {
  std::uint32_t corpus;
  std::uint64_t window;
  std::uint64_t epoch;
};

class Sampler {
 public:
  static constexpr std::uint64_t kMaxSamples = 1ULL << 62;

  Sampler(const std::vector<CorpusSpec>& corpora, std::uint64_t seq_length, std::uint64_t seed, std::int64_t eod_id,
          RoleSplit roles)
      : seq_length_(seq_length),
        seed_(seed),
        eod_id_(eod_id),
        roles_(roles),
        expanded_(corpora, true),
        original_(corpora, false) {
    if (seq_length == 0 || seq_length > (1ULL << 31)) throw std::invalid_argument("seq_length is out of range");
    if ((roles.uses_expanded() && expanded_.cycle.empty()) || (roles.uses_original() && original_.cycle.empty()))
      throw std::invalid_argument("a role with a share of the mixture has no corpus");
    for (const CorpusSpec& spec : corpora) {
      CorpusReader reader(spec.prefix);
      if (reader.header().tokens < 2) throw CorpusError(spec.prefix + ".bin holds fewer than two tokens");
      const std::uint64_t windows = (reader.header().tokens - 2) / seq_length + 1;
      corpora_.push_back({std::move(reader), spec.stream, spec.tag, windows});
    }
  }

  std::uint64_t seq_length() const { return seq_length_; }
  std::uint64_t num_windows(std::size_t corpus) const { return corpora_.at(corpus).windows; }

  Pick pick(std::uint64_t k) const {
    if (k >= kMaxSamples) throw std::out_of_range("sample index past 2^62");
    const RoleSplit::Pick role = roles_.pick(k);
    const Role& members = role.expanded ? expanded_ : original_;
    const CorpusCycle::Pick in_role = members.cycle.pick(role.index);
    const std::uint32_t id = members.ids[in_role.corpus];
    const Corpus& corpus = corpora_[id];
    const std::uint64_t epoch = in_role.index / corpus.windows;
    const Permutation permute(corpus.windows, {seed_, corpus.stream, epoch});
    return {id, permute(in_role.index % corpus.windows), epoch};
  }

  // Positions of a window that have a label; only a corpus' last window may have fewer than seq_length.
  std::uint64_t valid_positions(const Pick& pick) const {
    const std::uint64_t labels = corpora_[pick.corpus].reader.header().tokens - 1;
    return std::min(seq_length_, labels - pick.window * seq_length_);
  }

  // Writes samples [first, first + count) as rows of seq_length positions.
  void fill(std::uint64_t first, std::uint64_t count, std::int64_t* tokens, std::int64_t* labels, float* loss_mask,
            std::int64_t* tags) const {
    for (std::uint64_t row = 0; row < count; ++row) {
      const Pick picked = pick(first + row);
      const Corpus& corpus = corpora_[picked.corpus];
      const std::uint64_t start = picked.window * seq_length_;
      const std::uint64_t valid = valid_positions(picked);
      corpus.reader.read(start, valid, tokens);
      corpus.reader.read(start + 1, valid, labels);
      std::fill(tokens + valid, tokens + seq_length_, eod_id_);
      std::fill(labels + valid, labels + seq_length_, eod_id_);
      std::fill(std::fill_n(loss_mask, valid, 1.0F), loss_mask + seq_length_, 0.0F);
      std::fill(std::fill_n(tags, valid, corpus.tag), tags + seq_length_, std::int64_t{0});
      tokens += seq_length_;
      labels += seq_length_;
      loss_mask += seq_length_;
      tags += seq_length_;
    }
  }

  // Valid positions per corpus in samples [first, first + count); reads no token.
  std::vector<std::uint64_t> count(std::uint64_t first, std::uint64_t count) const {
    std::vector<std::uint64_t> positions(corpora_.size(), 0);
    for (std::uint64_t row = 0; row < count; ++row) {
      const Pick picked = pick(first + row);
      positions[picked.corpus] += valid_positions(picked);
    }
    return positions;
  }

 private:
  struct Corpus {
    CorpusReader reader;
    std::uint64_t stream;
    std::int64_t tag;
    std::uint64_t windows;
  };

  struct Role {
    Role(const std::vector<CorpusSpec>& corpora, bool expanded)
        : ids(select(corpora, expanded)), cycle(weights(corpora, ids)) {}

    static std::vector<std::uint32_t> select(const std::vector<CorpusSpec>& corpora, bool expanded) {
      std::vector<std::uint32_t> ids;
      for (std::uint32_t id = 0; id < corpora.size(); ++id)
        if (corpora[id].expanded == expanded && corpora[id].weight != 0) ids.push_back(id);
      return ids;
    }
    static std::vector<std::uint64_t> weights(const std::vector<CorpusSpec>& corpora,
                                              const std::vector<std::uint32_t>& ids) {
      std::vector<std::uint64_t> result;
      for (const std::uint32_t id : ids) result.push_back(corpora[id].weight);
      return result;
    }

    std::vector<std::uint32_t> ids;  // members, as indices into the sampler's corpora
    CorpusCycle cycle;
  };

  std::uint64_t seq_length_;
  std::uint64_t seed_;
  std::int64_t eod_id_;
  RoleSplit roles_;
  Role expanded_;
  Role original_;
  std::vector<Corpus> corpora_;
};

}  // namespace megatron_lpr
