// A corpus as a source of samples: what window `w` of epoch `e` holds.
//
// Packed windows. A corpus of n tokens has n - 1 positions, token i with label i + 1, and W = ceil((n - 1) / S)
// windows of S positions. Epoch e cuts them from position shift_e on (0 in epoch 0, a keyed number below S later):
// window w holds the positions (shift_e + w S + j) mod (n - 1). So the window that runs over the end goes on at the
// beginning, the last one ends where the first began and is the only one that may be short, and every position is
// seen exactly once in an epoch.
//
// One document per sample. Sample w is document w: its first S positions where it is longer, padded where shorter.
//
// Positions without a label, behind the end of a short window, hold the end-of-document token, loss mask 0 and tag 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "documents.h"
#include "languages.h"
#include "permutation.h"
#include "reader.h"

namespace megatron_lpr {

struct CorpusSpec {
  std::string prefix;
  std::uint64_t stream;            // selects the corpus' permutations
  bool expanded;                   // its role in the mixture
  std::vector<std::int64_t> tags;  // of every token, or of each language of its sidecar: language + 1, minus: expanded
  bool sidecar;
  std::uint64_t documents;  // a run of so many documents, at a keyed place, is all that is read; 0: no limit
  std::uint64_t tokens;     // the same in tokens, from a document's start on; 0: no limit
};

struct WindowRule {
  std::uint64_t seq_length;
  bool one_document;  // per sample; otherwise packed
  bool shift;         // packed windows are cut elsewhere in each epoch
};

// One row of a batch; `documents` may be null.
struct Row {
  std::int64_t* tokens;
  std::int64_t* labels;
  float* loss_mask;
  std::int64_t* tags;
  std::int32_t* documents;
};

class SampledCorpus {
 public:
  SampledCorpus(const CorpusSpec& spec, const WindowRule& rule, std::uint64_t seed, bool document_ids,
                std::uint64_t vocab_size)
      : reader_(spec.prefix, vocab_size),
        rule_(rule),
        seed_(seed),
        stream_(spec.stream),
        tags_(spec.tags),
        totals_(new Totals) {
    const CorpusHeader& header = reader_.header();
    if (document_ids || rule.one_document || spec.documents || spec.tokens) documents_.emplace(spec.prefix, header);
    if (spec.sidecar) languages_.emplace(spec.prefix, header.tokens, tags_.size());
    end_ = header.tokens;
    restrict_to(spec);
    if (end_ - first_ < 2) throw CorpusError(spec.prefix + ".bin holds fewer than two tokens");
    samples_ = rule.one_document ? documents_read_ : (positions() - 1) / rule.seq_length + 1;
  }

  std::uint64_t samples() const { return samples_; }  // in an epoch
  std::uint64_t tokens() const { return end_ - first_; }
  std::uint64_t stream() const { return stream_; }

  // What a sample holds: token ranges of the corpus, in order; at most two, and empty behind the first.
  struct Span {
    std::uint64_t first;
    std::uint64_t count;
  };
  using Spans = std::pair<Span, Span>;

  Spans spans(std::uint64_t window, std::uint64_t epoch) const {
    if (rule_.one_document) {
      const std::uint64_t document = first_document_ + window, length = documents_->length(document);
      return {{documents_->start(document), std::min(rule_.seq_length, length - (length > 0))}, {0, 0}};
    }
    const std::uint64_t count = std::min(rule_.seq_length, positions() - window * rule_.seq_length);
    const std::uint64_t start = (shift(epoch) + window * rule_.seq_length) % positions();
    const std::uint64_t head = std::min(count, positions() - start);
    return {{first_ + start, head}, {first_, count - head}};
  }

  // Writes a sample's valid positions and returns their number.
  std::uint64_t read(std::uint64_t window, std::uint64_t epoch, const Row& row) const {
    const auto [head, tail] = spans(window, epoch);
    read_span(head, row, 0);
    read_span(tail, row, head.count);
    if (row.documents != nullptr) {
      const std::int32_t next = number_documents(head, 0, row.documents);
      number_documents(tail, next, row.documents + head.count);
    }
    return head.count + tail.count;
  }

  // Calls visit(document, first token, tokens) for the documents of a span, cut to it.
  template <typename Visit>
  void for_each_document(const Span& span, Visit&& visit) const {
    if (span.count == 0) return;
    std::uint64_t first = span.first, document = documents_.value().containing(first);
    for (const std::uint64_t end = span.first + span.count; first < end; ++document) {
      const std::uint64_t next = documents_->start(document + 1);
      if (next < first) documents_->corrupt(document);
      if (next == first) continue;  // an empty document
      const std::uint64_t until = std::min(end, next);
      visit(document, first, until - first);
      first = until;
    }
  }

  // Adds the valid positions of a sample to those of their languages.
  void count(std::uint64_t window, std::uint64_t epoch, std::vector<std::uint64_t>& per_language) const {
    const auto [head, tail] = spans(window, epoch);
    count_span(head, per_language);
    count_span(tail, per_language);
  }

  // Adds the valid positions of the corpus' samples [first, last) in its order.
  void count_range(std::uint64_t first, std::uint64_t last, std::vector<std::uint64_t>& per_language) const {
    if (rule_.one_document || languages_) return count_visiting(first, last, per_language);
    // Every sample is full but an epoch's last window.
    const std::uint64_t missing = samples_ * rule_.seq_length - positions();
    const std::uint64_t shorts = short_before(last) - short_before(first);
    per_language[language(tags_[0])] += (last - first) * rule_.seq_length - shorts * missing;
  }

