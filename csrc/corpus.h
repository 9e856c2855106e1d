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
//
// How many samples there are follows from sizes that the manifest tells; files are opened when the first sample is read.
// A rank of hundreds over thousands of corpora would otherwise open every one of them before its first step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "corpus_files.h"
#include "permutation.h"

namespace megatron_lpr {

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
  SampledCorpus(CorpusSpec spec, const WindowRule& rule, std::uint64_t seed, bool document_ids,
                std::uint64_t vocab_size)
      : spec_(std::move(spec)),
        rule_(rule),
        seed_(seed),
        document_ids_(document_ids),
        vocab_size_(vocab_size),
        made_at_(static_cast<std::int64_t>(std::time(nullptr))),
        once_(new Once) {
    // What neither the manifest nor a limit tells depends on where the documents lie that are read.
    std::uint64_t documents = spec_.documents;
    if (spec_.documents_limited() || (spec_.tokens_limited() && rule.one_document)) {
      tokens_ = files().end - files().first;
      documents = files().documents_read;
    } else {
      tokens_ = spec_.tokens_limited() ? spec_.token_limit : spec_.tokens;
    }
    if (tokens_ < 2) throw CorpusError(spec_.prefix + ".bin holds fewer than two tokens");
    samples_ = rule.one_document ? documents : (positions() - 1) / rule.seq_length + 1;
  }

  std::uint64_t samples() const { return samples_; }  // in an epoch
  std::uint64_t tokens() const { return tokens_; }
  std::uint64_t stream() const { return spec_.stream; }

  // What a sample holds: token ranges of the corpus, in order; at most two, and empty behind the first.
  struct Span {
    std::uint64_t first;
    std::uint64_t count;
  };
  using Spans = std::pair<Span, Span>;

  Spans spans(std::uint64_t window, std::uint64_t epoch) const {
    const std::uint64_t first = files().first;
    if (rule_.one_document) {
      const DocumentOffsets& documents = files().documents.value();
      const std::uint64_t document = files().first_document + window, length = documents.length(document);
      return {{documents.start(document), std::min(rule_.seq_length, length - (length > 0))}, {0, 0}};
    }
    const std::uint64_t count = std::min(rule_.seq_length, positions() - window * rule_.seq_length);
    const std::uint64_t start = (shift(epoch) + window * rule_.seq_length) % positions();
    const std::uint64_t head = std::min(count, positions() - start);
    return {{first + start, head}, {first, count - head}};
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
    const DocumentOffsets& documents = files().documents.value();
    std::uint64_t first = span.first, document = documents.containing(first);
    for (const std::uint64_t end = span.first + span.count; first < end; ++document) {
      const std::uint64_t next = documents.start(document + 1);
      if (next < first) documents.corrupt(document);
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
    if (rule_.one_document || spec_.sidecar) return count_visiting(first, last, per_language);
    // Every sample is full but an epoch's last window.
    const std::uint64_t missing = samples_ * rule_.seq_length - positions();
    const std::uint64_t shorts = short_before(last) - short_before(first);
    per_language[language(spec_.tags[0])] += (last - first) * rule_.seq_length - shorts * missing;
  }

 private:
  static constexpr std::size_t kCounted = 1 << 20;  // windows that are looked up in the order of the files

  // Done by whichever thread comes first; again where it failed.
  struct Once {
    std::once_flag open;
    std::unique_ptr<const CorpusFiles> files;
    std::once_flag count;
    std::vector<std::uint64_t> per_language;  // positions in an epoch
  };

  static std::size_t language(std::int64_t tag) { return static_cast<std::size_t>(tag < 0 ? -tag : tag) - 1; }

  std::uint64_t positions() const { return tokens_ - 1; }
  PermutationKey key(std::uint64_t epoch) const { return {seed_, spec_.stream, epoch}; }

  std::uint64_t shift(std::uint64_t epoch) const {
    return rule_.shift && epoch > 0 ? below(mix(key(epoch).hash() ^ kGolden), rule_.seq_length) : 0;
  }

  const CorpusFiles& files() const {
    std::call_once(once_->open, [&] {
      const bool documents = document_ids_ || rule_.one_document;
      once_->files = std::make_unique<CorpusFiles>(spec_, mix(key(0).hash() + 1), documents, vocab_size_, made_at_);
    });
    return *once_->files;
  }

  void read_span(const Span& span, const Row& row, std::uint64_t at) const {
    if (span.count == 0) return;
    files().reader.read(span.first, span.count, row.tokens + at, row.labels + at);
    std::int64_t* tags = row.tags + at;
    if (!spec_.sidecar) {
      std::fill_n(tags, span.count, spec_.tags[0]);
      return;
    }
    files().languages->for_each(span.first, span.count, [&](std::size_t language, std::uint64_t count) {
      tags = std::fill_n(tags, count, spec_.tags[language]);
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
    if (!spec_.sidecar) {
      per_language[language(spec_.tags[0])] += span.count;
    } else if (span.count != 0) {
      files().languages->for_each(span.first, span.count, [&](std::size_t index, std::uint64_t count) {
        per_language[language(spec_.tags[index])] += count;
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
    std::call_once(once_->count, [&] {
      std::vector<std::uint64_t>& totals = once_->per_language;
      totals.assign(num_languages, 0);
      if (!rule_.one_document) return count_span({files().first, positions()}, totals);
      for (std::uint64_t window = 0; window < samples_; ++window) count(window, 0, totals);
    });
    return once_->per_language;
  }

  // How many of the corpus' first `n` samples are an epoch's last window.
  std::uint64_t short_before(std::uint64_t n) const {
    const std::uint64_t epoch = n / samples_;
    return epoch + (Permutation(samples_, key(epoch)).inverse(samples_ - 1) < n % samples_);
  }

  CorpusSpec spec_;
  WindowRule rule_;
  std::uint64_t seed_;
  bool document_ids_;
  std::uint64_t vocab_size_;
  std::int64_t made_at_;
  std::uint64_t tokens_ = 0;  // that are read
  std::uint64_t samples_ = 0;
  std::unique_ptr<Once> once_;
};

}  // namespace megatron_lpr