 private:
  static constexpr std::size_t kCounted = 1 << 20;  // windows that are looked up in the order of the files

  struct Totals {
    std::once_flag once;
    std::vector<std::uint64_t> per_language;
  };

  static std::size_t language(std::int64_t tag) { return static_cast<std::size_t>(tag < 0 ? -tag : tag) - 1; }

  std::uint64_t positions() const { return end_ - first_ - 1; }
  PermutationKey key(std::uint64_t epoch) const { return {seed_, stream_, epoch}; }

  std::uint64_t shift(std::uint64_t epoch) const {
    return rule_.shift && epoch > 0 ? below(mix(key(epoch).hash() ^ kGolden), rule_.seq_length) : 0;
  }

  void restrict_to(const CorpusSpec& spec) {
    const std::uint64_t place = mix(key(0).hash() + 1);
    documents_read_ = reader_.header().documents;
    if (spec.documents != 0 && spec.documents < documents_read_) {
      first_document_ = below(place, documents_read_ - spec.documents + 1);
      documents_read_ = spec.documents;
      first_ = documents_->start(first_document_);
      end_ = documents_->start(first_document_ + documents_read_);
      if (end_ < first_) documents_->corrupt(first_document_);
    } else if (spec.tokens != 0 && spec.tokens < end_) {
      first_document_ = documents_->containing(below(place, end_ - spec.tokens + 1));
      first_ = documents_->start(first_document_);
      if (spec.tokens > end_ - first_) documents_->corrupt(first_document_);
      end_ = first_ + spec.tokens;
      const std::uint64_t last = documents_->containing(end_ - 1);
      if (last < first_document_) documents_->corrupt(last);
      documents_read_ = last + 1 - first_document_;
    }
  }

  void read_span(const Span& span, const Row& row, std::uint64_t at) const {
    if (span.count == 0) return;
    reader_.read(span.first, span.count, row.tokens + at, row.labels + at);
    std::int64_t* tags = row.tags + at;
    if (!languages_) {
      std::fill_n(tags, span.count, tags_[0]);
      return;
    }
    languages_->for_each(span.first, span.count, [&](std::size_t language, std::uint64_t count) {
      tags = std::fill_n(tags, count, tags_[language]);
    });
  }

  // Numbers the documents of a span from `number` on and returns the number after the last.
  std::int32_t number_documents(const Span& span, std::int32_t number, std::int32_t* out) const {
    for_each_document(span, [&](std::uint64_t, std::uint64_t, std::uint64_t count) {
      out = std::fill_n(out, count, number++);
    });
    return number;
  }

  void count_span(const Span& span, std::vector<std::uint64_t>& per_language) const {
    if (!languages_) {
      per_language[language(tags_[0])] += span.count;
    } else if (span.count != 0) {
      languages_->for_each(span.first, span.count, [&](std::size_t index, std::uint64_t count) {
        per_language[language(tags_[index])] += count;
      });
    }
  }

  // Whole epochs have the corpus' totals, taken once; only the parts of epochs at the ends are visited.
  void count_visiting(std::uint64_t first, std::uint64_t last, std::vector<std::uint64_t>& per_language) const {
    while (first < last) {
      const std::uint64_t epoch = first / samples_;
      const std::uint64_t end = std::min(last, (epoch + 1) * samples_);
      if (end - first == samples_) {
        const std::uint64_t epochs = (last - first) / samples_;
        const std::vector<std::uint64_t>& totals = epoch_totals(per_language.size());
        for (std::size_t i = 0; i < totals.size(); ++i) per_language[i] += epochs * totals[i];
        first += epochs * samples_;
        continue;
      }
      const Permutation order(samples_, key(epoch));
      std::vector<std::uint64_t> windows;
      for (; first < end; ++first) {
        windows.push_back(order(first - epoch * samples_));
        if (windows.size() < kCounted && first + 1 < end) continue;
        std::sort(windows.begin(), windows.end());  // neighbours in the files share their blocks
        for (const std::uint64_t window : windows) count(window, epoch, per_language);
        windows.clear();
      }
    }
  }

  const std::vector<std::uint64_t>& epoch_totals(std::size_t num_languages) const {
    std::call_once(totals_->once, [&] {
      totals_->per_language.assign(num_languages, 0);
      if (!rule_.one_document) return count_span({first_, positions()}, totals_->per_language);
      for (std::uint64_t window = 0; window < samples_; ++window) count(window, 0, totals_->per_language);
    });
    return totals_->per_language;
  }

  // How many of the corpus' first `n` samples are an epoch's last window.
  std::uint64_t short_before(std::uint64_t n) const {
    const std::uint64_t epoch = n / samples_;
    return epoch + (Permutation(samples_, key(epoch)).inverse(samples_ - 1) < n % samples_);
  }

  CorpusReader reader_;
  std::optional<DocumentOffsets> documents_;
  std::optional<LanguageRuns> languages_;
  WindowRule rule_;
  std::uint64_t seed_;
  std::uint64_t stream_;
  std::vector<std::int64_t> tags_;
  std::uint64_t first_ = 0;  // tokens that are read: [first_, end_)
  std::uint64_t end_ = 0;
  std::uint64_t first_document_ = 0;
  std::uint64_t documents_read_ = 0;
  std::uint64_t samples_ = 0;
  std::unique_ptr<Totals> totals_;
};

}  // namespace megatron_lpr
